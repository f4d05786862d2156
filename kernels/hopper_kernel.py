"""The Gluon kernel of `hopper`: block-sparse attention forward with LSE for compute capability 9.0.

One program computes 128 queries of one head with three roles. A producer warp copies key and value blocks into rings
of shared memory, two consumer groups of four warps compute 64 queries each, without waiting for each other: the
softmax of one hides under the matrix products of the other. Whole blocks come first, in a loop without any test, then
the boundary blocks with their tests. Imported only when used: importing this module needs triton 3.6 or later.

Triton's interpreter does not run Gluon: what the kernel computes is tested on a GPU only (tests/gpu), what surrounds
it, `hopper_plan`, on any machine, and the compile for sm_90 on any machine that has triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Gluon reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_copies import ROWS, list_of, place_of, produce, tokens_of, write

# 12 warps (the producer's group counts four) start with 168 registers per thread, and trade them by role.
MAX_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _mask(score, block, i, n_real, n_exempt, slot, tests, BN: gl.constexpr, COORDINATE_COUNT: gl.constexpr,
          ALWAYS: gl.constexpr):
    """The scores of a boundary block, -inf where the query does not see the key.

    A list without any block counts as block 0 with every key masked (i = n_real = 0), so that all roles always agree
    on at least one block.
    """
    KEY_LENGTHS, p_flags, COORDINATES, LOW, HIGH, query_slots, key_slots = tests
    o_key = gl.arange(0, BN, gl.SliceLayout(0, score.type.layout))
    if p_flags is None:
        seen = o_key < gl.where(i < n_real, gl.load(KEY_LENGTHS + block), 0)
    else:
        flags = gl.load(p_flags + block.to(gl.int64) * BN + o_key).to(gl.int32)
        seen = (flags & 1) > gl.where(i < n_real, 0, 1)
    score = gl.where(gl.expand_dims(seen, 0), score, -float("inf"))
    if COORDINATE_COUNT > 0:
        # A loop that stays one: with the tests of all coordinates alive at once, registers would spill.
        for c in range(COORDINATE_COUNT):
            place = gl.expand_dims(gl.load(COORDINATES + c * key_slots + block * BN + o_key), 0)
            # Whole blocks that were demoted for their masked keys come first and are not for the window to test.
            low = gl.where(i < n_exempt, -2147483648, gl.load(LOW + c * query_slots + slot))
            high = gl.where(i < n_exempt, 2147483647, gl.load(HIGH + c * query_slots + slot))
            inside = (place >= gl.expand_dims(low, 1)) & (place <= gl.expand_dims(high, 1))
            if ALWAYS:
                inside = inside | gl.expand_dims((flags & 2) != 0, 0)
            score = gl.where(inside, score, -float("inf"))
    return score


@gluon.jit
def _softmax(score, top, scale_log2, TESTED: gl.constexpr):
    """Weights exp2(scale * score - new top), the factor that shrinks what came before, and the new top."""
    new_top = gl.maximum(top, gl.max(score, 1) * scale_log2)
    if TESTED:
        # A query that has met no key yet keeps -inf: subtract 0 there, so that its weights are exp2(-inf) = 0.
        base = gl.where(new_top == -float("inf"), 0.0, new_top)
    else:
        base = new_top
    weight = gl.exp2(score * scale_log2 - gl.expand_dims(base, 1))
    return weight, gl.exp2(top - base), new_top


@gluon.jit
def _step(query, weight, acc, top, total, memory, turn, scale_log2, block, i, n_real, n_exempt, slot, tests,
          TESTED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, COORDINATE_COUNT: gl.constexpr,
          ALWAYS: gl.constexpr):
    """Scores and softmax of the block at this turn, output of the block before it.

    The order is what keeps the matrix unit busy: the scores are started, then the output, and the softmax runs under
    the latter. No product stays in flight across a loop's end, as the assembler would then wait for every single one.
    """
    _, k_shared, v_shared, _, _, k_ready, k_free, v_ready, v_free = memory
    S_LAYOUT: gl.constexpr = top.type.layout.parent
    O_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    P_LAYOUT: gl.constexpr = weight.type.layout
    stage = turn % STAGES
    last = (turn - 1) % STAGES
    zeros = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    mbarrier.wait(k_ready.index(stage), turn // STAGES & 1)
    product = warpgroup_mma(query, k_shared.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(last), (turn - 1) // STAGES & 1)
    output = warpgroup_mma(weight, v_shared.index(last), acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=[product])
    mbarrier.arrive(k_free.index(stage), count=1)
    if TESTED and COORDINATE_COUNT > 0:
        # The window's tests need the registers that the output's operands hold while it runs.
        acc = warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(v_free.index(last), count=1)
    if TESTED:
        score = _mask(score, block, i, n_real, n_exempt, slot, tests, BN, COORDINATE_COUNT, ALWAYS)
    fresh, shrink, top = _softmax(score, top, scale_log2, TESTED)
    total = total * shrink + gl.sum(fresh, 1)
    if not TESTED or COORDINATE_COUNT == 0:
        acc = warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, O_ROWS), 1)
    return gl.convert_layout(fresh.to(weight.dtype), P_LAYOUT), acc, top, total


@gluon.jit
def _attend(query, memory, p_list, n_whole, n_real, n_exempt, slot, tests, turn, scale_log2,
            BN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, COORDINATE_COUNT: gl.constexpr,
            ALWAYS: gl.constexpr):
    """64 queries in shared memory against the listed blocks, as they arrive in the rings from `turn` on.

    Returns:
        the sum of weighted values, the sum of weights and the largest score (base 2) of each query.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    _, k_shared, v_shared, _, _, k_ready, k_free, v_ready, v_free = memory
    zeros = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    stage = turn % STAGES
    mbarrier.wait(k_ready.index(stage), turn // STAGES & 1)
    product = warpgroup_mma(query, k_shared.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(k_free.index(stage), count=1)
    if n_whole == 0:
        score = _mask(score, gl.load(p_list), 0, n_real, n_exempt, slot, tests, BN, COORDINATE_COUNT, ALWAYS)
    top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    fresh, _, top = _softmax(score, top, scale_log2, True)
    total = gl.sum(fresh, 1)
    weight = gl.convert_layout(fresh.to(k_shared.dtype), P_LAYOUT)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, O_LAYOUT)
    for i in range(1, n_whole):
        weight, acc, top, total = _step(query, weight, acc, top, total, memory, turn + i, scale_log2, 0, i, n_real,
                                        n_exempt, slot, tests, False, BN, STAGES, COORDINATE_COUNT, ALWAYS)
    # Between the loops the weights pass through whole registers: carried through both loops as values of 16 bits, they
    # would be put together by byte shuffles in every step.
    weight = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], dtype=weight.dtype, is_pure=True, pack=2)
    for i in range(gl.maximum(n_whole, 1), n_real):
        weight, acc, top, total = _step(query, weight, acc, top, total, memory, turn + i, scale_log2,
                                        gl.load(p_list + i), i, n_real, n_exempt, slot, tests, True, BN, STAGES,
                                        COORDINATE_COUNT, ALWAYS)
    turn += gl.maximum(n_real, 1) - 1
    last = turn % STAGES
    mbarrier.wait(v_ready.index(last), turn // STAGES & 1)
    output = warpgroup_mma(weight, v_shared.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[output])
    mbarrier.arrive(v_free.index(last), count=1)
    return acc, total, top


@gluon.jit
def _consume_tile(Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests, query_strides,
                  index_strides, flag_strides, box, H, Lq, NQ, scale_log2, tile, turn, round, j: gl.constexpr,
                  D: gl.constexpr, DV: gl.constexpr, PERMUTED: gl.constexpr, PERSISTENT: gl.constexpr,
                  TILE: gl.constexpr, COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr, BN: gl.constexpr,
                  WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """64 queries of one tile, from reading them to writing out and LSE; returns the turn of the rings after it."""
    # Rows in pieces of 16 bytes, for queries and outputs that go through an index.
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    q_shared, _, _, q_ready, q_free, _, _, _, _ = memory
    KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH, query_slots, key_slots = tests
    b, h, i_q = place_of(lists[3], tile, H, NQ)
    p_list, n_whole, n_real, i_count = list_of(lists, strides, b, h, i_q)
    n_exempt = 0
    if EXEMPT is not None:
        n_exempt = n_whole + gl.load(EXEMPT + i_count)
    if FLAGS is not None:
        tests = (KEY_LENGTHS, FLAGS + b * flag_strides[0] + h * flag_strides[1], COORDINATES, LOW, HIGH, query_slots,
                 key_slots)
    query = q_shared.index(j)
    first = i_q.to(gl.int32) * (2 * ROWS) + j * ROWS
    S_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                                       instr_shape=[16, BN, 16]))
    slot = first + gl.arange(0, ROWS, S_ROWS)
    if PERMUTED:
        # A slot's token is what the index says; -1 is padding.
        p_index = QUERY_INDEX + b * index_strides[0] + h * index_strides[1]
        token = gl.load(p_index + first + gl.arange(0, ROWS, gl.SliceLayout(1, LINES)))
        o_d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, LINES)), 0)
        p_query = Q + b * query_strides[0] + h * query_strides[2] + gl.expand_dims(token, 1) * query_strides[1] + o_d
        query.store(gl.load(p_query, mask=gl.expand_dims(token >= 0, 1) & (o_d < D), other=0.0))
        fence_async_shared()
    else:
        mbarrier.wait(q_ready.index(j), round & 1)

    acc, total, top = _attend(query, memory, p_list, n_whole, n_real, n_exempt, slot, tests, turn, scale_log2,
                              BN, WIDTH, STAGES, COORDINATE_COUNT, ALWAYS)

    # One reciprocal per row: a division per element costs more than a block. Queries without a key give 0 and -inf.
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, O_ROWS), 1)
    acc = gl.where(gl.expand_dims(gl.convert_layout(empty, O_ROWS), 1), 0.0, acc)
    lse = (top + gl.log2(total)) * 0.6931471805599453
    p_lse = LSE + (b * H + h) * Lq
    # The output leaves through the queries' memory: by a bulk copy, or row by row in pieces of 16 bytes instead of 4.
    query.store(acc.to(query.dtype))
    if PERMUTED:
        lse_token = gl.load(p_index + slot)
        gl.store(p_lse + lse_token, lse, mask=lse_token >= 0)
        token = gl.load(p_index + first + gl.arange(0, ROWS, gl.SliceLayout(1, LINES)))
        o_d = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, LINES)), 0)
        p_out = OUT + ((b * Lq + gl.expand_dims(token, 1)) * H + h) * DV + o_d
        gl.store(p_out, query.load(LINES), mask=gl.expand_dims(token >= 0, 1) & (o_d < DV))
    else:
        lse_token = slot
        if TILE is not None:
            lse_token = tokens_of(slot, i_q.to(gl.int32), box, TILE)
        gl.store(p_lse + lse_token, lse, mask=(lse_token >= 0) & (lse_token < Lq))
        fence_async_shared()
        write(OUT, OUT_BOXES, b, h, i_q.to(gl.int32), j, box, query, WIDTH, TILE)
        if PERSISTENT:
            mbarrier.arrive(q_free.index(j), count=1)
    return turn + gl.maximum(n_real, 1)


