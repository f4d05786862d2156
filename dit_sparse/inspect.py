"""What a method does to a grid, without a model: density, memory, the speed-up to hope for, a picture."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blockmask import BlockMask
from .grid import TokenGrid
from .methods import build
from .methods.base import Call, Method
from .operators import Drop
from .tilecount import TileReport, simulate_gna

__all__ = ["InspectReport", "TileReport", "allowed_pairs", "block_colours", "draw_mask", "inspect_method",
           "planted_call", "simulate_gna", "token_colours"]

HEADS = ("looks at its own frame", "looks at its own place", "looks nowhere in particular")
PANEL, SAMPLES, MARGIN, CAPTION = 480, 4, 12, 34
NOTHING, BOUNDARY, WHOLE = (246, 246, 244), (242, 158, 76), (33, 70, 139)


@dataclass(frozen=True)
class InspectReport:
    """A method on a grid.

    Args:
        method, title, arxiv, options: what was asked, all options written out.
        grid, tokens: the sequence.
        block_size, query_blocks, key_blocks: how it is cut; 0 when the method is dense.
        density: kept pairs over all pairs of real tokens; head_density: the same per head.
        blocks_mean, blocks_most: key blocks that a query block computes.
        boundary_share: share of the computed blocks that are tested pair by pair or for their length.
        mask_bytes: memory of lists, layouts and window.
        speedup: 1 / density: what attention itself gains when only kept pairs cost time.
        speedup_blocks: the same when whole blocks cost time, padding and boundary blocks included.
        notes: how to read the numbers.
    """

    method: str
    title: str
    arxiv: str | None
    options: dict[str, Any]
    grid: str
    tokens: int
    block_size: int = 0
    query_blocks: int = 0
    key_blocks: int = 0
    density: float = 1.0
    head_density: list[float] = field(default_factory=lambda: [1.0])
    blocks_mean: float = 0.0
    blocks_most: int = 0
    boundary_share: float = 0.0
    mask_bytes: int = 0
    speedup: float = 1.0
    speedup_blocks: float = 1.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The report as (what, value) pairs for a table."""
        paper = f" (arXiv {self.arxiv})" if self.arxiv else ""
        rows = [
            ("method", f"{self.method}: {self.title}{paper}"),
            ("options", ", ".join(f"{name}={value}" for name, value in self.options.items()) or "none"),
            ("grid", f"{self.grid} = {self.tokens:,} tokens"),
            ("density", f"{self.density:.4f}"),
        ]
        if len(self.head_density) > 1:
            rows.append(("density of each head", ", ".join(f"{d:.4f}" for d in self.head_density)))
        if self.block_size:
            rows += [
                ("blocks", f"{self.query_blocks} x {self.key_blocks} of {self.block_size} tokens"),
                ("key blocks of a query block", f"{self.blocks_mean:.1f} mean, {self.blocks_most} most"),
                ("boundary blocks", f"{100 * self.boundary_share:.1f} % of those computed"),
                ("memory of the mask", f"{self.mask_bytes / 2**20:.2f} MiB"),
            ]
        speedups = f"{self.speedup:.2f} x by pairs, {self.speedup_blocks:.2f} x by blocks"
        rows.append(("speed-up of attention, at most", speedups))
        return rows + [("note", note) for note in self.notes]


def planted_call(grid: TokenGrid, heads: int = len(HEADS), *, head_dim: int = 32, seed: int = 0) -> Call:
    """A call with made-up activations whose heads look, in turn, at their frame, at their place, and nowhere.

    Args:
        grid: the tokens.
        heads: number of heads; after three the kinds repeat.
        head_dim: channels of a head.
        seed: seeds the activations.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = head_dim**-0.5

    def planted(names: int, ids: Tensor) -> Tensor:
        features = torch.nn.functional.normalize(torch.randn(names, head_dim, generator=generator), dim=-1)
        # Equal names score 20, others about 0 with a spread of 20 / sqrt(head_dim).
        return math.sqrt(20 / scale) * features[ids]

    token = torch.arange(grid.video)
    kinds = [
        planted(grid.frames, token // grid.frame_tokens),
        planted(grid.frame_tokens, token % grid.frame_tokens),
        None,
    ]
    query, key, value = torch.randn(3, 1, grid.tokens, heads, head_dim, generator=generator).unbind(0)
    for head in range(heads):
        kind = kinds[head % len(kinds)]
        if kind is not None:
            query[0, grid.video_slice, head] = key[0, grid.video_slice, head] = kind
    return Call(query, key, value, grid, scale, generator=generator)


def inspect_method(
    name: str, grid: TokenGrid, options: dict[str, Any] | None = None, png: Path | str | None = None
) -> InspectReport:
    """Build a method's mask for a grid, count it, and draw it.

    Args:
        name: one of `methods.all_methods()`.
        grid: the sequence.
        options: the method's options.
        png: where to write a picture of the mask, or None.

    Raises:
        ValueError: unknown method or option, a value that is not allowed or does not fit the grid, or a
            picture asked of a method that is dense on this grid.
    """
    method = build(name, **(options or {}))
    method.check(grid)
    plan = method.plan(planted_call(grid, _heads(method)))
    mask = plan.mask
    written = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    common: dict[str, Any] = {
        "method": name,
        "title": method.title,
        "arxiv": method.arxiv,
        "options": written,
        "grid": str(grid),
        "tokens": grid.tokens,
    }
    if mask is None:
        if png is not None:
            raise ValueError(
                f"method {name!r} is dense on {grid}: there is no mask to draw; leave the picture out"
            )
        return InspectReport(**common, notes=["every call runs the dense kernel"])
    if png is not None:
        draw_mask(mask, png, f"{name} on {grid}")
    work = mask.work().to(torch.float64)
    density = float(mask.density())
    cells = work.mean() * mask.query.blocks * mask.query.block_size * mask.key.block_size
    notes = [
        "the speed-up is that of the attention calls that run sparse, not of the whole model: dense steps, "
        "dense layers and everything that is not attention keep their time"
    ]
    if method.scored:
        notes.append(
            "the mask depends on the activations; here they are made up: of three heads one "
            + ", one ".join(HEADS)
        )
    if not isinstance(plan.operator, Drop):
        notes.append(f"{plan.operator.title}; density and speed-ups leave them out")
    return InspectReport(
        **common,
        block_size=mask.query.block_size,
        query_blocks=mask.query.blocks,
        key_blocks=mask.key.blocks,
        density=density,
        head_density=[float(d) for d in mask.head_density()[0]],
        blocks_mean=float(work.mean()),
        blocks_most=int(work.max()),
        boundary_share=float(mask.boundary.sum() / work.sum()),
        mask_bytes=mask.nbytes,
        speedup=1 / density,
        speedup_blocks=float(grid.tokens**2 / cells),
        notes=notes,
    )


def _heads(method: Method) -> int:
    """Heads of the made-up call: those that a method's own table names, or three where heads can differ."""
    windows = getattr(method, "table_heads", None)
    return windows or (len(HEADS) if method.scored else 1)


