"""train-ppo from the run folder to the policy, on the tiny sandbox."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.observer import TIMES, Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.reporting.record import read_run
from denserl_cli.core.reporting.report import missing
from denserl_cli.core.runs.folder import Mode, RunFolder
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.torch_engine import TorchSampling
from denserl_cli.core.stages import train_ppo as stage
from denserl_cli.core.stages.run import run_stage
from tests import ROOT, tiny
from tests.fakes import InterruptingObserver, RecordingObserver

STAGE = "train-ppo"


def train(
    folder: Path, *settings: str, mode: Mode = "start", observer: Observer | None = None
) -> None:
    run_stage(STAGE, tiny.recipe(*settings), folder, mode, observer or Observer())


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.parent / name))


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The logged lines of train-ppo without what the clock says."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in found
        if line["stage"] == STAGE
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that must not depend on how it got there."""
    best = folder / "policy_best" / "model.safetensors"
    return {
        "policy": (folder / "policy" / "model.safetensors").read_bytes(),
        "best": best.read_bytes() if best.exists() else None,
        "metrics": lines(folder),
        "samples": lines(folder, "samples.jsonl"),
        "summary": json.loads((folder / "run.json").read_text())["stages"][STAGE]["summary"],
    }


def stop_in_rollout(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Press Ctrl-C while the rollout of this number is sampled."""
    calls = []
    original = Sampler.sample

    def sample(*words: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*words, **options)

    monkeypatch.setattr(Sampler, "sample", sample)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_policy_is_a_plain_model_that_stops_by_itself(
    scored: Path, monkeypatch: pytest.MonkeyPatch
):
    ids, kept, save = torch.tensor([[3, 7, 8, 9]]), {}, stage._save

    def noting(actor: Any, tokenizer: Any, run: RunFolder, name: str) -> None:
        with torch.no_grad():
            kept[name] = actor.model(ids).logits
        save(actor, tokenizer, run, name)

    monkeypatch.setattr(stage, "_save", noting)
    train(scored)
    trained = AutoModelForCausalLM.from_pretrained(scored / "policy")
    start = AutoModelForCausalLM.from_pretrained(scored / "sandbox" / "model")
    assert torch.equal(trained(ids).logits, kept["policy"])
    assert not torch.equal(trained(ids).logits, start(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(scored / "policy")
    stops = list(ChatFormat.of(tokenizer).stop_ids)
    assert trained.generation_config.eos_token_id == stops
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "write calm words about rivers"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = trained.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
    assert int(generated[-1]) in stops


def test_every_iteration_logs_its_metrics(scored: Path):
    train(scored, "ppo.train_batch_size=8", "ppo.epochs=1")  # one step an iteration
    start, *iterations = lines(scored)
    assert [line["step"] for line in (start, *iterations)] == [0, 1, 2, 3, 4]
    for line in iterations:
        assert line.keys() >= {
            "true_reward",
            "rm_score",
            "kl",
            "kl_coef",
            "response_length",
            "terminated",
            "segments_per_response",
            "segment_length",
            "policy_clip_fraction",
            "value_clip_fraction",
            "explained_variance",
            "policy_gradient_norm",
            "critic_gradient_norm",
            "policy_learning_rate",
            "policy_loss",
            "value_loss",
        }
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))
    assert iterations[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy is still the reference
    assert iterations[0]["policy_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert {"eval_true_reward", "eval_kl"} <= start.keys() & iterations[1].keys()


def test_samples_tell_text_and_segments(scored: Path):
    train(scored, "run.log_samples=3")
    samples = lines(scored, "samples.jsonl")
    held = [sample for sample in samples if sample.get("held_out")]
    others = [sample["step"] for sample in samples if sample not in held]
    assert others == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [sample["step"] for sample in held] == [0, 0, 2, 2, 4, 4]  # one to each held-out prompt
    assert len({sample["prompt"] for sample in held}) == 2
    for sample in samples:
        assert sample["prompt"].startswith("write ")
        assert all(s.keys() == {"text", "tokens", "value", "reward"} for s in sample["segments"])
        text = "".join(segment["text"] for segment in sample["segments"])
        assert len(text.split()) == sum(segment["tokens"] for segment in sample["segments"])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resumed_is_uninterrupted(after: int, scored: Path):
    whole = copied(scored, "whole")
    settings = ("ppo.kl_target=0.01", "ppo.epochs=2", "ppo.rollout.samples_per_prompt=2")
    train(whole, *settings)
    with pytest.raises(Interrupted, match=f"stopped after iteration {after} of 4"):
        train(scored, *settings, observer=InterruptingObserver(after, "train the policy"))
    with pytest.raises(DenserlError, match="was interrupted"):
        train(scored, *settings)
    train(scored, *settings, mode="resume")
    assert outcome(scored) == outcome(whole)


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_resumed_after_a_stop_while_sampling_is_uninterrupted(
    iteration: int, scored: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = copied(scored, "whole")
    settings = ("data.eval_prompts=0", "ppo.rollout.rows=4")
    train(whole, *settings)
    with monkeypatch.context() as patch:
        stop_in_rollout(patch, iteration)
        with pytest.raises(Interrupted, match=f"stopped after iteration {iteration - 1} of 4"):
            train(scored, *settings)
    train(scored, *settings, mode="resume")
    assert outcome(scored) == outcome(whole)


def test_resumed_after_a_kill_is_uninterrupted(scored: Path):
    settings = ("ppo.iterations=24", "ppo.save_every=3", "data.eval_prompts=0")
    whole = copied(scored, "whole")
    train(whole, *settings)
    log = scored / "metrics.jsonl"
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "denserl_cli.app", STAGE, "--recipe", "sandbox-segment"),
            *("--out", str(scored), *tiny.words(*settings)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while f'"{STAGE}", "step": 7' not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train(scored, *settings, mode="resume")
    assert outcome(scored) == outcome(whole)


def test_a_finished_stage_says_so_and_does_nothing(scored: Path):
    train(scored)
    before, recorder = contents(scored), RecordingObserver()
    train(scored, observer=recorder)
    train(scored, mode="resume", observer=recorder)
    assert contents(scored) == before
    assert len(recorder.notices) == 2
    assert all("is finished" in notice for notice in recorder.notices)


def test_nothing_depends_on_the_micro_batches_of_the_rollout(scored: Path):
    other = copied(scored, "other")
    train(scored)
    train(other, "ppo.rollout.micro_batch_size=3", "ppo.rollout.rows=3")
    for left, right in zip(lines(scored), lines(other), strict=True):
        assert left.pop("stage") == right.pop("stage")
        for name in [name for name, value in left.items() if isinstance(value, list)]:
            bins = (np.array(line.pop(name), dtype=float) for line in (left, right))
            np.testing.assert_allclose(*bins, rtol=1e-2, atol=1e-3)  # an empty bin is NaN
        assert left == pytest.approx(right, rel=1e-2, abs=1e-3)


def test_dense_training_with_one_segment_is_bandit_training(scored: Path):
    """Nothing terminates within two tokens, so one segment ends where bandit's does."""
    settings = (
        "ppo.rollout.max_new_tokens=2",
        "ppo.actor_learning_rate=1e-4",
        "normalizer.kind=none",
        "ppo.interpolation=end",
        "ppo.value_clip=0.2",
    )
    one = (*settings, "segmentation.cutoff=1000.0")
    bandit = (*settings, "segmentation.granularity=bandit", "segmentation.cutoff=null")
    other = copied(scored, "bandit")
    tiny.pretend(scored, tiny.recipe(*one))
    tiny.pretend(other, tiny.recipe(*bandit))
    train(scored, *one)
    train(other, *bandit)
    assert [line["terminated"] for line in lines(scored)[1:]] == [0.0] * 4
    assert outcome(scored)["policy"] == outcome(other)["policy"]


COMBINATIONS = [
    (granularity, interpolation, kind)
    for granularity in ("segment", "token", "bandit")
    for interpolation in ("even", "repeat", "end")
    for kind in ("location", "global", "last", "none")
    if granularity != "bandit" or (interpolation == "end" and kind != "location")
]


@pytest.mark.parametrize(("granularity", "interpolation", "kind"), COMBINATIONS)
def test_every_combination_runs(granularity: str, interpolation: str, kind: str, scored: Path):
    settings = [
        f"segmentation.granularity={granularity}",
        f"segmentation.cutoff={1.0 if granularity == 'segment' else 'null'}",
        f"ppo.interpolation={interpolation}",
        f"normalizer.kind={kind}",
        "ppo.iterations=1",
        "data.eval_prompts=0",
    ]
    tiny.pretend(scored, tiny.recipe(*settings))
    train(scored, *settings)
    (_, line) = lines(scored)
    assert np.isfinite(line["dense_reward"]) and np.isfinite(line["policy_loss"])
    count, length = line["segments_per_response"], line["response_length"]
    assert count == 1 if granularity == "bandit" else 1 < count <= length


@pytest.mark.parametrize(
    "settings",
    [
        ["ppo.rollout.samples_per_prompt=3", "ppo.rollout.batch_size=2", "ppo.train_batch_size=6",
         "ppo.micro_batch_size=6"],
        ["ppo.critic_init=reward_model"],
        ["ppo.critic_warmup=1"],
        ["ppo.rollout.temperature=0.7", "ppo.rollout.top_p=0.9"],
        ["ppo.loss_reduce=token", "ppo.micro_batch_size=2"],
        ["ppo.length_normalize=true", "ppo.segment_total=sum"],
        ["ppo.missing_eos_penalty=-0.1", "ppo.max_response_tokens=8", "ppo.overlong_penalty=-0.2"],
        ["model.gradient_checkpointing=true"],
        ["ppo.rollout.max_new_tokens=1"],
        ["ppo.action=segment", "ppo.lam=adaptive", "ppo.lam_alpha=0.5", "ppo.lam_value=1"],
        ["ppo.value_clip=none", "ppo.kl_loss=k3", "ppo.entropy_coef=0.01", "ppo.dual_clip=3",
         "ppo.policy_clip_high=0.28", "ppo.loss_reduce=constant"],
    ],
    ids=lambda settings: settings[0],
)  # fmt: skip
def test_every_option_runs(settings: list[str], scored: Path):
    train(scored, "ppo.iterations=2", "data.eval_prompts=0", *settings)
    assert all(np.isfinite(line["value_loss"]) for line in lines(scored)[1:])
    assert (scored / "policy" / "model.safetensors").exists()


def test_a_sampler_that_tells_no_entropy_is_enough(scored: Path, monkeypatch: pytest.MonkeyPatch):
    """As vLLM, which tells none."""
    sample = TorchSampling.sample
    monkeypatch.setattr(TorchSampling, "sample", lambda *given: [
        response._replace(entropy=None) for response in sample(*given)
    ])  # fmt: skip
    train(scored, "ppo.rollout.old_logprobs=sampled", "ppo.epochs=2")
    found = lines(scored)[1:]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert not any("entropy" in line for line in found)
    assert all(np.isfinite(line["policy_loss"]) for line in found)
    assert "train-ppo did not record policy entropy" in missing(read_run(scored, "run"))


def test_several_samples_of_a_prompt_differ(scored: Path):
    train(
        scored,
        *("ppo.rollout.samples_per_prompt=4", "ppo.rollout.batch_size=1", "run.log_samples=4"),
        *("ppo.iterations=1", "data.eval_prompts=0"),
    )
    samples = lines(scored, "samples.jsonl")
    assert len({sample["prompt"] for sample in samples}) == 1
    assert len({json.dumps(sample["segments"]) for sample in samples}) == 4


def test_a_warm_up_leaves_the_policy_alone(scored: Path):
    train(scored, "ppo.critic_warmup=4", "data.eval_prompts=0")
    trained = AutoModelForCausalLM.from_pretrained(scored / "policy").state_dict()
    start = AutoModelForCausalLM.from_pretrained(scored / "sandbox" / "model").state_dict()
    assert all(torch.equal(trained[name], start[name]) for name in start)


def test_the_critic_starts_from_the_policy_or_from_the_reward_model(scored: Path):
    first = []
    for init in ("policy", "reward_model"):
        folder = copied(scored, init)
        train(folder, f"ppo.critic_init={init}", "ppo.iterations=1", "data.eval_prompts=0")
        first.append(lines(folder)[1])
    policy, reward_model = first
    assert policy["rm_score"] == reward_model["rm_score"]
    assert policy["value_loss"] != reward_model["value_loss"]


def test_settings_that_say_the_default_in_other_words_change_no_byte(scored: Path):
    one, other = copied(scored, "one"), copied(scored, "other")
    train(one, "ppo.iterations=2")
    same = ("ppo.lam_value=0.95", "ppo.policy_clip_high=0.2", "ppo.dual_clip=1e30")
    train(other, "ppo.iterations=2", *same)
    assert outcome(one) == outcome(other)


def test_one_token_a_macro_action_changes_no_byte(scored: Path):
    settings = ("segmentation={granularity: token}", "segmentation.cutoff=null")
    tiny.pretend(scored, tiny.recipe(*settings))
    one, other = copied(scored, "one"), copied(scored, "other")
    train(one, "ppo.iterations=2", *settings)
    train(other, "ppo.iterations=2", "ppo.action=segment", *settings)
    assert outcome(one) == outcome(other)


@pytest.mark.parametrize("advantage", ["group", "rloo", "reinforce++"])
def test_without_a_critic_none_is_trained_recorded_or_saved(advantage: str, scored: Path):
    settings = (
        *(
            f"ppo.advantage={advantage}",
            "ppo.rollout.samples_per_prompt=2",
            "ppo.rollout.batch_size=2",
        ),
        *("ppo.iterations=2", "data.eval_prompts=0"),
    )
    with pytest.raises(Interrupted):
        train(scored, *settings, observer=InterruptingObserver(1, "train the policy"))
    run = RunFolder(scored, tiny.recipe(*settings))
    kept = run.latest_checkpoint(STAGE, Observer()).state
    assert "actor" in kept and "critic" not in kept
    train(scored, *settings, mode="resume")
    _, *steps = lines(scored)
    named = [name for line in steps for name in line]
    assert not [n for n in named if n.startswith(("value_", "critic_", "explained"))]
    assert all(np.isfinite(line["policy_loss"]) for line in steps)
    start = AutoModelForCausalLM.from_pretrained(scored / "sandbox" / "model").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(scored / "policy").state_dict()
    assert not all(torch.equal(trained[name], start[name]) for name in start)


def test_a_critic_that_was_saved_starts_another_run(scored: Path):
    warm = copied(scored, "warm")
    train(warm, "ppo.critic_warmup=4", "ppo.save_critic=true", "data.eval_prompts=0")
    critic = warm / "critic"
    fresh, again = copied(scored, "fresh"), copied(scored, "again")
    once = ("ppo.iterations=1", "data.eval_prompts=0")
    train(fresh, *once)
    train(again, f"ppo.critic_init={critic}", *once)
    assert not (fresh / "critic").exists()
    first, second = (lines(folder)[1] for folder in (fresh, again))
    assert second["rm_score"] == first["rm_score"]
    assert second["explained_variance"] > first["explained_variance"]
    file = critic / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other, *_ = (token for token in vocabulary if token.isalpha())
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(DenserlError, match=r"ppo\.critic_init: .* has another tokenizer"):
        train(again, f"ppo.critic_init={critic}", *once, mode="fresh")


def test_a_warm_up_over_kept_rollouts_goes_on_where_it_was_stopped(scored: Path):
    settings = (
        *("ppo.critic_warmup=3", "ppo.critic_warmup_rollouts=1", "ppo.save_every=1"),
        "data.eval_prompts=0",
    )
    whole, halves = copied(scored, "whole"), copied(scored, "halves")
    train(whole, *settings)
    scores = [line["rm_score"] for line in lines(whole)[1:]]
    assert scores[0] == scores[1] == scores[2] != scores[3]
    losses = [line["value_loss"] for line in lines(whole)[1:]]
    assert losses[2] < losses[0]
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 4"):
        train(halves, *settings, observer=InterruptingObserver(2, "train the policy"))
    train(halves, *settings, mode="resume")
    assert outcome(halves) == outcome(whole)


def test_a_generation_config_that_cannot_be_saved_is_replaced(scored: Path):
    file = scored / "sandbox" / "model" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "pad_token_id": 0}))
    train(scored, "ppo.iterations=1")
    saved = GenerationConfig.from_pretrained(scored / "policy")
    assert saved.eos_token_id == [5] and saved.temperature is None