@gluon.jit
def _consume(Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests, query_strides,
             index_strides, flag_strides, box, H, Lq, NQ, tiles, scale_log2, j: gl.constexpr,
             D: gl.constexpr, DV: gl.constexpr, PERMUTED: gl.constexpr, PERSISTENT: gl.constexpr,
             TILE: gl.constexpr, COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr, BN: gl.constexpr,
             WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """Consumer group j: its half of the queries of each tile."""
    if PERSISTENT:
        turn = 0
        round = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            turn = _consume_tile(Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests,
                                 query_strides, index_strides, flag_strides, box, H, Lq, NQ, scale_log2, tile, turn,
                                 round, j, D, DV, PERMUTED, PERSISTENT, TILE, COORDINATE_COUNT, ALWAYS, BN,
                                 WIDTH, STAGES)
            round += 1
    else:
        _consume_tile(Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests, query_strides,
                      index_strides, flag_strides, box, H, Lq, NQ, scale_log2, gl.program_id(0), 0, 0, j,
                      D, DV, PERMUTED, PERSISTENT, TILE, COORDINATE_COUNT, ALWAYS, BN, WIDTH, STAGES)


# A new size must not mean a new compile: of the steps only those matter that vector loads are aligned by, and what is
# read and written one number at a time needs no alignment (batch elements of tiles begin anywhere).
@gluon.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_lq", "stride_cb", "stride_ch", "stride_cq",
                              "stride_ib", "stride_ih", "frames", "height", "width", "video_blocks", "video_start",
                              "text_start", "text", "H", "Lq", "NQ", "query_slots", "key_slots", "tiles"],
           do_not_specialize_on_alignment=["LSE", "LISTS", "WHOLE", "BOUNDARY", "EXEMPT"])
