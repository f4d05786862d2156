"""Draws specs as clips with signed distance functions, in torch, on whatever device the spec is on.

Everything is a function of the spec and the pixel's place: the same spec gives the same clip at any size, and
nothing is stored. Textures come from a hash of lattice points, so every clip has its own, endless in all directions.
"""

from __future__ import annotations

import functools
import math

import torch

from . import world

_IS_BACK = {name: i for i, name in enumerate(world.BACKGROUNDS)}
_IS_MOTION = {name: i for i, name in enumerate(world.MOTIONS)}
TEXTURE_CELLS = 16  # lattice cells across the frame: one texture cell a token at the preview size


@functools.lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sizes, relation directions and palette on the device, made once: a captured graph cannot copy from the host."""
    sizes = torch.tensor(list(world.SIZES.values()), device=device)
    towards = torch.tensor(world.DIRECTIONS, device=device)
    palette = torch.tensor(list(world.COLOURS.values()), device=device, dtype=torch.float32) / 255
    return sizes, towards, palette


def _fold(x: torch.Tensor, y: torch.Tensor, tips: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the plane into one sector of a shape with that many tips, the first pointing up."""
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + math.pi / tips, 2 * math.pi / tips) - math.pi / tips).abs()
    radius = (x * x + y * y).sqrt()
    return radius * torch.sin(angle), -radius * torch.cos(angle)


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    sx, sy = _fold(x, y, 5)
    inner_x, inner_y = 0.42 * math.sin(math.pi / 5), -0.42 * math.cos(math.pi / 5)
    length = math.hypot(inner_x, inner_y + 1)
    return -(sx * (-1 - inner_y) + (sy + 1) * inner_x) / length


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    hx, hy = x.abs() / 1.45, (0.95 - y) / 1.75
    top = ((hx - 0.25) ** 2 + (hy - 0.75) ** 2).sqrt() - math.sqrt(2) / 4
    middle = 0.5 * (hx + hy).clamp(min=0)
    low = torch.minimum(hx**2 + (hy - 1) ** 2, (hx - middle) ** 2 + (hy - middle) ** 2).sqrt()
    return 1.3 * torch.where(hx + hy > 1, top, low * torch.sign(hx - hy))


def distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to each shape's edge (about exact near the edge, negative inside).

    `shape` holds indices in ``world.SHAPES`` and broadcasts against `x` and `y`, in units of the shape's radius,
    y pointing down.
    """
    ax, ay, radius = x.abs(), y.abs(), (x * x + y * y + 1e-8).sqrt()
    options = (
        radius - 0.9,
        torch.maximum(ax, ay) - 0.8,
        torch.maximum(ax * 0.866 - y * 0.5 - 0.5, y - 0.5),
        _star(x, y),
        _heart(x, y),
        (radius - 0.72).abs() - 0.23,
        torch.minimum(torch.maximum(ax - 1, ay - 0.33), torch.maximum(ax - 0.33, ay - 1)),
        (ax / 0.6 + ay - 1) * 0.514,
    )
    return _choose(shape, options)


def _choose(index: torch.Tensor, options) -> torch.Tensor:
    out = options[0]
    for i, option in enumerate(options[1:], 1):
        out = torch.where(index == i, option, out)
    return out


def _noise(x: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Value noise in 0..1 with one random number at every integer point; `seed` are integers, one a clip."""
    left, top = torch.floor(x), torch.floor(y)
    fx, fy = x - left, y - top
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    ix, iy = left.long(), top.long()

    def point(dx: int, dy: int) -> torch.Tensor:
        # An integer hash within 32 bits, so that every device gives the same lattice.
        mixed = ((ix + dx) * 374761393 + (iy + dy) * 668265263 + seed * 144269504) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 1274126177) & 0xFFFFFFFF
        return ((mixed ^ (mixed >> 16)) & 0xFFFF).to(x.dtype) / 65535

    upper = point(0, 0) * (1 - fx) + point(1, 0) * fx
    lower = point(0, 1) * (1 - fx) + point(1, 1) * fx
    return upper * (1 - fy) + lower * fy


def _soft_square(wave: torch.Tensor, sharpness: float = 4.0) -> torch.Tensor:
    """A sine wave pushed towards a square one, in 0..1."""
    return torch.sigmoid(sharpness * wave)


