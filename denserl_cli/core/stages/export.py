"""export: a reward model or policy as a plain Hugging Face folder with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from denserl_cli import __version__
from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.lora import FILES, is_adapters, merged
from denserl_cli.core.models.reward_metadata import RECORD, RewardRecord
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.recipe.stages import STAGES, TRAINING
from denserl_cli.core.sandbox.files import with_sandbox_files
from denserl_cli.core.scoring.calibration import with_calibrated_cutoff
from denserl_cli.core.system.files import replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.runs.folder import RunFolder

Part = Literal["policy", "policy-best", "reward-model"]

_MADE_BY = "Made by denserl"
_CLASS_OF = {
    "policy": "AutoModelForCausalLM",
    "policy-best": "AutoModelForCausalLM",
    "reward-model": "AutoModelForSequenceClassification",
}


def export(part: Part, recipe: Recipe, run: RunFolder, target: Path, *, replace: bool) -> None:
    """Write one part of a finished run to `target`, which transformers loads without denserl.

    Raises DenserlError when the part is not trained yet, or under other settings, and when `target`
    holds something: `replace` allows what an earlier export has left there.
    """
    result = part.replace("-", "_")
    stage = next(name for name in TRAINING if result in STAGES[name].results)
    source = run.path / result
    run.check_settings(stage)  # the card's recipe must be the one that made the model
    summary = run.summary(stage)
    if summary is None or not source.is_dir():
        raise DenserlError(
            f"{run.path} has no finished {part.replace('-', ' ')}",
            hint=f"run: denserl {stage} --recipe {recipe.name} --out {run.path}",
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        if not _is_export(target):
            hint = "name another folder with --to"
            raise DenserlError(f"{target} holds something else than an earlier export", hint=hint)
        if not replace:
            hint = "name another folder with --to, or pass --fresh"
            raise DenserlError(f"{target} is not empty", hint=hint)
    if recipe.segmentation.cutoff == "auto":
        known = (run.reward_model / RECORD).exists()
        record = RewardRecord.load(run.reward_model) if known else None
        recipe = with_calibrated_cutoff(recipe, run, Observer(), record)
    with replaced_folder(target) as folder:
        if is_adapters(source):
            _write_merged(part, with_sandbox_files(recipe, run, Observer()), source, folder)
        ignored = shutil.ignore_patterns(*FILES)
        shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)
        (folder / "README.md").write_text(model_card(part, recipe, summary), encoding="utf-8")


def _is_export(folder: Path) -> bool:
    """Whether an export has made a folder; models that trained or came from elsewhere are none."""
    try:
        return _MADE_BY in (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _write_merged(part: Part, recipe: Recipe, source: Path, target: Path) -> None:
    """Add trained adapters to the weights they were trained over and write the whole model."""
    scalar = part == "reward-model"
    model = merged(recipe, source, scalar=scalar)
    if scalar:
        model.config.pad_token_id = load_chat(recipe)[1].pad_id
    model.save_pretrained(target)


def model_card(part: Part, recipe: Recipe, summary: dict[str, Any]) -> str:
    """The model card: what it is, how to load it, its figures, the recipe that made it."""
    task = "text-classification" if part == "reward-model" else "text-generation"
    base = f"base_model: {recipe.model.path}\n" if recipe.sandbox is None else ""
    figures = "\n".join(f"| {k} | {_shown(v)} |" for k, v in summary.items())
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [denserl, rlhf, {part}]
{base}---

# {recipe.name}: {part.replace("-", " ")}

{_purpose(part, recipe)} {_MADE_BY} {__version__}.

```python
from transformers import {_CLASS_OF[part]}, AutoTokenizer

model = {_CLASS_OF[part]}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Figures

| figure | value |
|---|---|
{figures}

## Recipe

```yaml
{recipe_to_yaml(recipe).rstrip()}
```
"""


def _purpose(part: Part, recipe: Recipe) -> str:
    cut = recipe.segmentation
    how = f"{cut.granularity} rewards"
    if cut.granularity == "segment":
        by = f"cutoff {cut.cutoff} nats" if cut.cut == "entropy" else f"cut: {cut.cut}"
        how += f" ({by})"
    if part == "reward-model":
        return (
            f"A reward model for {how}: its scalar head is read at the last token of each segment; "
            "denserl.json says how segments are cut, normalizer.json how rewards are normalised."
        )
    return f"A policy trained by PPO on {how}."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
