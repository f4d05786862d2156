"""Sparse-vDiT (arXiv 2506.03065): every head takes one of five fixed masks, or is left out altogether.

A head sees everything, nothing, tokens near in the model's own order, tokens near in the order "all frames of one
place, then the next place", or a fixed set of key columns. Which, is searched: each candidate's output error, plus what
it costs. The paper searches offline, for every step, layer and head; a file from `search` does that. Without one, each
layer searches at its first sparse call of the run, on sampled rows: that is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..headmodes import DIAGONAL, MODES, MULTI, SKIP, STRIPE, HeadModes, choose, load_modes, relative_cost
from ..operators import Operator, ZeroHeads
from ..order import layout, raster, token_major, video_blocks
from ..patterns import (
    build_mask,
    check_block_size,
    choose_block_size,
    half_band,
    interval_blocks,
    pick,
    replace_heads,
    static_mask,
)
from ..scoring import head_chunks, pool, sampled_row_attention
from ..selection import rows_kept, select_top_k, text_forced
from .base import Call, Method, Plan, check_range


@dataclass(frozen=True)
class SparseVDiT(Method):
    """A fixed mask per head: full, skip, diagonal, multi-diagonal or stripe.

    Args:
        density: kept fraction of the diagonal, multi-diagonal and stripe modes, text included, within 0.03 on 2,000
            tokens and more (the paper does not state its own). A run's density is that of the modes its heads take.
        table: file from `search`; its modes, density and block size hold, whatever the other options say. None: each
            layer searches at its first sparse call (ours).
        lam: weight of the cost against the error.
        eps: largest loss that a sparse mode may have. With `normalise` .05 to .3 is a useful range (ours).
        normalise: divide a head's error by the mean square of its dense output, so that `lam` and `eps` mean the same
            for all heads (ours); False: the paper's plain mean squared error.
        skip_share: most heads of a layer that may be skipped, as a fraction (ours; the paper shows damage from 6 % on).
        cost: what a mode costs: "density", its computed share (the paper), or the time measured at this density: the
            name of a table that comes along or a JSON file of its form.
        rows: query rows that the search looks at, spread over the video.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float = 0.25
    table: str | None = None
    lam: float = 0.5
    eps: float = 0.3
    normalise: bool = True
    skip_share: float = 0.06
    cost: str = "hopper-h200"
    rows: int = 64
    block_size: int | None = None

    name: ClassVar[str] = "sparse_vdit"
    title: ClassVar[str] = "Sparse-vDiT"
    arxiv: ClassVar[str | None] = "2506.03065"
    needs: ClassVar[str] = "search file (optional)"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "as the model has it, or place by place, per head",
        "score": "output error of each mask, plus its cost",
        "select": "one of five masks per head; text",
        "operate": "drop; skipped heads give 0",
        "remember": "the modes, per layer of a run or in a file",
    }
    # Source: the paper, which needed no dense steps on CogVideoX 1.5, and on Hunyuan and Wan apparently kept the first
    # 10 of 50 dense. Widths, stripes and block size were not found: density, and masks of whole blocks, are ours.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "cogvideox": {"lam": 0.5, "eps": 1.0, "normalise": False, "cost": "density", "dense_steps": 0,
                      "dense_layers": 0},
        "hunyuan": {"lam": 0.5, "eps": 1.0, "normalise": False, "cost": "density", "dense_steps": 0.2},
        "wan": {"lam": 0.5, "eps": 1.0, "normalise": False, "cost": "density", "dense_steps": 0.2},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (ZeroHeads,)

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "lam", self.lam, 0, 1000)
        check_range(self.name, "eps", self.eps, 0, 1e9)
        check_range(self.name, "skip_share", self.skip_share, 0, 1)
        if not isinstance(self.normalise, bool):
            raise ValueError(f"sparse_vdit: normalise={self.normalise!r} is not allowed; use True or False")
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1:
            raise ValueError(f"sparse_vdit: rows={self.rows!r} is not allowed; use a whole number >= 1")
        check_block_size(self.name, self.block_size)
        for option in ("cost", "table"):
            value = getattr(self, option)
            if not isinstance(value, str) and not (option == "table" and value is None):
                raise ValueError(f"sparse_vdit: {option}={value!r} is not allowed; use a name or a file")
        relative_cost(self.cost, 0.5)
        if self.table is not None:
            load_modes(self.table)

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError when the table was made for another grid."""
        if self.table is not None:
            load_modes(self.table).check(grid)

    # -- the masks -------------------------------------------------------------------------------------------------

    def block(self, grid: TokenGrid) -> int:
        """Tokens of a block."""
        held = None if self.table is None else load_modes(self.table)
        return held.block_size if held is not None else choose_block_size(grid.tokens, self.block_size)

    def build(self, grid: TokenGrid) -> BlockMask:
        """The modes as one mask of five heads, on the CPU; stripes, which differ per head, hold the own block only."""
        size, density = self.block(grid), self.density
        if self.table is not None:
            density = load_modes(self.table).density
        video = TokenGrid(*grid.sizes)
        orders = torch.stack([token_major(video) if mode == MULTI else raster(video) for mode in range(len(MODES))])
        blocks = layout(grid, orders[None], size)
        share = half_band(density, grid, 0.0)
        # Covering a band by whole blocks adds half a block on either side.
        reach = grid.video if share > 0.999 else size * max(0, round(share * grid.video / size - 0.5))
        start = torch.arange(blocks.blocks) * size
        band = interval_blocks(start - reach, start + size - 1 + reach, blocks.blocks, size)
        own = torch.eye(blocks.blocks, dtype=torch.bool)
        keep = torch.stack((torch.ones_like(own), own, band, band, own))[None]
        return build_mask(text_forced(keep, blocks, grid), blocks, blocks)

    def stripe_count(self, grid: TokenGrid, blocks: BlockLayout, density: float) -> int:
        """Video key blocks of a stripe: with the own block and text they come to the density."""
        video = video_blocks(blocks, grid)
        count = rows_kept(density, video, 0, blocks.blocks - video, count_forced=True)
        return video if density == 1 else max(1, count - 1)

    def costs(self, grid: TokenGrid) -> Tensor:
        """What skip, diagonal, multi-diagonal and stripe cost of dense attention: float32 (4,), on the CPU."""
        _, _, diagonal, multi, _ = self.build(grid).head_density()[0].tolist()
        found = [0.0, relative_cost(self.cost, diagonal), relative_cost(self.cost, multi, True),
                 relative_cost(self.cost, self.density)]
        return torch.tensor(found)

    def compose(self, call: Call, modes: Tensor, stripes: Tensor) -> BlockMask:
        """The mask of a call.

        Args:
            call: for its grid and device.
            modes: int64 (1, H).
            stripes: bool (1, H, video blocks), looked at where the mode is stripe.
        """
        five = static_mask(call, (self, "modes"), lambda: self.build(call.grid))
        mask = pick(five, modes)
        # Stripes go to the same rows of lists; heads of equal mode share the other ones' lists and orders.
        keep = stripes[:, :, None] | call.cached((self, "own"), lambda: torch.eye(
            stripes.shape[-1], dtype=torch.bool, device=call.device))
        text = mask.key.blocks - stripes.shape[-1]
        keep = torch.nn.functional.pad(keep, (0, text, 0, text), value=True)
        return replace_heads(mask, BlockMask.from_dense(keep, mask.query, mask.key), modes == STRIPE)

    # -- the search ------------------------------------------------------------------------------------------------

    def measure(self, call: Call, stripes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Errors of the modes on sampled rows, in float32; nothing waits for the device.

        Args:
            call: the activations.
            stripes: bool (1, H, video blocks) to judge; None: those of most mass on the sampled rows.

        Returns:
            Errors of skip, diagonal, multi-diagonal and stripe, (1, H, 4), the mean over the batch; the stripes; and
            the mass of every video key block, (1, H, blocks), the mean over rows and batch.
        """
        grid = call.grid
        five = static_mask(call, (self, "modes"), lambda: self.build(grid))
        plain = call.cached((self, "plain"), lambda: layout(grid, None, five.key.block_size).to(call.device))
        video, count = video_blocks(plain, grid), self.stripe_count(grid, plain, self.density)
        sampled = min(self.rows, grid.video)
        rows, bands, block = call.cached((self, "sample"), lambda: _sample(five, grid, sampled))
        always = (block[rows, None] == block) | (block >= video)
        found = []
        for heads in head_chunks(call.query.shape[2], 4 * call.query.shape[0] * sampled * grid.tokens):
            value = call.value[:, :, heads]
            weights, dense = sampled_row_attention(call.query[:, :, heads], call.key[:, :, heads], value, rows,
                                                   call.scale, key_mask=call.key_mask)
            assert dense is not None
            if call.key_mask is not None:
                value = value.masked_fill(~call.key_mask[..., None, None], 0)  # 0 x NaN would be NaN
            # (B, h, L) -> (1, h, video blocks)
            mass = pool(weights.mean(2).transpose(1, 2)[..., None], plain)[..., 0] * plain.lengths
            mass = mass[..., :video].mean(0, keepdim=True)
            stripe = select_top_k(mass, count) if stripes is None else stripes[:, heads]
            column = torch.nn.functional.pad(stripe, (0, plain.blocks - video))[..., block]
            candidates = (bands[0], bands[1], column[:, :, None] | always)
            errors = _errors(weights, value.transpose(1, 2), dense, candidates)
            if self.normalise:
                errors = errors / errors[..., :1].clamp(min=1e-30)
            found.append((errors.mean(0, keepdim=True), stripe, mass))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))  # type: ignore[return-value]

    def decide(self, call: Call, errors: Tensor) -> Tensor:
        """The modes of the heads, int64 (1, H), from their errors."""
        cost = call.cached((self, "costs"), lambda: self.costs(call.grid).to(call.device))
        return choose(errors, cost, self.lam, self.eps, int(self.skip_share * errors.shape[1]))

    def modes(self, call: Call) -> tuple[Tensor, Tensor]:
        """Modes (1, H) and stripes (1, H, video blocks) of a call: from the file, the run's memory, or a search."""
        if self.table is not None:
            held = load_modes(self.table)
            held.check(call.grid, layers=call.layers, heads=call.all_heads, steps=call.num_steps)
            if call.step >= held.modes.shape[0]:
                raise ValueError(f"the search was made for {held.modes.shape[0]} steps, step {call.step} is beyond; "
                                 "pass num_steps= or search anew")
            modes, stripes = call.cached((self, "table", call.layer), lambda: (
                held.modes[:, call.layer].to(call.device), held.stripe_map(call.layer)[None].to(call.device)))
            return call.own(modes[call.step])[None], call.own(stripes, 1)
        found: tuple[Tensor, Tensor] | None = call.state.recall("head modes")
        if found is None:
            errors, stripes, _ = self.measure(call)
            found = self.decide(call, errors), stripes
            call.state.keep("head modes", found)
        return found

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        if self.table is not None or self.skip_share == 0:
            return ""
        return ("sparse_vdit: skip_share chooses among all heads of a layer, some of them on other ranks; use "
                "skip_share=0 or a table")

    def plan(self, call: Call) -> Plan:
        """The mask of every head."""
        modes, stripes = self.modes(call)
        return self.planned(call, modes, stripes)

    def planned(self, call: Call, modes: Tensor, stripes: Tensor) -> Plan:
        """The plan for given modes and stripes; the operator learns from `call.state` which heads are skipped."""
        call.state.keep(ZeroHeads.STATE, modes == SKIP)
        return Plan(self.compose(call, modes, stripes), {"modes": modes}, ZeroHeads())