def _ground(spec: dict, x: torch.Tensor, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gray level of the backgrounds at the points (x, y) and the times u, (B, T, S, S)."""
    seed = [column.view(-1, 1, 1, 1) for column in spec["seed"].unbind(1)]
    camera = spec["cam"].view(-1, 1, 1, 1)
    # A camera that pans left shows the ground sliding to the right; the subject is followed.
    x = x - ((camera == 1).to(x.dtype) - (camera == 2).to(x.dtype)) * 0.4 * u
    whole = (seed[0] * 1000003).long()
    tilt = (seed[1] - 0.5) * 2.0  # radians: stripes are never horizontal, so a pan can be seen
    pitch = 4 + 3 * seed[2]
    along = torch.cos(tilt) * x + torch.sin(tilt) * y
    across = torch.cos(tilt) * y - torch.sin(tilt) * x
    stripes = torch.sin(2 * math.pi * (pitch * along + seed[3]))
    checks = stripes * torch.sin(2 * math.pi * (pitch * across + seed[4]))
    heading = 2 * math.pi * seed[5]
    moved = (_IS_BACK["drifting"] == spec["back"].view(-1, 1, 1, 1)).to(x.dtype) * 0.4 * u
    grain = _noise(
        (x - torch.cos(heading) * moved) * TEXTURE_CELLS,
        (y - torch.sin(heading) * moved) * TEXTURE_CELLS,
        whole,
    )
    turn = math.pi * u
    cloud = (_noise(x * 5 + 0.5 * u, y * 5, whole + 17) - 0.5) * torch.cos(turn)
    cloud = cloud + (_noise(x * 5, y * 5 + 0.5 * u, whole + 31) - 0.5) * torch.sin(turn)
    ring = ((x - 0.2 - 0.6 * seed[6]) ** 2 + (y - 0.2 - 0.6 * seed[7]) ** 2 + 1e-6).sqrt()
    ripples = torch.sin(2 * math.pi * (pitch * ring - 2 * u + seed[3]))
    speckle = 0.2 + 0.38 * torch.sigmoid(8 * (grain - 0.5))
    options = (
        x * 0 + 0.03,
        x * 0 + 0.45,
        0.26 + 0.26 * _soft_square(stripes),
        0.26 + 0.26 * _soft_square(checks),
        speckle,
        (0.38 + 0.36 * cloud).clamp(0.1, 0.66),
        speckle,
        0.26 + 0.26 * _soft_square(ripples, 2.0),
    )
    return _choose(spec["back"].view(-1, 1, 1, 1), options)


def _placements(spec: dict, u: torch.Tensor):
    """Centre x and y, radius and angle of the two objects over time: the second first, since it lies below."""
    seed, motion = spec["seed"], spec["motion"].view(-1, 1, 1, 1)
    two = spec["two"].view(-1, 1, 1, 1).to(u.dtype)
    sizes, directions, _ = _constants(u.device)
    size = sizes[spec["size"]].view(-1, 1, 1, 1)

    def does(name: str) -> torch.Tensor:
        return (motion == _IS_MOTION[name]).to(u.dtype)

    def random(column: int) -> torch.Tensor:
        return seed[:, column].view(-1, 1, 1, 1)

    travel = (0.36 + 0.16 * random(8)) * (u - 0.5)
    x = 0.42 + 0.16 * random(9) + travel * (does("moving right") - does("moving left"))
    y = 0.42 + 0.16 * random(10) + travel * (does("moving down") - does("moving up"))
    y = y + does("bouncing") * (0.18 - 0.38 * torch.sin(2 * math.pi * u).abs())
    radius = size * (1 + (does("growing") - does("shrinking")) * 0.8 * (u - 0.5))
    spin = does("rotating clockwise") - does("rotating counterclockwise")
    angle = spin.abs() * 2 * math.pi * random(11) + 0.9 * math.pi * u * spin
    towards = directions[spec["rel"]]
    dx, dy = towards[:, 0].view(-1, 1, 1, 1) * 0.23, towards[:, 1].view(-1, 1, 1, 1) * 0.23
    sway = 0.03 * torch.sin(2 * math.pi * (u + random(8)))
    still = torch.zeros_like(angle)
    second = (0.5 - dx, 0.5 - dy + sway, torch.full_like(size, 0.17), still)
    first = (
        torch.where(two > 0, 0.5 + dx, x),
        torch.where(two > 0, 0.5 + dy - sway, y),
        torch.where(two > 0, torch.full_like(radius, 0.17), radius),
        torch.where(two > 0, still, angle),
    )
    return (second, "2", two), (first, "", torch.ones_like(two))


def paint(spec: dict, times: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor):
    """Draw specs at given times and pixel centres.

    Args:
        spec: rows of :func:`world.sample`.
        times: (T,) in 0..1, the whole motion being 0 to 1.
        rows, columns: (H,) and (W,) evenly spaced pixel centres in 0..1; a window of a frame has fewer.

    Returns:
        Clips (B, 3, T, H, W) in [-1, 1], and where the objects are, (B, 1, T, H, W) in 0..1.
    """
    u = times.view(1, -1, 1, 1)
    count, shape = spec["seed"].shape[0], (len(times), len(rows), len(columns))
    x, y = columns.view(1, 1, 1, -1).expand(1, *shape), rows.view(1, 1, -1, 1).expand(1, *shape)
    palette = _constants(times.device)[2]
    image = _ground(spec, x, y, u).expand(count, *shape).unsqueeze(1).expand(-1, 3, -1, -1, -1)
    where = torch.zeros_like(image[:, :1])
    edge = 1 / (rows[1] - rows[0])
    for (cx, cy, radius, angle), name, present in _placements(spec, u):
        px, py = (x - cx) / radius, (y - cy) / radius
        cos, sin = torch.cos(angle), torch.sin(angle)
        away = distance(spec["shape" + name].view(-1, 1, 1, 1), px * cos + py * sin, py * cos - px * sin)
        mask = ((0.5 - away * radius * edge).clamp(0, 1) * present).unsqueeze(1)
        image = image * (1 - mask) + mask * palette[spec["colour" + name]].view(count, 3, 1, 1, 1)
        where = torch.maximum(where, mask)
    return image * 2 - 1, where


def grid(frames: int, size: int, device: torch.device | str = "cpu"):
    """Times and pixel centres of a square clip; a single frame shows the middle of the motion."""
    times = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.full((1,), 0.5, device=device)
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    return times, centres, centres


def draw(spec: dict, frames: int = 17, size: int = 256) -> torch.Tensor:
    """Specs -> square clips (B, 3, frames, size, size) in [-1, 1]; the whole motion fits any number of frames."""
    return paint(spec, *grid(frames, size, spec["seed"].device))[0]
