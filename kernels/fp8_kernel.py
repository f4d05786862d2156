"""The Gluon kernel of `fp8`: block-sparse attention forward with LSE on 8-bit numbers, for compute capability 9.0.

Roles and lists are those of `hopper_kernel`: a producer warp, two consumer groups of 64 queries each, whole blocks
first, boundary blocks with their tests last. The order of a step differs: weights of 8 bits carried across a loop's end
are kept one to a register and put together by byte shuffles, so the scores are carried instead: in float32, or in int32
where queries and keys are int8, which is known when the kernel is compiled. Imported only when used: importing this
module needs triton 3.6 or later.
"""

# mypy: disable-error-code="no-untyped-def"
# Gluon reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_copies import ROWS, list_of, place_of
from .hopper_kernel import CONSUMER_REGISTERS, MAX_REGISTERS, PRODUCER_REGISTERS, _mask

__all__ = ["MAX_REGISTERS", "attention_kernel"]

BN = gl.constexpr(128)
# Weights are at most 2^8, below the 448 of e4m3: those down to 2^-14 of the largest keep all their bits.
WEIGHT_BITS = gl.constexpr(8.0)
# 1.5 * 2^23 and its bits: as integers, bits + i are those of 12582912 + i, while |i| < 2^22. Scores are at most
# 128 * 127 * 127 < 2^21.
MAGIC = gl.constexpr(12582912.0)
MAGIC_BITS = gl.constexpr(0x4B400000)


@gluon.jit
def _produce(Q, K, V, memory, lists, strides, H, NQ, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """The producer warp: the queries of both groups, then keys and values of the listed blocks."""
    q_shared, k_shared, v_shared, _, q_ready, k_ready, k_free, v_ready, v_free = memory
    b, h, i_q = place_of(lists[3], gl.program_id(0), H, NQ)
    p_list, _, n_real, _ = list_of(lists, strides, b, h, i_q)
    head = (b * H + h).to(gl.int32)
    for j in gl.static_range(2):
        mbarrier.expect(q_ready.index(j), ROWS * WIDTH)
        tma.async_copy_global_to_shared(Q, [head, i_q.to(gl.int32) * (2 * ROWS) + j * ROWS, 0], q_ready.index(j),
                                        q_shared.index(j).reshape([1, ROWS, WIDTH]))
    for i in range(gl.maximum(n_real, 1)):
        block = gl.load(p_list + i)
        stage = i % STAGES
        # A fresh barrier counts as one whose phase 1 has passed: the first waits return at once.
        phase = i // STAGES & 1 ^ 1
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), BN * WIDTH)
        tma.async_copy_global_to_shared(K, [head, block * BN, 0], k_ready.index(stage),
                                        k_shared.index(stage).reshape([1, BN, WIDTH]))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), BN * WIDTH)
        tma.async_copy_global_to_shared(V, [head, 0, block * BN], v_ready.index(stage),
                                        v_shared.index(stage).reshape([1, WIDTH, BN]))


