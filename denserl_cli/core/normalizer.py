"""Normaliser functions: reward mean and std by location in the response (method §4)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.files import write_text

SCHEMA = 1
"""Version of the normaliser file."""
HUBER_EPSILON = 1.35
HUBER_ALPHA = 1e-4
"""Threshold in units of the scale, and weight of slope²: scikit-learn's defaults."""

Location = TypeVar("Location", float, NDArray[np.float64], Tensor)


@dataclass(frozen=True)
class LocationNormalizer:
    """mean(p) = w_mean log p + b_mean, std(p) = w_std log p + b_std for p in (0, 1] (method §4).

    Zero slopes make it a constant. All coefficients are in the reward model's units.

    Attributes:
        w_mean: Slope of the mean.
        w_std: Slope of the std.
        b_mean: Mean at the end of a response.
        b_std: Std at the end of a response.
        min_std: std never falls below it; None stands for 0.1 * b_std.

    Raises:
        DenserlError: Something is not finite, or b_std or min_std is not positive.
    """

    w_mean: float
    w_std: float
    b_mean: float
    b_std: float
    min_std: float | None = None

    def __post_init__(self) -> None:
        if self.min_std is None:
            object.__setattr__(self, "min_std", 0.1 * self.b_std)
        for name, number in asdict(self).items():
            value = float(number)  # numpy's and torch's numbers cannot be written as JSON
            object.__setattr__(self, name, value)
            if not math.isfinite(value):
                raise DenserlError(f"normalizer: {name} is {value}", hint="fit it again")
            if name in ("b_std", "min_std") and value <= 0:
                raise DenserlError(
                    f"normalizer: {name} must be positive, not {value}",
                    hint="a std of zero or less cannot divide a reward; fit on more responses",
                )

    def mean(self, p: Location) -> Location:
        """Mean reward at location p, of p's kind and shape."""
        return cast(Location, self.w_mean * _log(p) + self.b_mean)

    def std(self, p: Location) -> Location:
        """Std of the reward at location p, at least min_std, of p's kind and shape."""
        std, floor = self.w_std * _log(p) + self.b_std, cast(float, self.min_std)
        if isinstance(std, Tensor):
            return std.clamp(min=floor)
        return cast(
            Location, np.maximum(std, floor) if isinstance(std, np.ndarray) else max(std, floor)
        )

    def save(self, path: Path | str, record: Mapping[str, Any] | None = None) -> None:
        """Write the coefficients, and a record of where they come from, as JSON."""
        content = {"schema": SCHEMA, **asdict(self), "record": dict(record or {})}
        write_text(Path(path), json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> LocationNormalizer:
        """Read what `save` wrote. Raises DenserlError for a missing, broken or unknown file."""
        hint = "run: denserl fit-function, with the recipe of this run"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DenserlError(f"no normalizer at {path}", hint=hint) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DenserlError(f"{path}: cannot be read: {error}", hint=hint) from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise DenserlError(f"{path}: not a normalizer of schema {SCHEMA}", hint=hint)
        names = cls.__dataclass_fields__
        wrong = [name for name in names if type(content.get(name)) not in (int, float)]
        if wrong:
            raise DenserlError(f"{path}: {', '.join(wrong)} missing or not a number", hint=hint)
        try:
            return cls(**{name: content[name] for name in names})
        except (DenserlError, OverflowError) as error:
            raise DenserlError(f"{path}: {error}", hint=hint) from error


class LocationTable(NamedTuple):
    """Statistics by location, (G,) each, ascending in location; std is the population's."""

    location: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    count: NDArray[np.int64]  # type: ignore[assignment]  # hides tuple.count


class HuberLine(NamedTuple):
    """y = slope * x + intercept, and the share of the variance of all points that it explains."""

    slope: float
    intercept: float
    r2: float


def fit_location_normalizer(locations: ArrayLike, rewards: ArrayLike) -> LocationNormalizer:
    """Fit mean and std of segment rewards as functions of their location (method §4).

    Args:
        locations: (segments,), p = (k+1)/K in (0, 1].
        rewards: (segments,), the reward model's values.

    Raises:
        DenserlError: Values are not finite, there are fewer than two locations, or the std is zero.
    """
    table = location_table(locations, rewards)
    mean = huber_line(np.log(table.location), table.mean)
    std = huber_line(np.log(table.location), table.std)
    if abs(std.intercept) < 1e-9 * table.mean.std():  # rounding errors of groups of one reward
        once = int((table.count == 1).sum())
        raise DenserlError(
            f"the standard deviation of rewards is zero: {once} of {len(table.count)} locations "
            "occur only once",
            hint="fit on more responses, or use --set normalizer.kind=global",
        )
    return LocationNormalizer(mean.slope, std.slope, mean.intercept, std.intercept)


def fit_constant_normalizer(rewards: ArrayLike) -> LocationNormalizer:
    """Use one mean and population std for every location (kinds `global` and `last`, method §4).

    rewards: (segments,). Raises DenserlError for values that are not finite or all the same.
    """
    values = _finite(rewards, "rewards")
    if len(values) == 0:
        raise DenserlError("no rewards to fit a normalizer to", hint="use more pairs")
    return LocationNormalizer(0.0, 0.0, float(values.mean()), float(values.std()))


def location_table(locations: ArrayLike, rewards: ArrayLike) -> LocationTable:
    """Group rewards by location, rounded to 3 decimals and never below 0.001 (method §4).

    Args:
        locations: (segments,), in (0, 1].
        rewards: (segments,).

    Returns:
        Mean, std and number of the rewards at each location.

    Raises:
        DenserlError: Values are not finite, or a location is outside (0, 1].
    """
    p, values = _finite(locations, "locations"), _finite(rewards, "rewards")
    assert p.shape == values.shape
    if np.any((p <= 0) | (p > 1)):
        raise DenserlError("locations must be above 0 and at most 1")
    exact, of_exact = np.unique(p, return_inverse=True)
    # Decimal rounding of the exact value, as in text: np.round would turn 0.0025 into 0.002.
    rounded = np.array([max(float(f"{value:.3f}"), 0.001) for value in exact])
    location, of_rounded = np.unique(rounded, return_inverse=True)
    group = of_rounded[of_exact]
    count = np.bincount(group, minlength=len(location))
    mean = np.bincount(group, values, len(location)) / count
    variance = np.bincount(group, np.square(values - mean[group]), len(location)) / count
    return LocationTable(location, mean, np.sqrt(variance), count)


def huber_line(x: ArrayLike, y: ArrayLike) -> HuberLine:
    """Fit a line by Huber regression with a jointly estimated scale (Owen 2007; method §4).

    Minimises sum_i (s + h(r_i / s) s) + alpha slope² over slope, intercept and s > 0, where
    h(z) = z² for |z| <= epsilon, else 2 epsilon |z| - epsilon²: scikit-learn's objective, solved
    more precisely.

    Args:
        x: (points,).
        y: (points,).

    Raises:
        DenserlError: There are fewer than two different x.
    """
    xs, ys = _finite(x, "x"), _finite(y, "y")
    if len(np.unique(xs)) < 2:
        raise DenserlError(
            "a line needs rewards at two or more locations", hint="fit on more responses"
        )
    slope, intercept = _minimize_huber(xs, ys)
    residual = float(np.square(ys - slope * xs - intercept).sum())
    spread = float(np.square(ys - ys.mean()).sum())
    return HuberLine(slope, intercept, 1 - residual / spread if spread > 0 else 0.0)


def _minimize_huber(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Return slope and intercept of the minimum; the objective is convex and smooth."""
    from scipy.optimize import minimize

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope, intercept, scale = parameters
        r = y - slope * x - intercept
        far = np.abs(r) > HUBER_EPSILON * scale
        near_squares, far_count = np.square(r[~far]).sum(), far.sum()
        value = len(x) * scale + near_squares / scale + HUBER_ALPHA * slope**2
        value += 2 * HUBER_EPSILON * np.abs(r[far]).sum() - HUBER_EPSILON**2 * scale * far_count
        pull = np.where(far, -2 * HUBER_EPSILON * np.sign(r), -2 * r / scale)
        by_scale = len(x) - near_squares / scale**2 - HUBER_EPSILON**2 * far_count
        by_slope = (pull * x).sum() + 2 * HUBER_ALPHA * slope
        return value, np.array([by_slope, pull.sum(), by_scale])

    slope, intercept = np.polyfit(x, y, 1)
    scale = max(float(np.std(y - slope * x - intercept)), 1e-9)
    parameters = np.array([slope, intercept, scale])
    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 1e-13, "maxcor": 20}
    bounds = [(None, None), (None, None), (1e-12, None)]
    for _ in range(3):  # the line search stops at rounding errors; a restart finds the last digits
        parameters = minimize(
            objective, parameters, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        ).x
    return float(parameters[0]), float(parameters[1])


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """The values as float64. Raises DenserlError unless all are finite."""
    if isinstance(values, Tensor):  # numpy has no bfloat16
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise DenserlError(
            f"{bad} of {array.size} {name} are not finite", hint="check the reward model"
        )
    return array


def _log(p: Location) -> Location:
    if isinstance(p, Tensor):
        return torch.log(p)
    return cast(Location, np.log(p) if isinstance(p, np.ndarray) else math.log(p))


def normalize(values: Tensor, ends: Tensor, normalizer: LocationNormalizer | None) -> Tensor:
    """Normalise the value of each segment by its location (method §4).

    Args:
        values: (B, T), used at the ends.
        ends: (B, T) bool, of the segments.
        normalizer: None returns the values as they are.

    Returns:
        (B, T); only the ends have a meaning.
    """
    if normalizer is None:
        return values
    location = locations(ends, values.dtype)
    return (values - normalizer.mean(location)) / normalizer.std(location)


def locations(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The location (k+1)/K of each segment k of K, at its end; 1 elsewhere: (B, T)."""
    count = ends.sum(1, keepdim=True).clamp(min=1)
    return (ends.cumsum(1).to(dtype) / count).masked_fill(~ends, 1)
