"""Numbers recorded from the authors' released code; what shows a defect is told apart below."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from denserl_cli.core.likelihood import logprob_and_entropy
from denserl_cli.core.normalizer import (
    LocationNormalizer,
    fit_location_normalizer,
    huber_line,
    location_table,
)
from denserl_cli.core.ppo.advantages import generalized_advantages, whiten
from denserl_cli.core.ppo.losses import clipped_policy_loss, clipped_value_loss, masked_mean
from denserl_cli.core.ppo.rewards import (
    AdaptiveKL,
    penalize_kl,
    replace_penalized,
    spread_rewards,
)
from denserl_cli.core.reward_model import aggregate_segments, preference_loss
from denserl_cli.core.segmentation import segment_ends, segment_ids

INTERPOLATION = {
    "segment_normalization": "even",
    "same_segment_last": "repeat",
    "every_segment_last": "end",
    "segment_last_avg": "end",
}


@pytest.fixture
def parity(shared):
    def load(name):
        return json.loads((shared / "parity" / f"{name}.json").read_text())

    return load


def close(ours, recorded, tolerance=2e-5):
    recorded = torch.as_tensor(recorded, dtype=ours.dtype)
    torch.testing.assert_close(ours, recorded, rtol=tolerance, atol=tolerance)


def positions(ends):
    return [row.nonzero()[:, 0].tolist() for row in ends]


def cut(entropy, mask, cutoff):
    """Segment ends by the reference's magic numbers: 1000 is bandit; 0 its `every token`."""
    if cutoff == 1000:
        return segment_ends(entropy, mask, granularity="bandit")
    return segment_ends(entropy, mask, granularity="segment", cutoff=cutoff)


def filled(action_mask):
    """Mask up to the last action of each row: the reference looks at no other bit of it."""
    mask = torch.tensor(action_mask).bool()
    return mask.flip(1).cumsum(1).flip(1) > 0


# ---------------------------------------------------------------- segmentation


def test_segmentation_of_reward_model_data(parity):
    degenerate = 0
    for case in parity("segmentation_rm")["cases"]:
        width = case["seq_len"]
        start = width if case["response_start"] is None else case["response_start"]
        mask = torch.arange(width)[None] >= start
        entropy = torch.tensor([case["entropies"]])
        ours = positions(cut(entropy, mask, case["cutoff"]))[0]
        if case["response_start"] is None:
            assert ours == []  # the reference marks a prompt token
        elif case["degenerate"]:
            degenerate += 1
            assert ours == [start] != case["segment_ends"]
        else:
            assert ours == case["segment_ends"], case["id"]
    assert degenerate == 9


def test_segmentation_by_several_cutoffs(parity):
    for case in parity("segmentation_rm")["multi_threshold_batches"]:
        entropy = torch.tensor(case["entropies"])
        mask = torch.arange(entropy.shape[1]) >= torch.tensor(case["response_start"])[:, None]
        ours = [positions(cut(entropy, mask, cutoff)) for cutoff in case["thresholds"]]
        by_row = [ends for row in zip(*ours, strict=True) for ends in row]
        assert by_row == case["segment_ends"]


def test_segmentation_of_rollouts(parity):
    degenerate = 0
    for case in parity("segmentation_ppo")["cases"]:
        mask, entropy = filled([case["action_mask"]]), torch.tensor([case["entropies"]])
        ours = positions(cut(entropy, mask, case["cutoff"]))[0]
        if case["degenerate"]:
            degenerate += 1
            assert ours == [0] != case["segment_ends"]
        else:
            assert ours == case["segment_ends"], case["id"]
    assert degenerate == 11


def test_token_is_what_cutoff_0_means_where_no_entropy_is_0(parity):
    checked = 0
    for case in parity("segmentation_ppo")["cases"] + parity("segmentation_rm")["cases"]:
        if case["cutoff"] != 0 or case["degenerate"]:
            continue
        entropy = torch.tensor([case["entropies"]])
        if "action_mask" in case:
            mask = filled([case["action_mask"]])
        else:
            mask = torch.arange(entropy.shape[1])[None] >= case["response_start"]
        ours = segment_ends(entropy, mask, granularity="token")
        if (entropy[mask] > 0).all():
            assert positions(ours)[0] == case["segment_ends"]
            checked += 1
        else:  # defect 11: a merged token is a lost segment
            assert set(case["segment_ends"]) <= set(positions(ours)[0])
    assert checked >= 3


