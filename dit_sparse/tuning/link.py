"""The link between the error that a plan predicts and the error of the clips: MSE = F + g * E ** alpha.

F is what rounding alone makes (the clip of another kernel at density 1), E the predicted error of an allocation; g and
alpha are of the model, and come from the runs of the closed loop. MSE is that of decoded frames in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ALPHAS = (0.3, 1.5)  # what alpha is held between
_LEAST = 0.05  # of the floor: the least excess over it that is told from rounding
_TINY = 1e-20


def mse_of(psnr_db: float) -> float:
    """Mean squared error of frames in [0, 1] at a PSNR in dB."""
    return float(10 ** (-psnr_db / 10))


def psnr_of(mse: float) -> float:
    """PSNR in dB of a mean squared error of frames in [0, 1]; infinite without error."""
    return -10 * math.log10(mse) if mse > 0 else math.inf


def _excess(mse: float, floor: float) -> float:
    """What lies above the floor of rounding, at least a twentieth of it."""
    return max(mse - floor, _LEAST * floor, _TINY)


def next_error(target_db: float, floor: float, error: float, mse: float, alpha: float = 1.0) -> float:
    """The predicted error to ask of the next plan.

    Args:
        target_db: PSNR to reach, the margin included.
        floor: MSE of rounding alone.
        error: predicted error of the plan that ran, positive.
        mse: what its clips had.
        alpha: exponent of the link.

    Returns:
        The error at which the link gives the target; a target above what rounding allows asks for a twentieth of the
        floor.

    Raises:
        ValueError: an error or alpha that is not positive; one line.
    """
    if error <= 0 or alpha <= 0:
        raise ValueError(f"error={error} and alpha={alpha} must be positive")
    wanted = _excess(mse_of(target_db), floor)
    return float(error * (wanted / _excess(mse, floor)) ** (1 / alpha))


def alpha_of(errors: Sequence[float], mses: Sequence[float], floor: float, default: float = 1.0) -> float:
    """The exponent that the last two runs show, held between .3 and 1.5.

    Args:
        errors: predicted errors of the runs, in their order.
        mses: what their clips had.
        floor: MSE of rounding alone.
        default: with fewer than two runs, or two of equal error.
    """
    if len(errors) < 2 or len(mses) < 2 or min(errors[-2:]) <= 0 or errors[-1] == errors[-2]:
        return default
    rise = math.log(_excess(mses[-1], floor) / _excess(mses[-2], floor))
    return min(max(rise / math.log(errors[-1] / errors[-2]), ALPHAS[0]), ALPHAS[1])
