"""Runs the fp8 kernel's own source on the CPU, as gluon_emulator does the bf16 one's: roles are threads, copies torch.

e4m3 is torch's: the conversion in PTX is replaced by it. What it cannot show is what gluon_emulator cannot either:
layouts, and with them whether the registers of a product's result are those that the next product reads.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from dit_sparse.kernels import fp8, fp8_kernel
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.quantise import Quantised
from tests.kernels import gluon_emulator as base


class _Typed(base._Pointer):
    """A pointer that says what it points to."""

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)


def _convert(_asm: str, _constraints: str, x: list[Tensor], *, dtype: torch.dtype, **_: Any) -> Tensor:
    """Rounding to e4m3, the only assembly in the kernel."""
    assert dtype == torch.float8_e4m3fn
    return base._value(x[0].to(dtype))


def _fma(a: Tensor, b: Any, c: Tensor) -> Tensor:
    """a * b + c of float32 numbers with one rounding."""
    return base._value((a.double() * torch.as_tensor(b).double() + c.double()).float())


_SHIMS: dict[str, Any] = base._SHIMS | dict(
    BN=128, WEIGHT_BITS=8.0, MAGIC=12582912.0, MAGIC_BITS=0x4B400000,
    gl=types.SimpleNamespace(**vars(base._GL) | dict(
        inline_asm_elementwise=_convert, float8e4nv=torch.float8_e4m3fn, int8=torch.int8, fma=_fma,
        reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.permute(order),
        minimum=lambda a, b: base._value(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))))))


def _plain(function: JITFunction, made: dict[Any, Any]) -> Any:
    """The kernel function as an ordinary one over the shims, with all that it calls, each from its own module."""
    if function not in made:
        source = function.fn
        plain = types.FunctionType(source.__code__, {**source.__globals__, **_SHIMS}, source.__name__,
                                   source.__defaults__)
        made[function] = plain
        for name in source.__code__.co_names:
            found = source.__globals__.get(name)
            if isinstance(found, JITFunction):
                plain.__globals__[name] = _plain(found, made)
    return made[function]


def _argument(x: Any) -> Any:
    found = base._argument(x)
    return _Typed(found.memory, found.place) if isinstance(found, base._Pointer) else found


def emulate(
    quantised: Quantised, blocks: Blocks, scale: float, query_tokens: int, head_dim: int, dtype: torch.dtype, *,
    stages: int = fp8.STAGES, fresh: bool = True
) -> tuple[Tensor, Tensor]:
    """`fp8.attend` on CPU tensors, with NaN in all fresh memory.

    Raises:
        AssertionError: when a role waits forever, a barrier overflows or an access leaves its tensor.
    """
    B, H, DV, key_slots = quantised.value.shape
    plan = fp8.fp8_plan(blocks, key_slots if blocks.key_mask is None else blocks.key_mask.shape[1], head_dim, DV)
    out = torch.full((B, query_tokens, H, DV), torch.nan, dtype=dtype)
    lse = torch.full((B, H, query_tokens), torch.nan)
    arguments, constants = fp8.launch(quantised, blocks, plan, scale, out, lse, stages, fresh)
    kernel = _plain(fp8_kernel.attention_kernel, {})
    tiles = B * H * blocks.query_blocks
    for program in range(tiles):
        base._here.run = types.SimpleNamespace(program=program, programs=tiles, failed=[])
        kernel(*map(_argument, arguments), **constants)
    return out, lse
