"""The Triton kernels of `quantise`: activations to 8 bits, on NVIDIA GPUs with 8-bit floats, and interpreted.

Two passes. `statistics_kernel` reads keys and values once, for the mean of the keys and the largest value of each
channel, and `finish_kernel` adds up its parts; `rows_kernel` and `values_kernel` then read queries, keys and values
once and write each in the order of the slots. Nothing is added up atomically: repeated calls give equal bits. Imported
only when used: importing this module needs triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

import triton
import triton.language as tl

from .quantise import LARGEST, LARGEST_INTEGER, SMALLEST

_LARGEST = tl.constexpr(LARGEST)
_LARGEST_INTEGER = tl.constexpr(LARGEST_INTEGER)
_SMALLEST = tl.constexpr(SMALLEST)
# The interpreter knows no assembly.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit(do_not_specialize=["H", "Lk", "span"])
def statistics_kernel(
    K, V, KEY_MASK, SUMS, TOPS, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd,
    stride_mb, stride_mn, H, Lk, span, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum of the keys and largest magnitude of the values over `span` tokens of one head.

    K (B, Lk, H, D), V (B, Lk, H, DV) by strides. KEY_MASK: bool (B, Lk) by strides, None: every key counts.
    SUMS (B, H, parts, D) and TOPS (B, H, parts, DV): float32, contiguous; parts = number of programs along axis 1.
    """
    # Heads vary fastest: programs that run together read neighbouring memory.
    h = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, WIDTH)[None, :]
    o_dv = tl.arange(0, WIDTH_V)[None, :]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    tops = tl.zeros([ROWS, WIDTH_V], tl.float32)
    first = part * span
    last = tl.minimum(first + span, Lk)
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS).to(tl.int64)
        real = token < last
        if KEY_MASK is not None:
            real &= tl.load(KEY_MASK + b * stride_mb + token * stride_mn, mask=real, other=0) != 0
        p_key = K + b * stride_kb + h * stride_kh + token[:, None] * stride_kn + o_d * stride_kd
        sums += tl.load(p_key, mask=real[:, None] & (o_d < D), other=0.0).to(tl.float32)
        p_value = V + b * stride_vb + h * stride_vh + token[:, None] * stride_vn + o_dv * stride_vd
        value = tl.load(p_value, mask=real[:, None] & (o_dv < DV), other=0.0).to(tl.float32)
        tops = tl.maximum(tops, tl.abs(value))
    row = (b * H + h) * tl.num_programs(1) + part
    o_d = tl.arange(0, WIDTH)
    o_dv = tl.arange(0, WIDTH_V)
    tl.store(SUMS + row * D + o_d, tl.sum(sums, 0), mask=o_d < D)
    tl.store(TOPS + row * DV + o_dv, tl.max(tops, 0), mask=o_dv < DV)


@triton.jit(do_not_specialize=["H", "Lk", "parts"])
def finish_kernel(SUMS, TOPS, COUNTS, MEAN, SCALE, H, Lk, parts, D: tl.constexpr, DV: tl.constexpr,
                  WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr):
    """MEAN (B, H, D) and SCALE (B, H, DV) of one head from the parts. COUNTS: int64 (B,) keys, None: Lk of them."""
    head = tl.program_id(1).to(tl.int64) * H + tl.program_id(0)
    o_row = tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, WIDTH)
    o_dv = tl.arange(0, WIDTH_V)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    tops = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for start in range(0, parts, ROWS):
        row = head * parts + start + o_row
        real = start + o_row < parts
        sums += tl.load(SUMS + row * D + o_d[None, :], mask=real & (o_d < D)[None, :], other=0.0)
        tops = tl.maximum(tops, tl.load(TOPS + row * DV + o_dv[None, :], mask=real & (o_dv < DV)[None, :], other=0.0))
    count = Lk.to(tl.float32)
    if COUNTS is not None:
        count = tl.maximum(tl.load(COUNTS + tl.program_id(1)).to(tl.float32), 1.0)
    tl.store(MEAN + head * D + o_d, tl.div_rn(tl.sum(sums, 0), count), mask=o_d < D)
    scale = tl.maximum(tl.max(tops, 0), _SMALLEST) * (1.0 / _LARGEST)
    tl.store(SCALE + head * DV + o_dv, scale, mask=o_dv < DV)


@triton.jit
def _tokens(INDEX, OK, b, h, slot, strides, L):
    """Token at each slot, and whether there is one that may be seen."""
    stride_ib, stride_ih, stride_ob, stride_oh = strides
    token = slot
    if INDEX is not None:
        token = tl.load(INDEX + b * stride_ib + h * stride_ih + slot)
    real = (token >= 0) & (token < L)
    if OK is not None:
        real &= tl.load(OK + b * stride_ob + h * stride_oh + slot) != 0
    return token, real


