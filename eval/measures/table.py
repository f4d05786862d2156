"""The measures by name: what each takes, which way is good, and what it needs; and one function that takes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import features, ffmpeg, imaging, motion, networks, reference, world
from .networks import Networks

Kind = Literal["pair", "clip", "prompt"]
Direction = Literal["higher", "lower", "zero", "neither"]


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: as in results and reports; ends in _proxy when another network stands in for VBench's.
        kind: "pair" takes (reference, video), "clip" takes (video), "prompt" takes (video, prompt).
        direction: "higher" or "lower" is better, "zero" means nearest to 0, "neither" says that it only informs.
        range: of its values, as text.
        needs: packages beyond the plain installation, as text; empty for none.
        compute: the function, whose docstring holds formula and source.
        missing: why it cannot be computed on this machine; an empty text when it can.
        takes_fps: whether `fps=` is an argument.
        reencode_bound: by how much a re-encoding at high quality (x264, crf 4) may move it.
        dimension: VBench's dimension that it measures or stands for, or an empty text.
        network: "dino" or "clip", whose folder must be given; `networks=` is an argument then. Empty for none.
    """

    name: str
    kind: Kind
    direction: Direction
    range: str
    needs: str
    compute: Callable[..., float | None]
    missing: Callable[[], str] = _nothing
    takes_fps: bool = False
    reencode_bound: float = 0.0
    dimension: str = ""
    network: Literal["", "dino", "clip"] = ""

    def unmet(self, given: Networks | None = None) -> str:
        """Why it cannot be computed with the networks that are given; an empty text when it can."""
        if self.network and (given is None or getattr(given, self.network) is None):
            return networks.lacking(self.network)
        return self.missing()

    def signed(self, value: float) -> float:
        """The value turned so that higher is better; "neither" stays as it is."""
        return -abs(value) if self.direction == "zero" else -value if self.direction == "lower" else value


def _pair(name: str, direction: Direction, range_: str, bound: float, needs: str = "", **more: Any) -> Measure:
    home = ffmpeg if hasattr(ffmpeg, name) else reference
    return Measure(name, "pair", direction, range_, needs, getattr(home, name), reencode_bound=bound, **more)


def _clip(name: str, home: Any, direction: Direction, range_: str, bound: float, needs: str, **more: Any) -> Measure:
    dimension = more.pop("dimension", name.removesuffix("_proxy"))
    more |= {"reencode_bound": bound, "dimension": dimension if dimension in VBENCH else ""}
    return Measure(name, "clip", direction, range_, needs, getattr(home, name), **more)


def _prompt(name: str, dimension: str) -> Measure:
    return Measure(name, "prompt", "higher", "0 or 1", "", getattr(world, name), dimension=dimension)


def _given(name: str, network: Literal["dino", "clip"], dimension: str, range_: str, bound: float) -> Measure:
    """A measure on a network whose folder must be given."""
    kind: Kind = "clip" if name.endswith("_consistency") else "prompt"
    needs = f"a folder with {network.upper()}"
    return Measure(name, kind, "higher", range_, needs, getattr(networks, name), reencode_bound=bound,
                   dimension=dimension, network=network)


# VBench's dimensions and the network that VBench takes for each (arXiv 2311.17982).
VBENCH: dict[str, str] = {
    "subject_consistency": "DINO ViT-B/16",
    "background_consistency": "CLIP ViT-B/32",
    "temporal_flickering": "differences of frames",
    "motion_smoothness": "AMT-S",
    "dynamic_degree": "RAFT",
    "aesthetic_quality": "CLIP ViT-L/14 and LAION's head",
    "imaging_quality": "MUSIQ",
    "object_class": "GRiT",
    "multiple_objects": "GRiT",
    "human_action": "UMT",
    "color": "GRiT",
    "spatial_relationship": "GRiT",
    "scene": "Tag2Text",
    "temporal_style": "ViCLIP",
    "appearance_style": "CLIP ViT-B/32",
    "overall_consistency": "ViCLIP",
}
IMPORTED = "import VBench's score"
# A clip that stands still has the best value of these: where one is measured, so is how much the clip moves.
FROZEN_IS_BEST = (
    "temporal_flickering",
    "motion_smoothness_proxy",
    "subject_consistency_proxy",
    "background_consistency_proxy",
    "subject_consistency",
    "background_consistency",
)
MOTION = ("dynamic_degree_proxy", "motion_magnitude_proxy")

