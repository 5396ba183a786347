"""What is to be answered: whose answers, to which questions, under which settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from denserl_cli.core.benchmarks.formats import Benchmark, Question
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.run import RunFolder

START = "start"
"""In place of a policy's path: the recipe's starting model."""


class Policy(NamedTuple):
    """A policy and what to call it. path: None for the starting model."""

    path: str | None
    name: str
    notice: str = ""


def choose_policy(recipe: Recipe, run: RunFolder, asked: str | None) -> Policy:
    """The policy that is asked for; else the run's own; else the one published with the recipe.

    asked: hub name, folder, or START. Raises DenserlError when there is none, and when the run's is
    not finished or was trained by other settings.
    """
    if asked == START:
        return Policy(None, f"{recipe.name}-start")
    if asked is not None:
        return _given(expanduser(asked))
    run.admit("train-ppo", "resume")
    if run.interrupted("train-ppo"):
        raise DenserlError(
            f"train-ppo in {run.path} is not finished",
            hint="finish it with denserl train-ppo --resume, or name a policy with --policy",
        )
    if run.summary("train-ppo") is not None:
        return Policy(str(run.policy), recipe.name)
    if recipe.published is not None and recipe.published.policy:
        path = recipe.published.policy
        notice = f"{run.path} has no policy; using the published one, {path}"
        return _given(path)._replace(notice=notice)
    raise DenserlError(
        f"{run.path} has no policy",
        hint=f"run denserl train-ppo --recipe {recipe.name}, or name a policy with --policy",
    )


def _given(path: str) -> Policy:
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise DenserlError(f"--policy {path}: no such folder", hint="check the path")
    return Policy(path, Path(path).resolve().name)


@dataclass(frozen=True)
class Job:
    """Which policy answers which questions, how, and where the answers go.

    policy: hub name or folder; None: the recipe's starting model. temperature: for every question;
    None: the benchmark's own.
    """

    benchmark: Benchmark
    questions: Sequence[Question]
    policy: str | None
    generator: str
    target: Path
    max_new_tokens: int
    batch_size: int
    temperature: float | None = None

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Everything that decides the answers, but for the rounding of another batch."""
        asked = [[question.id, question.turns] for question in self.questions]
        return {
            "benchmark": self.benchmark.name,
            "questions": hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
            "policy": _identity(self.policy or recipe.model.path),
            "sandbox": asdict(recipe.sandbox) if recipe.sandbox else None,
            "generator": self.generator,
            "seed": recipe.seed,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "tokenizer": recipe.model.tokenizer or recipe.model.path,
            "dtype": recipe.model.dtype,
            "chat": asdict(recipe.chat),
        }


def _identity(policy: str) -> str:
    """A digest of a folder's weights and settings, wherever it lies; a hub name as it is."""
    folder = Path(policy)
    if not policy or not folder.is_dir():
        return policy
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json") and file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"
