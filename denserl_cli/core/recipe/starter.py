"""A first recipe for a user's own model and data, with comments on what to look at."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, NamedTuple

from denserl_cli.core.recipe.catalog import list_recipes
from denserl_cli.core.recipe.dump import recipe_to_dict
from denserl_cli.core.recipe.json_schema import schema_line
from denserl_cli.core.recipe.loader import load_recipe
from denserl_cli.core.recipe.schema import Granularity, Recipe

_MICRO_BATCH = 4
_BATCH, _TRAIN_BATCH, _ROLLOUTS = 128, 128, 4
"""Rows of an optimizer step, about; and steps that the responses of an iteration make."""
_STEPS = 8
"""Few data make smaller batches, so that an epoch has so many steps."""

_PURPOSE = {
    "segment": "A reward for each segment",
    "token": "A reward for each token",
    "bandit": "One reward a response (classic PPO)",
}
_SEGMENTATION = {
    "segment": """\
# The entropies of a model are its own, so the cutoff is calibrated to a segment length in tokens.
# `denserl segment --recipe {file} --html segments.html` shows the cuts.
segmentation:
  granularity: segment
  cutoff: auto
  segment_length: 8
""",
    "token": "segmentation:\n  granularity: token\n",
    "bandit": "segmentation:\n  granularity: bandit\n",
}
_TEXT = """\
{schema}# {purpose} on {model}.
#
# Commands   denserl validate     {file}
#            denserl plan         --recipe {file}
#            denserl train-rm     --recipe {file}
#            denserl fit-function --recipe {file}
#            denserl train-ppo    --recipe {file}
#
# Whatever is not said here has its default: `denserl recipes show {file}` prints all of it, and
# docs/recipes.md says what it means. The learning rates are those of qwen3-segment, not tuned.

description: {description}

# The starting policy, the frozen reference, and the body of reward model and critic.
model:
  path: {model_value}

{chat}
{segmentation}
# Hub names or files. Pairs have `chosen` and `rejected`; prompts may be the prompts of the pairs.
# Columns of other names: {{path: FILE, columns: {{prompt: question, chosen: good, rejected: bad}}}}
data:
  preferences: {preferences}
  prompts: {prompts}
  max_length: 2048         # tokens of prompt and response; longer prompts lose their beginning
  max_prompt_length: 1728

# Batches are rows of an optimizer step over all GPUs; micro batches are rows on one GPU at a time:
# lower these where memory lacks.
reward_model:
  batch_size: {batch}
  micro_batch_size: {micro}
  learning_rate: 5e-6
{engine}
normalizer:
  pairs: 20000

ppo:
  rollout:
    batch_size: {rollout}
    max_new_tokens: 1024
  train_batch_size: {train}
  micro_batch_size: {micro}
  max_prompt_length: 1024
  actor_learning_rate: 1e-6
  critic_learning_rate: 1e-5
  kl_coef: 0.01              # raise it where the policy drifts away from the reference
{total}  missing_eos_penalty: -0.05 # for responses that do not come to an end
{engine}
# For `denserl plan`: how many GPUs there are{sizes_said}.
recorded:
{recorded}"""
_TOTAL = "  segment_total: mean        # a sum can be raised by making more of them\n"
_ENGINE = """\
  engine:
    zero_stage: 2   # 3 shards the weights, too; `denserl plan` says what fits
"""
_UNKNOWN_CHAT = """\
# Conversations are written by the tokenizer's own chat template. Say here what it needs, such as:
# chat:
#   stop_tokens: ["<|endoftext|>"]    # further tokens that end a response
#   template_arguments: {enable_thinking: false}
"""
_SIZES = (
    *("parameters", "hidden_size", "intermediate_size", "layers", "heads", "key_value_heads"),
    "vocabulary",
)


class Start(NamedTuple):
    """What a first recipe is made from."""

    model: str
    """Hub name or folder of the backbone."""
    preferences: str
    """Hub name or path of preference pairs."""
    prompts: str
    """Hub name or path of prompts."""
    granularity: Granularity
    gpus: int
    """GPUs that train together; 1 also where there is none."""
    pairs: int | None = None
    """Rows of the preference pairs, where they are known."""
    prompt_rows: int | None = None
    """Rows of the prompts, where they are known."""


def starter_recipe(file: str, start: Start) -> str:
    """Return the text of a recipe with comments.

    Args:
        file: what the recipe's file will be called, for the commands in its comments.
        start: what it is about.
    """
    known, file = _shipped(start.model), shlex.quote(file)
    recorded = {"gpus": start.gpus}
    if known is not None and known.recorded and known.model.path == start.model:
        recorded |= {name: getattr(known.recorded, name) for name in _SIZES}
    step = _MICRO_BATCH * start.gpus
    train = _batch(_TRAIN_BATCH, step, start.prompt_rows, _ROLLOUTS)
    purpose = _PURPOSE[start.granularity]
    return _TEXT.format(
        schema=schema_line(),
        purpose=purpose,
        description=_scalar(f"{purpose[0].lower()}{purpose[1:]}".partition(" (")[0]),
        file=file,
        model=start.model,
        model_value=_scalar(start.model),
        chat=_UNKNOWN_CHAT if known is None else _chat(known),
        segmentation=_SEGMENTATION[start.granularity].format(file=file),
        preferences=_scalar(start.preferences),
        prompts=_scalar(start.prompts),
        batch=_batch(_BATCH, step, start.pairs, _STEPS),
        micro=_MICRO_BATCH,
        train=train,
        rollout=train * _ROLLOUTS,
        total="" if start.granularity == "bandit" else _TOTAL,
        engine=_ENGINE if start.gpus > 1 else "",
        sizes_said=", and the size of the model" if len(recorded) > 1 else "",
        recorded="".join(f"  {name}: {value}\n" for name, value in recorded.items()),
    )


def _batch(wanted: int, step: int, rows: int | None, share: int) -> int:
    """About as many rows as wanted, in whole steps of all micro batches, of few rows fewer.

    Args:
        wanted: Rows of a batch.
        step: Rows of the micro batches of all GPUs together.
        rows: Rows of the data, of which a tenth may be held out; None: unknown.
        share: A batch has at most one of so many parts of them.
    """
    steps = round(wanted / step)
    if rows is not None:
        steps = min(steps, (rows - rows // 10) // (share * step))
    return max(1, steps) * step


def _shipped(model: str) -> Recipe | None:
    """The shipped recipe for this model, or for one that differs from it in size alone."""
    family = None
    for name in list_recipes():
        recipe = load_recipe(name)
        if recipe.model.path == model:
            return recipe
        if "/" in model and _family(recipe.model.path) == _family(model):
            family = recipe
    return family


def _family(model: str) -> str:
    """A model's name without its last part where that is a size: `Qwen/Qwen3` of Qwen3-0.6B."""
    return re.sub(r"-[\d.]+[BM]$", "", model)


def _chat(recipe: Recipe) -> str:
    """The chat block of a shipped recipe, without what is at its default."""
    block: dict[str, Any] = recipe_to_dict(recipe)["chat"]
    given = {name: value for name, value in block.items() if value}
    if not given:
        return _UNKNOWN_CHAT
    lines = [f"# What {recipe.name} says about the chat template of this backbone.", "chat:"]
    lines += [f"  {name}: {json.dumps(given[name], ensure_ascii=False)}" for name in given]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """The text in YAML, quoted where it could be read as something else."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~-]*( [A-Za-z][\w-]*)*", text)
    words = ("true", "false", "null", "~")
    return text if plain and text.lower() not in words else json.dumps(text, ensure_ascii=False)