@gluon.jit
def _product(query, k_shared, S_LAYOUT: gl.constexpr):
    """Starts the scores of 64 queries and one block of keys: float32, or int32 where both are int8."""
    zeros = gl.zeros([ROWS, BN], gl.int32 if query.dtype == gl.int8 else gl.float32, S_LAYOUT)
    return warpgroup_mma(query, k_shared.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _as_float(score, factor):
    """The scores of a block that is tested next, in float32, and the factor that they lack.

    int32 scores get theirs before the tests: it is NaN where activations were not finite, and what a query does not see
    must stay -inf.
    """
    if score.dtype == gl.int32:
        return score.to(gl.float32) * factor, 1.0
    else:
        return score, factor


@gluon.jit
def _weights(score, factor, top, total, TESTED: gl.constexpr):
    """Weights 2^8 exp2(factor * score - new top), the factor that shrinks what came before, new top and new total.

    int32 scores: their maximum is one of integers, of which an instruction takes three. They are not converted: one
    addition makes the bits of MAGIC + score, and MAGIC goes into the multiply-add that there is. Rounding
    MAGIC * factor, and what it is subtracted from, moves all weights of a query and a block alike, by less than a score
    two larger would: 2^-24 of either is below .9 * factor.
    """
    new_top = gl.maximum(top, gl.max(score, 1).to(gl.float32) * factor)
    if TESTED:
        # A query that has met no key yet keeps -inf: subtract 0 there, so that its weights are exp2(-inf) = 0.
        base = gl.where(new_top == -float("inf"), 0.0, new_top)
    else:
        base = new_top
    if score.dtype == gl.int32:
        shifted = (score + MAGIC_BITS).to(gl.float32, bitcast=True)
        start = WEIGHT_BITS - base - MAGIC * factor
        weight = gl.exp2(gl.fma(shifted, factor, gl.expand_dims(start, 1)))
    else:
        weight = gl.exp2(score * factor - gl.expand_dims(base - WEIGHT_BITS, 1))
    shrink = gl.exp2(top - base)
    return weight, shrink, new_top, total * shrink + gl.sum(weight, 1)


@gluon.jit
def _operand(weight, P_LAYOUT: gl.constexpr):
    """The weights in e4m3 as operand of the next product, their keys in the order of `quantise.value_order`.

    In that order each thread holds four neighbouring keys, so that nothing moves between threads or bytes.
    """
    weight = gl.reshape(weight, [ROWS, BN // 16, 2, 4, 2])
    weight = gl.reshape(gl.permute(weight, [0, 1, 3, 2, 4]), [ROWS, BN])
    weight = gl.convert_layout(weight, P_LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [weight], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def _add(weight, shrink, acc, memory, i, P_LAYOUT: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
         FRESH: gl.constexpr):
    """Starts the product of the weights and the values of block i; returns it and the factor of what came before.

    FRESH: the product starts from 0 and is added in float32 afterwards. The matrix unit keeps fewer bits when it adds
    8-bit products, which a sum over hundreds of blocks would feel.
    """
    _, _, v_shared, _, _, _, _, v_ready, _ = memory
    O_LAYOUT: gl.constexpr = acc.type.layout
    operand = _operand(weight, P_LAYOUT)
    shrink = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT)), 1)
    if FRESH:
        start = gl.zeros([ROWS, WIDTH], gl.float32, O_LAYOUT)
    else:
        start = acc * shrink
    stage = i % STAGES
    mbarrier.wait(v_ready.index(stage), i // STAGES & 1)
    output = warpgroup_mma(operand, v_shared.index(stage).permute((1, 0)), start, use_acc=not FRESH, is_async=True)
    return output, shrink


@gluon.jit
def _step(query, score, factor, acc, top, total, memory, p_list, p_scale, query_factor, i, n_real, n_exempt, slot,
          tests, TESTED: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, FRESH: gl.constexpr,
          COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr, P_LAYOUT: gl.constexpr):
    """Softmax and output of block i while the scores of block i + 1 are computed.

    No product stays in flight across a loop's end, as the assembler would then wait for every single one.
    """
    _, k_shared, _, _, _, k_ready, k_free, _, v_free = memory
    stage = (i + 1) % STAGES
    next_factor = query_factor * gl.load(p_scale + gl.load(p_list + i + 1))
    if TESTED:
        # Before the next scores are started: tests and two blocks of scores do not fit into the registers together.
        score, factor = _as_float(score, factor)
        score = _mask(score, gl.load(p_list + i), i, n_real, n_exempt, slot, tests, BN, COORDINATE_COUNT, ALWAYS)
    S_LAYOUT: gl.constexpr = score.type.layout
    mbarrier.wait(k_ready.index(stage), (i + 1) // STAGES & 1)
    product = _product(query, k_shared.index(stage), S_LAYOUT)
    weight, shrink, top, total = _weights(score, factor, top, total, TESTED)
    output, shrink = _add(weight, shrink, acc, memory, i, P_LAYOUT, WIDTH, STAGES, FRESH)
    score = warpgroup_mma_wait(1, deps=[product])
    mbarrier.arrive(k_free.index(stage), count=1)
    output = warpgroup_mma_wait(0, deps=[output])
    mbarrier.arrive(v_free.index(i % STAGES), count=1)
    if FRESH:
        output = acc * shrink + output
    return score, next_factor, output, top, total


@gluon.jit
def _attend(query, memory, p_list, p_scale, query_factor, n_whole, n_real, n_exempt, slot, tests, WIDTH: gl.constexpr,
            STAGES: gl.constexpr, FRESH: gl.constexpr, COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr):
    """64 queries in shared memory against the listed blocks, as they arrive in the rings.

    Returns:
        the sum of weighted values, the sum of weights, both times 2^8, and the largest score (base 2) of each query.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, WIDTH, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4)
    _, k_shared, _, _, _, k_ready, k_free, _, v_free = memory
    n = gl.maximum(n_real, 1)
    factor = query_factor * gl.load(p_scale + gl.load(p_list))
    top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([ROWS, WIDTH], gl.float32, O_LAYOUT)
    mbarrier.wait(k_ready.index(0), 0)
    product = _product(query, k_shared.index(0), S_LAYOUT)
    score = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(k_free.index(0), count=1)
    for i in range(0, gl.minimum(n_whole, n - 1)):
        score, factor, acc, top, total = _step(
            query, score, factor, acc, top, total, memory, p_list, p_scale, query_factor, i, n_real, n_exempt, slot,
            tests, False, WIDTH, STAGES, FRESH, COORDINATE_COUNT, ALWAYS, P_LAYOUT)
    # The tests take the registers that a fresh sum would need: these few blocks are added up in the matrix unit.
    for i in range(n_whole, n - 1):
        score, factor, acc, top, total = _step(
            query, score, factor, acc, top, total, memory, p_list, p_scale, query_factor, i, n_real, n_exempt, slot,
            tests, True, WIDTH, STAGES, False, COORDINATE_COUNT, ALWAYS, P_LAYOUT)
    # A list without any block counts as block 0 with every key masked, so that all roles agree on one block.
    score, factor = _as_float(score, factor)
    if n_whole < n:
        score = _mask(score, gl.load(p_list + (n - 1)), n - 1, n_real, n_exempt, slot, tests, BN, COORDINATE_COUNT,
                      ALWAYS)
    weight, shrink, top, total = _weights(score, factor, top, total, True)
    output, shrink = _add(weight, shrink, acc, memory, n - 1, P_LAYOUT, WIDTH, STAGES, FRESH)
    output = warpgroup_mma_wait(0, deps=[output])
    mbarrier.arrive(v_free.index((n - 1) % STAGES), count=1)
    if FRESH:
        output = acc * shrink + output
    return output, total, top


@gluon.jit
def _consume(OUT, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, scales, tests, index_strides, flag_strides, H, Lq,
             NQ, NK, scale_log2, j: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
             FRESH: gl.constexpr, COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr):
    """Consumer group j: its half of the queries, from waiting for them to writing out and LSE."""
    # Rows in pieces of 16 bytes, for outputs that go through an index.
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                                       instr_shape=[16, BN, 32]))
    q_shared, _, _, o_shared, q_ready, _, _, _, _ = memory
    KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH, query_slots, key_slots = tests
    QUERY_SCALE, KEY_SCALE, VALUE_SCALE, SHIFT = scales
    b, h, i_q = place_of(lists[3], gl.program_id(0), H, NQ)
    p_list, n_whole, n_real, i_count = list_of(lists, strides, b, h, i_q)
    n_exempt = 0
    if EXEMPT is not None:
        n_exempt = n_whole + gl.load(EXEMPT + i_count)
    if FLAGS is not None:
        tests = (KEY_LENGTHS, FLAGS + b * flag_strides[0] + h * flag_strides[1], COORDINATES, LOW, HIGH, query_slots,
                 key_slots)
    query_factor = scale_log2 * gl.load(QUERY_SCALE + (b * H + h) * NQ + i_q)
    first = i_q.to(gl.int32) * (2 * ROWS) + j * ROWS
    slot = first + gl.arange(0, ROWS, S_ROWS)
    p_value_scale = VALUE_SCALE + (b * H + h) * DV
    p_shift = SHIFT + (b * H + h) * query_slots
    p_lse = LSE + (b * H + h) * Lq
    mbarrier.wait(q_ready.index(j), 0)
    acc, total, top = _attend(q_shared.index(j), memory, p_list, KEY_SCALE + (b * H + h) * NK, query_factor, n_whole,
                              n_real, n_exempt, slot, tests, WIDTH, STAGES, FRESH, COORDINATE_COUNT, ALWAYS)

    if QUERY_INDEX is not None:
        QUERY_INDEX += b * index_strides[0] + h * index_strides[1]
    # One reciprocal per row: a division per element costs more than a block. Queries without a key give 0 and -inf.
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    o_channel = gl.arange(0, WIDTH, gl.SliceLayout(0, acc.type.layout))
    value_scale = gl.load(p_value_scale + o_channel, mask=o_channel < DV, other=0.0)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, O_ROWS), 1) * gl.expand_dims(value_scale, 0)
    acc = gl.where(gl.expand_dims(gl.convert_layout(empty, O_ROWS), 1), 0.0, acc)
    lse = (top - WEIGHT_BITS + gl.log2(total)) * 0.6931471805599453
    lse += gl.load(p_shift + slot)
    source = o_shared.index(j)
    source.store(acc.to(source.dtype))
    lse_token = slot
    if QUERY_INDEX is not None:
        lse_token = gl.load(QUERY_INDEX + slot)
    gl.store(p_lse + lse_token, lse, mask=(lse_token >= 0) & (lse_token < Lq))
    if QUERY_INDEX is not None:
        # A slot's token is what the index says; -1 is padding.
        token = gl.load(QUERY_INDEX + first + gl.arange(0, ROWS, gl.SliceLayout(1, LINES)))
        o_d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, LINES)), 0)
        p_out = OUT + ((b * Lq + gl.expand_dims(token, 1)) * H + h) * DV + o_d
        gl.store(p_out, source.load(LINES), mask=gl.expand_dims(token >= 0, 1) & (o_d < DV))
    else:
        fence_async_shared()
        tma.async_copy_shared_to_global(OUT, [b.to(gl.int32), h.to(gl.int32), first, 0],
                                        source.reshape([1, 1, ROWS, WIDTH]))
        tma.store_wait(0)


# A new size must not mean a new compile: of the steps only those matter that vector loads are aligned by.
@gluon.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_lq", "stride_cb", "stride_ch", "stride_cq",
                              "stride_ib", "stride_ih", "H", "Lq", "NQ", "NK", "query_slots", "key_slots"])
def attention_kernel(
    Q, K, V, QUERY_SCALE, KEY_SCALE, VALUE_SCALE, SHIFT, OUT, LSE, LISTS, WHOLE, BOUNDARY, EXEMPT, ORDER, QUERY_INDEX,
    KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq,
    stride_ib, stride_ih, stride_fb, stride_fh, H, Lq, NQ, NK, query_slots, key_slots, scale_log2,
    DV: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, FRESH: gl.constexpr,
    COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr,
):
    """128 queries of one head against the key blocks that their list names.

    Q, K: descriptors over (B * H, slots, head dim), both e4m3 or both int8; V over e4m3 (B * H, DV, key slots), keys in
    `quantise.value_order`.
    QUERY_SCALE (B, H, NQ), KEY_SCALE (B, H, NK), VALUE_SCALE (B, H, DV), SHIFT (B, H, query_slots): float32,
    contiguous. OUT: descriptor over (B, H, Lq, DV), or with QUERY_INDEX a pointer to (B, Lq, H, DV), contiguous.
    All others as in `hopper_kernel.attention_kernel`.
    """
    rows: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=WIDTH, element_bitwidth=8, rank=2)
    columns: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = OUT.dtype if QUERY_INDEX is None else OUT.dtype.element_ty
    q_shared = gl.allocate_shared_memory(Q.dtype, [2, ROWS, WIDTH], rows)
    k_shared = gl.allocate_shared_memory(K.dtype, [STAGES, BN, WIDTH], rows)
    v_shared = gl.allocate_shared_memory(V.dtype, [STAGES, WIDTH, BN], columns)
    o_shared = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH], out_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(q_ready.index(j), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        # Both consumer groups must be done with a block before the next may overwrite it.
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    memory = (q_shared, k_shared, v_shared, o_shared, q_ready, k_ready, k_free, v_ready, v_free)
    lists = (LISTS, WHOLE, BOUNDARY, ORDER)
    strides = (stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq)
    scales = (QUERY_SCALE, KEY_SCALE, VALUE_SCALE, SHIFT)
    tests = (KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH, query_slots, key_slots)
    index_strides = (stride_ib, stride_ih)
    flag_strides = (stride_fb, stride_fh)
    gl.warp_specialize([
        (_consume, (OUT, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, scales, tests, index_strides, flag_strides,
                    H, Lq, NQ, NK, scale_log2, 0, DV, WIDTH, STAGES, FRESH, COORDINATE_COUNT, ALWAYS)),
        (_consume, (OUT, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, scales, tests, index_strides, flag_strides,
                    H, Lq, NQ, NK, scale_log2, 1, DV, WIDTH, STAGES, FRESH, COORDINATE_COUNT, ALWAYS)),
        (_produce, (Q, K, V, memory, lists, strides, H, NQ, WIDTH, STAGES)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
