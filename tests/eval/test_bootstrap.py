"""Intervals cover what they promise, and tell noise from differences."""

import numpy as np
import pytest

from dit_sparse.eval.bootstrap import interval, verdict


def test_interval_covers_the_true_mean_about_as_often_as_promised() -> None:
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        found = interval(draw.normal(3, 1, 30), confidence=0.9)
        inside += found.low <= 3 <= found.high
    assert 0.82 <= inside / 200 <= 0.97


def test_same_values_same_interval() -> None:
    values = [1.0, 2.0, 4.0]
    assert interval(values) == interval(values)
    assert interval([2.5]).low == interval([2.5]).high == 2.5
    assert interval(values).low < interval(values).mean < interval(values).high


def test_verdicts() -> None:
    draw = np.random.default_rng(2)
    assert verdict(interval(draw.normal(0, 1, 40))) == "within noise"
    assert verdict(interval(draw.normal(2, 1, 40))) == "higher"
    assert verdict(interval(draw.normal(-2, 1, 40))) == "lower"
    assert verdict(interval([5.0, 5.0])) == "too few prompts"


@pytest.mark.parametrize("values, confidence", [([], 0.95), ([float("nan")], 0.95), ([1.0], 1.0), ([1.0], 95)])
def test_wrong_input(values, confidence) -> None:
    with pytest.raises(ValueError, match="use a number between|finite numbers"):
        interval(values, confidence=confidence)
