"""Does a clip of the embedded world show what its prompt says? VBench's dimensions, decided by looking at pixels.

Every measure takes a clip (F, 3, H, W) in [0, 1] and its prompt, and returns 1 or 0, or None where the dimension does
not apply: another kind of prompt, words outside the world's grammar, or fewer frames than a motion needs. The checks
are those of pipelines/embedded/checks.py; the scene is found here.
"""

from __future__ import annotations

import functools
import re

import torch
import torch.nn.functional as F

from dit_sparse.pipelines.embedded import checks, drawing, world

from .clips import check_clip

_SIDE = 32
_NEIGHBOURS, _EXAMPLES = 3, 10  # of each background, drawn once
_SCENE, _FRAMES = 64, 5  # size and frames at which scenes are compared
Spec = dict[str, torch.Tensor]


def read_caption(prompt: str) -> Spec | None:
    """A prompt in the world's grammar as a spec of one row; None for any other prompt."""
    found = _grammar().fullmatch(" ".join(prompt.lower().split()).replace(" ,", ","))
    if found is None:
        return None
    said = found.groupdict()
    colours, sizes = list(world.COLOURS), list(world.SIZES)
    spec = {
        "colour": colours.index(said["colour"]),
        "shape": world.SHAPES.index(said["shape"]),
        "size": sizes.index(said["size"] or "medium"),
        "motion": world.MOTIONS.index(said["motion"] or "standing still"),
        "back": world.BACKGROUNDS.index(said["back"] or "black"),
        "cam": world.CAMERAS.index(said["cam"] or ""),
        "two": int(said["rel"] is not None),
        "rel": world.RELATIONS.index(said["rel"]) if said["rel"] else 0,
        "colour2": colours.index(said["colour2"]) if said["rel"] else 0,
        "shape2": world.SHAPES.index(said["shape2"]) if said["rel"] else 0,
        "say_size": int(said["size"] is not None),
        "say_motion": int(said["motion"] is not None),
        "say_back": int(said["back"] is not None),
    }
    return {name: torch.tensor([value]) for name, value in spec.items()} | {"seed": torch.full((1, world.SEEDS), 0.5)}