# ---------------------------------------------------------------- rewards


def normalizer_of(case, published):
    """The reference's choice of normaliser; a missing entry silently means none (defect 5)."""
    if not case["normalize_reward"]:
        return None
    if case["reward_type"] == "segment_last_avg":
        return LocationNormalizer(0.0, 0.0, case["rm_mean"], case["rm_std"])
    if "no_normalization" in case["exp_prefix"]:
        return None
    if case["reward_fit_dataset"] != "preference700k_60000":
        return None
    key = "0" if case["cutoff"] == 0 else str(case["cutoff"])
    coefficients = published[case["model_type"]].get(key)
    return None if coefficients is None else LocationNormalizer(*coefficients)


def dense_rewards(case, published, *, limit_shift=0):
    """Our rewards of a recorded case, and its window of values, its mask and its ends."""
    mask = filled(case["action_mask"])
    ends = cut(torch.tensor(case["entropies"]), mask, case["cutoff"])
    values = torch.tensor(case["values"])[:, case["prompt_len"] :]
    length_normalize = (
        "length_norm" in case["exp_prefix"]
        and case["cutoff"] == 0
        and case["reward_type"] == "segment_normalization"
    )
    rewards = spread_rewards(
        values,
        ends,
        mask,
        normalizer=normalizer_of(case, published),
        interpolation=INTERPOLATION[case["reward_type"]],
        length_normalize=length_normalize,
        clip=math.inf,
    )
    limit = case["response_penalty_length"]
    rewards = replace_penalized(
        rewards,
        mask,
        torch.tensor(case["eos_token_present"]),
        missing_eos_penalty=case["penalty"],
        max_response_tokens=None if limit is None else limit + limit_shift,
        overlong_penalty=None if limit is None else case["penalty"],
        last_token_only=case["reward_type"] == "segment_last_avg",
    )
    return rewards, values, mask, ends


def recorded_rewards(parity, *, dense):
    content = parity("rewards_ppo")
    for case in content["cases"]:
        if (case["reward_type"] != "segment_last_avg") == dense:
            yield case, content["published_coefficients"]


def test_dense_rewards(parity):
    seen = set()
    for case, published in recorded_rewards(parity, dense=True):
        quirk = case.get("quirk", "")
        shift = case["prompt_len"] if "prompt_len" in quirk else 0
        ours, _, mask, ends = dense_rewards(case, published, limit_shift=shift)
        recorded = torch.tensor(case["rewards"])
        assert not ours[~mask].any()
        compared = mask.clone()
        if "one_token" in quirk:
            compared &= mask.sum(1, keepdim=True) > 1
        elif "std_function" in quirk:
            location = ends.cumsum(1) / ends.sum(1, keepdim=True)
            normalizer = normalizer_of(case, published)
            above_floor = normalizer.std(location.masked_fill(~ends, 1)) > normalizer.min_std
            below = compared & ~above_floor
            assert below.any()
            assert ours[below].abs().max() < recorded[below].abs().max()
            compared &= above_floor
        else:
            assert positions(ends) == case["segment_ends"]
        tolerance = 2e-4 if "std_function" in quirk else 2e-5
        close(ours[compared], recorded[compared], tolerance)
        seen.add(case["tag"])
    assert len(seen) == 16


def test_mean_segment_lengths(parity):
    for case, published in recorded_rewards(parity, dense=True):
        if "quirk" not in case or case["quirk"].startswith("missing_params"):
            _, _, mask, ends = dense_rewards(case, published)
            tokens = (segment_ids(ends, mask) >= 0).sum(1)
            close(tokens / ends.sum(1), case["avg_segment_lengths"])


