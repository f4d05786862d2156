"""What the bridge knows about each model family: which layers, how to read the token grid, where text sits.

A new model is one entry. Method code never asks for a class name; it receives the family's name at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .grid import TokenGrid

TextPlace = Literal["none", "front", "back"]
Inputs = Mapping[str, Any]


class Unreadable(Exception):
    """The grid of this forward cannot be read; the text says why."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: short name, also in summaries.
        classes: transformer classes (their subclasses count too).
        layers: pattern that the whole module path of a self-attention layer of the video or image tokens matches.
        grid: reads (frames, height, width) in tokens from (model, forward arguments); raises Unreadable.
        text_at: where the text tokens of self-attention are, "none" when text is only in cross-attention.
        split_text: under Ulysses each rank holds a piece of text and a piece of image (from the model's `_cp_plan`).
        excluded: says of (model, path) why a layer that matches is left alone after all; empty when it is not.
        notes: what a reader should know.
    """

    name: str
    classes: tuple[str, ...]
    layers: str
    grid: Callable[[Any, Inputs], tuple[int, int, int]]
    text_at: TextPlace = "none"
    split_text: bool = False
    excluded: Callable[[Any, str], str] | None = None
    notes: str = ""

    def against(self, model: Any, path: str) -> str:
        """Why the attention module at this path is not bound; empty for a self-attention layer."""
        if re.fullmatch(self.layers, path) is None:
            return "not self-attention of the video or image tokens"
        return self.excluded(model, path) if self.excluded is not None else ""

    def read_grid(self, model: Any, inputs: Inputs) -> tuple[TokenGrid | None, str]:
        """The video part of the grid, or None and the reason."""
        try:
            frames, height, width = self.grid(model, inputs)
            return TokenGrid(frames, height, width, text_at=self.text_at), ""
        except Unreadable as error:
            return None, str(error)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            return None, f"token grid unreadable: {type(error).__name__}: {error}".splitlines()[0]


# -- grid readers --------------------------------------------------------------------------------------------------


def _patch(model: Any) -> tuple[int, int, int]:
    """(t, h, w) of a patch from the configuration."""
    size = model.config.patch_size
    if isinstance(size, int):
        return getattr(model.config, "patch_size_t", None) or 1, size, size
    return (1, *size) if len(size) == 2 else tuple(size)  # type: ignore[return-value]


def _latent(inputs: Inputs, dims: int) -> Any:
    states = inputs["hidden_states"]
    if getattr(states, "ndim", 0) != dims:
        raise Unreadable(f"hidden_states is not a {dims}-D tensor")
    return states


def video_bcfhw(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, C, F, H, W)."""
    _, _, *sizes = _latent(inputs, 5).shape
    return tuple(n // p for n, p in zip(sizes, _patch(model), strict=True))  # type: ignore[return-value]


def video_bfchw(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, F, C, H, W)."""
    _, frames, _, height, width = _latent(inputs, 5).shape
    t, h, w = _patch(model)
    return -(-frames // t), height // h, width // w


def video_bfhwc(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, F, H, W, C)."""
    _, *sizes, _ = _latent(inputs, 5).shape
    return tuple(n // p for n, p in zip(sizes, _patch(model), strict=True))  # type: ignore[return-value]


def image_bchw(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, C, H, W), or (B, C, F, H, W) where the patch has three sizes."""
    states = inputs["hidden_states"]
    if states.ndim == 5:
        return video_bcfhw(model, inputs)
    _, _, height, width = _latent(inputs, 4).shape
    _, h, w = _patch(model)
    return 1, height // h, width // w


def packed_sizes(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, S, C) with num_frames, height and width in latent units."""
    tokens = _latent(inputs, 3).shape[1]
    if inputs.get("num_frames") is None:
        raise Unreadable("the pipeline passes video_coords instead of sizes: conditioning tokens may lead")
    t, h, w = _patch(model)
    sizes = inputs["num_frames"] // t, inputs["height"] // h, inputs["width"] // w
    if sizes[0] * sizes[1] * sizes[2] != tokens:
        raise Unreadable(f"{tokens} tokens are not the {'x'.join(map(str, sizes))} that the pipeline names")
    return sizes


def packed_shapes(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, S, C) with img_shapes, a list of (frames, height, width) per sample."""
    shapes = inputs["img_shapes"]
    samples = [sample if isinstance(sample, list) else [sample] for sample in shapes]
    if any(len(sample) != 1 for sample in samples):
        raise Unreadable("reference image tokens follow the image")
    first = tuple(samples[0][0])
    if any(tuple(sample[0]) != first for sample in samples):
        raise Unreadable("images of a batch differ in size")
    return first  # type: ignore[return-value]


_sizes_of_ids: dict[int, tuple[Any, int, tuple[int, int, int]]] = {}


def packed_ids(model: Any, inputs: Inputs) -> tuple[int, int, int]:
    """hidden_states (B, S, C) with img_ids (S, axes); the last two of the first three axes are row and column.

    Reads the ids from the device once per tensor: pipelines pass the same one at every step.
    """
    import weakref

    ids, tokens = inputs["img_ids"], _latent(inputs, 3).shape[1]
    known = _sizes_of_ids.get(id(ids))
    if known is None or known[0]() is not ids or known[1] != ids._version:
        sizes = _sizes_from_ids(ids[0] if ids.ndim == 3 else ids)
        if len(_sizes_of_ids) > 16:
            _sizes_of_ids.clear()
        known = _sizes_of_ids[id(ids)] = (weakref.ref(ids), ids._version, sizes)
    sizes = known[2]
    if sizes[1] * sizes[2] != tokens:
        raise Unreadable(f"{tokens} tokens are not one {sizes[1]}x{sizes[2]} image: reference image tokens follow it")
    return sizes


def _sizes_from_ids(ids: Any) -> tuple[int, int, int]:
    rows, columns = (ids[:, axis].detach().to("cpu").long() for axis in (1, 2))
    height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    if len(rows) != height * width:
        return 1, height, width  # refused by the caller, which compares with the number of tokens
    raster = (rows - rows.min()) * width + columns - columns.min()
    if not bool((raster.diff() == 1).all()):
        raise Unreadable("image tokens are not in raster order")
    return 1, height, width


def _motif_decoder(model: Any, path: str) -> str:
    """Decoder blocks of Motif attend over the video twice (decoder and encoder stream)."""
    first = len(model.single_transformer_blocks) - model.num_decoder_layers
    number = re.fullmatch(r"single_transformer_blocks\.(\d+)\..*", path)
    return "decoder block that holds the video twice" if number and int(number[1]) >= first else ""


# -- the table -----------------------------------------------------------------------------------------------------

BLOCKS = r"(single_)?transformer_blocks\.\d+\.attn"

FAMILIES: tuple[Family, ...] = (
    Family("wan", ("WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel",
                   "WanAnimateTransformer3DModel"),
           r"(vace_)?blocks\.\d+\.attn1", video_bcfhw,
           notes="Wan 2.2: both denoisers are bound; VACE blocks too; face adapters of Animate are left alone"),
    Family("skyreels", ("SkyReelsV2Transformer3DModel",), r"blocks\.\d+\.attn1", video_bcfhw,
           notes="block-causal masks of diffusion forcing stay dense"),
    Family("hunyuan", ("HunyuanVideoTransformer3DModel",), BLOCKS, video_bcfhw, "back"),
    Family("hunyuan15", ("HunyuanVideo15Transformer3DModel",), BLOCKS, video_bcfhw, "back",
           notes="bound with a mask of keys instead of the S x S mask"),
    Family("cogvideox", ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
           r"transformer_blocks\.\d+\.attn1", video_bfchw, "front"),
    Family("ltx", ("LTXVideoTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", packed_sizes,
           notes="pipelines with conditioning tokens stay dense"),
    Family("ltx2", ("LTX2VideoTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", packed_sizes,
           notes="video self-attention only; audio and audio-video attention are left alone"),
    Family("anyflow", ("AnyFlowTransformer3DModel",), r"blocks\.\d+\.attn1", video_bfchw),
    Family("motif", ("MotifVideoTransformer3DModel",), BLOCKS, video_bcfhw, "back", excluded=_motif_decoder,
           notes="decoder blocks are left alone"),
    Family("mochi", ("MochiTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", video_bcfhw, "back",
           notes="attends sample by sample: each is a branch of its own"),
    Family("cosmos", ("CosmosTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", video_bcfhw),
    Family("allegro", ("AllegroTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", video_bcfhw),
    Family("kandinsky5", ("Kandinsky5Transformer3DModel",), r"visual_transformer_blocks\.\d+\.self_attention",
           video_bfhwc, notes="its own nabla sparsity (flex BlockMask) stays as it is"),
    Family("easyanimate", ("EasyAnimateTransformer3DModel",), r"transformer_blocks\.\d+\.attn1", video_bcfhw, "front"),
    Family("flux", ("FluxTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel",
                    "BriaTransformer2DModel", "BriaFiboTransformer2DModel", "LongCatImageTransformer2DModel",
                    "OvisImageTransformer2DModel"), BLOCKS,
           packed_ids, "front", split_text=True, notes="reference images (Kontext, FLUX.2 editing) stay dense"),
    Family("qwen", ("QwenImageTransformer2DModel",), BLOCKS, packed_shapes, "front", split_text=True,
           notes="editing pipelines append reference images and stay dense"),
    Family("sd3", ("SD3Transformer2DModel",), r"transformer_blocks\.\d+\.attn2?", image_bchw, "back"),
    Family("pixart", ("PixArtTransformer2DModel",), r"transformer_blocks\.\d+\.attn1", image_bchw),
    Family("cogview", ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
           r"transformer_blocks\.\d+\.attn1", image_bchw, "front"),
    Family("auraflow", ("AuraFlowTransformer2DModel",), r"(joint|single)_transformer_blocks\.\d+\.attn", image_bchw,
           "front", notes="its register tokens count as text"),
    Family("hunyuanimage", ("HunyuanImageTransformer2DModel",), BLOCKS, image_bchw, "back"),
)

_LINEAR = "linear attention: there is no softmax attention to sparsify; left untouched"
_AUDIO = "no image or video tokens (audio, proteins or embeddings)"
_HISTORY = "history tokens before the video: their place is unknown to the grid"
_PACKED = "packed text, image, video or audio: no grid of one video"
_CACHED = "attends to a key-value cache through flex attention"
_UNTESTED = "no entry yet: grid and text place of this image model are untested"

UNSUPPORTED: dict[str, str] = {
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaTransformer2DModel": _LINEAR,
    "SanaWMTransformer3DModel": "mostly linear attention; its softmax layers have no processor",
    "SanaWMLTX2RefinerTransformer3DModel": "autoregressive blocks with a key-value cache",
    "HunyuanVideoFramepackTransformer3DModel": _HISTORY,
    "HeliosTransformer3DModel": _HISTORY,
    "WanAnimate2Transformer3DModel": _CACHED,
    "AnyFlowFARTransformer3DModel": _CACHED,
    "MiniMaxH3Transformer3DModel": _PACKED,
    "Cosmos3OmniTransformer": "queries and keys differ in number (text keys before the video) and key heads are fewer",
    "Kandinsky6Transformer3DModel": "no entry yet: video and audio streams together are untested",
    "Kandinsky6SRTransformer3DModel": "forces flex attention",
    "LatteTransformer3DModel": "attention is factorised already (one frame, then one place over time)",
    "TransformerTemporalModel": "attention is factorised already (one place over time)",
    "Lumina2Transformer2DModel": "text and image are packed sample by sample, padding last: no fixed place of the text",
    "OmniGenTransformer2DModel": _PACKED,
    "PRXTransformer2DModel": "queries and keys differ in number (text keys beside the image)",
    "QwenImage21Transformer2DModel": "block-causal attention, segment by segment or through flex attention",
    "NucleusMoEImageTransformer2DModel": "queries and keys differ in number (text keys beside the image)",
    "DiTTransformer2DModel": "class-conditional images of 256 tokens: nothing to gain",
    "Transformer2DModel": "a block of U-Nets and of models of its own kind, not a denoiser by itself",
    "DreamLiteTransformer2DModel": "a block of U-Nets, not a denoiser by itself",
    **dict.fromkeys(("AceStepTransformer1DModel", "StableAudioDiTModel", "StableAudio3DiTModel", "T5FilmDecoder",
                     "LongCatAudioDiTTransformer", "MiniMaxMusic3RVQDepthDecoder", "MiniMaxMusic3Transformer1DModel",
                     "PriorTransformer", "RFD4ProteinaTransformer"), _AUDIO),
    **dict.fromkeys(("BriaFibo2Transformer2DModel", "ErnieImageTransformer2DModel", "Flux3Transformer2DModel",
                     "GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel", "HunyuanDiT2DModel",
                     "Ideogram4Transformer2DModel", "JoyImageEditTransformer3DModel",
                     "JoyImageEditPlusTransformer3DModel", "Krea2Transformer2DModel", "LuminaNextDiT2DModel",
                     "ZImageTransformer2DModel"),
                    _UNTESTED),
}

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def _names(model: Any) -> list[str]:
    return [cls.__name__ for cls in (model if isinstance(model, type) else type(model)).__mro__]


def family_of(model: Any) -> Family | None:
    """The family of a transformer (or of its class), or None."""
    return next((_BY_CLASS[name] for name in _names(model) if name in _BY_CLASS), None)


def reason_against(model: Any) -> str:
    """Why a transformer that has no family is not supported; empty when it is none that the table knows."""
    return next((UNSUPPORTED[name] for name in _names(model) if name in UNSUPPORTED), "")
