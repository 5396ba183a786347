"""`cutoff: auto`: calibrated once for a run, on the recipe's preference pairs, before training.

The run folder keeps the number, and wherever else a cutoff is recorded it is this number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.batches import collate_sequences, micro_batches
from denserl_cli.core.data.conversations import Pair, read_pairs
from denserl_cli.core.data.encoding import encode_pairs
from denserl_cli.core.data.kinds import has_steps
from denserl_cli.core.engine.factory import freeze
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import device
from denserl_cli.core.models.lora import load_reference
from denserl_cli.core.recipe import recipe_to_dict
from denserl_cli.core.recipe.resolved import ResolvedSegmentation
from denserl_cli.core.scoring.scorer import Scorer
from denserl_cli.core.segmentation import calibrate_cutoff, segment_ends, segment_ids
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from denserl_cli.core.models.reward_metadata import RewardRecord
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder

FILE = "cutoff.json"
"""File in a run folder that holds its cutoff and the settings that made it."""
PAIRS = 250
"""Preference pairs to calibrate on; both sides are used."""
BATCH = 16


class Calibration(NamedTuple):
    """A cutoff in nats, and the mean length of the segments that it gives, in tokens."""

    cutoff: float
    segment_length: float


def with_calibrated_cutoff(
    recipe: Recipe, run: RunFolder, observer: Observer, record: RewardRecord | None = None
) -> Recipe:
    """The recipe with its cutoff as a number, also where it says `auto`.

    Args:
        recipe: With the sandbox's files filled in.
        run: Where a calibrated cutoff is recorded.
        observer: Told the calibrated cutoff.
        record: Of the reward model that the command uses, whose cutoff is taken. Without one it is
            that of the recipe's published model, or is calibrated and recorded in the run folder.

    Raises:
        DenserlError: The reward model's cutoff was calibrated for another length, or there are no
            pairs to calibrate on.
    """
    cut, published = recipe.segmentation, recipe.published
    if cut.cutoff != "auto":
        return recipe
    if record is not None:
        found = _recorded(run)
        length = found.get("settings", {}).get("segment_length", cut.segment_length)
        if found.get("cutoff") == record.cutoff and length != cut.segment_length:
            raise DenserlError(
                f"the recipe contradicts the reward model in {run.reward_model}: "
                f"segmentation.segment_length is {cut.segment_length}, the reward model's cutoff "
                f"was calibrated for {length}",
                hint="change the recipe back, or train a reward model for it in another folder",
            )
        cutoff = record.cutoff
    elif published is not None and published.granularity == "segment":
        cutoff = published.cutoff
    else:
        cutoff = _calibrated_once(recipe, run, observer)
    return replace(recipe, segmentation=replace(cut, cutoff=cutoff))


def calibrate(
    scorer: Scorer,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    terminated: Sequence[bool],
    *,
    length: float,
    pad_id: int,
) -> Calibration:
    """Find the cutoff that cuts responses into segments of `length` tokens on average.

    Args:
        scorer: Its reference gives the entropies.
        prompts: Ids of each prompt.
        responses: Ids of each response.
        terminated: Whether each response has its terminator.
        length: Mean tokens of a segment.
        pad_id: Token that fills batches up.
    """
    shape = (len(responses), max(map(len, responses)))
    entropy, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    for part in micro_batches(lengths, np.arange(len(responses)), BATCH):
        batch = collate_sequences(
            [prompts[i] for i in part], [responses[i] for i in part], pad_id, device()
        )
        found = scorer(batch).entropy
        assert found is not None
        rows, width = torch.from_numpy(part), found.shape[1]
        entropy[rows, :width] = found.float().cpu()
        mask[rows, :width] = batch.response_mask.cpu()
    ended = torch.tensor(list(terminated))
    cutoff = calibrate_cutoff(entropy, mask, length, ended)
    ends = segment_ends(entropy, mask, granularity="segment", cutoff=cutoff, terminated=ended)
    inside = (segment_ids(ends, mask) >= 0).sum()
    return Calibration(cutoff, float(inside / ends.sum()))


def sample_pairs(recipe: Recipe, limit: int, observer: Observer) -> list[Pair]:
    """Up to `limit` usable preference pairs, equally many from each source of the recipe."""
    for source in recipe.data.preferences:
        if has_steps(source):
            raise DenserlError(
                f"{source.path} has steps with labels, and preference pairs are needed here",
                hint="set segmentation.cut=newline, or a cutoff; `segment` takes --text and --file",
            )
    drawn = [
        replace(source, max_samples=min(4 * limit, source.max_samples or 4 * limit))
        for source in recipe.data.preferences
    ]
    pairs = read_pairs(
        drawn, seed=recipe.seed, strict=recipe.data.strict, notice=observer.notice
    ).pairs
    return pairs[:: max(1, len(pairs) // limit)][:limit]


def _calibrated_once(recipe: Recipe, run: RunFolder, observer: Observer) -> float:
    """The cutoff that the run folder has for these settings, or a new one, recorded there."""
    settings, found = _settings(run), _recorded(run)
    if found.get("settings") == settings:
        return found["cutoff"]
    length = recipe.segmentation.segment_length
    assert length is not None, "filled in when the recipe is loaded"
    if not recipe.data.preferences:
        raise DenserlError(
            "segmentation.cutoff: auto needs preference pairs, and the recipe has none",
            hint="add data.preferences, or choose a cutoff: --set segmentation.cutoff=NATS",
        )
    _, chat = load_chat(recipe)
    limits = {name: getattr(recipe.data, name) for name in ("max_length", "max_prompt_length")}
    rows = encode_pairs(chat, sample_pairs(recipe, PAIRS, observer), **limits).rows
    sides = [(row.prompt, side) for row in rows for side in (row.chosen, row.rejected, *row.others)]
    prompts, responses = map(list, zip(*sides, strict=True))
    calibration = calibrate(
        Scorer(
            ResolvedSegmentation(cutoff=0.0),
            reference=freeze(load_reference(recipe), recipe),
        ),
        prompts,
        responses,
        [True] * len(responses),
        length=length,
        pad_id=chat.pad_id,
    )
    document = {"schema": 1, **calibration._asdict(), "responses": len(responses)}
    text = json.dumps({**document, "settings": settings}, indent=2) + "\n"
    with run.locked(observer):
        run.claim()
        write_text(run.path / FILE, text)
    observer.notice(
        f"segmentation.cutoff: auto is {calibration.cutoff:.4f} nats, which gives segments of "
        f"{calibration.segment_length:.1f} tokens on average ({len(responses)} responses); "
        f"recorded in {run.path / FILE}"
    )
    return calibration.cutoff


def _settings(run: RunFolder) -> dict[str, Any]:
    """The settings of the user's recipe that a calibrated cutoff depends on."""
    asked = recipe_to_dict(run.recipe)
    data = ("preferences", "max_length", "max_prompt_length")
    return {
        **{name: asked.get(name) for name in ("seed", "sandbox", "model", "chat")},
        "data": {name: asked["data"][name] for name in data},
        "segment_length": run.recipe.segmentation.segment_length,
    }


def _recorded(run: RunFolder) -> dict[str, Any]:
    """The content of the run folder's cutoff file; empty when it is missing or damaged."""
    try:
        found = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    cutoff = found.get("cutoff") if isinstance(found, dict) else None
    return found if isinstance(cutoff, float) and math.isfinite(cutoff) else {}
