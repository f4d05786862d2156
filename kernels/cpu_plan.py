"""Cuts the block lists of one head into pieces that a dense attention kernel computes well. Pure numpy, host only.

PyTorch's CPU kernel is about a third slower per pair on 64 queries than on 768. Neighbouring query blocks mostly
list the same key blocks, so what a run of query blocks has in common is computed for all of them at once, and only
the rest is left to shorter runs; the parts are merged by their LSE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Queries in a piece, and the time per pair relative to the fastest: PyTorch's CPU kernel switches its query tile at
# 768 and 192 queries. Measured on 2 cores with AVX-512, head dim 64, torch 2.13, November 2026.
RATES = ((768, 1.0), (192, 1.12), (1, 1.33))
MASK_RATE = 0.2  # what an additive mask costs on top, in the same unit
WORTH = 2**18  # pairs, times heads, from which a piece of its own repays its fixed cost (about 0.1 ms)


@dataclass(frozen=True)
class Piece:
    """Query blocks first..last-1 against key blocks; `tested` pieces apply the window and the lists pair by pair.

    Untested pieces of one level share no query block.
    """

    level: int
    first: int
    last: int
    keys: np.ndarray
    tested: bool = False


def plan_pieces(
    keep: np.ndarray, tested: np.ndarray, query_lengths: np.ndarray, key_lengths: np.ndarray, *, heads: int,
    threads: int,
) -> list[Piece]:
    """Pieces that cover every kept pair of blocks exactly once, wide pieces of a query block before narrow ones.

    Args:
        keep: bool (nq, nk), block pairs computed without a test.
        tested: bool (nq, nk), block pairs to test.
        query_lengths, key_lengths: int (nq,) and (nk,), tokens of each block.
        heads: batch elements times heads that share the lists.
        threads: threads of the kernel: the widest pieces give each of them work.

    Returns:
        The pieces.
    """
    alive = (query_lengths > 0)[:, None] & (key_lengths > 0)
    typical = max(1, int(query_lengths.max(initial=1)))
    widest = max(RATES[0][0], 256 * -(-threads // heads))
    spans = [-(-rows // typical) for rows in (widest, RATES[1][0])]
    pieces = _plain_pieces(keep & alive, query_lengths, key_lengths, spans, heads)
    return pieces + _tested_pieces(tested & alive, query_lengths, key_lengths, spans)


def _plain_pieces(
    rest: np.ndarray, query_lengths: np.ndarray, key_lengths: np.ndarray, spans: list[int], heads: int
) -> list[Piece]:
    pieces = []
    nq = rest.shape[0]
    rest = rest.copy()
    for level, span in enumerate(spans):
        if span <= 1:
            continue
        for first in range(0, nq, span):
            last = min(first + span, nq)
            # An empty query block has no say in what is common.
            common = (rest[first:last] | (query_lengths[first:last] == 0)[:, None]).all(0)
            pairs = int(query_lengths[first:last].sum()) * int(key_lengths[common].sum()) * heads
            if last - first > 1 and pairs >= WORTH:
                pieces.append(Piece(level, first, last, np.flatnonzero(common)))
                rest[first:last] &= ~common
    return pieces + [Piece(len(spans), i, i + 1, np.flatnonzero(rest[i])) for i in np.flatnonzero(rest.any(1)).tolist()]


def _tested_pieces(
    tested: np.ndarray, query_lengths: np.ndarray, key_lengths: np.ndarray, spans: list[int]
) -> list[Piece]:
    """A run of query blocks is computed over all key blocks that any of them lists, where that costs less."""
    pieces = []
    nq = tested.shape[0]
    cost = (query_lengths * (tested @ key_lengths)).astype(np.float64) * (RATES[2][1] + MASK_RATE)
    todo = cost > 0
    for span, (_, rate) in zip(spans, RATES, strict=False):
        for first in range(0, nq, span):
            last = min(first + span, nq)
            if not todo[first:last].all() or last - first <= 1:
                continue
            union = tested[first:last].any(0)
            together = int(query_lengths[first:last].sum()) * int(key_lengths[union].sum()) * (rate + MASK_RATE)
            if together < cost[first:last].sum():
                pieces.append(Piece(0, first, last, np.flatnonzero(union), tested=True))
                todo[first:last] = False
    return pieces + [Piece(0, i, i + 1, np.flatnonzero(tested[i]), tested=True)
                     for i in np.flatnonzero(todo).tolist()]


def slices(rows: int) -> int:
    """Query tiles that PyTorch's CPU kernel cuts a piece into: what its threads share out."""
    return -(-rows // (256 if rows >= RATES[0][0] else 64 if rows >= RATES[1][0] else 32))


def runs(blocks: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
    """Blocks as ranges of tokens, consecutive blocks joined.

    Args:
        blocks: int (n,), ascending block ids.
        offsets: int (blocks + 1,), where each block's tokens start.

    Returns:
        (start, stop) of each run of tokens.
    """
    starts, stops = offsets[blocks], offsets[blocks + 1]
    breaks = np.flatnonzero(starts[1:] != stops[:-1])
    first = np.concatenate([starts[:1], starts[1:][breaks]])
    last = np.concatenate([stops[:-1][breaks], stops[-1:]])
    return list(zip(first.tolist(), last.tolist(), strict=True))
