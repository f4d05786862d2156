"""The accuracy rules of fp8 attention, shared by CPU and GPU tests.

All follow from three mantissa bits of e4m3, or where queries and keys are INT8, from steps of a 127th of the largest
number in each block of 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.fp8 import block_sparse_fp8_reference
from dit_sparse.kernels.quantise import BLOCK, LARGEST_INTEGER, Quantised, dequantise, stored_dtype
from dit_sparse.kernels.reference import attention_reference
from tests.kernels.cases import Inputs

# Largest rounding of a number relative to itself, and its root mean square when all places between two steps are
# equally likely.
ROUNDING = 2.0**-4
ROUNDING_RMS = ROUNDING / math.sqrt(3)
# The matrix unit adds 8-bit products with about 13 bits: what a block's sum may be off, relative to its magnitudes.
SUMS = 2.0**-11
# The kernel's rounding of its constant for INT8 moves a block's scores by less than two of their integer steps.
STEPS = 2.0


def kernel_problem(inputs: Inputs, out: Tensor, lse: Tensor, quantised: Quantised) -> str:
    """What is wrong with the kernel's answer to these 8-bit numbers, "" when nothing is. Holds for every input.

    The twin does not round weights. The kernel rounds each by at most 2^-4 of itself, or 2^-18 of the largest weight of
    its row where it is small; it rounds the output once, and its sums are off by 2^-11 of their magnitudes. Sums of
    INT8 products are exact; what is done with them is off by `STEPS`, and the twin's own sums by 2^-20.
    """
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    arguments = inputs.query, inputs.key, inputs.value, blocks, inputs.scale, quantised
    want, want_lse = block_sparse_fp8_reference(*arguments)
    empty = want_lse == -torch.inf
    shapes = (tuple(out.shape), tuple(lse.shape), out.dtype, lse.dtype)
    if shapes != (tuple(want.shape), tuple(want_lse.shape), inputs.query.dtype, torch.float32):
        return f"shapes and types {shapes}"
    if not torch.equal(lse == -torch.inf, empty):
        return "the LSE is not -inf exactly where queries see no key"
    if not torch.isfinite(out).all() or out.transpose(1, 2)[empty].any():
        return "the output is not finite, or not 0 where queries see no key"
    q, k, v, shift = dequantise(quantised, blocks, inputs.query.shape[3])
    seen = inputs.mask.token_mask() & (True if inputs.key_mask is None else inputs.key_mask[:, None, None])
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * inputs.scale
    sizes = q.transpose(1, 2).abs() @ k.permute(0, 2, 3, 1).abs() * inputs.scale
    off = sizes.masked_fill(~seen, 0).amax(-1) * SUMS  # (B, H, Lq)
    if quantised.query.dtype == torch.int8:
        largest = quantised.query_scale.amax(-1) * quantised.key_scale.amax(-1) * inputs.scale
        off = sizes.masked_fill(~seen, 0).amax(-1) * 2.0**-20 + largest[..., None] * STEPS
    off += 1e-5
    weighted, _ = attention_reference(q, k, v.abs(), seen, inputs.scale)
    smallest = (scores.masked_fill(~seen, -torch.inf).amax(-1) - (want_lse - shift)).nan_to_num(0).exp()
    plain = seen.expand_as(scores).float() @ v.transpose(1, 2).abs() * smallest[..., None] * 2.0**-18
    bound = (weighted.transpose(1, 2) * (ROUNDING + SUMS + (2 * off).expm1()[..., None]) + plain).transpose(1, 2)
    bound = (bound * 1.001 + want.abs() * torch.finfo(out.dtype).eps / 2 + 1e-6)
    found = []
    if ((out.float() - want).abs() > bound).any():
        found.append(f"out is {((out.float() - want).abs() / bound).max():.2f} of its bound")
    slack = off + 1e-5 * (1 + shift.abs())
    if ((lse - want_lse).abs() > slack)[~empty].any():
        found.append(f"LSE is {((lse - want_lse).abs() / slack)[~empty].max():.2f} of its bound")
    return "; ".join(found)


def formula_problem(inputs: Inputs, lse: Tensor, quantised: Quantised) -> str:
    """What is wrong with the LSE against the formula on the numbers as given, "" when nothing is. For every input.

    It moves no more than the score that moves most: scale * (|q| . |dk| + |dq| . |k|), d being what rounding changed.
    """
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    key = inputs.key if inputs.key_mask is None else torch.where(inputs.key_mask[..., None, None], inputs.key, 0)
    seen = inputs.mask.token_mask() & (True if inputs.key_mask is None else inputs.key_mask[:, None, None])
    _, want = attention_reference(inputs.query, key, key, seen, inputs.scale, dtype=torch.float64)
    q, k, _, _ = (x.double() for x in dequantise(quantised, blocks, inputs.query.shape[3]))
    given = key.double()
    real = given if inputs.key_mask is None else given.nan_to_num(0)
    # The keys that were rounded are centred: the mean is what all of them differ by but for rounding.
    mean = (real.float().mean(1) if inputs.key_mask is None else
            real.float().sum(1) / inputs.key_mask.sum(1).clamp(min=1)[:, None, None]).double()[:, None]
    moved_q, moved_k = (q - inputs.query.double()).abs(), (k - (real - mean)).abs()

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        return a.transpose(1, 2) @ b.permute(0, 2, 3, 1)

    moved = (pairs(inputs.query.double().abs(), moved_k) + pairs(moved_q, k.abs())) * inputs.scale
    bound = moved.masked_fill(~seen, 0).amax(-1) + 1e-4 * (1 + want.abs().nan_to_num(0, posinf=0, neginf=0))
    real_rows = want > -torch.inf
    off = (lse.double() - want).abs()
    return "" if (off <= bound)[real_rows].all() else f"LSE is {(off / bound)[real_rows].max():.2f} of its bound"


def noise_figures(out: Tensor, want: Tensor) -> tuple[float, float]:
    """Root mean square error relative to that of the output, and cosine."""
    error = (out.float() - want.float()).norm() / want.float().norm()
    cosine = torch.nn.functional.cosine_similarity(out.float().flatten(), want.float().flatten(), dim=0)
    return float(error), float(cosine)


def noise_bound(score_deviation: float) -> float:
    """Largest relative error (root mean square) on noise whose scores have this standard deviation.

    Four roundings, independent and each of relative size 2^-4 / sqrt(3) at most: of weights and values as they are, of
    queries and keys through the score, whose deviation is theirs in proportion. 7.2 % for scores of unit deviation;
    numbers spread over all binades round by about three quarters of that. Queries must not differ in the deviation of
    their scores, or the sequence must be short: else `rounding_noise`.
    """
    return ROUNDING_RMS * math.sqrt(2 + 2 * score_deviation**2)


def rounding_noise(query: Tensor, key: Tensor, value: Tensor, scale: float, scores: str = "e4m3") -> Tensor:
    """Largest expected square of the error of each output, (B, Lq, H, Dv): `noise_bound` for scores of any spread.

    The same four independent roundings, followed to first order through the output, sum_j p_j v_j, every pair seen.
    Rounded weights and values move it by p_j v_j each. A rounded key moves one score by scale q_d k_jd, and the output
    by p_j (v_j - out) times that; a rounded query moves all scores of its row at once, which cancels where keys agree.
    Queries that see little but a few keys have the largest outputs and the largest scores at once, so that the mean
    spread of the scores is not enough where queries differ in it, as with an outlier channel: the more so, the longer
    the sequence. Queries and keys are in raster order, the first query at the first slot of a block.
    """
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    k = k - k.mean(2, keepdim=True)
    weight = (q @ k.transpose(2, 3) * scale).softmax(-1)
    out = weight @ v
    square = weight.square()
    moved = square * (q.square() @ _variance(k, scores).transpose(2, 3)) * scale**2
    of_keys = moved @ v.square() - 2 * out * (moved @ v) + out.square() * moved.sum(-1, keepdim=True)
    of_queries = torch.empty_like(out)
    of_query = _variance(q, scores) * scale**2
    for i in range(q.shape[2]):
        seen = k * weight[:, :, i, :, None]
        slope = seen.transpose(2, 3) @ v - seen.sum(2)[..., None] * out[:, :, i, None]  # (B, H, D, Dv)
        of_queries[:, :, i] = (of_query[:, :, i, :, None] * slope.square()).sum(2)
    return (2 * ROUNDING_RMS**2 * square @ v.square() + of_keys + of_queries).transpose(1, 2)


def _variance(x: Tensor, scores: str) -> Tensor:
    """Expected square of what rounding moves each number of x (B, H, slots, D) by, at most.

    In INT8 all places between two steps are equally likely, which leaves no room: a tenth is added to its deviation,
    for what is not of first order.
    """
    if stored_dtype(scores) == torch.int8:
        step = torch.cat([part.abs().amax((2, 3), keepdim=True).expand_as(part) for part in x.split(BLOCK, 2)], 2)
        return (1.1 * step / LARGEST_INTEGER).square() / 12
    return ROUNDING_RMS**2 * x.square()
