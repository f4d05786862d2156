"""Linear layers of the transformer blocks in 8-bit floats (e4m3): `fp8_linears(pipe)`, and `bf16_linears(pipe)` back.

    weight         one scale per output channel: w is stored once as e4m3(w / s), s = max |w| / 448
    activations    one scale per token, anew in every call
    product        on the tensor cores, summed in float32, times both scales, plus the bias; bf16 out

Twice the matrix rate of bf16 and half the memory of the weights. Every number is rounded by at most 2^-4 of itself,
so that on white noise a layer's output is off by 4 to 5 per cent (root mean square). Rounding the activations is a pass
of its own unless the blocks are compiled: `compile_repeated_blocks` fuses it with the normalisation or the activation
function before it. Linear layers of adaptive normalisation see one row per image and stay as they are, and so does
everything outside of the blocks. Load and fuse LoRA weights before: they cannot be merged into 8-bit weights.

Needs an NVIDIA GPU of compute capability 8.9 or later; a CPU computes the same, slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .kernels.quantise import DTYPE, LARGEST, SMALLEST

__all__ = ["Fp8Linear", "bf16_linears", "fp8_linear_reference", "fp8_linears", "missing", "quantise_rows"]

CAPABILITY = (8, 9)
STEP = 16  # what both dimensions of a weight must be a multiple of

Target = TypeVar("Target")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each with a scale of its own.

    Args:
        x: (rows, channels), any floating dtype.

    Returns:
        e4m3 (rows, channels) and float32 scales (rows, 1): x is about their product. A row with a number that is not
        finite becomes NaN.
    """
    largest = x.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST)
    scale = largest * (1 / LARGEST)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(DTYPE), scale


class Fp8Linear(torch.nn.Module):
    """A linear layer whose product is computed in e4m3.

    Args:
        linear: the layer to take over; both of its dimensions multiples of 16.

    Expert args:
        keep: hold on to `linear`, for `bf16_linears`; it moves with neither `.to` nor `state_dict`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: torch.nn.Linear, *, keep: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantise_rows(linear.weight.detach())
        # As bytes: `.to(dtype)` of a pipeline converts every floating buffer.
        self.register_buffer("weight", weight.view(torch.uint8))
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        # Past Module.__setattr__: no child, so that moving or saving the model leaves it out.
        self.__dict__["original"] = linear if keep else None

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        """The scale stays float32, whatever the model is converted to."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in the dtype of x."""
        rows, scale = quantise_rows(x.reshape(-1, self.in_features))
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        # Fast sums keep some 14 bits within the matrix unit: far finer than the rounding of what is summed.
        out = torch._scaled_mm(rows, self.weight.view(DTYPE).t(), scale_a=scale, scale_b=self.scale, bias=bias,
                               out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The twin: float32 products of what the rounded numbers stand for.

    Args:
        x (..., in), weight (out, in), bias (out,): any floating dtype, any device.

    Returns:
        (..., out), float32.
    """
    (rows, row_scale), (columns, scale) = quantise_rows(x.reshape(-1, x.shape[-1])), quantise_rows(weight)
    out = (rows.float() * row_scale) @ (columns.float() * scale).t()
    return (out if bias is None else out + bias.float()).reshape(*x.shape[:-1], weight.shape[0])


def missing(device: torch.device | str) -> str:
    """Why 8-bit linear layers cannot run on a device, "" when they can."""
    device = torch.device(device)
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"device {device.type}: 8-bit linear layers need an NVIDIA GPU or the CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (f"the GPU has compute capability {capability[0]}.{capability[1]}; 8-bit linear layers need "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} or later")
    return ""


def fp8_linears(target: Target, *, keep: bool = True) -> Target:
    """Computes the linear layers of the transformer blocks in 8-bit floats; twice equals once.

    Call it before `compile_repeated_blocks` and on the device where the model runs; sparse attention may be switched
    on before or after.

    Args:
        target: a Diffusers pipeline with a diffusion transformer, or a bare transformer.

    Expert args:
        keep: keep the original layers for `bf16_linears`; False frees their memory.

    Returns:
        `target`.

    Raises:
        ValueError: the device cannot run them, a layer's dimensions are no multiples of 16, a LoRA is loaded and not
            fused, or there is no layer to switch; nothing is changed then.
    """
    found = [entry for model in _transformers(target) for entry in _linears(model)]
    if not found:
        if any(isinstance(part, Fp8Linear) for model in _transformers(target) for part in model.modules()):
            return target
        raise ValueError(f"target={type(target).__name__} has no linear layers in repeated transformer blocks")
    for name, parent, linear in found:
        if hasattr(parent, "lora_A") or "lora_A" in name.split("."):
            raise ValueError(f"{name} belongs to a LoRA that is not part of the weights; call fuse_lora() and "
                             "unload_lora_weights() before fp8_linears")
        if linear.weight.is_meta:
            raise ValueError(f"{name} has no weights yet (device meta); load or move the model before fp8_linears")
        if reason := missing(linear.weight.device):
            raise ValueError(reason)
        if linear.in_features % STEP or linear.out_features % STEP:
            raise ValueError(f"{name} is {linear.in_features} x {linear.out_features}; 8-bit linear layers need "
                             f"multiples of {STEP}")
    for name, parent, linear in found:
        setattr(parent, name.rpartition(".")[2], Fp8Linear(linear, keep=keep))
    return target


def bf16_linears(target: Target) -> Target:
    """Puts the original linear layers back: the very same objects, on the device where the 8-bit ones are.

    Args:
        target: what `fp8_linears` was called on.

    Returns:
        `target`.

    Raises:
        ValueError: they were not kept (`keep=False`).
    """
    found = [(name, model.get_submodule(name.rpartition(".")[0]), part) for model in _transformers(target)
             for name, part in model.named_modules() if isinstance(part, Fp8Linear)]
    if any(part.original is None for *_, part in found):
        raise ValueError("the original linear layers were not kept; use fp8_linears(..., keep=True), or load the model")
    for name, parent, part in found:
        setattr(parent, name.rpartition(".")[2], part.original.to(part.weight.device))
    return target


def _transformers(target: Any) -> list[torch.nn.Module]:
    from .bridge import transformers_of

    return [model for _, model, _ in transformers_of(target)]


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Linear]]:
    """(name, parent, layer) of the linear layers in the model's repeated blocks, normalisations left out."""
    # Older classes name their blocks for splitting between devices only.
    kinds = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    for block_name, block in model.named_modules():
        # Of a repeated block there are many, in a list.
        if type(block).__name__ not in kinds or not block_name.rpartition(".")[2].isdigit():
            continue
        inside = dict(block.named_modules())
        for name, part in inside.items():
            parents = name.split(".")[:-1]
            above = [inside[".".join(parents[:depth])] for depth in range(1, len(parents) + 1)]
            if type(part) is torch.nn.Linear and not any("Norm" in type(module).__name__ for module in above):
                yield f"{block_name}.{name}", above[-1] if above else block, part
