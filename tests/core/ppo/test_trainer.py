"""What the PPO loop decides, on models and rollouts that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.engine.base import NonFiniteError
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import TIMES, Observer
from denserl_cli.core.ppo.evaluator import Evaluator
from denserl_cli.core.ppo.prompts import PromptPlan, evaluation_batch
from denserl_cli.core.ppo.reward_functions import reward_settings
from denserl_cli.core.ppo.rewards import RewardSources
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.ppo.trainer import HEADLINE, PPOTrainer
from denserl_cli.core.recipe.schema import PPOConfig, Recipe, RunConfig, SegmentationConfig
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.runs.stage_session import StageSession
from tests.fakes import RecordingObserver

NORMALIZER = LocationNormalizer(0.5, 0.1, 0.3, 2.0)
STAGE = "train-ppo"


class Engine:
    def __init__(self) -> None:
        self.value = 0

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def restore(self, state: dict[str, int]) -> None:
        self.value = state["value"]

    def save_shards(self, folder: Path) -> None:
        """It has none."""

    def load_shards(self, folder: Path) -> None:
        """It has none."""


class Updates:
    """Counts its calls, and keeps what it was given."""

    def __init__(self) -> None:
        self.actor, self.critic = Engine(), Engine()
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self,
        iteration: int,
        rollout: Rollout,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        guarded: Any,
    ) -> dict[str, float]:
        self.actor.value = iteration
        self.given.append((advantages, returns))
        return {"policy_loss": 0.5}


class Letters:
    def decode(self, ids: Any, **_: object) -> str:
        return "".join(chr(97 + i) for i in ids)

    def batch_decode(self, rows: Any, **_: object) -> list[str]:
        return [self.decode(row) for row in rows]


def rollout(
    *, kl: float = 0.0, score: float = 0.0, ends: tuple[int, ...] = (1, 2), terminated: bool = True
) -> Rollout:
    """Two responses of four tokens; `kl` nats each, `score` at every token."""
    shape = (2, 4)
    marks = torch.zeros(shape, dtype=torch.bool)
    marks[:, list(ends)] = True
    return Rollout(
        prompts=[np.array([1])] * 2,
        responses=[np.array([0, 1, 2, 3])] * 2,
        terminated=torch.tensor([terminated, True]),
        response_mask=torch.ones(shape, dtype=torch.bool),
        logprobs=torch.full(shape, kl / 4),
        policy_entropy=torch.full(shape, 0.5),
        reference_logprobs=torch.zeros(shape),
        entropy=torch.zeros(shape),
        values=torch.zeros(shape),
        token_values=torch.full(shape, score) + torch.tensor([[0.0, 0.1, 0.2, 0.3]]),
        ends=marks,
    )


class Collect:
    """Training rollouts in order; evaluation rollouts in order, if there are any."""

    def __init__(self, training: list[Rollout], evaluation: list[Rollout]) -> None:
        self.training, self.evaluation = training, evaluation
        self.seconds = {"rollout_seconds": 2.0, "scoring_seconds": 1.0}

    def refresh(self) -> None:
        """Do nothing: the rollouts are made."""

    def collect(self, ids: Any, keys: Any, progress: Any = lambda _: None) -> Rollout:
        evaluating = keys[0][1] >= 2**31
        progress(2)
        return self.evaluation.pop(0) if evaluating else self.training[keys[0][1] - 1]


def trainer(
    folder: Path,
    training: list[Rollout],
    *,
    evaluation: list[Rollout] | None = None,
    granularity: str = "segment",
    normalizer: LocationNormalizer | None = None,
    **settings: Any,
) -> PPOTrainer:
    cutoff = 1.0 if granularity == "segment" else None
    recipe = Recipe(
        name="r",
        segmentation=SegmentationConfig(granularity, cutoff),
        ppo=PPOConfig(
            **{
                "kl_coef": 0.0,
                "eval_every": 1,
                "save_every": 100,
                "interpolation": "even",
                "reward_model_weight": 1.0,
                **settings,
            }
        ),
        run=RunConfig(log_samples=1),
    )
    prompts = [Prompt([{"role": "user", "content": "hi"}], "", {}, np.array([1]))] * 2
    run = RunFolder(folder, recipe)
    run.started(STAGE, "resume", Observer())
    saved: list[str] = []
    recorder, updater = RecordingObserver(), Updates()
    collector = Collect(training, list(evaluation or []))
    sources = RewardSources(reward_settings(recipe), normalizer, lambda prompts, rollout: None)
    session = StageSession(
        STAGE,
        run,
        recorder,
        engines={"actor": updater.actor, "critic": updater.critic},
        unit="iteration",
        total=len(training),
        save_every=recipe.ppo.save_every,
        headline=HEADLINE,
    )
    made = PPOTrainer(
        recipe.ppo,
        session,
        plan=PromptPlan(prompts, [np.array([0, 1])] * len(training), samples=1, seed=0),
        collector=collector,
        sources=sources,
        updater=updater,
        evaluator=Evaluator(
            recipe,
            collector=collector,
            sources=sources,
            prompts=evaluation_batch(prompts if evaluation else [], 0),
            tokenizer=Letters(),
            true_reward=lambda prompt, text: float(len(text)),
        ),
        save_policy=saved.append,
    )
    made.saved, made.run, made.observer = saved, run, recorder
    return made


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_metrics_of_a_run_are_logged(tmp_path: Path):
    trainer(tmp_path, [rollout(kl=2.0)], evaluation=[rollout(), rollout()]).train(0)
    start, first = lines(tmp_path)
    assert start.keys() >= {"eval_true_reward", "eval_rm_score", "eval_kl"}
    assert start["step"] == 0 and first["step"] == 1
    assert first.keys() >= {
        "true_reward",
        "rm_score",
        "kl",
        "response_length",
        "segments_per_response",
        "segment_length",
        "explained_variance",
        "policy_loss",
        "dense_reward",
        "kl_coef",
        *TIMES,
        "eval_true_reward",
    }
    assert (first["true_reward"], first["kl"], first["responses"]) == (4.0, 2.0, 2)
    assert (first["rollout_seconds"], first["scoring_seconds"]) == (2.0, 1.0)  # the collector's
    tokens_per_response = 1 + 4
    assert first["tokens_per_second"] == pytest.approx(
        tokens_per_response * first["responses_per_second"]
    )
    assert first["responses_per_second"] * first["seconds"] == pytest.approx(2)
    assert first["update_seconds"] <= first["seconds"]


def test_samples_are_written_with_the_segments_rewards(tmp_path: Path):
    trainer(tmp_path, [rollout(score=1.0)]).train(0)
    (sample,) = lines(tmp_path, "samples.jsonl")
    assert (sample["stage"], sample["step"], sample["prompt"]) == (STAGE, 1, "hi")
    first, second = sample["segments"]
    assert (first["text"], first["tokens"], second["text"], second["tokens"]) == ("ab", 2, "c", 1)
    assert [first["value"], first["reward"]] == pytest.approx([1.1, 1.1])
    assert [second["value"], second["reward"]] == pytest.approx([1.2, 1.2])


@pytest.mark.parametrize("interpolation", ["even", "end"])
@pytest.mark.parametrize("total", ["sum", "mean"])
def test_the_rewards_of_a_response_add_up_to_those_of_its_segments(
    interpolation: str, total: str, tmp_path: Path
):
    made = trainer(
        tmp_path,
        [],
        normalizer=NORMALIZER,
        interpolation=interpolation,
        segment_total=total,
    )
    given = rollout(score=1.0)
    normalised = [
        (1.1 - NORMALIZER.mean(0.5)) / NORMALIZER.std(0.5),
        (1.2 - NORMALIZER.mean(1.0)) / NORMALIZER.std(1.0),
    ]
    expected = sum(normalised) / (1 if total == "sum" else 2)
    torch.testing.assert_close(
        made.sources.of(given, None).sum(1),
        torch.full((2,), expected),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dense_with_one_segment_is_bandit(tmp_path: Path):
    settings = {"interpolation": "end", "missing_eos_penalty": None, "normalizer": NORMALIZER}
    one = rollout(score=0.7, ends=(3,), terminated=False)
    dense, bandit = (
        trainer(tmp_path / name, [], granularity=name, **settings).sources.of(one, None)
        for name in ("segment", "bandit")
    )
    assert torch.equal(dense, bandit)
    assert torch.nonzero(dense).tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize(("granularity", "paid"), [("segment", [0, 1, 2, 3]), ("bandit", [3])])
def test_a_response_without_terminator_gets_the_penalty_instead(
    granularity: str, paid: list[int], tmp_path: Path
):
    made = trainer(tmp_path, [], granularity=granularity, missing_eos_penalty=-0.5)
    given = rollout(score=1.0, ends=(3,), terminated=False)
    rewards = made.sources.of(given, None)
    assert rewards[0].tolist() == [-0.5 if column in paid else 0.0 for column in range(4)]
    assert rewards[1].sum().item() == pytest.approx(1.3)


def test_the_kl_penalty_enters_the_returns_and_not_the_dense_reward(tmp_path: Path):
    given = rollout(kl=4.0, score=1.0, ends=(3,))
    made = trainer(tmp_path, [given], kl_coef=0.5, interpolation="end", gamma=1.0)
    made.train(0)
    ((_, returns),) = made.updater.given
    # k1 is 1 nat a token: the return of token j is 1.3 - 0.5 (4 - j), values are 0 and λ = 0.95
    last = 1.3 - 0.5
    expected = [last, last * 0.95 - 0.5]
    assert [returns[0, 3].item(), returns[0, 2].item()] == pytest.approx(expected)
    assert lines(tmp_path)[-1]["dense_reward"] == pytest.approx(1.3)


def test_advantages_are_whitened(tmp_path: Path):
    made = trainer(tmp_path, [rollout(score=1.0)])
    made.train(0)
    ((advantages, _),) = made.updater.given
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_kl_limit_ends_the_training_with_a_checkpoint(tmp_path: Path):
    made = trainer(
        tmp_path, [rollout(kl=1.0), rollout(kl=3.0), rollout()], kl_limit=2.0, eval_every=100
    )
    made.train(0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "checkpoints" / STAGE / "step-00000002").is_dir()
    assert made.summary()["iterations"] == 2
    (notice,) = made.observer.notices
    assert "stopped after iteration 2: KL 3.0" in notice and "ppo.kl_limit 2.0" in notice


def test_a_run_killed_after_its_last_checkpoint_stays_stopped_by_the_limit(tmp_path: Path):
    rollouts = [rollout(kl=3.0), rollout()]
    trainer(tmp_path, rollouts, kl_limit=2.0).train(0)
    again = trainer(tmp_path, rollouts, kl_limit=2.0)
    again.session.restore(again.run.latest_checkpoint(STAGE, Observer()))
    again.train(1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_the_policy_with_the_best_evaluation_is_kept(tmp_path: Path):
    scores = [0.0, 1.0, 3.0, 2.0, 3.0]
    made = trainer(
        tmp_path,
        [rollout()] * 4,
        evaluation=[rollout(score=score, ends=(0,)) for score in scores],
    )
    made.train(0)
    assert made.saved == ["policy_best"] * 3  # the start, then 1.0 and 3.0
    assert made.best == 3.0
    assert made.summary()["eval_rm_score"] == {"start": 0.0, "end": 3.0}


def test_without_evaluation_prompts_no_policy_is_the_best(tmp_path: Path):
    made = trainer(tmp_path, [rollout(score=2.0, ends=(0,)), rollout(score=1.0, ends=(0,))])
    made.train(0)
    assert made.saved == [] and made.best is None
    assert made.summary() == {"iterations": 2}


def test_evaluation_comes_every_so_often_and_at_the_end(tmp_path: Path):
    made = trainer(tmp_path, [rollout()] * 5, evaluation=[rollout()] * 4, eval_every=2)
    made.train(0)
    assert [line["step"] for line in lines(tmp_path) if "eval_kl" in line] == [0, 2, 4, 5]


def test_more_segments_than_at_the_start_are_warned_about_once(tmp_path: Path):
    some, many = rollout(ends=(1, 2)), rollout(ends=(0, 1, 2, 3))
    made = trainer(tmp_path, [some, rollout(ends=(0, 1, 2)), many, many])
    made.train(0)
    (notice,) = made.observer.notices
    assert "rose from 2.0 to 4.0" in notice and "ppo.segment_total=mean" in notice


def test_the_adaptive_kl_goes_on_where_it_was(tmp_path: Path):
    settings = {"kl_coef": 0.1, "kl_target": 0.1, "kl_horizon": 10, "save_every": 1}
    made = trainer(tmp_path, [rollout(kl=4.0)] * 2, **settings)
    made.train(0)
    coefficients = [line["kl_coef"] for line in lines(tmp_path)[1:]]
    # 1 nat a token is beyond the target, so the error is 0.2, over 2 of 10 responses
    assert coefficients == pytest.approx([0.1, 0.1 * 1.04])
    again = trainer(tmp_path, [rollout(kl=4.0)] * 3, **settings)
    again.session.restore(again.run.latest_checkpoint(STAGE, Observer()))
    again.train(2)
    assert lines(tmp_path)[-1]["kl_coef"] == pytest.approx(0.1 * 1.04**2)


def test_everything_is_restored(tmp_path: Path):
    made = trainer(
        tmp_path, [rollout(score=1.0), rollout(score=2.0, ends=(0, 1, 2, 3))], save_every=1
    )
    made.train(0)
    again = trainer(tmp_path, [], save_every=1)
    again.session.restore(again.run.latest_checkpoint(STAGE, Observer()))
    assert (again.best, again.start_segments, again.warned) == (made.best, 2.0, True)
    assert again.updater.actor.value == 2


def test_a_reward_that_is_not_finite_stops_with_the_rollout_kept(tmp_path: Path):
    bad = rollout()
    bad.token_values[0, 1] = float("nan")
    made = trainer(tmp_path, [rollout(), bad], save_every=1)
    with pytest.raises(
        DenserlError, match="stopped at step 2: a reward or log-probability is not finite"
    ) as caught:
        made.train(0)
    assert caught.value.exit_code == 2
    kept = torch.load(tmp_path / "nonfinite" / f"{STAGE}-00000002" / "batch.pt")
    assert kept["token_values"].isnan().sum() == 1
    assert kept["responses"][0].tolist() == [0, 1, 2, 3]
    assert made.run.latest_checkpoint(STAGE, Observer()).step == 1


def test_a_nan_gradient_stops_with_the_rollout_kept(tmp_path: Path):
    made = trainer(tmp_path, [rollout()])

    def fail(*words: Any) -> dict[str, float]:
        with words[-1]():
            raise NonFiniteError("the gradient norm is nan")

    made.updater.update = fail
    with pytest.raises(DenserlError, match="the gradient norm is nan"):
        made.train(0)
    assert (tmp_path / "nonfinite" / f"{STAGE}-00000001" / "batch.pt").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_stop_during_the_first_rollout_does_not_evaluate_twice(tmp_path: Path):
    made = trainer(tmp_path, [rollout()], evaluation=[rollout()] * 2)

    def leave(ids: Any, keys: Any, progress: Any = None) -> Rollout:
        if keys[0][1] >= 2**31:
            return rollout()
        raise made.session.interrupted(0)

    made.collector.collect = leave
    with pytest.raises(Interrupted, match="stopped after iteration 0 of 1"):
        made.train(0)
    again = trainer(tmp_path, [rollout()], evaluation=[rollout()])
    checkpoint = again.run.latest_checkpoint(STAGE, Observer())
    assert checkpoint.step == 0
    again.session.restore(checkpoint)
    again.train(0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
