"""VBench's formulas on its own networks, DINO and CLIP, when a folder with their safetensors is given.

VBench takes DINO ViT-B/16 and CLIP ViT-B/32. The folders are those of transformers (config.json, model.safetensors,
for CLIP a tokenizer too), such as a copy of facebook/dino-vitb16 and openai/clip-vit-base-patch32; other sizes load
as well, and then the numbers are not VBench's. Classes are chosen here and not by the folder, so that no code in a
folder is ever run, and nothing is read that holds code (pickles). The networks run on the CPU: the GPU's peak memory
stays the pipeline's. (arXiv 2311.17982; vbench 0.1.5, Apache-2.0)
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..vbench_prompts import style_of
from .clips import check_clip, eight_bit
from .features import consistency

Kind = Literal["dino", "clip"]
MODEL_TYPES: dict[Kind, str] = {"dino": "vit", "clip": "clip"}
_NAMES: dict[Kind, str] = {"dino": "DINO ViT-B/16", "clip": "CLIP ViT-B/32"}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PIECE = 8  # frames at a time


@dataclass(frozen=True)
class Networks:
    """Folders of the networks that are there.

    Attributes:
        dino, clip: folders that `check_network` took; None where there is none.
    """

    dino: Path | None = None
    clip: Path | None = None

    def folder(self, kind: Kind) -> Path:
        """The folder of one.

        Raises:
            ValueError: there is none.
        """
        found: Path | None = getattr(self, kind)
        if found is None:
            raise ValueError(lacking(kind))
        return found


def lacking(kind: Kind) -> str:
    """What it takes to measure with a network that was not given."""
    return f"needs {_NAMES[kind]}: name its folder by the key {kind}"


def check_network(kind: Kind, folder: str | Path) -> Path:
    """Look whether a folder holds a network that may be read, without reading its tensors.

    Raises:
        ValueError: no folder, another kind of model, no safetensors (pickles are not read), or a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{kind}: {folder} is no folder; name one with config.json and model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{kind}: {folder / 'config.json'} cannot be read ({type(error).__name__})") from error
    if found != MODEL_TYPES[kind]:
        raise ValueError(f"{kind}: {folder} holds a model of type {found!r}; use one of type {MODEL_TYPES[kind]!r}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pth", ".pt", ".ckpt", ".h5", ".pkl"))
        held = f"holds {', '.join(others)}" if others else "holds no weights"
        raise ValueError(f"{kind}: {folder} {held}; only safetensors are read, which hold no code")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{kind}: {file} is damaged: {str(error).splitlines()[0]}") from error
    return folder


def subject_consistency(video: torch.Tensor, *, networks: Networks) -> float:
    """Mean over frames i > 0 of (max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))) / 2, f DINO's class token.

    VBench's measure: 8-bit frames, the shorter side to 224 (bilinear, without antialiasing), the aspect ratio kept.
    Range 0 to 1, higher keeps the subject. A frozen clip has 1. (arXiv 2311.17982)
    """
    return consistency(_dino_features(check_clip(video, least=2), networks.folder("dino")))


def background_consistency(video: torch.Tensor, *, networks: Networks) -> float:
    """The same formula, f CLIP's image features.

    VBench's measure: 8-bit frames, the shorter side to 224 (bicubic, without antialiasing), the middle cut out. Range
    0 to 1, higher keeps the scene. A frozen clip has 1. (arXiv 2311.17982)
    """
    return consistency(_clip_features(check_clip(video, least=2), networks.folder("clip")))


def clip_score(video: torch.Tensor, prompt: str, *, networks: Networks) -> float:
    """Mean over the frames of the cosine between CLIP's image features and its text features of the prompt.

    Range -1 to 1, about 0.2 to 0.35 for ViT-B/32, higher follows the prompt. None of VBench's dimensions, whose
    overall consistency takes ViCLIP; known as CLIPSIM. (arXiv 2104.14806)
    """
    folder = networks.folder("clip")
    images = F.normalize(_clip_features(check_clip(video), folder), dim=1)
    return float((images @ _text_features(folder, prompt)).mean())


def appearance_style(video: torch.Tensor, prompt: str, *, networks: Networks) -> float | None:
    """The same with the text of the style alone ("oil painting"), for prompts of VBench's list that name one.

    VBench's measure: frames resized by Pillow (bicubic, antialiased), the middle cut out. Range -1 to 1, higher shows
    the style. None for other prompts. (arXiv 2311.17982)
    """
    style = style_of(prompt)
    if style is None:
        return None
    folder = networks.folder("clip")
    images = F.normalize(_clip_features(check_clip(video), folder, pillow=True), dim=1)
    return float((images @ _text_features(folder, style)).mean())


