"""The oracle: what every candidate would do to a head's output, from a few query rows of a dense call.

A candidate is an order of the tokens, a ranking of the key blocks, an operator and a budget. For the sampled rows the
exact attention is summed up per key block once; ranking the blocks then gives the outputs of all budgets together. How
tokens sit in blocks, and how many of them a budget keeps, is asked of the method that runs the plan (`methods.tuned`);
text, the own block and, by pattern, its neighbours come first there and here. Products are float32 whatever the
activations are: below an error of 1e-4 half precision would measure its own noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blocklayout import BlockLayout
from ..grid import TokenGrid
from ..methods.auto import block_weight
from ..methods.base import Call
from ..methods.tuned import candidate_layout, kept_of, near_of
from ..order import video_blocks
from ..scoring import gather_tokens, head_chunks, keys_held, pool, to_slots
from .candidates import BUDGETS, KINDS, ORDERS, Candidate

__all__ = ["NOISE", "OPERATORS", "RANKINGS", "Errors", "RowErrors", "ordered", "probe_head", "probe_heads",
           "probe_rows", "sample_rows"]

RANKINGS = ("pooled", "spread", "band")
OPERATORS = ("drop", "soft")
NOISE = 1e-4  # relative squared errors below it count as equal


def sample_rows(grid: TokenGrid, count: int = 128, text: int = 32, *, seed: int = 0) -> Tensor:
    """Query rows spread over the sequence: one at random out of each of `count` equal stretches of the video.

    Args:
        grid: the tokens.
        count: rows of the video, at most all of them.
        text: rows of the text, where the sequence holds text.
        seed: of the choice.

    Returns:
        int64 (rows,), token ids in rising order of the video, then of the text; on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start, tokens, asked in ((grid.video_start, grid.video, count), (grid.text_start, grid.text, text)):
        number = min(asked, tokens)
        edges = torch.arange(number + 1) * tokens // max(1, number)
        width = edges[1:] - edges[:-1]
        parts.append(start + edges[:-1] + (torch.rand(number, generator=generator) * width).long())
    return torch.cat(parts)