def test_a_reward_that_overflows_stops_with_the_rollout_kept(scored: Path):
    from safetensors.torch import load_file, save_file

    train(scored, "ppo.iterations=1")
    file = scored / "reward_model" / "model.safetensors"
    weights = load_file(file)
    weights["score.weight"][:] = 3e38  # finite weights, whose products are not
    weights["model.norm.weight"] *= 1e3
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DenserlError, match="stopped at step 1: a reward or") as caught:
        train(scored, mode="fresh")
    assert caught.value.exit_code == 2
    assert (scored / "nonfinite" / "train-ppo-00000001" / "batch.pt").exists()
    assert (scored / "replaced" / "policy.1" / "model.safetensors").exists()


def without_reward_model(folder: Path) -> tuple[str, ...]:
    shutil.rmtree(folder / "reward_model")
    return ()


def without_normalizer(folder: Path) -> tuple[str, ...]:
    (folder / "reward_model" / "normalizer.json").unlink()
    return ()


def other_kind(folder: Path) -> tuple[str, ...]:
    return ("normalizer.kind=global",)


def other_cutoff(folder: Path) -> tuple[str, ...]:
    return ("segmentation.cutoff=2.0",)


def other_granularity(folder: Path) -> tuple[str, ...]:
    return ("segmentation.granularity=token", "segmentation.cutoff=null")