def test_length_limit_counts_response_tokens_only(parity):
    """Defect 1: with the limit as it is, we penalise rows that the reference lets through."""
    checked = 0
    for case, published in recorded_rewards(parity, dense=True):
        if "prompt_len" in case.get("quirk", ""):
            ours, _, mask, _ = dense_rewards(case, published)
            recorded = torch.tensor(case["rewards"])
            overlong = mask.sum(1) > case["response_penalty_length"]
            assert (ours[overlong][mask[overlong]] == case["penalty"]).all()
            assert not torch.allclose(ours[mask], recorded[mask])
            checked += 1
    assert checked == 4


def test_penalties_stay_out_of_masked_columns(parity):
    """Defect 12, dense half: the reference writes the penalty into masked columns as well."""
    checked = 0
    for case, published in recorded_rewards(parity, dense=True):
        if case["tag"] == "missing_eos":
            ours, _, mask, _ = dense_rewards(case, published)
            assert not ours[~mask].any()
            assert (torch.tensor(case["rewards"])[~mask] == case["penalty"]).any()
            checked += 1
    assert checked == 3


def test_bandit_rewards(parity):
    """The recorded (B,) score is our row's sum, which sits on the last response token."""
    quirks = 0
    for case, published in recorded_rewards(parity, dense=False):
        quirk = case.get("quirk", "")
        shift = case["prompt_len"] if "prompt_len" in quirk else 0
        ours, values, mask, ends = dense_rewards(case, published, limit_shift=shift)
        recorded = torch.tensor(case["rewards"])
        if case["cutoff"] != 1000:  # mean of several segments: our reward model's score
            normalizer = normalizer_of(case, published)
            score = aggregate_segments(values, ends)
            if normalizer is not None:
                score = (score - normalizer.mean(1.0)) / normalizer.std(1.0)
            close(score, recorded)
            continue
        last = mask.sum(1, keepdim=True) - 1
        assert torch.equal(ours.gather(1, last)[:, 0], ours.sum(1))
        missing = ~torch.tensor(case["eos_token_present"]) & ("bandit_missing_eos" in quirk)
        close(ours.sum(1)[~missing], recorded[~missing])
        if missing.any():  # defect 12: the reference forgets the penalty
            close(ours.sum(1)[missing], torch.full((1,), case["penalty"]))
            assert not torch.isclose(ours.sum(1)[missing], recorded[missing]).any()
        quirks += bool(quirk)
    assert quirks == 2


def test_mean_and_std_functions(parity):
    content = parity("rewards_ppo")
    floored = 0
    for table in content["mean_std_function"]:
        key = "0" if table["cutoff"] == 0 else str(table["cutoff"])
        coefficients = content["published_coefficients"][table["model_type"]].get(key)
        if coefficients is None:
            assert set(table["mean"]) == {0.0} and set(table["std"]) == {1.0}
            continue
        normalizer = LocationNormalizer(*coefficients)
        position = torch.tensor(table["position"])
        std = torch.tensor(table["std"])
        close(normalizer.mean(position), table["mean"])
        close(normalizer.std(position), std.clamp(min=normalizer.min_std))
        floored += int((std <= normalizer.min_std).sum())
    assert floored > 0


# ---------------------------------------------------------------- Huber fit


def test_huber_lines(parity):
    for table in parity("huber_fit")["tables"]:
        x = np.log(np.array(table["positions"]) + 1e-10)
        for name in ("mean", "std"):
            line = huber_line(x, table[name])
            assert line[:2] == pytest.approx(table[f"exact_{name}"], abs=1e-6)
            sklearn = (table[f"{name}_coef"], table[f"{name}_intercept"])
            assert line[:2] == pytest.approx(sklearn, abs=5e-4)
            assert line.r2 == pytest.approx(table[f"{name}_r2"], abs=1e-4)


