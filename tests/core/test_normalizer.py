from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import (
    LocationNormalizer,
    fit_constant_normalizer,
    fit_location_normalizer,
    huber_line,
    location_table,
)

PUBLISHED = LocationNormalizer(1.7340, 0.9906, 1.3212, 5.4513)


def test_mean_and_std_keep_the_kind_of_their_argument():
    half = math.log(0.5)
    mean, std = 1.7340 * half + 1.3212, 0.9906 * half + 5.4513
    assert type(PUBLISHED.mean(0.5)) is type(PUBLISHED.std(0.5)) is float
    assert PUBLISHED.mean(0.5) == pytest.approx(mean)
    assert PUBLISHED.std(0.5) == pytest.approx(std)
    for kind in (np.array, torch.tensor):
        p = kind([0.5, 1.0])
        assert type(PUBLISHED.mean(p)) is type(PUBLISHED.std(p)) is type(p)
        np.testing.assert_allclose(PUBLISHED.mean(p), [mean, 1.3212], rtol=1e-6)
        np.testing.assert_allclose(PUBLISHED.std(p), [std, 5.4513], rtol=1e-6)


def test_std_stops_at_its_floor():
    assert PUBLISHED.min_std == pytest.approx(0.54513)
    early = 1 / 300
    for value in (
        PUBLISHED.std(early),
        PUBLISHED.std(np.array([early]))[0],
        PUBLISHED.std(torch.tensor([early])).item(),
    ):
        assert value == pytest.approx(0.54513)
    assert LocationNormalizer(0, 1, 0, 1, min_std=0.25).std(0.1) == 0.25


@pytest.mark.parametrize(
    ("coefficients", "complaint"),
    [
        ((0, 0, 0, 0), "b_std must be positive"),
        ((0, 0, 0, -1), "b_std must be positive"),
        ((0, 0, 0, 1, 0), "min_std must be positive"),
        ((0, 0, 0, 1, math.inf), "min_std is inf"),
        ((math.nan, 0, 0, 1), "w_mean is nan"),
    ],
)
def test_impossible_coefficients(coefficients, complaint):
    with pytest.raises(DenserlError, match=complaint):
        LocationNormalizer(*coefficients)


def test_saved_and_loaded_is_the_same(tmp_path):
    path = tmp_path / "new" / "normalizer.json"
    PUBLISHED.save(path, record={"kind": "location", "segments": 12})
    assert LocationNormalizer.load(path) == PUBLISHED
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["record"] == {"kind": "location", "segments": 12}
    assert [file.name for file in path.parent.iterdir()] == ["normalizer.json"]


