"""Objective checks of clips against their specs: colour, shape, motion, relation and camera, by looking at pixels.

Nothing is learned and nothing is downloaded: nearest palette colour in CIE Lab, best overlap with drawn templates,
centroid, area and turn over time, and the shift of the ground between frames.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from . import drawing, world

NAMES = ("colour", "shape", "motion", "relation", "camera")
# Rotations to try of each shape, and the order of its symmetry.
_TURNS = {
    "circle": (1, 1),
    "square": (9, 4),
    "triangle": (12, 3),
    "star": (8, 5),
    "heart": (36, 1),
    "ring": (1, 1),
    "cross": (9, 4),
    "diamond": (18, 2),
}
_LEAST = 40 / 128**2  # share of the frame that an object covers at least
_MOTION = {name: i for i, name in enumerate(world.MOTIONS)}


def to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """RGB (..., 3) in 0..1 -> CIE Lab (D65)."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    white = torch.tensor([0.9505, 1.0, 1.089], device=rgb.device)
    xyz = linear @ torch.tensor(matrix, device=rgb.device).T / white
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def segment(clip: torch.Tensor) -> torch.Tensor:
    """A clip (3, T, H, W) in [-1, 1] -> masks (colours, T, H, W): nearest palette colour, 3x3 majority."""
    rgb = ((clip.float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)
    palette = to_lab(torch.tensor(list(world.COLOURS.values()), device=clip.device).float() / 255)
    lab = to_lab(rgb)
    away = torch.stack([(lab - colour).square().sum(-1) for colour in palette], -1).sqrt()
    high, low = rgb.amax(-1), rgb.amin(-1)
    saturation = (high - low) / high.clamp(min=1e-3)
    near = (away < 45) & (saturation > 0.28).unsqueeze(-1)
    white = list(world.COLOURS).index("white")
    near[..., white] = (away[..., white] < 45) & (high > 0.78) & (saturation < 0.2)
    masks = F.one_hot(away.argmin(-1), len(world.COLOURS)).bool() & near
    return F.avg_pool2d(masks.permute(3, 0, 1, 2).float(), 3, 1, 1) > 0.5


def normalise(masks: torch.Tensor, turn: torch.Tensor | None = None) -> torch.Tensor:
    """Square masks (N, S, S) -> (N, 64, 64), centred on their centroid, of equal area, turned by `turn` radians."""
    count, size, _ = masks.shape
    m = masks.float()
    grid = (torch.arange(size, device=m.device) + 0.5) / size * 2 - 1
    area = m.sum((1, 2)).clamp(min=1)
    cx, cy = (m.sum(1) * grid).sum(1) / area, (m.sum(2) * grid).sum(1) / area
    zoom = area.sqrt() / size * 2  # the mask's area becomes a quarter of the frame
    cos, sin = (
        (torch.cos(turn), torch.sin(turn)) if turn is not None else (torch.ones_like(zoom), torch.zeros_like(zoom))
    )
    rows = [torch.stack([zoom * cos, zoom * sin, cx], -1), torch.stack([-zoom * sin, zoom * cos, cy], -1)]
    places = F.affine_grid(torch.stack(rows, 1), (count, 1, 64, 64), align_corners=False)
    return F.grid_sample(m.unsqueeze(1), places, align_corners=False)[:, 0] > 0.5


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks over their last two dimensions."""
    a, b = a.flatten(-2).float(), b.flatten(-2).float()
    both = (a * b).sum(-1)
    return both / (a.sum(-1) + b.sum(-1) - both).clamp(min=1)


@functools.lru_cache(maxsize=4)
def _templates(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    grid = ((torch.arange(128, device=device) + 0.5) / 128 - 0.5) * 3
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    masks, names = [], []
    for index, name in enumerate(world.SHAPES):
        steps, order = _TURNS[name]
        for k in range(steps):
            angle = 2 * math.pi / order * k / steps
            cos, sin = math.cos(angle), math.sin(angle)
            shape = torch.tensor(index, device=device)
            masks.append(drawing.distance(shape, x * cos + y * sin, y * cos - x * sin) < 0)
            names.append(index)
    return normalise(torch.stack(masks)), torch.tensor(names, device=device)


def shapes_of(masks: torch.Tensor) -> torch.Tensor:
    """Masks (N, S, S) of one object each -> the best matching shape's index, (N,)."""
    templates, names = _templates(masks.device)
    seen, known = normalise(masks).flatten(1).float(), templates.flatten(1).float()
    both = seen @ known.T
    return names[(both / (seen.sum(1, keepdim=True) + known.sum(1) - both)).argmax(1)]


def centroids(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N, S, S) -> centroids (N, 2) in 0..1 as (x, y), and areas in pixels (N,)."""
    size = masks.shape[-1]
    grid = (torch.arange(size, device=masks.device) + 0.5) / size
    m = masks.float()
    area = m.sum((1, 2)).clamp(min=1)
    return torch.stack([(m.sum(1) * grid).sum(1) / area, (m.sum(2) * grid).sum(1) / area], 1), area


def _turned(masks: torch.Tensor) -> float:
    """Degrees that the object turns clockwise over the masks (T, S, S), summed over pairs of frames."""
    angles = torch.arange(-18, 19, 3, device=masks.device) * math.pi / 180
    before, after = masks[:-1], masks[1:]
    tries = normalise(before.repeat_interleave(13, 0), angles.repeat(len(before))).view(-1, 13, 64, 64)
    best = overlap(tries, normalise(after).unsqueeze(1)).argmax(1)
    return float(angles[best].sum()) * 180 / math.pi


def motion_of(masks: torch.Tensor) -> int:
    """Masks (T, S, S) of one object, at least 13 frames of the whole motion -> its index in ``world.MOTIONS``."""
    centre, area = centroids(masks)
    u = torch.linspace(-0.5, 0.5, len(centre), device=centre.device)
    vx, vy = ((centre * u[:, None]).sum(0) / (u * u).sum()).tolist()
    growth = float((area.log() * u).sum() / (u * u).sum())
    if math.hypot(vx, vy) > 0.15:
        sideways = _MOTION["moving left"] if vx < 0 else _MOTION["moving right"]
        upright = _MOTION["moving up"] if vy < 0 else _MOTION["moving down"]
        return sideways if abs(vx) > abs(vy) else upright
    if abs(growth) > 0.5:
        return _MOTION["growing"] if growth > 0 else _MOTION["shrinking"]
    if float(centre[:, 1].max() - centre[:, 1].min()) > 0.2:
        return _MOTION["bouncing"]
    total = _turned(masks)
    if abs(total) < 50:
        return _MOTION["standing still"]
    return _MOTION["rotating clockwise"] if total > 0 else _MOTION["rotating counterclockwise"]


def camera_of(clip: torch.Tensor, object_mask: torch.Tensor) -> int:
    """Which way the ground slides: index in ``world.CAMERAS``. `clip` (3, T, S, S), mask (T, S, S) of the objects."""
    gray = F.interpolate(clip.float().mean(0).unsqueeze(1), size=(128, 128), mode="area")[:, 0]
    free = F.interpolate(1 - object_mask.float().unsqueeze(1), size=(128, 128), mode="area")[:, 0]
    step = max(1, (len(gray) - 1) // 16)
    gray, free = gray[::step], free[::step]
    reach, inner = 8, slice(8, -8)
    before, weight = gray[:-1, :, inner], free[:-1, :, inner] * free[1:, :, inner]
    costs = []
    for shift in range(-reach, reach + 1):
        after = gray[1:, :, reach + shift : 128 - reach + shift]
        costs.append(((after - before).square() * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1))
    slide = (torch.stack(costs).argmin(0) - reach).float().median().item()
    if abs(slide) < 1.5:
        return 0
    return world.CAMERAS.index("panning left") if slide > 0 else world.CAMERAS.index("panning right")


def check(clip: torch.Tensor, spec: dict[str, torch.Tensor], row: int) -> dict[str, float | None]:
    """Check one square clip (3, T, S, S) against row `row` of `spec`.

    Returns:
        0 or 1 for each of :data:`NAMES`; None where it does not apply: motion and camera need one object and at least
        13 frames, a relation two objects. What is not seen fails. Both objects must pass for colour and shape.
    """
    one = {name: values[row] for name, values in spec.items()}
    masks = segment(clip)
    frames, size = clip.shape[1], clip.shape[2]
    two = int(one["two"])
    wanted = [int(one["colour"])] + ([int(one["colour2"])] if two else [])
    area = masks.flatten(2).sum(-1).float()
    there = area > _LEAST * size**2
    order = area.mean(1).argsort(descending=True).tolist()
    seen = all(float(there[k].float().mean()) > 0.6 for k in wanted)
    moves = not two and frames >= 13
    out: dict[str, float | None] = dict.fromkeys(NAMES)
    out["colour"] = float(seen and set(order[: len(wanted)]) == set(wanted))
    if not seen:
        out.update(shape=0.0, relation=0.0 if two else None, motion=0.0 if moves else None)
        return out | {"camera": 0.0 if int(one["cam"]) and moves else None}
    pieces = [masks[k][there[k]] for k in wanted]
    stride = 4 if frames > 4 else 1
    votes = [
        (shapes_of(piece[::stride]) == one["shape" + name]).float().mean()
        for piece, name in zip(pieces, ("", "2"), strict=False)
    ]
    out["shape"] = float(all(vote > 0.5 for vote in votes))
    if two:
        apart = centroids(pieces[0])[0].mean(0) - centroids(pieces[1])[0].mean(0)
        towards = torch.tensor(world.DIRECTIONS, device=apart.device)
        out["relation"] = float(int((towards @ apart).argmax()) == int(one["rel"]))
    elif moves:
        out["motion"] = float(motion_of(pieces[0]) == int(one["motion"]))
        if int(one["cam"]):
            grown = F.max_pool2d(masks[wanted[0]].float().unsqueeze(1), 5, 1, 2)[:, 0]
            out["camera"] = float(camera_of(clip, grown) == int(one["cam"]))
    return out


def check_all(clips: torch.Tensor, spec: dict[str, torch.Tensor]) -> list[dict[str, float | None]]:
    """:func:`check` of every clip (B, 3, T, S, S) against its row."""
    return [check(clip, spec, row) for row, clip in enumerate(clips)]


def summarise(rows: list[dict[str, float | None]]) -> dict[str, float]:
    """Mean of each check over the rows it applies to, and "all": the share of rows where every check passes."""
    out = {}
    for name in NAMES:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            out[name] = round(sum(values) / len(values), 3)
    whole = [float(all(value for value in row.values() if value is not None)) for row in rows]
    out["all"] = round(sum(whole) / max(len(whole), 1), 3)
    return out


def score(clips: torch.Tensor, spec: dict[str, torch.Tensor]) -> dict[str, float]:
    """:func:`summarise` of :func:`check_all`."""
    return summarise(check_all(clips, spec))