def resized(video: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """8-bit frames with the shorter side of a length, as torchvision resizes byte tensors without antialiasing.

    Args:
        video: (F, 3, H, W) in [0, 1].
        side: pixels of the shorter side; the longer one keeps the ratio, rounded down.
        mode: "bilinear" or "bicubic".

    Returns:
        (F, 3, h, w) float32, whole numbers from 0 to 255.
    """
    frames = (video * 255).round()
    size = _size(video.shape[2], video.shape[3], side)
    if size == tuple(video.shape[2:]):
        return frames
    return F.interpolate(frames, size=size, mode=mode, align_corners=False).clamp(0, 255).round()


def _size(height: int, width: int, side: int) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    other = int(side * long / short)
    return (side, other) if height <= width else (other, side)


def _middle(frames: torch.Tensor, side: int) -> torch.Tensor:
    top, left = (round((length - side) / 2) for length in frames.shape[2:])
    return frames[..., top : top + side, left : left + side]


def _by_pillow(video: torch.Tensor, side: int) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    height, width = _size(video.shape[2], video.shape[3], side)
    frames = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in eight_bit(video)
    ]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()


def _normal(frames: torch.Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (frames / 255 - mean) / std


_kept: dict[str, tuple[str, torch.Tensor]] = {}


def _once(name: str, video: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Features of the last clip are kept under a name: several measures look at the same one."""
    key = hashlib.sha256(video.contiguous().numpy().tobytes()).hexdigest() + str(tuple(video.shape))
    if _kept.get(name, ("", None))[0] != key:
        _kept[name] = key, make()
    return _kept[name][1]


@torch.no_grad()
def _dino_features(video: torch.Tensor, folder: Path) -> torch.Tensor:
    """(F, 3, H, W) -> (F, C): the class token behind the last norm."""
    network = _network("dino", folder)

    def make() -> torch.Tensor:
        frames = _normal(resized(video, network.config.image_size, "bilinear"), _IMAGENET)
        tokens = [
            network(pixel_values=piece, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            for piece in frames.split(_PIECE)
        ]
        return torch.cat(tokens)

    return _once(f"dino {folder}", video, make)


@torch.no_grad()
def _clip_features(video: torch.Tensor, folder: Path, *, pillow: bool = False) -> torch.Tensor:
    """(F, 3, H, W) -> (F, C): projected image features."""
    network = _network("clip", folder)

    def make() -> torch.Tensor:
        side = network.config.vision_config.image_size
        frames = _by_pillow(video, side) if pillow else resized(video, side, "bicubic")
        frames = _normal(_middle(frames, side), _OPENAI)
        return torch.cat([_tensor(network.get_image_features(pixel_values=piece)) for piece in frames.split(_PIECE)])

    return _once(f"clip {folder} {pillow}", video, make)


@torch.no_grad()
def _text_features(folder: Path, text: str) -> torch.Tensor:
    """(C,) of length 1: projected text features."""
    network = _network("clip", folder)
    longest = network.config.text_config.max_position_embeddings
    tokens = _tokenizer(folder)([text], truncation=True, max_length=longest, return_tensors="pt")
    return F.normalize(_tensor(network.get_text_features(**tokens))[0], dim=0)


def _tensor(found: Any) -> torch.Tensor:
    """Features as every release of transformers 5 returns them: a tensor, or the pooled part of an output."""
    result: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return result.float()


@functools.cache
def _network(kind: Kind, folder: Path) -> Any:
    check_network(kind, folder)
    from transformers import CLIPModel, ViTModel

    # Named classes: trust_remote_code has nothing to act on.
    model: Any = ViTModel if kind == "dino" else CLIPModel
    more = {"add_pooling_layer": False} if kind == "dino" else {}
    try:
        network, told = model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **more
        )
    except Exception as error:
        raise ValueError(f"{kind}: {folder} cannot be loaded: {str(error).strip().splitlines()[0][:200]}") from error
    gone = sorted(told["missing_keys"])
    if gone:
        raise ValueError(f"{kind}: {folder} lacks {gone[0]} ({len(gone)} tensors missing)")
    return network.eval()


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise ValueError(f"clip: {folder} holds no tokenizer.json, or vocab.json and merges.txt, which texts need")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"clip: the tokenizer in {folder} cannot be loaded ({type(error).__name__})") from error
