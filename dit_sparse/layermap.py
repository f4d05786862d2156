"""A picture of one head of one attention call: what a method keeps, and where the attention's mass lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blockmask import BlockMask
from .grid import TokenGrid
from .inspect import BOUNDARY, NOTHING, PANEL, WHOLE, block_colours, token_colours

GAP, LEFT, TOP, HEAD = 26, 66, 56, 66  # between panels, room for a panel's labels, for its title, for the heading
TEXT, FAINT = (20, 20, 20), (110, 110, 110)
_CHUNK = 512  # queries whose scores are there at once


def frame_density(mask: BlockMask, grid: TokenGrid, head: int) -> Tensor:
    """Share of kept pairs by query frame and key frame.

    Args:
        mask: of a small call; its token mask is made.
        grid: the tokens.
        head: which head.

    Returns:
        float32 (frames, frames).
    """
    kept = mask.token_mask()[0]
    kept = kept[head if kept.shape[0] > 1 else 0][grid.video_slice, grid.video_slice]
    size = grid.frames, grid.frame_tokens
    return kept.view(*size, *size).to(torch.float32).mean((1, 3))


def dense_mass(query: Tensor, key: Tensor, scale: float, pixels: int) -> Tensor:
    """Dense attention's mass on a coarse map, over what even attention would give.

    Args:
        query, key: (L, D) of one head.
        scale: softmax scale.
        pixels: sides of the map.

    Returns:
        float32 (pixels, pixels): mean mass of the pairs under a pixel times L; rows are queries.
    """
    length = len(query)
    place = torch.arange(length, device=query.device) * pixels // length
    total = torch.zeros(pixels, pixels, device=query.device)
    for start in range(0, length, _CHUNK):
        rows = slice(start, start + _CHUNK)
        mass = (query[rows].float() @ key.float().T * scale).softmax(-1)
        columns = torch.zeros(len(mass), pixels, device=query.device).index_add_(1, place, mass)
        total.index_add_(0, place[rows], columns)
    count = torch.bincount(place, minlength=pixels).to(torch.float32)
    return (total / (count[:, None] * count).clamp(min=1) * length).cpu()


def draw_layer(mask: BlockMask, call: Any, head: int, png: Path | str, title: str, numbers: str) -> None:
    """Write the picture: block map, token map, dense attention, and density by pairs of frames.

    Args:
        mask: what the method keeps, of one batch element.
        call: the activations, as the method saw them.
        head: which head.
        png: file to write.
        title: what is shown.
        numbers: density, recall and the like, in one line.
    """
    from PIL import Image, ImageDraw, ImageFont

    mask, grid = mask.to("cpu"), call.grid
    side = min(PANEL, grid.tokens)
    mass = dense_mass(call.query[0, :, head], call.key[0, :, head], call.scale, side)
    # Even attention is 1: from a tenth of it (pale) to a hundred times (full), by its logarithm.
    shade = ((mass.clamp(min=1e-6).log10() + 1) / 3).clamp(0, 1)
    low, high = torch.tensor(NOTHING, dtype=torch.float32), torch.tensor((122, 28, 84), dtype=torch.float32)
    panels: list[tuple[str, str, Tensor, str]] = [
        ("Block map", f"{mask.query.blocks} x {mask.key.blocks} blocks of {mask.query.block_size} tokens, in the "
         "method's order", block_colours(mask, head), "block"),
        ("Token map", "share of the pairs that are kept, in the model's order; ticks: frames",
         token_colours(mask, head), "token"),
        ("Dense attention", "its mass, from a tenth of an even share (pale) to 100 times (dark); ticks: frames",
         low + shade[..., None] * (high - low), "token"),
    ]
    pen_font, big = ImageFont.load_default(size=13), ImageFont.load_default(size=17)
    cell = LEFT + PANEL + GAP, TOP + PANEL + GAP
    image = Image.new("RGB", (2 * cell[0] + GAP, HEAD + 2 * cell[1] + GAP), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 12), title, fill=TEXT, font=big)
    pen.text((LEFT, 38), numbers, fill=FAINT, font=pen_font)
    corners = [(LEFT + x * cell[0], HEAD + TOP + y * cell[1]) for y in (0, 1) for x in (0, 1)]
    for (name, words, colours, what), corner in zip(panels, corners, strict=False):
        pixels = Image.fromarray(colours.to(torch.uint8).numpy(), "RGB")
        how = Image.Resampling.NEAREST if max(colours.shape[:2]) <= PANEL else Image.Resampling.BOX
        image.paste(pixels.resize((PANEL, PANEL), how), corner)
        counts = (mask.query.blocks, mask.key.blocks) if what == "block" else (grid.tokens, grid.tokens)
        _frame(pen, corner, name, words, what, counts, (pen_font, big))
        if what == "token":
            _frames(pen, corner, grid)
    _legend(pen, corners[0], pen_font, boundary=bool(mask.boundary.any()))
    _frame(pen, corners[3], "Density by frames", "share of the pairs that are kept, query frame by key frame", "frame",
           (grid.frames, grid.frames), (pen_font, big))
    _cells(pen, corners[3], frame_density(mask, grid, head), pen_font)
    image.save(png, format="PNG")


def _frame(pen: Any, corner: tuple[int, int], name: str, words: str, what: str, counts: tuple[int, int],
           fonts: tuple[Any, Any]) -> None:
    """Title, outline and axes of a panel."""
    x, y = corner
    font, big = fonts
    pen.text((x, y - 46), name, fill=TEXT, font=big)
    pen.text((x, y - 23), words, fill=FAINT, font=font)
    pen.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline=(160, 160, 160))
    pen.text((x, y + PANEL + 3), "0", fill=FAINT, font=font)
    pen.text((x + PANEL, y + PANEL + 3), f"{counts[1] - 1}", fill=FAINT, font=font, anchor="ra")
    pen.text((x + PANEL // 2, y + PANEL + 3), f"key {what}", fill=FAINT, font=font, anchor="ma")
    pen.text((x - 6, y), "0", fill=FAINT, font=font, anchor="ra")
    pen.text((x - 6, y + PANEL), f"{counts[0] - 1}", fill=FAINT, font=font, anchor="rd")
    pen.text((x - 6, y + PANEL // 2 - 8), "query", fill=FAINT, font=font, anchor="rd")
    pen.text((x - 6, y + PANEL // 2 + 8), what, fill=FAINT, font=font, anchor="rd")


def _frames(pen: Any, corner: tuple[int, int], grid: TokenGrid) -> None:
    """Ticks on both axes where a frame begins."""
    x, y = corner
    for frame in range(grid.frames + 1):
        at = (grid.video_start + frame * grid.frame_tokens) * PANEL // grid.tokens
        pen.line((x + at, y - 5, x + at, y - 1), fill=FAINT)
        pen.line((x - 5, y + at, x - 1, y + at), fill=FAINT)


def _legend(pen: Any, corner: tuple[int, int], font: Any, *, boundary: bool) -> None:
    """What the colours of the block map mean, at the right of its title."""
    x, y = corner[0] + PANEL, corner[1] - 42
    for words, colour in [("kept", WHOLE), ("kept in part, or short", BOUNDARY)][: 1 + boundary][::-1]:
        pen.text((x, y), words, fill=FAINT, font=font, anchor="ra")
        x -= int(pen.textlength(words, font=font)) + 16
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=colour)
        x -= 12


def _cells(pen: Any, corner: tuple[int, int], shares: Tensor, font: Any) -> None:
    """A square for each pair of frames, with the number where it fits."""
    edge = PANEL / len(shares)
    low, high = torch.tensor(NOTHING, dtype=torch.float32), torch.tensor(WHOLE, dtype=torch.float32)
    for i, row in enumerate(shares.tolist()):
        for k, share in enumerate(row):
            left, top = corner[0] + k * edge, corner[1] + i * edge
            colour = tuple(int(c) for c in low + share * (high - low))
            pen.rectangle((left, top, left + edge - 1, top + edge - 1), fill=colour)
            if edge >= 34:
                words = "1" if share > 0.995 else "0" if share < 0.005 else f"{share:.2f}".removeprefix("0")
                pen.text((left + edge / 2, top + edge / 2), words, font=font, anchor="mm",
                         fill=(255, 255, 255) if share > 0.5 else TEXT)