def too_few_prompts(folder: Path) -> tuple[str, ...]:
    return ("ppo.rollout.batch_size=100", "ppo.train_batch_size=100")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_reward_model, "no reward model in"),
        (without_normalizer, "no normalizer in"),
        (other_kind, "was fitted for kind location instead of global"),
        (other_cutoff, "segmentation.cutoff is 2.0, the reward model was trained with 1.0"),
        (other_granularity, "segmentation.granularity is token"),
        (too_few_prompts, "not enough data for one batch: 62 rows, ppo.rollout.batch_size is 100"),
    ],
)
def test_what_cannot_start_writes_nothing(spoil: Any, message: str, scored: Path):
    settings = spoil(scored)
    before = contents(scored)
    with pytest.raises(DenserlError, match=message) as caught:
        train(scored, *settings)
    assert caught.value.exit_code == 2 and caught.value.hint
    assert contents(scored) == before


def test_other_prompts_have_no_true_reward(scored: Path, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"write {n}"}) + "\n" for n in range(8)))
    train(scored, f"data.prompts={file}", "ppo.iterations=1")
    assert all("true_reward" not in line for line in lines(scored))


def test_the_plan_counts_passes_or_iterations(scored: Path):
    recipe: Recipe = load_recipe("sandbox-segment", [*tiny.SETTINGS, "ppo.iterations=null"])
    prompts = [None] * 10
    assert stage._plan(recipe, prompts).iterations == 2  # type: ignore[arg-type]
    five = load_recipe("sandbox-segment", [*tiny.SETTINGS, "ppo.iterations=5"])
    assert stage._plan(five, prompts).iterations == 5  # type: ignore[arg-type]
    assert RunFolder(scored, recipe).summary("train-rm")
