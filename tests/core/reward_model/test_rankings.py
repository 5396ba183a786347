"""Rankings of several answers through train-rm: the Plackett-Luce loss beside that of pairs."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.loading import load_pairs
from denserl_cli.core.engine.random_state import seed_everything
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import TIMES, Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.reward_model.loss import PreferenceObjective
from denserl_cli.core.reward_model.metrics import preference_metrics
from denserl_cli.core.reward_model.trainer import RewardTrainer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import SandboxFiles
from denserl_cli.core.stages.run import run_stage
from tests.fakes import RecordingObserver

COLUMNS = '{prompt: prompt, answers: "answers[*]", scores: "scores[*]"}'


def ranking_file(slots: SandboxFiles, path: Path, sizes: tuple[int, ...]) -> Path:
    """The sandbox's pairs with answers of the next rows between them; sizes come in turns."""
    rows = [json.loads(line) for line in Path(slots.preferences).read_text().splitlines()]
    written = []
    for place, row in enumerate(rows):
        known = [row[side][-1]["content"] for side in ("rejected", "chosen")]
        more = [rows[(place + n) % len(rows)]["chosen"][-1]["content"] for n in range(1, 9)]
        others = [text for text in dict.fromkeys(more) if text not in known]
        others = others[: sizes[place % len(sizes)] - 2]
        answers = [*known, *others]  # in no order
        scores = [-1.0, 9.0, *range(len(others), 0, -1)]
        written.append({"prompt": row["chosen"][:-1], "answers": answers, "scores": scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def ranked(settings: list[str], file: Path, *more: str) -> Recipe:
    source = f"data.preferences=[{{path: {file}, columns: {COLUMNS}, pairs: ranking}}]"
    return load_recipe("sandbox-segment", [*settings, source, *more])


def train(recipe: Recipe, folder: Path, mode: Any = "start", observer: Any = None) -> bytes:
    run_stage("train-rm", recipe, folder, mode, observer or Observer())
    return (folder / "reward_model" / "model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def trainer(recipe: Recipe, folder: Path) -> RewardTrainer:
    tokenizer, chat = load_chat(recipe)
    data = load_pairs(recipe, chat, Observer())
    seed_everything(recipe.seed)
    return RewardTrainer(
        recipe,
        RunFolder(folder, recipe),
        Observer(),
        rows=data.train,
        evaluation=data.evaluation,
        batches=[np.arange(8)],
        tokenizer=tokenizer,
        pad_id=chat.pad_id,
    )


def step(made: RewardTrainer, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Any]:
    """The metrics of a step on the first eight rows, and its gradient."""
    found: list[torch.Tensor] = []
    real = made.engine.check

    def look() -> None:
        parameters = made.engine.model.parameters()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        real()

    monkeypatch.setattr(made.engine, "check", look)
    return made.update(1, np.arange(8)), found[0]


def plackett_luce(scores: list[float]) -> float:
    """Minus the log-probability that answers are chosen in this order."""
    return sum(
        math.log(sum(math.exp(other) for other in scores[k:])) - scores[k]
        for k in range(len(scores))
    )


def test_a_ranking_of_two_is_a_pair(slots: SandboxFiles, settings: list[str], tmp_path: Path):
    file = ranking_file(slots, tmp_path / "two.jsonl", (2,))
    weights = train(ranked(settings, file), tmp_path / "ranked")
    assert weights == train(load_recipe("sandbox-segment", settings), tmp_path / "pairs")
    assert metrics(tmp_path / "ranked") == metrics(tmp_path / "pairs")


def test_loss_and_metrics_are_those_of_the_scores_by_hand():
    # rows: a ranking of three, a pair, a ranking of four; all chosen, all rejected, the others
    scores = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5, 0.0, 1.0, 3.0, -2.0], requires_grad=True)
    rankings = [[2.0, 1.0, -1.0], [0.5, 1.5], [1.0, 3.0, -2.0, 0.0]]
    segments, margin = torch.arange(1, 10), torch.tensor([math.nan, 0.3, math.nan])
    objective = PreferenceObjective(temperature=0.5, center_rewards=0.1)
    found = preference_metrics(scores, segments, margin, objective, np.array([1, 0, 2]))
    losses = [plackett_luce([2 * one for one in row]) for row in rankings]
    losses[1] = -math.log(1 / (1 + math.exp(-((0.5 - 1.5) * 2 - 0.3))))  # the pair has a margin
    center = [0.1 * (2 * np.mean(row)) ** 2 for row in rankings]
    assert found["loss"].item() == pytest.approx(np.mean(losses) + np.mean(center))
    right = [[a > b for a, b in combinations(row, 2)] for row in rankings]
    assert found["accuracy"].item() == pytest.approx(np.mean([np.mean(one) for one in right]))
    assert found["reward_mean"].item() == pytest.approx(np.mean([np.mean(r) for r in rankings]))
    means = [(1 + 7 + 4) / 3, (2 + 5) / 2, (3 + 8 + 9 + 6) / 4]
    assert found["segments_per_response"].item() == pytest.approx(np.mean(means))
    plain = preference_metrics(scores, segments, None, PreferenceObjective(), np.array([1, 0, 2]))
    plain["loss"].backward()
    chosen = np.exp([2.0, 1.0, -1.0])
    first, second = chosen / chosen.sum(), np.append(0, chosen[1:] / chosen[1:].sum())
    by_hand = (first + second - [1, 1, 0]) / 3  # of the ranking of three, a third of the mean
    assert scores.grad is not None
    assert scores.grad[[0, 6, 3]].tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)


