"""The copies of the Hopper kernel: the producer warp, and where blocks of tokens lie in the activations.

A block is a run of tokens in raster order, or a tile of the grid: a box of (frames, rows, columns) that one
instruction copies straight from the activations, with zeros where the grid ends inside the tile.
"""

# mypy: disable-error-code="no-untyped-def"
# Gluon reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_plan import QUERY_BLOCK, half_of

# Queries of one consumer group: what one matrix instruction takes.
ROWS = gl.constexpr(QUERY_BLOCK // 2)
_half_of = gluon.constexpr_function(half_of)


@gluon.jit
def place_of(ORDER, tile, H, NQ):
    """Batch element, head and query block of a tile, in launch order."""
    flat = gl.load(ORDER + tile)
    return (flat // NQ // H).to(gl.int64), (flat // NQ % H).to(gl.int64), (flat % NQ).to(gl.int64)


@gluon.jit
def list_of(lists, strides, b, h, i_q):
    """The list of a query block: its start, whole blocks, all blocks, and the place of its counts."""
    LISTS, WHOLE, BOUNDARY, _ = lists
    stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq = strides
    i_count = b * stride_cb + h * stride_ch + i_q * stride_cq
    n_whole = gl.load(WHOLE + i_count)
    n_real = n_whole + gl.load(BOUNDARY + i_count)
    return LISTS + b * stride_lb + h * stride_lh + i_q * stride_lq, n_whole, n_real, i_count


@gluon.jit
def _corner(block, box, TILE: gl.constexpr):
    """First frame, row and column of a video block."""
    _, height, width, _, _, _, _ = box
    rows = (height + TILE[1] - 1) // TILE[1]
    columns = (width + TILE[2] - 1) // TILE[2]
    return block // (rows * columns) * TILE[0], block // columns % rows * TILE[1], block % columns * TILE[2]


@gluon.jit
def _part(block, j: gl.constexpr, box, TILE: gl.constexpr):
    """First frame, row and column of half j of a video block."""
    HALF: gl.constexpr = _half_of(TILE)
    t, y, x = _corner(block, box, TILE)
    return (t + j * (TILE[0] - HALF[0]), y + j * ((TILE[1] - HALF[1]) if HALF[0] == TILE[0] else 0),
            x + j * ((TILE[2] - HALF[2]) if HALF[0] == TILE[0] and HALF[1] == TILE[1] else 0))


@gluon.jit
def _copy_block(RASTER, BOXES, b, h, block, box, barrier, target, BN: gl.constexpr, WIDTH: gl.constexpr,
                TILE: gl.constexpr):
    """Starts the copy of one block of keys or values; what lies beyond the head dim or the tokens becomes 0."""
    mbarrier.expect(barrier, BN * WIDTH * 2)
    if TILE is None:
        tma.async_copy_global_to_shared(RASTER, [b.to(gl.int32), h.to(gl.int32), block * BN, 0], barrier,
                                        target.reshape([1, 1, BN, WIDTH]))
    else:
        video_blocks = box[3]
        if block < video_blocks:
            t, y, x = _corner(block, box, TILE)
            tma.async_copy_global_to_shared(BOXES, [t, y, x, h.to(gl.int32), 0], barrier,
                                            target.reshape([TILE[0], TILE[1], TILE[2], 1, WIDTH]))
        elif RASTER is not None:
            tma.async_copy_global_to_shared(RASTER, [0, h.to(gl.int32), (block - video_blocks) * BN, 0], barrier,
                                            target.reshape([1, 1, BN, WIDTH]))


@gluon.jit
def _copy_queries(RASTER, BOXES, b, h, block, j: gl.constexpr, box, barrier, target, WIDTH: gl.constexpr,
                  TILE: gl.constexpr):
    """Starts the copy of the queries of consumer group j."""
    mbarrier.expect(barrier, ROWS * WIDTH * 2)
    if TILE is None:
        tma.async_copy_global_to_shared(RASTER, [b.to(gl.int32), h.to(gl.int32), block * (2 * ROWS) + j * ROWS, 0],
                                        barrier, target.reshape([1, 1, ROWS, WIDTH]))
    else:
        HALF: gl.constexpr = _half_of(TILE)
        video_blocks = box[3]
        if block < video_blocks:
            t, y, x = _part(block, j, box, TILE)
            tma.async_copy_global_to_shared(BOXES, [t, y, x, h.to(gl.int32), 0], barrier,
                                            target.reshape([HALF[0], HALF[1], HALF[2], 1, WIDTH]))
        elif RASTER is not None:
            start = (block - video_blocks) * (2 * ROWS) + j * ROWS
            tma.async_copy_global_to_shared(RASTER, [0, h.to(gl.int32), start, 0], barrier,
                                            target.reshape([1, 1, ROWS, WIDTH]))


@gluon.jit
def write(RASTER, BOXES, b, h, block, j: gl.constexpr, box, source, WIDTH: gl.constexpr, TILE: gl.constexpr):
    """Writes the outputs of consumer group j, cut at the end of the tokens; returns when its memory is free again."""
    if TILE is None:
        tma.async_copy_shared_to_global(RASTER, [b.to(gl.int32), h.to(gl.int32), block * (2 * ROWS) + j * ROWS, 0],
                                        source.reshape([1, 1, ROWS, WIDTH]))
    else:
        HALF: gl.constexpr = _half_of(TILE)
        video_blocks = box[3]
        if block < video_blocks:
            t, y, x = _part(block, j, box, TILE)
            tma.async_copy_shared_to_global(BOXES, [t, y, x, h.to(gl.int32), 0],
                                            source.reshape([HALF[0], HALF[1], HALF[2], 1, WIDTH]))
        elif RASTER is not None:
            start = (block - video_blocks) * (2 * ROWS) + j * ROWS
            tma.async_copy_shared_to_global(RASTER, [0, h.to(gl.int32), start, 0],
                                            source.reshape([1, 1, ROWS, WIDTH]))
    tma.store_wait(0)


@gluon.jit
def tokens_of(slot, block, box, TILE: gl.constexpr):
    """Tokens of the slots of one block whose tiles are boxes of the grid, -1 for padding."""
    frames, height, width, video_blocks, video_start, text_start, text = box
    t, y, x = _corner(block, box, TILE)
    inside = slot % (2 * ROWS)
    t += inside // (TILE[1] * TILE[2])
    y += inside // TILE[2] % TILE[1]
    x += inside % TILE[2]
    video = gl.where((t < frames) & (y < height) & (x < width), video_start + (t * height + y) * width + x, -1)
    place = slot - video_blocks * (2 * ROWS)
    return gl.where(block < video_blocks, video, gl.where(place < text, text_start + place, -1))


@gluon.jit
def _produce_tile(copies, memory, lists, strides, box, H, NQ, tile, turn, round,
                  PERMUTED: gl.constexpr, PERSISTENT: gl.constexpr, TILE: gl.constexpr, BN: gl.constexpr,
                  WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """Starts the copies of one tile; returns the turn of the rings after it."""
    Q, K, V, Q_BOXES, K_BOXES, V_BOXES = copies
    q_shared, k_shared, v_shared, q_ready, q_free, k_ready, k_free, v_ready, v_free = memory
    b, h, i_q = place_of(lists[3], tile, H, NQ)
    p_list, _, n_real, _ = list_of(lists, strides, b, h, i_q)
    for i in range(gl.maximum(n_real, 1)):
        block = gl.load(p_list + i)
        stage = (turn + i) % STAGES
        # A fresh barrier counts as one whose phase 1 has passed: the first waits return at once.
        phase = (turn + i) // STAGES & 1 ^ 1
        mbarrier.wait(k_free.index(stage), phase)
        _copy_block(K, K_BOXES, b, h, block, box, k_ready.index(stage), k_shared.index(stage), BN, WIDTH, TILE)
        if not PERMUTED:
            # After the first keys: in a persistent program the queries' memory is still busy with the last output.
            if i == 0:
                for j in gl.static_range(2):
                    if PERSISTENT:
                        mbarrier.wait(q_free.index(j), round & 1 ^ 1)
                    _copy_queries(Q, Q_BOXES, b, h, i_q.to(gl.int32), j, box, q_ready.index(j), q_shared.index(j),
                                  WIDTH, TILE)
        mbarrier.wait(v_free.index(stage), phase)
        _copy_block(V, V_BOXES, b, h, block, box, v_ready.index(stage), v_shared.index(stage), BN, WIDTH, TILE)
    return turn + gl.maximum(n_real, 1)


@gluon.jit
def produce(copies, memory, lists, strides, box, H, NQ, tiles,
             PERMUTED: gl.constexpr, PERSISTENT: gl.constexpr, TILE: gl.constexpr, BN: gl.constexpr,
             WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """The producer warp: queries (raster order), keys and values of its tiles."""
    if PERSISTENT:
        turn = 0
        round = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            turn = _produce_tile(copies, memory, lists, strides, box, H, NQ, tile, turn, round,
                                 PERMUTED, PERSISTENT, TILE, BN, WIDTH, STAGES)
            round += 1
    else:
        _produce_tile(copies, memory, lists, strides, box, H, NQ, gl.program_id(0), 0, 0,
                      PERMUTED, PERSISTENT, TILE, BN, WIDTH, STAGES)
