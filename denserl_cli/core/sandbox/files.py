"""The files of the embedded task: model, tokenizer and data, made once for a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import Recipe, SandboxConfig, Source
from denserl_cli.core.sandbox.language_model import write_model
from denserl_cli.core.sandbox.task import Task
from denserl_cli.core.system.files import replaced_folder, write_text

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.runs.folder import RunFolder


def with_sandbox_files(recipe: Recipe, run: RunFolder, observer: Observer) -> Recipe:
    """The recipe with the sandbox's model and data filled in where it names no others.

    They are made in the run folder at first use.

    Args:
        recipe: As it was loaded.
        run: Where the files are.
        observer: Told progress.

    Raises:
        DenserlError: The folder's sandbox was made with other settings.
    """
    if recipe.sandbox is None:
        return recipe
    folder, settings = run.path / "sandbox", {"seed": recipe.seed, **asdict(recipe.sandbox)}
    made = SandboxFiles.of(folder).settings
    if made.exists() and _read_settings(made) != settings:
        raise DenserlError(
            f"the sandbox in {folder} was made with other settings or another seed",
            hint="name another folder with --out",
        )
    if not made.exists():
        with run.locked(observer):
            run.claim()
            make(recipe.sandbox, folder, seed=recipe.seed, observer=observer)
    files = SandboxFiles.of(folder)
    data = recipe.data
    return replace(
        recipe,
        model=replace(recipe.model, path=recipe.model.path or str(files.model)),
        data=replace(
            data,
            preferences=data.preferences or (Source(str(files.preferences)),),
            prompts=data.prompts or (Source(str(files.prompts)),),
        ),
    )


def _read_settings(file: Path) -> object:
    """What a sandbox was made with; settings that came later have the value that they replaced."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        hint = f"remove {file.parent}; it is made again"
        raise DenserlError(f"{file} is damaged: {error}", hint=hint) from error
    return asdict(SandboxConfig()) | found if isinstance(found, dict) else found


class SandboxFiles(NamedTuple):
    """The paths of a sandbox's files."""

    model: Path
    preferences: Path
    prompts: Path
    settings: Path

    @classmethod
    def of(cls, folder: Path) -> SandboxFiles:
        """The files of the sandbox in `folder`."""
        names = ("model", "preferences.jsonl", "prompts.jsonl", "settings.json")
        return cls(*(folder / name for name in names))


def make(config: SandboxConfig, folder: Path, *, seed: int, observer: Observer) -> SandboxFiles:
    """Write model, tokenizer, preference pairs and prompts to `folder`, unless it exists."""
    files = SandboxFiles.of(folder)
    if folder.is_dir():
        return files
    task = Task(config, seed)
    with replaced_folder(folder) as aside:
        settings = {"seed": seed, **asdict(config)}
        write_text(aside / files.settings.name, json.dumps(settings) + "\n")
        write_model(task, aside / files.model.name, seed=seed, observer=observer)
        rng = np.random.default_rng([seed, 2])
        pairs = [_pair(task, rng) for _ in range(config.pairs)]
        write_text(aside / files.preferences.name, _jsonl(pairs))
        prompts = [{"prompt": prompt} for prompt in task.prompts]
        write_text(aside / files.prompts.name, _jsonl(prompts))
    return files


def _pair(task: Task, rng: np.random.Generator) -> dict[str, object]:
    """Two responses to one prompt, ordered by a noisy Bradley-Terry choice on the true reward."""
    prompt = task.prompts[rng.integers(len(task.prompts))]
    first, second = task.compose(prompt, rng), task.compose(prompt, rng)
    gap = task.true_reward(prompt, first) - task.true_reward(prompt, second)
    odds = gap / task.config.label_temperature
    if rng.random() > 0.5 * (1 + math.tanh(odds / 2)):  # the logistic function, without overflow
        first, second = second, first
    user = {"role": "user", "content": prompt}
    return {
        "chosen": [user, {"role": "assistant", "content": first}],
        "rejected": [user, {"role": "assistant", "content": second}],
    }


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