def test_location_tables_and_their_fit(parity):
    for sample in parity("huber_fit")["raw_samples"]:
        rows = sample["sequences"]
        locations = [(j + 1) / len(row) for row in rows for j in range(len(row))]
        rewards = [reward for row in rows for reward in row]
        table = location_table(locations, rewards)
        assert [f"{p:.3f}" for p in table.location] == sample["position_keys"]
        assert table.count.tolist() == sample["counts"]
        np.testing.assert_allclose(table.mean, sample["mean"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(table.std, sample["std"], rtol=1e-6, atol=1e-6)
        fitted = fit_location_normalizer(locations, rewards)
        mean, std = (fitted.w_mean, fitted.b_mean), (fitted.w_std, fitted.b_std)
        assert mean == pytest.approx(sample["exact_mean"], abs=1e-5)
        assert std == pytest.approx(sample["exact_std"], abs=1e-5)


def test_segment_rewards_and_locations_of_the_statistics_pipeline(parity):
    for case in parity("huber_fit")["pipeline_positions"]:
        entropy, values = torch.tensor(case["entropies"]), torch.tensor(case["values"])
        start, length = (torch.tensor(case[f"response_{x}"])[:, None] for x in ("start", "len"))
        column = torch.arange(case["width"])
        mask = (column >= start) & (column < start + length)
        ends = cut(entropy, mask, case["cutoff"])
        location = ends.cumsum(1).double() / ends.sum(1, keepdim=True)
        assert [f"{p:.3f}" for p in location[ends]] == [p for p, _ in case["position_rewards"]]
        close(values[ends], [reward for _, reward in case["position_rewards"]])
        assert ends.sum(1).tolist() == case["segment_num"]
        close(aggregate_segments(values, ends), case["sequence_reward"])


# ---------------------------------------------------------------- PPO arithmetic


def mask_of(case, like):
    given = case["action_mask"]
    return torch.ones_like(like, dtype=torch.bool) if given is None else torch.tensor(given).bool()


def test_kl_estimates(parity):
    for case in parity("ppo_math")["approx_kl"]:
        new, old = torch.tensor(case["log_probs"]), torch.tensor(case["log_probs_base"])
        mask = mask_of(case, new)
        close(-penalize_kl(torch.zeros_like(new), new, old, mask, 1.0), case["k1"])
        # k3 of the pair is our update's approx_kl with the roles of the policies exchanged.
        metrics = clipped_policy_loss(old, new, torch.zeros_like(new), mask, clip=0.2).metrics
        k3 = torch.tensor(case["k3"])
        close(metrics["approx_kl"], masked_mean(k3, mask, "token"), 1e-4)


def test_rewards_with_kl_penalty(parity):
    for case in parity("ppo_math")["compute_reward"]:
        logprobs, reference = torch.tensor(case["log_probs"]), torch.tensor(case["log_probs_base"])
        mask, given = mask_of(case, logprobs), torch.tensor(case["r"])
        if case["kind"] == "dense":
            rewards = given.clamp(-10, 10)
        else:
            ends = segment_ends(torch.zeros_like(logprobs), mask, granularity="bandit")
            values = given[:, None].expand_as(logprobs)
            rewards = spread_rewards(values, ends, mask, interpolation="end")
        close(penalize_kl(rewards, logprobs, reference, mask, case["kl_coef"]), case["reward"])


def test_generalized_advantages(parity):
    content = parity("ppo_math")
    for case in content["gae"]:
        rewards, values = torch.tensor(case["rewards"]), torch.tensor(case["values"])
        advantages, returns = generalized_advantages(
            rewards, values, mask_of(case, values), gamma=case["gamma"], lam=case["lam"]
        )
        close(advantages, case["advantages"])
        close(returns, case["returns"])
    for case in content["gae_ragged"]:
        padded = [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in case[name]], True)
            for name in ("rewards", "values")
        ]
        lengths = torch.tensor([len(row) for row in case["values"]])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ours = generalized_advantages(*padded, mask, gamma=case["gamma"], lam=case["lam"])
        for tensor, name in zip(ours, ("advantages", "returns"), strict=True):
            for row, length, recorded in zip(tensor, lengths, case[name], strict=True):
                close(row[:length], recorded)


def test_policy_losses(parity):
    for case in parity("ppo_math")["policy_loss"]:
        logprobs = torch.tensor(case["log_probs"], requires_grad=True)
        old, advantages = torch.tensor(case["old_log_probs"]), torch.tensor(case["advantages"])
        mask = mask_of(case, logprobs)
        loss = clipped_policy_loss(logprobs, old, advantages, mask, clip=case["clip_eps"]).loss
        close(loss, case["loss"])
        close(*torch.autograd.grad(loss, logprobs), case["grad_log_probs"])