def attention_kernel(
    Q, K, V, OUT, LSE, LISTS, WHOLE, BOUNDARY, EXEMPT, ORDER, QUERY_INDEX, KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH,
    stride_qb, stride_qn, stride_qh, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq,
    stride_ib, stride_ih, stride_fb, stride_fh, Q_BOXES, K_BOXES, V_BOXES, OUT_BOXES,
    frames, height, width, video_blocks, video_start, text_start, text,
    H, Lq, NQ, query_slots, key_slots, tiles, scale_log2,
    D: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    PERMUTED: gl.constexpr, PERSISTENT: gl.constexpr, COORDINATE_COUNT: gl.constexpr, ALWAYS: gl.constexpr,
    TILE: gl.constexpr,
):
    """Tiles of 128 queries of one head against the key blocks that their lists name.

    K, V: descriptors over (B, H, rows, D). Q, OUT: such descriptors too, or with PERMUTED pointers to (B, Lq, H, D),
    the former by strides with contiguous head dim, the latter contiguous. LSE (B, H, Lq), contiguous.
    ORDER: int32 (B * H * NQ,), the tiles in launch order. FLAGS: int8 (B|1, H|1, key slots), bit 0 set where the slot
    holds a key that may be seen, bit 1 where the window does not test it; None: KEY_LENGTHS says what is real.
    EXEMPT: how many of the boundary blocks, first in the list, the window does not test. May be None: EXEMPT,
    QUERY_INDEX, FLAGS, COORDINATES, LOW, HIGH.
    TILE: None, or (frames, rows, columns) of the boxes of 128 tokens that are the first blocks of queries and keys.
    Then Q_BOXES ... OUT_BOXES are descriptors of the video tokens of one batch element, (frames, rows, columns, H, D),
    the plain ones describe its text tokens (None: no text), frames, height and width are the grid's, video_start and
    text_start the first tokens of video and text, text how many those are. Where the grid's ends cut tiles, FLAGS says
    which of their slots are real.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = K.dtype if TILE is None else K_BOXES.dtype
    q_shared = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH], layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, BN, WIDTH], layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, BN, WIDTH], layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(q_ready.index(j), count=1)
        mbarrier.init(q_free.index(j), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        # Both consumer groups must be done with a block before the next may overwrite it.
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    memory = (q_shared, k_shared, v_shared, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    box = (frames, height, width, video_blocks, video_start, text_start, text)
    copies = (Q, K, V, Q_BOXES, K_BOXES, V_BOXES)
    lists = (LISTS, WHOLE, BOUNDARY, ORDER)
    strides = (stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq)
    tests = (KEY_LENGTHS, FLAGS, COORDINATES, LOW, HIGH, query_slots, key_slots)
    query_strides = (stride_qb, stride_qn, stride_qh)
    index_strides = (stride_ib, stride_ih)
    flag_strides = (stride_fb, stride_fh)
    gl.warp_specialize([
        (_consume, (Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests, query_strides,
                    index_strides, flag_strides, box, H, Lq, NQ, tiles, scale_log2, 0,
                    D, DV, PERMUTED, PERSISTENT, TILE, COORDINATE_COUNT, ALWAYS, BN, WIDTH, STAGES)),
        (_consume, (Q, OUT, OUT_BOXES, LSE, memory, lists, strides, EXEMPT, QUERY_INDEX, tests, query_strides,
                    index_strides, flag_strides, box, H, Lq, NQ, tiles, scale_log2, 1,
                    D, DV, PERMUTED, PERSISTENT, TILE, COORDINATE_COUNT, ALWAYS, BN, WIDTH, STAGES)),
        (produce, (copies, memory, lists, strides, box, H, NQ, tiles, PERMUTED, PERSISTENT, TILE, BN, WIDTH, STAGES)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
