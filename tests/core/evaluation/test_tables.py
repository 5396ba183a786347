"""Results as people see them."""

from __future__ import annotations

import numpy as np
import pytest

from denserl_cli.core.evaluation.policy import compare
from denserl_cli.core.evaluation.tables import equivalence


@pytest.mark.parametrize(
    ("score", "words"),
    [(0.5, "is below that of best of 1"), (1.5, "equals that of best of 1.50"),
     (9.0, "is above that of best of 2")],
)  # fmt: skip
def test_the_equivalent_in_words(score: float, words: str):
    before, after = np.array([[0.0, 2.0]]), np.full((1, 2), score)
    result = compare({"rm_score": before}, {"rm_score": after})
    assert equivalence(result) == f"the policy's mean rm_score {words}"