def draw_mask(mask: BlockMask, png: Path | str, title: str = "mask") -> None:
    """Write a picture of a mask: per head, the blocks as a kernel sees them, and the tokens in their order.

    Whole blocks are blue, boundary blocks orange; in the second row the shade is the share of kept pairs. At
    most three heads of the first batch element are drawn.

    Args:
        mask: the mask, on any device.
        png: file to write.
        title: first words of the caption.
    """
    from PIL import Image, ImageDraw

    mask = mask.to("cpu")
    densities = mask.head_density()[0].tolist()
    heads = min(3, max(x.shape[1] for x in (mask.lists, *_indices(mask))))
    size = (heads * (PANEL + MARGIN) + MARGIN, 2 * (PANEL + CAPTION) + CAPTION)
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    blocks = f"{mask.query.blocks} x {mask.key.blocks} blocks of {mask.query.block_size}"
    draw.text((MARGIN, 10), f"{title}, density {float(mask.density()):.4f}; {blocks}", fill=(0, 0, 0))
    for head in range(heads):
        left = MARGIN + head * (PANEL + MARGIN)
        density = densities[head if len(densities) > 1 else 0]
        for row, (panel, words) in enumerate(
            (
                (block_colours(mask, head), f"head {head}: blocks in the mask's order, density {density:.4f}"),
                (token_colours(mask, head), "tokens in the model's order"),
            )
        ):
            top = CAPTION + row * (PANEL + CAPTION)
            draw.text((left, top + 10), words, fill=(60, 60, 60))
            pixels = Image.fromarray(panel.to(torch.uint8).numpy(), "RGB")
            how = Image.Resampling.NEAREST if max(panel.shape[:2]) <= PANEL else Image.Resampling.BOX
            image.paste(pixels.resize((PANEL, PANEL), how), (left, top + CAPTION))
    image.save(png, format="PNG")


def _indices(mask: BlockMask) -> list[Tensor]:
    """The layouts' indices that differ between heads."""
    return [x.index for x in (mask.query, mask.key) if x.index is not None and x.index.dim() == 3]


def _one_head(x: Tensor, head: int) -> Tensor:
    """(B|1, H|1, ...) -> (...) of the first batch element; tensors shared by all heads as they are."""
    return x[0, head if x.shape[1] > 1 else 0]


def _colours(share: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """From nothing's colour to the given one, by share: (n, m) -> (n, m, 3)."""
    low, high = torch.tensor(NOTHING, dtype=torch.float32), torch.tensor(colour, dtype=torch.float32)
    return low + share[..., None].to(torch.float32) * (high - low)


def block_colours(mask: BlockMask, head: int) -> Tensor:
    """(nq, nk, 3) colours of the blocks."""
    kept, boundary = _one_head(mask.to_dense(), head), _one_head(mask.boundary_dense(), head)
    return torch.where(boundary[..., None], _colours(boundary, BOUNDARY), _colours(kept, WHOLE))


def token_colours(mask: BlockMask, head: int) -> Tensor:
    """(n, n, 3) colours by the share of kept pairs, from some tokens of every pixel."""
    pixels = min(PANEL, mask.query.tokens)
    samples = max(1, min(SAMPLES, mask.query.tokens // pixels))
    token = (torch.arange(pixels * samples) * mask.query.tokens) // (pixels * samples)
    allowed = allowed_pairs(mask, head, token, token)
    share = allowed.to(torch.float32).reshape(pixels, samples, pixels, samples).mean((1, 3))
    return _colours(share, WHOLE)


def allowed_pairs(mask: BlockMask, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Which pairs of some tokens a mask keeps, for one head of the first batch element.

    Args:
        mask: the mask.
        head: index of the head; of masks that all heads share, any.
        queries, keys: int64 (n,) and (m,), numbers of tokens in the model's order.

    Returns:
        bool (n, m).
    """
    slots = []
    for layout, token in ((mask.query, queries), (mask.key, keys)):
        slot = layout.slot_of_token
        slots.append((slot if slot.dim() == 1 else _one_head(slot, head))[token])
    rows, columns = slots[0][:, None], slots[1]
    cell = (rows // mask.query.block_size, columns // mask.key.block_size)
    allowed = _one_head(mask.to_dense(), head)[cell]
    if mask.window is not None:
        allowed &= ~_one_head(mask.boundary_dense(), head)[cell] | mask.window.allowed(rows, columns)
    return allowed
