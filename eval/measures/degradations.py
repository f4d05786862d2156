"""Ways to spoil a clip, which measures must answer to each, and a table of what they really see.

Drawn clips of the embedded world are spoiled in known ways at rising strengths. `ANSWERS` says for each measure under
which of them it must fall from strength to strength; the tests hold it to that, and `sensitivities` shows the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_sparse.pipelines.embedded import drawing

from .clips import eight_bit
from .table import MEASURES, measure
from .world import read_caption

LEVELS = (1 / 3, 2 / 3, 1.0)
PROMPTS = (
    "a large red star moving right on a speckled background",
    "a large yellow square growing on a striped background, camera panning left",
    "a red circle on the left of a blue star on a speckled background",
)
_EVERY = ("blur", "noise", "flicker", "jitter", "shuffle", "freeze", "colour_shift", "drop_object")
# Under which degradations a measure must fall with every strength. What is not listed it may miss or even like:
# flickering, smoothness and consistency rise when a clip freezes, so dynamic degree stands beside them.
ANSWERS: dict[str, tuple[str, ...]] = {
    "psnr": _EVERY,
    "psnr_frames": _EVERY,
    "ssim": _EVERY,
    "ms_ssim": _EVERY,
    "vmaf": tuple(name for name in _EVERY if name != "flicker"),
    "xpsnr": _EVERY,
    "flicker_difference": ("noise", "flicker", "jitter", "freeze"),
    "sharpness_drift": ("blur", "noise"),
    "temporal_flickering": ("noise", "flicker", "jitter", "shuffle"),
    "motion_smoothness_proxy": ("noise", "flicker"),
    "dynamic_degree_proxy": ("freeze",),
    "motion_magnitude_proxy": ("freeze",),
    "subject_consistency_proxy": ("flicker",),
    "background_consistency_proxy": ("flicker",),
    "imaging_quality_proxy": ("noise",),
    "colourfulness_proxy": ("drop_object",),
    "world_object_class": ("colour_shift", "drop_object"),
    "world_multiple_objects": ("colour_shift", "drop_object"),
    "world_color": ("colour_shift", "drop_object"),
    "world_spatial_relationship": ("drop_object",),
    "world_action": ("freeze", "drop_object"),
    "world_scene": ("flicker",),
    "world_camera": ("freeze",),
    "world_all": ("colour_shift", "drop_object", "freeze"),
}

# Measures that stand in no row of the table, and why: nothing is promised of them.
NOT_PROMISED: dict[str, str] = {
    "lpips": "AlexNet's weights are in no package; its formula is tested on random ones",
    "dists": "VGG's weights are in no package; its formula is tested on random ones",
    "subject_consistency": "DINO's weights are in no package; its formula is tested on random ones",
    "background_consistency": "CLIP's weights are in no package; its formula is tested on random ones",
    "clip_score": "CLIP's weights are in no package; its formula is tested on random ones",
    "appearance_style": "CLIP's weights are in no package; its formula is tested on random ones",
}


@dataclass(frozen=True)
class Drawn:
    """A drawn clip.

    Attributes:
        video: (F, 3, H, W) in [0, 1].
        where: (F, 1, H, W) in [0, 1], the place of the objects.
        prompt: what it shows.
    """

    video: torch.Tensor
    where: torch.Tensor
    prompt: str


def draw(prompt: str, frames: int = 13, size: int = 128) -> Drawn:
    """The clip that a prompt of the embedded world describes.

    Raises:
        ValueError: words outside the world's grammar.
    """
    spec = read_caption(prompt)
    if spec is None:
        raise ValueError(f"prompt {prompt!r} is not in the embedded world's grammar; write for example {PROMPTS[0]!r}")
    video, where = drawing.paint(spec, *drawing.grid(frames, size))
    return Drawn((video[0].movedim(1, 0) / 2 + 0.5).clamp(0, 1), where[0].movedim(1, 0), prompt)


def _noise_of(clip: Drawn, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def blur(clip: Drawn, strength: float) -> torch.Tensor:
    """Gaussian blur of every frame, sigma up to 3 pixels at 128."""
    sigma = 3 * strength * min(clip.video.shape[2:]) / 128
    reach = max(1, round(3 * sigma))
    window = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    window = (window / window.sum()).repeat(3, 1)
    video = F.pad(clip.video, [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(video, window.view(3, 1, -1, 1), groups=3), window.view(3, 1, 1, -1), groups=3)


def noise(clip: Drawn, strength: float) -> torch.Tensor:
    """Independent Gaussian noise in every pixel, deviation up to 0.12."""
    return clip.video + 0.12 * strength * _noise_of(clip, *clip.video.shape)


def flicker(clip: Drawn, strength: float) -> torch.Tensor:
    """The brightness of whole frames goes up and down, by up to 0.2."""
    sign = torch.where(torch.arange(len(clip.video)) % 2 == 0, 1.0, -1.0)
    return clip.video + 0.2 * strength * sign.view(-1, 1, 1, 1)


def jitter(clip: Drawn, strength: float) -> torch.Tensor:
    """Frames are shifted to and fro, by up to 8 pixels at 128."""
    most = 8 * strength * min(clip.video.shape[2:]) / 128
    signs = torch.where(_noise_of(clip, len(clip.video), 2) > 0, 1, -1) * round(most)
    return torch.stack([f.roll(tuple(s.tolist()), (1, 2)) for f, s in zip(clip.video, signs, strict=True)])


def shuffle(clip: Drawn, strength: float) -> torch.Tensor:
    """The first part of the frames is shown in another order, its two halves interleaved; all of it at strength 1."""
    frames = len(clip.video)
    part = max(3, round(strength * frames))
    order = torch.arange(frames)
    half = (part + 1) // 2
    order[0:part:2], order[1:part:2] = torch.arange(half), torch.arange(half, part)
    return clip.video[order]


def freeze(clip: Drawn, strength: float) -> torch.Tensor:
    """The last part of the clip stands still; all of it at strength 1."""
    frames = len(clip.video)
    last = round((1 - strength) * (frames - 1))
    return clip.video[torch.arange(frames).clamp(max=last)]


def colour_shift(clip: Drawn, strength: float) -> torch.Tensor:
    """Hues turn by up to 120 degrees: red becomes green, green blue, blue red."""
    turned = clip.video.roll(1, 1)
    return clip.video + strength * (turned - clip.video)


def drop_object(clip: Drawn, strength: float) -> torch.Tensor:
    """The object is gone in the last part of the frames, all of them at strength 1; the ground's median fills its
    place."""
    frames = len(clip.video)
    first = frames - round(strength * frames)
    grown = F.max_pool2d(clip.where, 5, 1, 2)
    video = clip.video.clone()
    for i in range(first, frames):
        ground = clip.video[i][:, grown[i, 0] == 0].median(1).values
        video[i] = torch.where(grown[i] > 0, ground.view(3, 1, 1), video[i])
    return video


DEGRADATIONS: dict[str, Callable[[Drawn, float], torch.Tensor]] = {
    "blur": blur,
    "noise": noise,
    "flicker": flicker,
    "jitter": jitter,
    "shuffle": shuffle,
    "freeze": freeze,
    "colour_shift": colour_shift,
    "drop_object": drop_object,
}


def degrade(clip: Drawn, name: str, strength: float) -> torch.Tensor:
    """The clip spoiled in one way, within [0, 1].

    Args:
        clip: a drawn clip.
        name: a key of `DEGRADATIONS`.
        strength: in (0, 1]; 0 is the clip itself.

    Raises:
        ValueError: unknown name, or a strength outside [0, 1].
    """
    if name not in DEGRADATIONS:
        raise ValueError(f"degradation {name!r} is unknown; use one of {', '.join(DEGRADATIONS)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} is not allowed; use a number from 0 to 1")
    return clip.video if strength == 0 else DEGRADATIONS[name](clip, strength).clamp(0, 1)


def reencode(video: torch.Tensor, crf: int = 4) -> torch.Tensor:
    """The clip through a file of high quality and back: x264 at this crf, full chroma.

    `Measure.reencode_bound` says how far that may move a measure of a clip with some grain that differs from its
    reference in every frame. (Frames equal to the reference have 100 dB, and lose tens of it by any rounding; drawn
    clips without grain are so smooth that rounding to 8 bits changes NIQE and sharpness.)
    """
    import io

    import av

    stored = io.BytesIO()
    with av.open(stored, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": str(crf), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "yuv444p"
        for frame in eight_bit(video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    stored.seek(0)
    with av.open(stored, "r") as source:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in source.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def sensitivities(
    clips: Iterable[Drawn],
    names: Iterable[str] | None = None,
    degradations: Iterable[str] | None = None,
    levels: Iterable[float] = LEVELS,
) -> dict[str, dict[str, list[float]]]:
    """Means over the clips of each measure, by measure and degradation: at strength 0 and at the levels.

    Args:
        clips: drawn clips; each is also the reference of its spoiled versions.
        names: measures; None takes all. One that cannot be taken here has no entry.
        degradations: keys of `DEGRADATIONS`; None takes all.
        levels: rising strengths in (0, 1].
    """
    clips, names = list(clips), list(MEASURES if names is None else names)

    def means(spoiled: str, level: float) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for clip in clips:
            video = degrade(clip, spoiled, level)
            for name, value in measure(video, reference=clip.video, prompt=clip.prompt, names=names)[0].items():
                sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    clean = means("blur", 0.0)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in clean}
    for spoiled in DEGRADATIONS if degradations is None else degradations:
        rows = [clean, *(means(spoiled, level) for level in levels)]
        for name in clean:
            found[name][spoiled] = [row[name] for row in rows]
    return found


def answers(name: str, values: Sequence[float]) -> bool:
    """Whether a measure gets worse with every strength, and by more than a re-encoding could make it.

    Args:
        name: of the measure; one that says neither way answers when it falls.
        values: at strength 0 and at rising strengths. A measure that is 0 or 1 may stay between two of them.
    """
    entry = MEASURES[name]
    signed = [entry.signed(value) for value in values]
    falls = all(b < a or (b == a and entry.range == "0 or 1") for a, b in zip(signed[:-1], signed[1:], strict=True))
    return falls and signed[0] - signed[-1] > entry.reencode_bound


def blind_spots(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, list[str]]:
    """For each measure the degradations that leave it as it was, or make it better, at the strongest level.

    Args:
        found: what `sensitivities` returned.
    """
    blind: dict[str, list[str]] = {}
    for name, row in found.items():
        entry = MEASURES[name]
        for spoiled, values in row.items():
            if entry.signed(values[0]) - entry.signed(values[-1]) <= entry.reencode_bound:
                blind.setdefault(name, []).append(spoiled)
    return blind
