import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.schedule import Schedule


def dense_steps(schedule: Schedule, num_steps: int, layer: int = 9) -> list[int]:
    return [step for step in range(num_steps) if schedule.is_dense(step, num_steps, layer)]


@pytest.mark.parametrize(
    ("steps", "num_steps", "dense"),
    [
        (0.2, 50, 10), (0.35, 40, 14), (0.375, 40, 15), (0.29, 100, 29), (0.2, 8, 1), (0.2, 4, 1), (0.1, 1, 1),
        (0.0, 50, 0), (1.0, 50, 50), (0, 50, 0), (1, 50, 1), (12, 50, 12), (12, 4, 4),
    ],
)
def test_leading_steps(steps: float | int, num_steps: int, dense: int) -> None:
    assert dense_steps(Schedule(steps, 0), num_steps) == list(range(dense))


def test_last_steps_and_layers() -> None:
    schedule = Schedule(dense_steps=2, dense_layers=1, dense_last_steps=0.25)
    assert dense_steps(schedule, 10) == [0, 1, 8, 9]
    assert dense_steps(schedule, 10, layer=0) == list(range(10))


def test_unknown_length_counts_as_past_the_warm_up() -> None:
    schedule = Schedule(0.5, 2, 0.5)
    assert [schedule.is_dense(0, None, layer) for layer in range(4)] == [True, True, False, False]


@given(st.floats(0, 1), st.integers(1, 100))
def test_a_fraction_is_rounded_down_but_never_to_nothing(fraction: float, num_steps: int) -> None:
    count = len(dense_steps(Schedule(fraction, 0), num_steps))
    assert count == (max(1, int(fraction * num_steps + 1e-9)) if fraction > 0 else 0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(dense_steps=1.5), "dense_steps=1.5"),
        (dict(dense_steps=-1), "dense_steps=-1"),
        (dict(dense_steps=True), "dense_steps=True"),
        (dict(dense_last_steps=float("nan")), "dense_last_steps=nan"),
        (dict(dense_last_steps="1"), "dense_last_steps='1'"),
        (dict(dense_layers=-1), "dense_layers=-1"),
        (dict(dense_layers=0.1), "dense_layers=0.1"),
    ],
)
def test_values_out_of_range_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Schedule(**wrong)