@dataclass(frozen=True)
class Errors:
    """What the sampled rows say of every candidate of some heads.

    Args:
        orders, rankings, operators, budgets: names of the first four dimensions of the tensors.
        mass: share of the softmax that the kept blocks hold, mean over rows.
        err: squared error of the head's output over its square, both summed over rows.
        a: the same of what the head adds to the residual stream, over the square of the stream; `err` without a
            projection.
        mass_error, err_error, a_error: their standard errors over the rows.

    All tensors are float32 (orders, rankings, operators, budgets, heads), on the device of the activations.
    """

    orders: tuple[str, ...]
    rankings: tuple[str, ...]
    operators: tuple[str, ...]
    budgets: tuple[float, ...]
    mass: Tensor
    err: Tensor
    a: Tensor
    mass_error: Tensor
    err_error: Tensor
    a_error: Tensor

    def of(self, candidate: Candidate) -> dict[str, Tensor]:
        """The numbers of one candidate: each name of a tensor with float32 (heads,); dense makes no error.

        Raises:
            ValueError: the candidate was not probed; one line.
        """
        names = ("mass", "err", "a", "mass_error", "err_error", "a_error")
        if candidate.is_dense:
            zero = torch.zeros_like(self.err[0, 0, 0, 0])
            return {name: zero + (name == "mass") for name in names}
        ranking, operator = KINDS[candidate.pattern]
        try:
            place = (self.orders.index(candidate.order), self.rankings.index(ranking), self.operators.index(operator),
                     self.budgets.index(candidate.density))
        except ValueError:
            raise ValueError(f"candidate {candidate} was not probed; probed are orders {', '.join(self.orders)}, "
                             f"rankings {', '.join(self.rankings)}, budgets {self.budgets}") from None
        return {name: getattr(self, name)[place] for name in names}

    def table(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """The numbers of several candidates: each name of a tensor with float32 (heads, candidates)."""
        found = [self.of(candidate) for candidate in candidates]
        return {name: torch.stack([one[name] for one in found], dim=-1) for name in found[0]}

    def worse(self, other: Errors) -> Errors:
        """The worse of two probes of the same heads (the two guidance branches), candidate by candidate, by `a`."""
        mine = self.a >= other.a
        names = ("mass", "err", "a", "mass_error", "err_error", "a_error")
        parts: dict[str, Any] = {n: torch.where(mine, getattr(self, n), getattr(other, n)) for n in names}
        return replace(self, **parts)


@dataclass(frozen=True)
class RowErrors:
    """The sums that `Errors` are made of, row by row, so that rows can be drawn anew.

    Args:
        orders, rankings, operators, budgets: as in `Errors`.
        mass, err, added: float32 (orders, rankings, operators, budgets, heads, rows): kept share, squared error of the
            output, and squared change of the residual stream.
        norm: float32 (heads, rows), square of the dense output.
        stream: float32 (1|heads, rows), square of the residual stream.
    """

    orders: tuple[str, ...]
    rankings: tuple[str, ...]
    operators: tuple[str, ...]
    budgets: tuple[float, ...]
    mass: Tensor
    err: Tensor
    added: Tensor
    norm: Tensor
    stream: Tensor

    def errors(self, rows: Tensor | None = None) -> Errors:
        """The means over all rows, or over some of them: int64 (R,), places among the rows."""
        every = slice(None) if rows is None else rows
        mass, err, added, norm, stream = (x[..., every] for x in
                                          (self.mass, self.err, self.added, self.norm, self.stream))
        one = torch.ones_like(norm)
        parts = [_ratio(*pair) for pair in ((mass, one), (err, norm), (added, stream.expand_as(norm)))]
        return Errors(self.orders, self.rankings, self.operators, self.budgets, *(value for value, _ in parts),
                      *(spread for _, spread in parts))


def _ratio(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of one over that of the other, and its standard error (delta method for a ratio of means)."""
    total = whole.sum(-1).clamp(min=1e-30)
    value, rows = part.sum(-1) / total, part.shape[-1]
    spread = (part - value[..., None] * whole).square().sum(-1) * (rows / max(1, rows - 1))
    return value, spread.sqrt() / total


def probe_head(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, **options: Any) -> Errors:
    """`probe_heads` of one head: query, key and value are (L, D), gate_out is (D, C)."""
    if options.get("gate_out") is not None:
        options["gate_out"] = options["gate_out"][None]
    return probe_heads(query[:, None], key[:, None], value[:, None], rows, **options)


def probe_heads(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, **options: Any) -> Errors:
    """Errors of all candidates on the sampled rows: `probe_rows`, whose arguments it takes, and the mean over rows."""
    return probe_rows(query, key, value, rows, **options).errors()


def probe_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, *, scale: float, grid: TokenGrid,
    orders: Sequence[str] | Mapping[str, BlockLayout] = ORDERS, rankings: Sequence[str] = RANKINGS,
    budgets: Sequence[float] = BUDGETS, gate_out: Tensor | None = None, stream: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> RowErrors:
    """What every candidate does to the sampled rows, some heads at a time.

    Args:
        query, key: (L, H, D); value: (L, H, Dv), of one batch element, after norms and rotary embedding.
        rows: int64 (R,), query tokens, from `sample_rows`; the same for all candidates, so that they can be compared.
        scale: softmax scale.
        grid: what the L tokens are.
        orders: names of `candidates.ORDERS`, or their layouts where the caller has them (`ordered`).
        rankings: of `RANKINGS`: "pooled" (mean query times mean key), "spread" (the same and the log of the spread of
            the block's keys and values, see `methods.auto.block_weight`) and "band" (distance along the order).
        budgets: kept fractions in (0, 1].
        gate_out: (H, Dv, C), each head's part of the output projection times the block's gate; None: `a` is `err`.
        stream: (R, C), the residual stream that enters the layer at these rows; with gate_out.
        key_mask: bool (L,), True where the key is a real token; None: all are.

    Returns:
        The sums of every row, with tensors on the device of the activations.

    Raises:
        ValueError: names, budgets or shapes that are not allowed; one line.
    """
    layouts = dict(orders) if isinstance(orders, Mapping) else ordered(grid, orders, query.device)
    names, kept, shares = tuple(layouts), tuple(rankings), tuple(float(b) for b in budgets)
    _check(query, key, value, grid, kept, shares, gate_out, stream)
    rows = rows.to(query.device)
    value_dim = value.shape[-1]
    # The largest temporaries of a head: weights in token and slot order, their sums times values per block, and the
    # activations in float32.
    blocks = max(x.blocks for x in layouts.values())
    each = 2 * len(rows) * (2 * grid.tokens + blocks * (value_dim + len(shares))) + 4 * grid.tokens * value_dim
    found = []
    for part in head_chunks(query.shape[1], each):
        head = _Rows(query[:, part], key[:, part], value[:, part], rows, scale, grid, key_mask)
        gram = None
        if gate_out is not None:
            gate = gate_out[part].to(torch.float32)
            gram = gate @ gate.transpose(1, 2)
        found.append((*head.probe(layouts, kept, shares, gram), head.out.square().sum(-1)))
    mass, err, added, norm = (torch.cat(x, dim=-2) for x in zip(*found, strict=True))
    whole = norm if stream is None else stream.to(torch.float32).square().sum(-1)[None]
    return RowErrors(names, kept, OPERATORS, shares, mass, err, added, norm, whole)


def ordered(
    grid: TokenGrid, orders: Sequence[str] = ORDERS, device: torch.device | str | None = None
) -> dict[str, BlockLayout]:
    """The layouts of the orders by name, as the method that runs a candidate makes them.

    Args:
        grid: the tokens.
        orders: of `candidates.ORDERS`.
        device: where to put them.

    Raises:
        ValueError: an unknown order; one line.
    """
    for name in orders:
        if name not in ORDERS:
            raise ValueError(f"orders={name!r} is not allowed; use some of {', '.join(ORDERS)}")
    made = {name: candidate_layout(grid, name) for name in orders}
    return {name: x if device is None else x.to(device) for name, x in made.items()}


def _check(
    query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid, rankings: Sequence[str], budgets: Sequence[float],
    gate_out: Tensor | None, stream: Tensor | None,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3 or x.shape[:2] != (grid.tokens, query.shape[1]):
            raise ValueError(f"{name} is {tuple(x.shape)}; use (L, H, D), where L is {grid.tokens}, the grid's tokens")
    for name in rankings:
        if name not in RANKINGS:
            raise ValueError(f"rankings={name!r} is not allowed; use some of {', '.join(RANKINGS)}")
    if not budgets or any(not 0 < b <= 1 for b in budgets):
        raise ValueError(f"budgets={tuple(budgets)} is not allowed; use numbers in (0, 1]")
    if (gate_out is None) != (stream is None):
        raise ValueError("gate_out and stream belong together; give both or neither")


class _Blocks(NamedTuple):
    """What the key blocks of an order hold, whatever ranks them.

    Args:
        mass: (h, R, n), softmax weights of a block, summed.
        sums: (h, R, n, Dv), of weight times value.
        keys, values: (h, n, D) and (h, n, Dv), means.
        weight: (h, R, n), of a block as one entry, its mean key as heavy as its keys.
    """

    mass: Tensor
    sums: Tensor
    keys: Tensor
    values: Tensor
    weight: Tensor


class _Rows:
    """Exact attention of the sampled rows of some heads, and what becomes of it block by block.

    Attributes:
        out: float32 (h, R, Dv), the dense output.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float, grid: TokenGrid,
        key_mask: Tensor | None,
    ) -> None:
        # As a batch of one, the form that the shared parts take.
        self.mask = None if key_mask is None else key_mask[None]
        q, k, v = (x[None].to(torch.float32) for x in (query, key, value))
        self.call = Call(q, k, v, grid, scale, key_mask=self.mask)
        self.rows, self.scale, self.grid = rows, scale, grid
        if key_mask is not None:
            self.call.value = self.call.value.masked_fill(~key_mask[None, :, None, None], 0)
        self.query = gather_tokens(self.call.query, rows)[0].transpose(0, 1) * scale
        # [h, R, D] x [h, D, L]
        scores = self.query @ self.call.key[0].permute(1, 2, 0)
        if key_mask is not None:
            scores.masked_fill_(~key_mask, -torch.inf)
        self.top = scores.amax(-1, keepdim=True)
        self.weights = scores.sub_(self.top).exp_()
        self.sum = self.weights.sum(-1)
        self.out = self.weights @ self.call.value[0].transpose(0, 1) / self.sum[..., None]

    def probe(
        self, layouts: Mapping[str, BlockLayout], rankings: Sequence[str], budgets: Sequence[float], gram: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mass, error and added error of all candidates: float32 (orders, rankings, operators, budgets, h, R)."""
        found = [[list(self._budgets(x, held, ranking, budgets, gram)) for ranking in rankings]
                 for x in layouts.values() for held in (self._by_block(x),)]
        mass, err, added = (
            torch.stack([torch.stack([torch.stack([one[i] for one in each]) for each in order]) for order in found])
            for i in range(3)
        )
        return mass, err, added

    def _budgets(
        self, blocks: BlockLayout, of: _Blocks, ranking: str, budgets: Sequence[float], gram: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Mass, error and added error, float32 (budgets, h, R) each, for both operators."""
        # [h, R, nb, n], 1 where a budget keeps the block
        keeps = self._kept(blocks, of, ranking, budgets).to(torch.float32)
        held = (keeps @ of.mass[..., None])[..., 0]
        kept = keeps @ of.sums
        share = (held / self.sum[..., None]).permute(2, 0, 1)
        for operator in OPERATORS:
            numerator, denominator = kept, held
            if operator == "soft":
                # [h, R, nb, n] x [h, 1, n, Dv]
                rest = (1 - keeps) * of.weight[:, :, None]
                numerator = kept + (rest.flatten(1, 2) @ of.values).unflatten(1, rest.shape[1:3])
                denominator = held + rest.sum(-1)
            # A row may keep nothing that is left of it in float32; its output is 0 then.
            off = numerator / denominator.clamp(min=1e-30)[..., None] - self.out[:, :, None]
            err = off.square().sum(-1)
            added = err if gram is None else ((off.flatten(1, 2) @ gram).unflatten(1, off.shape[1:3]) * off).sum(-1)
            yield share, err.permute(2, 0, 1), added.clamp(min=0).permute(2, 0, 1)

    def _by_block(self, blocks: BlockLayout) -> _Blocks:
        """Sums and means of every key block."""
        size = blocks.block_size
        # As (1, L, h, R): rows in the place of channels.
        weights = to_slots(self.weights.permute(2, 0, 1)[None], blocks)[0].unflatten(0, (-1, size))
        values = to_slots(self.call.value, blocks)[0].unflatten(0, (-1, size))
        # [n, t, h, R] -> [h, n, R, t] x [h, n, t, Dv]
        weights = weights.permute(2, 0, 3, 1)
        sums = weights @ values.permute(2, 0, 1, 3)
        keys, means = (pool(x, blocks, mask=self.mask)[0] for x in (self.call.key, self.call.value))
        weight = (self.query @ keys.transpose(1, 2) - self.top).exp() * keys_held(blocks, self.mask)[0][:, None]
        return _Blocks(weights.sum(-1).transpose(1, 2), sums.transpose(1, 2), keys, means, weight)

    def _kept(self, blocks: BlockLayout, of: _Blocks, ranking: str, budgets: Sequence[float]) -> Tensor:
        """Whether a budget keeps a key block for a row: bool (h, R, budgets, n)."""
        video = video_blocks(blocks, self.grid)
        own = blocks.block_of_token.reshape(-1)[self.rows]
        at = torch.arange(blocks.blocks, device=own.device)
        apart = (own[:, None] - at).abs()
        if ranking == "band":
            scores = -apart.to(torch.float32).expand(self.out.shape[0], -1, -1)
        else:
            means = self.call.block_mean("query", blocks)[0] * self.scale
            scores = means[:, own] @ of.keys.transpose(1, 2)
        if ranking == "spread":
            scores = scores + block_weight(self.call, blocks, soft=True)[0][:, None]
        # Forced blocks first: the near ones of the video; text takes no place in the ranking.
        scores = scores.masked_fill(apart < near_of(ranking), torch.inf).masked_fill(at >= video, -torch.inf)
        rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        count = torch.tensor([kept_of(b, ranking, blocks, self.grid) for b in budgets], device=own.device)
        kept = rank[:, :, None] < count[:, None]
        # Text is seen by every row, and its own rows see everything.
        return kept | (at >= video) | (own >= video)[:, None, None]