def test_value_losses(parity):
    for case in parity("ppo_math")["value_loss"]:
        values = torch.tensor(case["values"], requires_grad=True)
        old, returns = torch.tensor(case["old_values"]), torch.tensor(case["returns"])
        mask = mask_of(case, values)
        loss = clipped_value_loss(values, old, returns, mask, clip=case["clip_eps"]).loss
        close(loss, case["loss"])
        close(*torch.autograd.grad(loss, values), case["grad_values"])


def test_preference_losses(parity):
    for case in parity("ppo_math")["pairwise_loss"]:
        chosen = torch.tensor(case["chosen"], requires_grad=True)
        rejected = torch.tensor(case["rejected"], requires_grad=True)
        margin = None if case["margin"] is None else torch.tensor(case["margin"])
        loss = preference_loss(chosen, rejected, margin)
        close(loss, case["sigmoid_loss"])
        gradients = torch.autograd.grad(loss, (chosen, rejected))
        close(gradients[0], case["grad_chosen"])
        close(gradients[1], case["grad_rejected"])


def test_masked_means(parity):
    for case in parity("ppo_math")["masked_mean"]:
        values, mask = torch.tensor(case["tensor"]), torch.tensor(case["mask"]).bool()
        close(masked_mean(values, mask, "token"), case["mean_all"])
        for row, recorded in enumerate(case["mean_dim_last"]):
            ours = masked_mean(values[row : row + 1], mask[row : row + 1], "sequence")
            close(ours, 0.0 if recorded == "nan" else recorded)  # defect 15


def test_entropies_and_logprobs(parity):
    for case in parity("ppo_math")["entropy_logprob"]:
        logits, labels = torch.tensor(case["logits"]), torch.tensor(case["labels"])
        logprob, entropy = logprob_and_entropy(logits, torch.eye(logits.shape[1]), labels)
        close(logprob, case["log_probs"])
        close(entropy, case["entropy"])


def test_kl_controllers(parity):
    for case in parity("ppo_math")["kl_controller"]:
        kl = AdaptiveKL(case["init"], case.get("target"), case.get("horizon", 10_000))
        steps = zip(case["current"], case["n_steps"], case["value_after"], strict=True)
        for current, responses, recorded in steps:
            kl.update(current, responses)
            assert kl.coef == pytest.approx(recorded, rel=1e-12)


def whitened(experiences):
    """All rows of several recorded rollouts, whitened together, and their mask."""
    rows = [
        (torch.tensor(advantages), torch.tensor(mask).bool())
        for experience in experiences
        for advantages, mask in zip(
            experience["advantages"], experience["action_mask"], strict=True
        )
    ]
    values, mask = (torch.nn.utils.rnn.pad_sequence(x, True) for x in zip(*rows, strict=True))
    return whiten(values, mask), mask


def test_whitened_advantages(parity):
    for case in parity("ppo_math")["replay_buffer"]:
        ours, mask = whitened(case["experiences"])
        if "quirk" in case:  # holes: the reference loses tokens and takes the mean of masked ones
            close(ours[mask].mean(), 0.0)
            continue
        for row, counts, recorded in zip(ours, mask, case["normalized_advantages"], strict=True):
            close(row[counts], recorded, 1e-4)


def test_whitened_advantages_across_ranks(parity):
    for case in parity("ppo_math")["replay_buffer_ranks"]:
        ours, mask = whitened([x for rank in case["per_rank_experience"] for x in rank])
        recorded = [row for rank in case["per_rank_normalized_advantages"] for row in rank]
        for row, counts, expected in zip(ours, mask, recorded, strict=True):
            close(row[counts], expected, 1e-4)


# ---------------------------------------------------------------- whole models


def language_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def scalar_model(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation="eager"
    ).eval()


def states(model, sequences, mask):
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    body = model.base_model
    return body(sequences, attention_mask=mask, position_ids=position_ids).last_hidden_state


def streamed(model, sequences, mask):
    """Per position: log-probability of the next token (the last one's is void), and entropy."""
    hidden = states(model, sequences, mask)
    logprob, entropy = logprob_and_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, sequences.roll(-1, 1).flatten()
    )
    return logprob.view(sequences.shape), entropy.view(sequences.shape)


