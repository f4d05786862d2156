"""The link of predicted error and clips: the worked numbers, and its ends."""

from __future__ import annotations

import math

import pytest

from dit_sparse.tuning.link import alpha_of, mse_of, next_error, psnr_of

FLOOR, GAIN = 10**-3.56, 0.03


def clips(error: float, alpha: float) -> float:
    return FLOOR + GAIN * error**alpha


def test_one_step_with_the_right_exponent_hits_the_target() -> None:
    mse = clips(0.2, 1)
    assert psnr_of(mse) == pytest.approx(22.02, abs=0.005)
    error = next_error(28, FLOOR, 0.2, mse)
    assert error == pytest.approx(0.04365, abs=5e-6) and psnr_of(clips(error, 1)) == pytest.approx(28, abs=1e-6)


def test_the_exponent_is_learnt_from_two_runs() -> None:
    errors, mses = [0.2], [clips(0.2, 0.6)]
    assert psnr_of(mses[0]) == pytest.approx(19.32, abs=0.005) and alpha_of(errors, mses, FLOOR) == 1
    errors.append(next_error(28, FLOOR, errors[-1], mses[-1]))
    mses.append(clips(errors[-1], 0.6))
    assert errors[-1] == pytest.approx(0.02294, abs=2e-5) and psnr_of(mses[-1]) == pytest.approx(24.70, abs=0.005)
    alpha = alpha_of(errors, mses, FLOOR)
    assert alpha == pytest.approx(0.6)
    error = next_error(28, FLOOR, errors[-1], mses[-1], alpha)
    assert error == pytest.approx(0.00541, abs=5e-6) and psnr_of(clips(error, 0.6)) == pytest.approx(28, abs=1e-6)


def test_ends_stay_finite_and_positive() -> None:
    assert 0 < next_error(60, FLOOR, 0.1, clips(0.1, 1)) < 0.1  # above what rounding allows
    assert next_error(20, FLOOR, 0.1, FLOOR) > 0.1
    assert math.isfinite(next_error(30, 0.0, 0.1, 0.0))
    assert alpha_of([0.1, 0.2], [1e-3, 1e-3], FLOOR) == 0.3 and alpha_of([0.1, 0.1], [1e-3, 2e-3], FLOOR) == 1
    assert alpha_of([0.1, 0.2], [1e-3, 9e-1], FLOOR) == 1.5
    assert psnr_of(0) == math.inf and mse_of(20) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="must be positive"):
        next_error(30, FLOOR, 0.0, 0.1)