def world_object_class(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the one object of the prompt is there with its shape (best overlap with drawn templates)."""
    spec, row = _look(video, prompt)
    return None if spec is None or int(spec["two"]) else row["shape"]


def world_multiple_objects(video: torch.Tensor, prompt: str) -> float | None:
    """1 when both objects of the prompt are there, each with its colour and its shape."""
    spec, row = _look(video, prompt)
    if spec is None or not int(spec["two"]):
        return None
    return float(row["colour"] == 1 and row["shape"] == 1)


def world_color(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the largest areas of palette colour are the prompt's (nearest in CIE Lab)."""
    return _look(video, prompt)[1].get("colour")


def world_spatial_relationship(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the first object lies where the prompt puts it (direction between the centroids)."""
    return _look(video, prompt)[1].get("relation")


def world_action(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the object moves as the prompt says, in place of VBench's human action; needs 13 frames."""
    spec, row = _look(video, prompt)
    return None if spec is None or not int(spec["say_motion"]) else row["motion"]


def world_scene(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the background is the prompt's: the commonest among the nearest drawn ones, by their statistics.

    Speckles under a panning camera and a drifting background look the same, and count as the same there.
    """
    spec = read_caption(prompt)
    if spec is None or not int(spec["say_back"]):
        return None
    seen = scene_of(check_clip(video, side=_SIDE))
    wanted = world.BACKGROUNDS[int(spec["back"])]
    same = {"speckled", "drifting"} if int(spec["cam"]) else {wanted}
    return float(seen == wanted or (wanted in same and seen in same))


def world_camera(video: torch.Tensor, prompt: str) -> float | None:
    """1 when the ground slides as the prompt's camera says; needs 13 frames and a prompt with a camera."""
    return _look(video, prompt)[1].get("camera")


def world_all(video: torch.Tensor, prompt: str) -> float | None:
    """1 when every check passes that applies to the prompt, in place of VBench's overall consistency."""
    spec, row = _look(video, prompt)
    if spec is None:
        return None
    said = {name: value for name, value in row.items() if name != "motion" or int(spec["say_motion"])}
    values = [*said.values(), world_scene(video, prompt)]
    return float(all(value for value in values if value is not None))


_last: list[object] = [None, None]


def _look(video: torch.Tensor, prompt: str) -> tuple[Spec | None, dict[str, float | None]]:
    """The prompt's spec, and the checks of the clip against it; the last pair is kept for the other dimensions."""
    spec = read_caption(prompt)
    if spec is None:
        return None, {}
    video = check_clip(video, side=_SIDE)
    if not (_last[0] is not None and _last[0][1] == prompt and torch.equal(_last[0][0], video)):  # type: ignore[index]
        _last[:] = (video, prompt), checks.check(_square(video).movedim(1, 0) * 2 - 1, spec, 0)
    return spec, dict(_last[1])  # type: ignore[call-overload]


def _square(video: torch.Tensor) -> torch.Tensor:
    """The world is square: another shape of frame is squeezed into it."""
    height, width = video.shape[2:]
    side = max(height, width)
    return video if height == width else F.interpolate(video, size=(side, side), mode="area")


def scene_of(video: torch.Tensor) -> str:
    """Name in ``world.BACKGROUNDS`` of what lies behind the objects of a clip (F, 3, H, W)."""
    frames = min(len(video), _FRAMES)
    known, names, scale = _scenes(frames)
    chosen = torch.linspace(0, len(video) - 1, frames).round().long()
    away = ((known - _scene_features(video[chosen])) / scale).square().sum(1)
    nearest = names[away.topk(_NEIGHBOURS, largest=False).indices]
    return world.BACKGROUNDS[int(torch.bincount(nearest, minlength=len(world.BACKGROUNDS)).argmax())]


def _scene_features(video: torch.Tensor) -> torch.Tensor:
    """What tells the backgrounds apart, from the gray places of a clip: brightness, contrast at three scales, change
    over time, and how far the spectrum gathers in one or two directions."""
    small = F.interpolate(_square(video), size=(_SCENE, _SCENE), mode="area")
    coloured = (small.amax(1) - small.amin(1) > 0.12) | (small.amin(1) > 0.8)
    free = 1 - F.max_pool2d(coloured.float()[:, None], 5, 1, 2)[:, 0]
    gray = small.mean(1)
    count = free.sum().clamp(min=1)
    mean = (gray * free).sum() / count
    rest = (gray - mean) * free
    spread = ((rest.square().sum() / count) + 1e-6).sqrt()
    fine = [_left(rest, free, size) for size in (3, 7, 15)]
    both = free[1:] * free[:-1]
    change = ((gray[1:] - gray[:-1]).abs() * both).sum() / both.sum().clamp(min=1)
    power = torch.fft.fft2(rest).abs().square().mean(0)
    power[0, 0] = 0
    top = power.flatten().topk(8).values.cumsum(0) / power.sum().clamp(min=1e-6)
    middle = ((gray - 0.35).abs() < 0.06).float()
    levels = torch.stack([(middle * free).sum() / count, (gray < 0.1).float().mean()])
    return torch.stack([mean * 3, spread * 10, *fine, change * 10, top[1] * 2, top[3] * 2, top[7] * 2, *levels])


def _left(rest: torch.Tensor, free: torch.Tensor, size: int) -> torch.Tensor:
    """Share of the contrast that a box of this size leaves over."""
    smooth = F.avg_pool2d(rest[:, None], size, 1, size // 2)[:, 0]
    return ((rest - smooth).square() * free).sum() / (rest.square().sum() + 1e-3)


@functools.lru_cache(maxsize=4)
def _scenes(frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of drawn clips, their backgrounds, and the spread of each feature."""
    generator = torch.Generator().manual_seed(23)
    count = _EXAMPLES * len(world.BACKGROUNDS)
    spec = world.sample(count, generator=generator)
    spec["back"] = torch.arange(count) % len(world.BACKGROUNDS)
    still = torch.tensor([name in ("striped", "checkered", "cloudy") for name in world.BACKGROUNDS])
    spec["cam"] = spec["cam"] * still[spec["back"]].long()
    features = []
    for row in range(count):  # one at a time: all of them at once are slower, out of the cache
        one = {name: values[row : row + 1] for name, values in spec.items()}
        features.append(_scene_features(drawing.draw(one, frames, _SCENE)[0].movedim(1, 0) / 2 + 0.5))
    known = torch.stack(features)
    return known, spec["back"], known.std(0).clamp(min=1e-3)


@functools.cache
def _grammar() -> re.Pattern[str]:
    """The captions of ``world.captions`` as a pattern, any part of which may be left out that may be."""

    def any_of(name: str, words: object) -> str:
        return f"(?P<{name}>{'|'.join(sorted((w for w in words if w), key=len, reverse=True))})"  # type: ignore[attr-defined]

    colour, shape = any_of("colour", world.COLOURS), any_of("shape", world.SHAPES)
    second = f"an? {any_of('colour2', world.COLOURS)} {any_of('shape2', world.SHAPES)}"
    return re.compile(
        f"an? (?:{any_of('size', world.SIZES)} )?{colour} {shape}"
        f"(?: {any_of('rel', world.RELATIONS)} {second})?(?: {any_of('motion', world.MOTIONS)})?"
        f"(?: on a {any_of('back', world.BACKGROUNDS)} background)?(?:, camera {any_of('cam', world.CAMERAS)})?"
    )