@triton.jit
def _scale(row):
    """Largest magnitude over 127; NaN where a number is not finite, which INT8 cannot store."""
    # Bits of positive numbers are ordered as they are, infinity and NaN last: a maximum of numbers would drop NaN.
    bits = tl.max(row.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.where(bits < 0x7F800000, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    return tl.where(largest < _SMALLEST, _SMALLEST, largest) * (1.0 / _LARGEST_INTEGER)


@triton.jit
def _integers(x):
    """The nearest integers, of two the even one, as int8: |x| is at most 127 but for the last bits of x.

    12582912 + x has steps of 1, and the integer in its lowest bits. Added in inline assembly, because the product that
    made x and this sum would else be one instruction with one rounding.
    """
    if _INTERPRETED:
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a, b, c, d; .reg .b32 i, j, k, l; add.rn.f32 a, $1, 0f4B400000; "
            "add.rn.f32 b, $2, 0f4B400000; add.rn.f32 c, $3, 0f4B400000; add.rn.f32 d, $4, 0f4B400000; "
            "mov.b32 i, a; mov.b32 j, b; mov.b32 k, c; mov.b32 l, d; prmt.b32 i, i, j, 0x0040; "
            "prmt.b32 k, k, l, 0x0040; prmt.b32 $0, i, k, 0x5410; }",
            "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit(do_not_specialize=["stride_ib", "stride_ih", "stride_ob", "stride_oh", "H", "L"])
def rows_kernel(
    X, INDEX, OK, MEAN, OUT, SCALE, SHIFT, stride_b, stride_n, stride_h, stride_d, stride_ib, stride_ih, stride_ob,
    stride_oh, H, L, factor, D: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of queries or keys of one head, with one scale.

    X (B, L, H, D) by strides; INDEX: int64 (B|1, H|1, slots), None: slot = token; OK: (B|1, H|1, slots), slots that may
    be seen, None: all that hold a token. MEAN (B, H, D). OUT: e4m3 or int8 (B, H, slots, STORED), SCALE (B, H, blocks).
    With SHIFT (B, H, slots) the rows are queries, and it gets factor * row . MEAN; without, they are keys, from which
    MEAN is subtracted.
    """
    h = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    slot = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, real = _tokens(INDEX, OK, b, h, slot, (stride_ib, stride_ih, stride_ob, stride_oh), L)
    o_d = tl.arange(0, WIDTH)
    p_row = X + b * stride_b + h * stride_h + token[:, None] * stride_n + o_d[None, :] * stride_d
    row = tl.load(p_row, mask=real[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.load(MEAN + (b * H + h) * D + o_d, mask=o_d < D, other=0.0)
    first = (b * H + h) * tl.num_programs(1) * BLOCK
    if SHIFT is None:
        row = tl.where(real[:, None], row - mean[None, :], 0.0)
    else:
        tl.store(SHIFT + first + slot, tl.sum(row * mean[None, :], 1) * factor)
    if OUT.dtype.element_ty == tl.int8:
        scale = _scale(row)
        rounded = _integers(row * tl.div_rn(1.0, scale))
    else:
        scale = tl.maximum(tl.max(tl.abs(row)), _SMALLEST) * (1.0 / _LARGEST)
        rounded = (row * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    tl.store(SCALE + (b * H + h) * tl.num_programs(1) + block, scale)
    p_out = OUT + (first + slot)[:, None] * STORED + o_d[None, :]
    tl.store(p_out, rounded, mask=(o_d < STORED)[None, :])


@triton.jit
def _values(p_value, INDEX, OK, inverse, b, h, slot, strides, stride_n, L, D: tl.constexpr, WIDTH: tl.constexpr):
    """Values of the tokens at some slots over their scales, 0 where no token may be seen."""
    token, real = _tokens(INDEX, OK, b, h, slot, strides, L)
    real = real[:, None] & (tl.arange(0, WIDTH) < D)[None, :]
    return tl.load(p_value + token[:, None] * stride_n, mask=real, other=0.0).to(tl.float32) * inverse


@triton.jit
def _byte(x):
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def _word(first, second, third, fourth):
    """Four numbers in e4m3 in one int32, the first in its lowest byte.

    Two instructions convert them in pairs, and both halves of the word are theirs. Put together from single bytes, the
    odd halves of a pair can come out wrong: where a byte of a pair is widened beside an undefined half, ptxas 12.8
    reads the other byte of the pair from the undefined register.
    """
    if _INTERPRETED:
        words = _byte(first) | _byte(second) << 8 | _byte(third) << 16 | _byte(fourth) << 24
        return words.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [first, second, third, fourth], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["stride_ib", "stride_ih", "stride_ob", "stride_oh", "H", "L"])
def values_kernel(
    V, INDEX, OK, SCALE, OUT, stride_b, stride_n, stride_h, stride_d, stride_ib, stride_ih, stride_ob, stride_oh, H, L,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of values of one head, transposed, with their keys in the order of `quantise.value_order`.

    V (B, L, H, D) by strides; INDEX, OK as in `rows_kernel`. SCALE (B, H, D). OUT: e4m3 (B, H, D, slots), written as
    int32 words of four neighbouring keys: transposing words costs a quarter of transposing bytes.
    """
    h = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    scale = tl.load(SCALE + (b * H + h) * D + o_d, mask=o_d < D, other=1.0)
    inverse = tl.div_rn(1.0, scale)[None, :]
    o_word = tl.arange(0, BLOCK // 4)
    p_value = V + b * stride_b + h * stride_h + o_d[None, :] * stride_d
    strides = (stride_ib, stride_ih, stride_ob, stride_oh)
    # Word t of a group of 16 keys holds its keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    slot = block.to(tl.int64) * BLOCK + o_word // 4 * 16 + o_word % 4 * 2
    first = _values(p_value, INDEX, OK, inverse, b, h, slot, strides, stride_n, L, D, WIDTH)
    second = _values(p_value, INDEX, OK, inverse, b, h, slot + 1, strides, stride_n, L, D, WIDTH)
    third = _values(p_value, INDEX, OK, inverse, b, h, slot + 8, strides, stride_n, L, D, WIDTH)
    fourth = _values(p_value, INDEX, OK, inverse, b, h, slot + 9, strides, stride_n, L, D, WIDTH)
    words = _word(first, second, third, fourth)
    p_out = OUT + (((b * H + h) * D + o_d) * tl.num_programs(1) + block)[:, None] * (BLOCK // 4) + o_word[None, :]
    tl.store(p_out, tl.trans(words), mask=(o_d < D)[:, None])