GOOD = {"schema": 1, "w_mean": 0.0, "w_std": 0, "b_mean": 0.5, "b_std": 2.0, "min_std": 0.2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[1]", "not a normalizer of schema 1"),
        (json.dumps(GOOD | {"schema": 2}), "not a normalizer of schema 1"),
        (json.dumps({"schema": 1, "w_mean": "1", "w_std": True}), "w_mean, w_std, b_mean, b_std"),
        (json.dumps(GOOD | {"b_std": 0.0}), "b_std must be positive"),
        (json.dumps(GOOD | {"b_mean": math.nan}), "b_mean is nan"),
        (json.dumps(GOOD | {"b_mean": 10**400}), "too large"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, complaint):
    path = tmp_path / "normalizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DenserlError, match=complaint) as caught:
        LocationNormalizer.load(path)
    assert str(path) in caught.value.message
    assert "fit-function" in caught.value.hint


def test_whole_numbers_are_numbers(tmp_path):
    path = tmp_path / "normalizer.json"
    path.write_text(json.dumps(GOOD))
    assert LocationNormalizer.load(path) == LocationNormalizer(0, 0, 0.5, 2.0, 0.2)


def test_numbers_and_samples_of_numpy_and_torch_are_taken(tmp_path):
    made = LocationNormalizer(np.float32(0.5), 0, torch.tensor(1.0), np.float64(2))
    made.save(tmp_path / "n.json")
    assert LocationNormalizer.load(tmp_path / "n.json") == made
    places, rewards = [0.5, 1.0, 0.5, 1.0], [1.0, 2.0, 3.0, 5.0]
    halves = torch.tensor(rewards, requires_grad=True).bfloat16()
    expected = fit_location_normalizer(places, rewards)
    assert fit_location_normalizer(torch.tensor(places), halves) == expected


def test_location_table_by_hand():
    # 1/3 and 333/1000 meet at 0.333; 1/5000 is raised to 0.001; 1/400 = 0.0025 rounds up, as text.
    locations = [1 / 3, 1.0, 333 / 1000, 1 / 5000, 1 / 400]
    table = location_table(locations, [1.0, 7.0, 4.0, -1.0, 2.0])
    np.testing.assert_allclose(table.location, [0.001, 0.003, 0.333, 1.0])
    np.testing.assert_allclose(table.mean, [-1.0, 2.0, 2.5, 7.0])
    np.testing.assert_allclose(table.std, [0.0, 0.0, 1.5, 0.0])
    assert table.count.tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_a_spread_that_is_only_rounding_is_refused(seed: int):
    rewards = np.random.default_rng(seed).normal(size=64)
    with pytest.raises(DenserlError, match="64 of 64 locations occur only once") as caught:
        fit_location_normalizer(np.arange(1, 65) / 64, rewards)
    assert caught.value.hint and "normalizer.kind=global" in caught.value.hint


def test_wrong_samples():
    for location in (0.0, 1.5):
        with pytest.raises(DenserlError, match="above 0 and at most 1"):
            location_table([location], [1.0])
    with pytest.raises(DenserlError, match="1 of 2 rewards are not finite"):
        fit_location_normalizer([0.5, 1.0], [1.0, math.nan])
    with pytest.raises(DenserlError, match="two or more locations"):
        fit_location_normalizer([1.0, 1.0], [1.0, 2.0])
    with pytest.raises(DenserlError, match="is zero: 2 of 2 locations occur only once"):
        fit_location_normalizer([0.5, 1.0], [1.0, 2.0])
    with pytest.raises(DenserlError, match="b_std must be positive"):
        fit_constant_normalizer([3.0])
    with pytest.raises(DenserlError, match="no rewards"):
        fit_constant_normalizer([])


def test_the_fit_finds_the_functions_that_made_the_rewards():
    locations = np.repeat(np.arange(1, 101) / 100, 2)
    truth = LocationNormalizer(0.8, 0.3, 0.5, 2.8)
    signs = np.tile([-1.0, 1.0], 100)
    rewards = truth.mean(locations) + signs * truth.std(locations)
    fitted = fit_location_normalizer(locations, rewards)
    for name in ("w_mean", "w_std", "b_mean", "b_std", "min_std"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), abs=1e-4)


def test_an_outlier_hardly_moves_the_line():
    x = np.linspace(-4, 0, 60)
    y = 2 * x + 1 + 0.1 * np.sin(37 * x)
    clean = huber_line(x, y)
    y[0] += 50
    bent = huber_line(x, y)
    assert bent.slope == pytest.approx(clean.slope, abs=0.05)
    assert abs(np.polyfit(x, y, 1)[0] - clean.slope) > 0.5
    assert bent.r2 < clean.r2 <= 1


def test_scikit_learn_agrees():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(5)
    x = np.log(np.arange(1, 201) / 200)
    y = 0.9 * x + 1.2 + rng.standard_t(2, 200)
    theirs = linear_model.HuberRegressor(max_iter=1000, tol=1e-9).fit(x[:, None], y)
    ours = huber_line(x, y)
    assert ours.slope == pytest.approx(theirs.coef_[0], abs=2e-4)
    assert ours.intercept == pytest.approx(theirs.intercept_, abs=2e-4)
    assert ours.r2 == pytest.approx(theirs.score(x[:, None], y), abs=1e-4)


def test_a_level_line_explains_nothing():
    line = huber_line([0.0, 1.0, 2.0], [3.0, 3.0, 3.0])
    assert line.slope == pytest.approx(0, abs=1e-9)
    assert line.intercept == pytest.approx(3)
    assert line.r2 == 0


def test_constant_normalizer_by_hand():
    fitted = fit_constant_normalizer(np.array([1.0, 3.0]))
    assert fitted == LocationNormalizer(0.0, 0.0, 2.0, 1.0, 0.1)
    assert fitted.mean(0.01) == 2.0
    assert fitted.std(0.01) == 1.0