@pytest.mark.parametrize("sizes", [(3,), (2, 4, 3)])
def test_packing_and_micro_batches_change_nothing(
    slots: SandboxFiles, settings: list[str], tmp_path: Path, monkeypatch, sizes: tuple[int, ...]
):
    file = ranking_file(slots, tmp_path / "ranked.jsonl", sizes)
    found = []
    for packing, size in (("true", 8), ("false", 8), ("true", 2), ("false", 2)):
        more = (f"model.packing={packing}", f"reward_model.micro_batch_size={size}")
        made = trainer(ranked(settings, file, *more), tmp_path / "run")
        evaluated = {k: v for k, v in made.evaluate().items() if isinstance(v, float)}
        numbers, gradient = step(made, monkeypatch)
        found.append((numbers | evaluated, gradient))
    (whole, gradient), *others = found
    assert len(whole) > 10 and torch.isfinite(gradient).all()
    for numbers, other in others:
        assert numbers == pytest.approx(whole, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_rankings_survive_the_cache_and_a_kill(
    slots: SandboxFiles, settings: list[str], tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DENSERL_CACHE", str(tmp_path / "cache"))
    file = ranking_file(slots, tmp_path / "ranked.jsonl", (2, 4, 3))
    recipe = ranked(settings, file)
    weights = train(recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(done: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):  # its rows and segments come from the cache
        train(recipe, tmp_path / "killed", observer=RecordingObserver(die))
    assert train(recipe, tmp_path / "killed", "resume") == weights
    logged = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == logged and 0 < logged[-1]["eval_accuracy"] <= 1
    monkeypatch.setenv("DENSERL_CACHE", str(tmp_path / "another"))
    assert train(recipe, tmp_path / "anew") == weights


def test_the_later_stages_read_every_answer(
    slots: SandboxFiles, settings: list[str], tmp_path: Path
):
    recipe = ranked(settings, ranking_file(slots, tmp_path / "ranked.jsonl", (3,)))
    train(recipe, tmp_path / "run")
    run_stage("fit-function", recipe, tmp_path / "run", "start", Observer())
    from denserl_cli.core.evaluation.reward_model import evaluate_reward_model

    run = RunFolder(tmp_path / "run", recipe)
    found = evaluate_reward_model(recipe, run, Observer(), name="held-out")
    held = recipe.data.eval_pairs and 6  # a tenth of the rows
    assert found["pairs"] == 3 * held
    logged = metrics(tmp_path / "run")[-1]
    assert found["accuracy"] == pytest.approx(logged["eval_accuracy"])
    assert found["length"]["longer_accuracy"] == pytest.approx(logged["eval_longer_accuracy"])


def test_a_margin_of_a_ranking_is_refused(slots: SandboxFiles, settings: list[str], tmp_path: Path):
    file = ranking_file(slots, tmp_path / "ranked.jsonl", (3,))
    rows = [json.loads(line) | {"margin": 1.0} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DenserlError, match=r"no meaning for a ranking.*ranked\.jsonl:"):
        train(ranked(settings, file), tmp_path / "run")
    assert train(ranked(settings, file, "reward_model.margins=ignore"), tmp_path / "ignored")
