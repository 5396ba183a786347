"""import-normalizer: coefficients that the authors' code wrote become a run's normaliser.

Their file is nested JSON with the keys model, data set and cutoff, and then four numbers in the
order of method §4's table. The cutoffs 0 and 1000 are the granularities token and bandit (method
§2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.recipe.stages import FIT_FUNCTION
from denserl_cli.core.scoring.resolve import prepare, reward_record

if TYPE_CHECKING:
    from denserl_cli.core.models.reward_metadata import RewardRecord
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import Mode, RunFolder


class Entry(NamedTuple):
    """A value of the file and the keys that lead to it."""

    path: tuple[str, ...]
    value: Any

    def __str__(self) -> str:
        return ".".join(self.path)

    @property
    def cutoff(self) -> float | None:
        """The last key that is a number; None without one."""
        return next((c for c in map(_number, reversed(self.path)) if c is not None), None)

    def under(self, key: str) -> bool:
        """Whether the key, or neighbouring keys joined by dots, are part of the path."""
        depths = range(len(self.path))
        return any(".".join(self.path[i : j + 1]) == key for i in depths for j in depths[i:])

    def fits(self, record: RewardRecord) -> bool:
        """Whether the entry is for the reward model's granularity and cutoff."""
        asked = {"token": 0.0, "bandit": 1000.0}.get(record.granularity, record.cutoff)
        return self.cutoff is not None and self.cutoff == asked


def import_normalizer(
    recipe: Recipe,
    run: RunFolder,
    file: Path,
    keys: Sequence[str],
    mode: Mode,
    observer: Observer,
) -> None:
    """Make an entry of a coefficient file the normaliser of the run's reward model.

    Args:
        recipe: As it was loaded.
        run: Has the reward model.
        file: The coefficient file.
        keys: Parts of the entry's path, needed when several entries fit.
        mode: `fresh` replaces a normaliser that the run has.
        observer: Told the result.

    Raises:
        DenserlError: The run has no reward model, the file has no entry for it or several, the
            entry is damaged, or the run has a normaliser already.
    """
    entries, record = read_entries(file), reward_record(recipe, run)
    kind = "global" if record.granularity == "bandit" else "location"
    if recipe.normalizer.kind != kind:
        raise DenserlError(
            f"normalizer.kind is {recipe.normalizer.kind}; imported coefficients are {kind}",
            hint=f"pass --set normalizer.kind={kind}",
        )
    entry = choose(entries, keys, record, file)
    normalizer = to_normalizer(entry, file, record.granularity, recipe.normalizer.min_std)
    prepare(recipe, run, observer, reward_model=True)
    if run.normalizer.exists() and mode != "fresh":
        raise DenserlError(
            f"the reward model of {run.path} has a normaliser already",
            hint="replace it with --fresh, or name another folder with --out",
        )
    if mode != "fresh":
        run.check_later(FIT_FUNCTION)
    run.started(FIT_FUNCTION, mode, observer)
    about = {
        "kind": kind,
        "granularity": record.granularity,
        "cutoff": record.cutoff,
        "source": f"{entry} of {file}",
    }
    normalizer.save(run.normalizer, about)
    run.finished(FIT_FUNCTION, about)
    rows = [[name, getattr(normalizer, name)] for name in normalizer.__dataclass_fields__]
    observer.table("normaliser", ["metric", "value"], [*rows, ["source", about["source"]]])


def read_entries(file: Path) -> list[Entry]:
    """The leaves of a nested JSON mapping. Raises DenserlError for any other file."""
    try:
        # integers as float: none is too large to test
        tree = json.loads(file.read_text(encoding="utf-8-sig"), parse_int=float)
        entries = list(_leaves(tree, ()))
    except OSError as error:
        raise DenserlError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DenserlError(f"{file} is not JSON: {error}", hint=_EXPECTED) from error
    if not isinstance(tree, dict) or not entries:
        raise DenserlError(f"{file} is not a mapping with coefficients", hint=_EXPECTED)
    return entries


def choose(
    entries: Sequence[Entry], keys: Sequence[str], record: RewardRecord, file: Path
) -> Entry:
    """The one entry that fits a reward model.

    Args:
        entries: Of the file.
        keys: Parts of the path that it must have.
        record: Of the reward model.
        file: For errors.

    Raises:
        DenserlError: There is none, or several.
    """
    cutoff = "" if record.cutoff is None else f" with cutoff {record.cutoff:g}"
    wanted = f"{record.granularity}{cutoff}"
    for key in keys:
        if not any(entry.under(key) for entry in entries):
            raise DenserlError(f"{file} has no key {key!r}; it has{_listed(entries)}")
    named = [entry for entry in entries if all(entry.under(key) for key in keys)]
    fitting = [entry for entry in named if entry.fits(record)]
    if not fitting:
        under = f" under {' and '.join(keys)}" if keys else ""
        raise DenserlError(
            f"{file} has no entry for {wanted}{under}; it has{_listed(named or entries)}",
            hint="the last number of a path is its cutoff; 0 stands for token, 1000 for bandit",
        )
    if len(fitting) > 1:
        raise DenserlError(
            f"several entries of {file} are for {wanted}:{_listed(fitting)}",
            hint=f"choose one: --key {fitting[0]}",
        )
    return fitting[0]


def to_normalizer(
    entry: Entry, file: Path, granularity: str, min_std: float | None
) -> LocationNormalizer:
    """The normaliser of an entry.

    Args:
        entry: Of the file.
        file: For errors.
        granularity: Of the reward model; bandit uses the two coefficients at location 1 alone.
        min_std: Floor of the std; None is the default.

    Raises:
        DenserlError: The entry is not four finite numbers with a positive std.
    """
    where, values = f"{file}: {entry}", entry.value
    if not isinstance(values, list) or [type(value) for value in values] != [float] * 4:
        raise DenserlError(
            f"{where} must be a list of four numbers, not {json.dumps(values)[:80]}", hint=_EXPECTED
        )
    if not all(map(math.isfinite, values)):
        raise DenserlError(f"{where} has a number that is not finite: {values}")
    w_mean, w_std, b_mean, b_std = values
    if b_std <= 0:
        raise DenserlError(
            f"{where}: the standard deviation at the end of a response (its fourth number) is "
            f"{b_std:g}, and must be positive",
            hint=_EXPECTED,
        )
    if granularity == "bandit":  # its one location is 1, where log p = 0
        w_mean = w_std = 0.0
    return LocationNormalizer(w_mean, w_std, b_mean, b_std, min_std)


_EXPECTED = (
    'expected {"model": {"data set": {"1.75": [w_mean, w_std, b_mean, b_std]}}}, nested to any '
    "depth"
)


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[Entry]:
    if not isinstance(tree, dict):
        yield Entry(path, tree)
        return
    for key, child in tree.items():
        yield from _leaves(child, (*path, key))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _listed(entries: Sequence[Entry]) -> str:
    return "".join(f"\n  {entry}" for entry in entries)
