"""What is to be answered: which questions, by which policy, under which settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.answers.formats import Benchmark, Question

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe


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
        """Everything that decides the answers file, but for the rounding of another batch."""
        asked = [[question.id, question.turns] for question in self.questions]
        return {
            "benchmark": self.benchmark.name,
            "questions": hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
            "generator": self.generator,
            "max_new_tokens": self.max_new_tokens,
            **self._generation(recipe),
        }

    def fingerprint(self, recipe: Recipe) -> str:
        """Six hexadecimal digits for what decides the answers: the same for every benchmark."""
        own = self.max_new_tokens == self.benchmark.max_new_tokens
        made = {**self._generation(recipe), "max_new_tokens": None if own else self.max_new_tokens}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:6]

    def _generation(self, recipe: Recipe) -> dict[str, Any]:
        """What decides the answer to a question, but for its longest length."""
        return {
            "policy": _identity(self.policy or recipe.model.path),
            "sandbox": asdict(recipe.sandbox) if recipe.sandbox else None,
            "seed": recipe.seed,
            "temperature": self.temperature,
            "tokenizer": recipe.model.tokenizer or recipe.model.path,
            "dtype": recipe.model.dtype,
            "chat": asdict(recipe.chat),
        }


def _identity(policy: str) -> str:
    """A digest of a folder's weights and settings, wherever it lies; a hub name as it is."""
    folder = Path(policy)
    if not policy or not folder.is_dir():
        return policy
    files = [
        (file, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".bin", ".json") and file.is_file()
    ]
    return _digest(tuple(files))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A digest of files, with sizes and times so that each is read once as long as it stays."""
    digest = hashlib.sha256()
    for file, *_ in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"
