"""Comparison of two ways to cut the same responses, by two cutoffs or two models."""

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
    """Responses as one model reads and one cut segments them.

    name: of the model and the cut, for people.
    """

    name: str
    cut: Cut
    traces: list[Trace]

    @classmethod
    def of(
        cls, name: str, inspector: Inspector, answers: Sequence[Answer], observer: Observer
    ) -> View:
        """The view of an inspector on answers.

        Args:
            name: Of its recipe.
            inspector: Reads the answers.
            answers: To read.
            observer: Told progress.
        """
        encoded = [inspector.encode(answer) for answer in answers]
        title = f"{name}, {inspector.cut.description}"
        return cls(title, inspector.cut, inspector.trace(encoded, observer))


class Other(NamedTuple):
    """The other side of a comparison: a cutoff, or else the recipe of another model.

    trained: whether the run's reward model belongs to the recipe.
    """

    name: str
    cutoff: float | None = None
    recipe: Recipe | None = None
    folder: Path | None = None
    trained: bool = True

    @classmethod
    def named(cls, name: str, recipe: Recipe, folder: Path) -> Other:
        """Find what a name means: a cutoff in nats, a run folder, a recipe or a model.

        Args:
            name: As the user gave it.
            recipe: Settings for a model, which comes without a recipe; its cutoff is a number.
            folder: Run folder for a model.

        Raises:
            DenserlError: A number cannot be a cutoff, or the name is none of these.
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
        """The view of the same answers for this side.

        Args:
            first: The view of the first side.
            answers: Of both.
            observer: Told progress.
        """
        if self.cutoff is not None:
            check_entropies(first.traces)
            cut = at(first.cut, self.cutoff)
            return View(cut.description, cut, first.traces)
        assert self.recipe is not None and self.folder is not None
        run = RunFolder(self.folder, self.recipe)
        inspector = Inspector(self.recipe, run, observer, rewards=self.trained)
        return View.of(self.name, inspector, answers, observer)


def _cutoff(text: str) -> float | None:
    """The cutoff that a text gives; None for a text that is not a number."""
    try:
        cutoff = float(text)
    except ValueError:
        return None
    if not (math.isfinite(cutoff) and cutoff >= 0):
        raise DenserlError(f"{text} cannot be a cutoff", hint="give a number of nats, 0 or more")
    return cutoff


class Agreement(NamedTuple):
    """How far two cuts of the same responses agree.

    Attributes:
        responses: Their number.
        segments: Number of segments of each cut.
        boundaries: Number of segment ends inside the responses, of each cut; the end of a response
            does not count.
        shared: Number of boundaries that both have at the same position in the text.
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
        """What `denserl segment --compare --json` prints of it."""
        return {**self._asdict(), "f1": self.f1}


def agreement(first: Sequence[SegmentedResponse], second: Sequence[SegmentedResponse]) -> Agreement:
    """Compare two cuts of the same responses, made with the same tokenizer or with two."""
    boundaries = [_boundaries(a, b) for a, b in zip(first, second, strict=True)]
    return Agreement(
        len(boundaries),
        (sum(len(a.segments) for a in first), sum(len(b.segments) for b in second)),
        (sum(len(a) for a, _ in boundaries), sum(len(b) for _, b in boundaries)),
        sum(len(a & b) for a, b in boundaries),
    )


def _boundaries(*cuts: SegmentedResponse) -> list[set[int]]:
    """Where segments end inside a response, for each of its cuts: the number of characters before.

    Spaces do not count: one tokenizer may put the space before a word into the word's token, and
    another one before it. Where one cut is of a longer text, only the text of both is compared.
    """
    ends = [
        np.cumsum([len("".join(s.text.split())) for s in one.segments]).tolist() for one in cuts
    ]
    last = min(of_one[-1] for of_one in ends)
    return [{end for end in of_one if 0 < end < last} for of_one in ends]