_FLOW = {"missing": motion.without_opencv}
_NET = {"missing": features.without_features}
_ALL = (
    _pair("psnr", "higher", "0 to 100 dB", 1.0),
    _pair("psnr_frames", "higher", "0 to 100 dB", 1.0),
    _pair("ssim", "higher", "-1 to 1", 0.03),
    _pair("ms_ssim", "higher", "0 to 1", 0.01, "torchmetrics", missing=reference.without_torchmetrics),
    _pair("vmaf", "higher", "0 to 100", 3.0, "ffmpeg with libvmaf", missing=ffmpeg.without_vmaf, takes_fps=True),
    _pair("xpsnr", "higher", "0 to 100 dB", 1.0, "ffmpeg with xpsnr", missing=ffmpeg.without_xpsnr, takes_fps=True),
    _pair("flicker_difference", "zero", "-1 to 1", 0.003),
    _pair("sharpness_drift", "zero", "-10 to 10", 0.15),
    _pair("lpips", "lower", "0 to 1", 0.02, "torchvision, AlexNet weights", missing=reference.without_lpips),
    _pair("dists", "lower", "0 to 1", 0.02, "torchvision, VGG weights", missing=reference.without_dists),
    _clip("temporal_flickering", motion, "higher", "0 to 1", 0.003, ""),
    _clip("motion_smoothness_proxy", motion, "higher", "0 to 1", 0.003, "OpenCV", **_FLOW),
    _clip("dynamic_degree_proxy", motion, "neither", "0 or 1", 0.0, "OpenCV", takes_fps=True, **_FLOW),
    _clip("motion_magnitude_proxy", motion, "neither", "0 upwards", 0.05, "OpenCV", takes_fps=True, **_FLOW),
    _clip("subject_consistency_proxy", features, "higher", "0 to 1", 0.02, "EfficientNet-lite0", **_NET),
    _clip("background_consistency_proxy", features, "higher", "0 to 1", 0.02, "EfficientNet-lite0", **_NET),
    _given("subject_consistency", "dino", "subject_consistency", "0 to 1", 0.02),
    _given("background_consistency", "clip", "background_consistency", "0 to 1", 0.02),
    _given("clip_score", "clip", "", "-1 to 1", 0.02),
    _given("appearance_style", "clip", "appearance_style", "-1 to 1", 0.02),
    _clip("imaging_quality_proxy", imaging, "lower", "0 upwards", 2.0, ""),
    _clip("colourfulness_proxy", imaging, "neither", "0 to about 200", 1.0, "", dimension="aesthetic_quality"),
    _prompt("world_object_class", "object_class"),
    _prompt("world_multiple_objects", "multiple_objects"),
    _prompt("world_color", "color"),
    _prompt("world_spatial_relationship", "spatial_relationship"),
    _prompt("world_action", "human_action"),
    _prompt("world_scene", "scene"),
    _prompt("world_camera", "temporal_style"),
    _prompt("world_all", "overall_consistency"),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _ALL}


@dataclass(frozen=True)
class Covered:
    """What measures one of VBench's 16 dimensions here.

    Attributes:
        dimension: VBench's name.
        takes: the network that VBench takes.
        any_video: measures of any clip: VBench's formula exactly, or a proxy, which says so in its name.
        world: measures of the included model's world, by its prompts.
        network: measures on VBench's own network, for those who give its folder.
    """

    dimension: str
    takes: str
    any_video: tuple[str, ...]
    world: tuple[str, ...]
    network: tuple[str, ...]

    def cells(self) -> list[str]:
        """A row as printed; the score of VBench itself can be imported for each."""
        groups = (self.any_video, self.world, self.network)
        any_video, *others = (", ".join(names) for names in groups)
        return [self.dimension, self.takes, any_video or IMPORTED, *(names or "-" for names in others)]


def coverage() -> list[Covered]:
    """The 16 dimensions in VBench's order, each with what measures it here."""
    found = []
    for dimension, takes in VBENCH.items():
        mine = [entry for entry in MEASURES.values() if entry.dimension == dimension]
        groups = [
            tuple(entry.name for entry in mine if wanted == ("network" if entry.network else entry.kind))
            for wanted in ("clip", "prompt", "network")
        ]
        found.append(Covered(dimension, takes, *groups))
    return found


def with_motion(names: Iterable[str]) -> list[str]:
    """The names, and how much a clip moves where one of them is best for a clip that stands still."""
    names = list(names)
    return names + [name for name in MOTION if name not in names and not set(names).isdisjoint(FROZEN_IS_BEST)]


def check_names(names: Iterable[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: a name that is no measure.
    """
    names = list(names)
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"measure {name!r} is unknown; use some of {', '.join(MEASURES)}")
    return names


def measure(
    video: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
    prompt: str | None = None,
    fps: float = 8.0,
    names: Iterable[str] | None = None,
    networks: Networks | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Every measure that can be taken of a clip.

    Args:
        video: (F, 3, H, W) in [0, 1].
        reference: the clip to compare with; None leaves the pairs out.
        prompt: what the clip should show; None leaves the prompt's dimensions out.
        fps: frames per second of the clip.
        names: which measures; None takes all.
        networks: folders of DINO and CLIP, where there are some.

    Returns:
        Values by name, and by name why a measure was not taken: a package that is missing, a clip that is too small or
        too short. A dimension that does not apply to the prompt is in neither.

    Raises:
        ValueError: an unknown name, or a clip that no measure takes.
    """
    from .clips import check_clip, check_fps, check_pair

    video = check_clip(video)
    check_fps(fps)
    if reference is not None:
        reference, video = check_pair(reference, video)
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in check_names(MEASURES if names is None else names):
        entry = MEASURES[name]
        given = {"pair": reference, "clip": video, "prompt": prompt}[entry.kind]
        if given is None:
            continue
        reason = entry.unmet(networks)
        if reason:
            reasons[name] = reason
            continue
        arguments = {"pair": (reference, video), "clip": (video,), "prompt": (video, prompt)}[entry.kind]
        more = ({"fps": fps} if entry.takes_fps else {}) | ({"networks": networks} if entry.network else {})
        try:
            value = entry.compute(*arguments, **more)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        if value is not None:
            values[name] = float(value)
    return values, reasons
