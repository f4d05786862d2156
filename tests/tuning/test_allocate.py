"""Allocation: the worked example against brute force, orders, caps, ties, budgets, and its speed at real size."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from dit_sparse.tuning.allocate import allocate, allowed_by

TIMES = [1, 0.30, 0.15, 0.08]
ERRORS = np.array([[0, 0.01, 0.04, 0.16], [0, 0.05, 0.20, 0.45], [0, 0.002, 0.004, 0.01]])


def least(times: np.ndarray, errors: np.ndarray, limit: float) -> float:
    """Least time within an error, by trying everything."""
    best = math.inf
    for pick in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        if errors[range(len(errors)), pick].sum() <= limit + 1e-12:
            best = min(best, float(times[list(pick)].sum()))
    return best


@pytest.mark.parametrize(("limit", "expected"), [(0.02, 1.38), (0.05, 1.23), (0.10, 0.53), (0.25, 0.38), (0.62, 0.24)])
def test_the_worked_example_equals_brute_force(limit: float, expected: float) -> None:
    found = allocate(TIMES, ERRORS[None, None], 1.0, limit=limit)
    assert found.met and found.error <= limit + 1e-9
    assert found.time == pytest.approx(expected) == pytest.approx(least(np.array(TIMES), ERRORS, limit))


def test_multiplier_alone_and_the_example_at_a_tenth() -> None:
    alone = allocate(TIMES, ERRORS[None, None], 1.0, limit=0.02, fill=False)
    assert alone.time == alone.bisected_time == pytest.approx(1.45)
    tenth = allocate(TIMES, ERRORS[None, None], 1.0, limit=0.10)
    assert tenth.choice.ravel().tolist() == [2, 1, 3]
    assert 3 * TIMES[1] == pytest.approx(0.90) and ERRORS[:, 1].sum() == pytest.approx(0.062)


def test_a_budget_of_time_gives_the_least_error() -> None:
    found = allocate(TIMES, ERRORS[None, None], 1.0, budget=0.53)
    assert found.met and found.time <= 0.53 + 1e-9
    best = min(
        ERRORS[range(3), pick].sum() for pick in itertools.product(range(4), repeat=3)
        if np.array(TIMES)[list(pick)].sum() <= 0.53 + 1e-12
    )
    assert found.error == pytest.approx(best)
    assert not allocate(TIMES, ERRORS[None, None], 1.0, budget=0.1).met
    assert not allocate(TIMES, ERRORS[None, None] + 0.01, 1.0, limit=0.0).met


def test_an_order_is_used_only_where_it_pays() -> None:
    # Two heads gain .1 each by the order; it costs .15 in a layer: worth it for both together, not for one.
    times, orders = [1.0, 0.5, 0.4], ["", "tile", "morton"]
    errors = np.zeros((1, 2, 2, 3))
    errors[0, 1, 1, 2] = 9.0  # in the second layer one head cannot take it
    found = allocate(times, errors, 1.0, {"tile": 0.0, "morton": 0.15}, orders=orders, limit=1.0)
    assert found.choice[0].tolist() == [[2, 2], [1, 1]]
    assert found.time == pytest.approx(0.8 + 0.15 + 1.0)


def test_caps_leave_dense_and_close_what_is_too_wrong() -> None:
    err = np.array([0.0, 0.3, 0.6])
    allowed = allowed_by(err, [1.0, 0.1, 0.05])
    assert allowed.tolist() == [True, True, False]
    assert allowed_by(0.1, [0.01, 0.02]).tolist() == [False, True]
    found = allocate([1, 0.1, 0.05], err.reshape(1, 1, 1, 3), 1.0, limit=1.0, allowed=allowed)
    assert found.choice.item() == 1
    with pytest.raises(ValueError, match="leaves a head without a candidate"):
        allocate([1, 0.1], np.full((1, 1, 1, 2), 0.1), 1.0, limit=1.0, allowed=[False, False])


def test_ties_keep_the_choice_of_the_bucket_before() -> None:
    times = np.array([[[[0.50, 0.51]]], [[[0.51, 0.505]]], [[[0.51, 0.40]]]])
    for tie, expected in ((0.02, [0, 0, 1]), (0, [0, 1, 1])):
        found = allocate(times, np.zeros((3, 1, 1, 2)), 1.0, limit=1.0, fill=False, tie=tie)
        assert found.choice.ravel().tolist() == expected


def test_steps_and_weights_count() -> None:
    errors = np.broadcast_to(ERRORS, (2, 1, 3, 4))
    found = allocate(TIMES, errors, [[1.0], [0.01]], limit=0.05, steps=[1, 10])
    late, early = found.choice[1, 0], found.choice[0, 0]
    assert np.array(TIMES)[late].sum() < np.array(TIMES)[early].sum()
    spent = np.array(TIMES)[early].sum() + 10 * np.array(TIMES)[late].sum()
    assert found.time == pytest.approx(spent)
    assert allocate(TIMES, errors, 1.0, limit=0.4).time >= allocate(TIMES, errors, 1.0, limit=0.8).time


@pytest.mark.parametrize("words", [{}, {"limit": 1.0, "budget": 1.0}])
def test_one_of_limit_and_budget_is_asked_for(words: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="limit .* or budget"):
        allocate(TIMES, ERRORS[None, None], 1.0, **words)


def test_real_size_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    density = np.array([1.0, *np.tile([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8], 5)])
    heads = generator.lognormal(-3, 1.5, (4, 40, 40, 1))
    errors = heads * (1 / density - 1) * generator.uniform(0.5, 1, (4, 40, 40, len(density)))
    start = time.process_time()
    found = allocate(density, errors, 1.0, {"tile": 0.1, "morton": 2.0}, limit=errors[..., 1].sum() / 50,
                     orders=["", *["tile"] * 24, *["morton"] * 16], allowed=allowed_by(errors, density, most=1e9))
    assert found.met and time.process_time() - start < 10
    assert found.time <= found.bisected_time + 1e-9