def head(model, sequences, mask):
    return model.score(states(model, sequences, mask))[..., 0]


def test_reward_model_forward_loss_and_gradients(parity, shared):
    from safetensors.torch import load_file

    folder = shared / "parity" / "rm_forward"
    content, gradients = parity("rm_forward/results"), load_file(folder / "grads.safetensors")
    reference, reward_model = (
        language_model(folder / "ref_lm"),
        scalar_model(folder / "reward_model"),
    )
    for case in content["cases"]:
        batch = content["batches"][case["batch"]]
        ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
        real, response = mask.bool(), torch.tensor(batch["labels"]) != -100
        with torch.no_grad():
            _, entropy = streamed(reference, ids, mask)
        close(entropy[real], torch.tensor(batch["entropy"])[real], 3e-5)
        values = head(reward_model, ids, mask)
        close(values[real], torch.tensor(batch["values"])[real], 3e-5)

        ends = cut(entropy, response, case["cutoff"])
        assert positions(ends) == case["segment_ends"]
        chosen, rejected = aggregate_segments(values, ends).chunk(2)
        close(chosen, case["chosen_rewards"], 3e-5)
        close(rejected, case["rejected_rewards"], 3e-5)
        margin = None if case["margin"] is None else torch.tensor(case["margin"])
        loss = preference_loss(chosen, rejected, margin)
        close(loss, case["loss"], 3e-5)

        reward_model.zero_grad()
        loss.backward()
        squares = sum(
            p.grad.square().sum() for p in reward_model.parameters() if p.grad is not None
        )
        assert math.sqrt(squares) == pytest.approx(case["grad_norm_all"], rel=2e-4)
        for name, parameter in reward_model.named_parameters():
            recorded = gradients.get(f"case{case['id']}.grad.{name}")
            if recorded is not None:
                close(parameter.grad, recorded, 2e-4)


def test_a_whole_rollout(parity, shared):
    folder = shared / "parity"
    reference = language_model(folder / "rm_forward" / "ref_lm")
    reward_model = scalar_model(folder / "rm_forward" / "reward_model")
    actor = language_model(folder / "experience" / "actor")
    critic = scalar_model(folder / "experience" / "critic")
    published = parity("rewards_ppo")["published_coefficients"]
    for case in parity("experience/results")["cases"]:
        ids, mask = torch.tensor(case["sequences"]), torch.tensor(case["attention_mask"])
        start, response = case["input_len"], torch.tensor(case["action_mask"]).bool()
        after, before = slice(start, None), slice(start - 1, -1)
        with torch.no_grad():
            logprobs = streamed(actor, ids, mask)[0][:, before]
            reference_logprobs, entropy = streamed(reference, ids, mask)
            reference_logprobs, entropy = reference_logprobs[:, before], entropy[:, after]
            token_values = head(reward_model, ids, mask)[:, after]
            values = head(critic, ids, mask)[:, before]
        ends = cut(entropy, response, case["cutoff"])
        assert positions(ends) == case["segment_ends"]
        full = case | {"normalize_reward": True, "reward_fit_dataset": "preference700k_60000"}
        rewards = spread_rewards(
            token_values,
            ends,
            response,
            normalizer=normalizer_of(full, published),
            interpolation=INTERPOLATION[case["reward_type"]],
            length_normalize="length_norm" in case["exp_prefix"],
        )
        rewards = replace_penalized(
            rewards,
            response,
            torch.tensor(case["eos_token_present"]),
            missing_eos_penalty=-0.05 if "m0d05" in case["exp_prefix"] else None,
        )
        final = penalize_kl(rewards, logprobs, reference_logprobs, response, case["kl_coef"])
        advantages, returns = generalized_advantages(
            final, values, response, gamma=case["gamma"], lam=case["lam"]
        )
        for name, ours in {
            "base_action_entropy": entropy,
            "action_log_probs": logprobs,
            "base_action_log_probs": reference_logprobs,
            "rm_values_action_window": token_values,
            "values": values,
            "dense_reward": rewards,
            "reward_minus_kl": final,
            "advantages": advantages,
            "returns": returns,
        }.items():
            close(ours[response], torch.tensor(case[name])[response], 1e-4)
