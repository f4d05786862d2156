"""Pictures of a recording: the attention map with a method's mask on it, and a query's map laid over the frames."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..inspect import BOUNDARY, NOTHING, WHOLE
from .capture import Detail, Moment, Recording, View, unpack

# From nothing to the peak: kept attention glows, dropped attention is red on grey.
_GLOW = np.array([(14, 18, 38), (24, 62, 112), (26, 140, 150), (120, 205, 120), (255, 240, 160)], float)
_LOST = np.array([(52, 52, 60), (96, 44, 52), (170, 48, 48), (235, 80, 60), (255, 170, 140)], float)
_LINE, _MARK, _SHEET = (90, 96, 120), (255, 255, 255), (24, 27, 38)
STAMP, GAP, COLUMNS = 176, 6, 5  # pixels and frames across of the picture with frames
_TALL, _WIDE = 360, 640  # of the picture of the map


def query_index(detail: Detail, frame: int, row: float, column: float) -> int:
    """The kept query that lies nearest to a token."""
    def away(place: tuple[int, int, int]) -> tuple[float, float]:
        return abs(place[0] - frame), (place[1] - row) ** 2 + (place[2] - column) ** 2

    return min(range(len(detail.queries)), key=lambda i: away(detail.queries[i]))


def kept_bits(recording: Recording, view: View | None, head: int) -> Tensor | None:
    """bool (queries, keys): pooled keys that a method keeps, or None where it has no mask."""
    if view is None or view.kept is None or recording.detail is None:
        return None
    keys = recording.detail.keys
    return unpack(view.kept[head], keys[0] * keys[1] * keys[2])


def attention_map(recording: Recording, moment: Moment, head: int, view: View | None = None) -> Image.Image:
    """Queries down, keys across, both frame by frame; what the view's mask drops is red on grey.

    Args:
        recording: where the moment is from.
        moment: one kept call.
        head: place among the kept heads.
        view: of a method, or None for the bare map.
    """
    assert recording.detail is not None
    detail = recording.detail
    light, kept = moment.maps[head].float() / 255, kept_bits(recording, view, head)
    fold = max(1, light.shape[1] // _WIDE)  # of keys that share a pixel the brightest is shown: lines stay lines
    light = torch.nn.functional.max_pool1d(light[None], fold, ceil_mode=True)[0]
    if kept is not None:
        kept = torch.nn.functional.max_pool1d(kept[None].float(), fold, ceil_mode=True)[0] > 0.5
    pixels = coloured(light, kept)
    height = max(_TALL // len(pixels), 1) * len(pixels)
    image = Image.fromarray(pixels).resize((_WIDE, height), Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    for frame in range(1, detail.keys[0]):
        x = frame * _WIDE // detail.keys[0]
        draw.line([(x, 0), (x, height)], fill=_LINE)
    frames = [place[0] for place in detail.queries]
    for row in range(1, len(frames)):
        if frames[row] != frames[row - 1]:
            y = row * height // len(frames)
            draw.line([(0, y), (_WIDE, y)], fill=_LINE)
    return image


def query_over_frames(recording: Recording, moment: Moment, head: int, query: int, view: View | None = None
                      ) -> Image.Image:
    """The attention of one query laid over the clip's frames; its own place is ringed, what is dropped is greyed.

    Args:
        recording, moment, head, view: as in `attention_map`.
        query: index into the recording's queries.
    """
    assert recording.detail is not None and recording.pictures is not None and recording.grid is not None
    keys, grid = recording.detail.keys, recording.grid
    light = (moment.maps[head, query].float() / 255).unflatten(0, keys)
    bits = kept_bits(recording, view, head)
    kept = None if bits is None else bits[query].unflatten(0, keys)
    height, width = recording.pictures.shape[2:]
    size = (STAMP, max(1, round(STAMP * height / width)))
    sheet = Image.new("RGB", sheet_size(keys[0], size[1]), _SHEET)
    place = recording.detail.queries[query]
    for frame in range(keys[0]):
        stamp = _stamp(recording.pictures[frame], light[frame], None if kept is None else kept[frame], size)
        if frame == place[0]:
            _ring(stamp, (place[2] + 0.5) / grid.width * size[0], (place[1] + 0.5) / grid.height * size[1])
        sheet.paste(stamp, corner(frame, size[1]))
    return sheet


def corner(frame: int, height: int) -> tuple[int, int]:
    """Where a frame's picture lies on the sheet."""
    return (GAP + frame % COLUMNS * (STAMP + GAP), GAP + frame // COLUMNS * (height + GAP))


def sheet_size(frames: int, height: int) -> tuple[int, int]:
    """Width and height of the sheet of frames."""
    return (min(frames, COLUMNS) * (STAMP + GAP) + GAP, -(-frames // COLUMNS) * (height + GAP) + GAP)


def token_at(recording: Recording, x: float, y: float) -> tuple[int, float, float] | None:
    """The token under a place of the sheet of `query_over_frames`, or None between frames.

    Args:
        recording: the recording.
        x, y: shares of the sheet's width and height, 0 to 1.
    """
    if recording.grid is None or recording.pictures is None:
        return None
    grid, (height, width) = recording.grid, recording.pictures.shape[2:]
    tall = max(1, round(STAMP * height / width))
    wide, high = sheet_size(grid.frames, tall)
    for frame in range(grid.frames):
        left, top = corner(frame, tall)
        across, down = (x * wide - left) / STAMP, (y * high - top) / tall
        if 0 <= across < 1 and 0 <= down < 1:
            return frame, down * grid.height - 0.5, across * grid.width - 0.5
    return None


def block_picture(view: View, head: int) -> Image.Image | None:
    """The mask block by block, in its own order: blue whole, orange tested pair by pair, pale dropped."""
    if view.blocks is None:
        return None
    palette = np.array([NOTHING, BOUNDARY, WHOLE], np.uint8)
    return Image.fromarray(palette[view.blocks[head].numpy()]).resize((320, 320), Image.Resampling.NEAREST)


def coloured(light: Tensor, kept: Tensor | None = None) -> np.ndarray:
    """(n, m) in [0, 1] -> (n, m, 3) uint8; where `kept` is False in the colours of what is lost."""
    found = _ramp(light.numpy(), _GLOW)
    if kept is not None:
        found = np.where(kept.numpy()[..., None], found, _ramp(light.numpy(), _LOST))
    return found.round().astype(np.uint8)


def address(image: Image.Image, quality: int = 88) -> str:
    """A picture as a data address."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ramp(share: np.ndarray, colours: np.ndarray) -> np.ndarray:
    at = np.clip(share, 0, 1) * (len(colours) - 1)
    low = np.minimum(at.astype(int), len(colours) - 2)
    part = (at - low)[..., None]
    return colours[low] * (1 - part) + colours[low + 1] * part


def _stamp(picture: Tensor, light: Tensor, kept: Tensor | None, size: tuple[int, int]) -> Image.Image:
    """One frame, dimmed and paler, with the map glowing on it."""
    frame = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize(size, Image.Resampling.BICUBIC)
    base = (np.asarray(frame, float) + np.asarray(frame.convert("L").convert("RGB"), float)) * 0.33 + 20

    def grown(values: Tensor, how: Any) -> np.ndarray:
        return np.asarray(Image.fromarray((values.numpy() * 255).astype(np.uint8)).resize(size, how), float) / 255

    strength = grown(light, Image.Resampling.BICUBIC)
    heat, dropped = _ramp(strength, _GLOW), None
    if kept is not None:
        dropped = grown((~kept).float(), Image.Resampling.NEAREST)[..., None] > 0.5
        heat = np.where(dropped, _ramp(strength, _LOST), heat)
        base = np.where(dropped, base * 0.35 + 30, base)
    mix = np.clip(strength * 1.15, 0, 0.92)[..., None]
    return Image.fromarray((base * (1 - mix) + heat * mix).round().astype(np.uint8))


def _ring(stamp: Image.Image, x: float, y: float, radius: int = 7) -> None:
    draw = ImageDraw.Draw(stamp)
    for r, colour in ((radius + 2, (0, 0, 0)), (radius, _MARK)):
        draw.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=2)
