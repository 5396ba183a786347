"""The same responses cut in two ways, by two cutoffs or two models: how far they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.inspector import Answer, Inspector
from denserl_cli.core.inspection.statistics import at, check_entropies
from denserl_cli.core.inspection.traces import Cut, SegmentedResponse, Trace
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.catalog import list_recipes
from denserl_cli.core.runs.folder import RunFolder

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer


class View(NamedTuple):
    """Responses as one model and one cut see them, and what to call that."""

    name: str
    cut: Cut
    traces: list[Trace]

    @classmethod
    def of(
        cls, name: str, inspector: Inspector, answers: Sequence[Answer], observer: Observer
    ) -> View:
        """What an inspector makes of answers."""
        encoded = [inspector.encode(answer) for answer in answers]
        words = f"{name}, {inspector.cut.words}"
        return cls(words, inspector.cut, inspector.trace(encoded, observer))


class Other(NamedTuple):
    """What responses are to be compared with: a cutoff, or else the recipe of another model.

    trained: whether its run's reward model belongs to it.
    """

    name: str
    cutoff: float | None = None
    recipe: Recipe | None = None
    folder: Path | None = None
    trained: bool = True

    @classmethod
    def named(cls, name: str, recipe: Recipe, folder: Path) -> Other:
        """Find a cutoff in nats, a run folder, a recipe or a model; the first that fits.

        recipe, folder: what a model is read with, since it comes without a recipe; the recipe's
        cutoff is a number. Raises
        DenserlError for a cutoff that is none, and where nothing fits.
        """
        cutoff, path = _cutoff(name), Path(name).expanduser()
        if cutoff is not None:
            return cls(name, cutoff=cutoff)
        if (path / "run.json").is_file():
            theirs = load_recipe(str(path / "recipe.yaml"))
            return cls(theirs.name, recipe=theirs, folder=path)
        if name in list_recipes() or path.is_file():
            theirs = load_recipe(name)
            return cls(theirs.name, recipe=theirs, folder=Path("runs") / theirs.name)
        model = replace(recipe.model, path=name, revision=None, tokenizer=None)
        try:
            load_tokenizer(model)
        except DenserlError as error:
            raise DenserlError(
                f"--compare {name}: neither a number nor a run folder nor a recipe, and as a "
                f"model: {error.message}",
                hint="give a cutoff in nats, a run folder, a recipe, or the folder of a model",
            ) from error
        return cls(name, recipe=replace(recipe, model=model), folder=folder, trained=False)

    def view(self, first: View, answers: Sequence[Answer], observer: Observer) -> View:
        """The answers of the first view, seen in this way."""
        if self.cutoff is not None:
            check_entropies(first.traces)
            cut = at(first.cut, self.cutoff)
            return View(cut.words, cut, first.traces)
        assert self.recipe is not None and self.folder is not None
        run = RunFolder(self.folder, self.recipe)
        inspector = Inspector(self.recipe, run, observer, rewards=self.trained)
        return View.of(self.name, inspector, answers, observer)


def _cutoff(text: str) -> float | None:
    """The number that a text is; None for other words."""
    try:
        cutoff = float(text)
    except ValueError:
        return None
    if not (math.isfinite(cutoff) and cutoff >= 0):
        raise DenserlError(f"{text} is no cutoff", hint="give a number of nats, 0 or more")
    return cutoff


class Agreement(NamedTuple):
    """How far two cuts of the same responses agree, over `responses` of them.

    segments: of each cut. boundaries: ends of segments inside the responses, of each cut; the end
    of a response is no boundary. shared: those that both have, at the same place in the text.
    """

    responses: int
    segments: tuple[int, int]
    boundaries: tuple[int, int]
    shared: int

    @property
    def f1(self) -> float:
        """2 shared / (boundaries of both): 1 where all are shared, and where there are none."""
        total = sum(self.boundaries)
        return 2 * self.shared / total if total else 1.0

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {**self._asdict(), "f1": self.f1}


def agreement(first: Sequence[SegmentedResponse], second: Sequence[SegmentedResponse]) -> Agreement:
    """Compare two cuts of the same responses, made by the same tokenizer or by two."""
    places = [_boundaries(a, b) for a, b in zip(first, second, strict=True)]
    return Agreement(
        len(places),
        (sum(len(a.segments) for a in first), sum(len(b.segments) for b in second)),
        (sum(len(a) for a, _ in places), sum(len(b) for _, b in places)),
        sum(len(a & b) for a, b in places),
    )


def _boundaries(*cuts: SegmentedResponse) -> list[set[int]]:
    """Where segments end inside a response, for each of its cuts: characters before.

    Spaces do not count: two tokenizers may write them differently, and put the space before a word
    into the word or before it. Where one read less than the other, the text that both read counts.
    """
    ends = [
        np.cumsum([len("".join(s.text.split())) for s in one.segments]).tolist() for one in cuts
    ]
    last = min(places[-1] for places in ends)
    return [{place for place in places if 0 < place < last} for places in ends]