def _errors(weights: Tensor, value: Tensor, dense: Tensor, candidates: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of sampled rows under masks, with that of no output at all first: float32 (B, h, 1 + masks).

    Args:
        weights: float32 (B, h, R, L), softmax of the rows; value: (B, h, L, D); dense: float32 (B, h, R, D).
        candidates: bool masks that broadcast to the weights.
    """
    errors = [dense.square().mean((2, 3))]
    for allowed in candidates:
        kept = weights * allowed
        total = kept.sum(-1, keepdim=True).clamp(min=1e-30)
        out = (kept.to(value.dtype) @ value).to(torch.float32) / total
        errors.append((out - dense).square().mean((2, 3)))
    return torch.stack(errors, dim=-1)


def _sample(five: BlockMask, grid: TokenGrid, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the search looks at, on the mask's device.

    Returns:
        rows int64 (count,), tokens spread over the video; bands bool (2, count, tokens), what diagonal and
        multi-diagonal keep of these rows; block int64 (tokens,), each token's block in the model's order.
    """
    rows = torch.arange(count, device=five.device) * grid.video // count + grid.video_start
    keep, block = five.to_dense()[0], five.key.block_of_token[0]
    bands = [keep[mode][block[mode, rows]][:, block[mode]] for mode in (DIAGONAL, MULTI)]
    return rows, torch.stack(bands), block[STRIPE]


# -- the search before a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Searcher(Method):
    """Searches at every call and goes on with what it chose; adds up what the table is made of."""

    method: SparseVDiT
    seen: dict[str, Any] = field(default_factory=dict, compare=False)

    def plan(self, call: Call) -> Plan:
        """The least mean loss so far decides, so that later layers see the errors of earlier ones."""
        sizes = (call.grid.sizes, call.layers, call.query.shape[2], call.num_steps, self.method.block(call.grid))
        if self.seen.setdefault("sizes", sizes) != sizes:
            raise ValueError("search: the runs differ in grid, layers, heads, steps or block size: "
                             f"{self.seen['sizes']} and {sizes}")
        mass = self.seen.setdefault("mass", {})
        before = mass.get(call.layer)
        count = self.method.stripe_count(call.grid, static_mask(
            call, (self.method, "modes"), lambda: self.method.build(call.grid)).key, self.method.density)
        stripes = None if before is None else select_top_k(before, count).to(call.device)
        errors, stripes, found = self.method.measure(call, stripes)
        mass[call.layer] = found.cpu() if before is None else before + found.cpu()
        place, errors = (call.step, call.layer), errors.cpu()
        store, calls = self.seen.setdefault("errors", {}), self.seen.setdefault("calls", {})
        store[place] = store[place] + errors if place in store else errors
        calls[place] = calls.get(place, 0) + 1
        modes = self.method.decide(call, (store[place] / calls[place]).to(call.device))
        self.seen.setdefault("modes", {})[place] = modes.cpu()
        self.seen.setdefault("stripes", {})[call.layer] = stripes.cpu()
        return self.method.planned(call, modes, stripes)

    def result(self) -> HeadModes:
        """The table of what was seen."""
        if "sizes" not in self.seen:
            raise ValueError("search: no self-attention call was seen; generate() must run the pipeline")
        grid, layers, heads, steps, size = self.seen["sizes"]
        steps = steps or 1 + max(step for step, _ in self.seen["modes"])
        table = torch.zeros(steps, layers, heads, dtype=torch.int64)  # what was never called stays full
        for (step, layer), modes in self.seen["modes"].items():
            table[step, layer] = modes[0]
        stripes = {(layer, head): self.seen["stripes"][layer][0, head].nonzero()[:, 0].tolist()
                   for layer, head in (table == STRIPE).any(0).nonzero().tolist()}
        return HeadModes(grid, size, self.method.density, table, stripes)


def search(target: Any, generate: Callable[[], Any], **options: Any) -> HeadModes:
    """Search the modes of all heads at every step, layer by layer on the output of what was chosen before.

    Args:
        target: a pipeline or transformer; sparse attention is switched off on it afterwards.
        generate: runs the pipeline on a few prompts, at the size and number of steps to be used later.
        options: those of `SparseVDiT` but `table`. More `rows` are slower and nearer to the paper, which takes all.

    Returns:
        The table; `.save(path)` writes it for the option `table`.

    Raises:
        ValueError: a wrong option, no call seen, or runs that differ.
    """
    from ..processor import disable, enable

    searcher = _Searcher(SparseVDiT(**options))
    if searcher.method.table is not None:
        raise ValueError("search: table is not allowed; the search makes one")
    enable(target, searcher, dense_steps=0, dense_layers=0, strict=True)
    try:
        generate()
    finally:
        disable(target)
    return searcher.result()
