"""`block_sparse_attention`: checks the call, chooses a backend and runs it as one operator that compilers do not open.

Backends, fastest first: "hopper" (kernels for Hopper GPUs), "triton" (portable GPU kernel), "cpu" (pieces by
PyTorch's own CPU kernel), "pieces" (the same cut on any other device), "reference" (the formula). "int8" and "fp8"
compute products in 8 bits on Hopper GPUs and run only when asked for by name: they are faster and less exact.
Importing this module needs neither triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import fp8, hopper_cuda, hopper_plan
from .blocks import Blocks, SoftMeans
from .dense import dense_attention
from .reference import block_sparse_reference
from .soft import check_soft, merge_means
from .starting import Starting, fallbacks

if TYPE_CHECKING:
    from dit_sparse.blockmask import BlockMask

__all__ = ["Backend", "backends", "block_sparse_attention", "can_run", "choose_backend", "dense_attention",
           "device_backends", "fallbacks", "switched_off", "triton_reasons"]

_MAX_HEAD_DIM = 128
_BLOCK_SIZES = (16, 32, 64, 128)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Environment variables that keep a backend from being chosen by itself, when set to one of _OFF; by name it still runs.
_SWITCHES = {"hopper": "DIT_SPARSE_HOPPER"}
_OFF = ("0", "false", "off")
_BY_NAME_ONLY = ("int8", "fp8")  # not as exact as the dtype asked for

_hopper = Starting("the Hopper kernel", "the portable kernel")


@dataclass(frozen=True)
class Backend:
    """One way to compute block-sparse attention.

    Args:
        name: what users write.
        title: what it is, in a few words.
        reasons: (query, key, value, blocks) -> why it cannot run this call, in words; empty when it can.
        run: (query, key, value, blocks, scale) -> out (B, Lq, H, Dv), lse (B, H, Lq).
        missing: why this machine cannot run it at all, "" when it can.
    """

    name: str
    title: str
    reasons: Callable[[Tensor, Tensor, Tensor, Blocks], list[str]]
    run: Callable[[Tensor, Tensor, Tensor, Blocks, float], tuple[Tensor, Tensor]]
    missing: Callable[[], str]


def backends() -> list[Backend]:
    """All backends, fastest first."""
    return list(_BACKENDS)


def can_run(
    backend: str, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, key_mask: Tensor | None = None
) -> list[str]:
    """Why a backend cannot run this call.

    Args:
        backend: name of the backend.
        query, key, value, mask, key_mask: as for `block_sparse_attention`.

    Returns:
        Reasons in words; empty when it can.

    Raises:
        ValueError: for an unknown backend.
    """
    return _named(backend).reasons(query, key, value, Blocks.from_mask(mask, key_mask))


def choose_backend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, key_mask: Tensor | None = None
) -> str:
    """Name of the fastest backend that can run this call."""
    return _choose(query, key, value, Blocks.from_mask(mask, key_mask))


def device_backends() -> list[tuple[str, bool, str]]:
    """(name, available, reason when not, else what it is) of every backend on this machine."""
    return [(b.name, not b.missing(), b.missing() or b.title + _note(b.name)) for b in _BACKENDS]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
    on_backend: Callable[[str], None] | None = None,
    soft: SoftMeans | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that `mask` lists for it.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv). Any strides.
        mask: lists, layouts and window, on the device of the query.

    Expert args:
        scale: factor of the scores, positive; None: 1 / sqrt(D).
        key_mask: bool (B, Lk), True where the key is a real token; None: all are.
        backend: name of the backend to use; None: the fastest that can run.
        on_backend: called with the name of the backend that ran.
        soft: means of all blocks: those that are not listed enter the softmax as theirs, see `soft_attention`.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, and the natural-log LSE (B, H, Lq) in float32. Queries without a key
        give 0 and -inf.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or when the backend asked for cannot run, with its
            reasons.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    blocks = Blocks.from_mask(mask, key_mask)
    _check(query, key, value, blocks, mask.query.tokens, mask.key.tokens, scale)
    if soft is not None:
        check_soft(query, value, soft, blocks, mask.query.tokens)
    fall_back = backend is None
    if backend is None:
        backend = _choose(query, key, value, blocks)
    elif reasons := _named(backend).reasons(query, key, value, blocks):
        raise ValueError(f"backend={backend!r} cannot run this call: {'; '.join(reasons)}")
    together = soft is not None and backend == "hopper" and hopper_cuda.takes_soft(query, key, value, blocks)
    means = (soft.key, soft.value, soft.counts, soft.heads) if soft is not None and together else (None,) * 4
    out, lse = _operator(
        query, key, value, blocks.lists, blocks.whole, blocks.boundary, blocks.query_lengths, blocks.key_lengths,
        blocks.query_index, blocks.key_index, blocks.key_coordinates, blocks.query_low, blocks.query_high,
        blocks.always, blocks.key_mask, blocks.query_block, blocks.key_block, blocks.query_box,
        blocks.key_box, scale, backend, fall_back, *means)
    if fall_back and (why := _failure(query, value, blocks)):
        if backend == "hopper":
            backend = "triton"  # the operator tried, and counted
        else:
            fallbacks[why] += 1
    if on_backend is not None:
        on_backend(backend)
    return (out, lse) if soft is None or together else merge_means(query, soft, blocks, out, lse, scale)


@torch.library.custom_op("dit_sparse::block_sparse_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, lists: Tensor, whole: Tensor, boundary: Tensor, query_lengths: Tensor,
    key_lengths: Tensor, query_index: Tensor | None, key_index: Tensor | None, key_coordinates: Tensor | None,
    query_low: Tensor | None, query_high: Tensor | None, always: Tensor | None, key_mask: Tensor | None,
    query_block: int, key_block: int, query_box: Sequence[int] | None, key_box: Sequence[int] | None,
    scale: float, backend: str, fall_back: bool = False, mean_key: Tensor | None = None,
    mean_value: Tensor | None = None, mean_counts: Tensor | None = None, soft_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    blocks = Blocks(lists, whole, boundary, query_lengths, key_lengths, query_index, key_index, key_coordinates,
                    query_low, query_high, always, key_mask, query_block, key_block,
                    *(None if box is None else tuple(box) for box in (query_box, key_box)))
    run = _run_hopper_or_fall_back if backend == "hopper" and fall_back else _named(backend).run
    if mean_key is not None and mean_value is not None and mean_counts is not None:
        means = SoftMeans(mean_key, mean_value, mean_counts, soft_heads)
        return hopper_cuda.with_soft_blocks(
            query, key, value, blocks, scale, means,
            lambda: merge_means(query, means, blocks, *run(query, key, value, blocks, scale), scale))
    return run(query, key, value, blocks, scale)


@_operator.register_fake
def _operator_shapes(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, Lq, H, _D = query.shape
    return (query.new_empty(B, Lq, H, value.shape[3]), query.new_empty(B, H, Lq, dtype=torch.float32))


def _check(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, query_tokens: int, key_tokens: int, scale: float
) -> None:
    """Raises ValueError, in one line, unless the tensors fit together."""
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError("query, key and value must be (B, L, H, D); got "
                         f"{[tuple(x.shape) for x in (query, key, value)]}")
    B, Lq, H, D = query.shape
    Lk = key.shape[1]
    if key.shape != (B, Lk, H, D) or value.shape[:3] != (B, Lk, H):
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query "
                         f"{tuple(query.shape)}; use ({B}, Lk, {H}, {D}) and ({B}, Lk, {H}, Dv)")
    if (query_tokens, key_tokens) != (Lq, Lk):
        raise ValueError(f"mask is for {query_tokens} queries and {key_tokens} keys, the tensors have {Lq} and {Lk}")
    for name, x in (("lists", blocks.lists), ("query index", blocks.query_index), ("key index", blocks.key_index)):
        if x is not None and (x.shape[0] not in (1, B) or x.shape[1] not in (1, H)):
            raise ValueError(f"mask {name} has batch and heads {tuple(x.shape[:2])}; allowed: (1 or {B}, 1 or {H})")
    if len({x.dtype for x in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}; use one")
    if len({x.device for x in (query, key, value, blocks.lists)}) > 1:
        raise ValueError(f"query, key, value and mask are on {query.device}, {key.device}, {value.device} and "
                         f"{blocks.lists.device}; use one device")
    if blocks.key_mask is not None and (blocks.key_mask.shape != (B, Lk) or blocks.key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask is {blocks.key_mask.dtype} {tuple(blocks.key_mask.shape)}; use bool ({B}, {Lk})")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} is not allowed; use a positive number")


def _may_choose(name: str) -> bool:
    """Whether the backend may be chosen without being asked for by name."""
    return name not in _BY_NAME_ONLY and (name not in _SWITCHES or not switched_off(_SWITCHES[name]))


def switched_off(variable: str) -> bool:
    """Whether an environment variable says that kernels are not to be chosen by themselves."""
    return os.environ.get(variable, "").strip().lower() in _OFF


def _note(name: str) -> str:
    """What to know about a backend that can run, for `device_backends`."""
    if name in _BY_NAME_ONLY:
        return f"; used only with backend={name!r}"
    if not _may_choose(name):
        return f"; switched off by {_SWITCHES[name]}={os.environ[_SWITCHES[name]]}, used only with backend={name!r}"
    if name == "hopper" and (failed := _hopper.failed):
        return f"; {len(failed)} kind(s) of calls run on triton instead: {next(iter(failed.values()))}"
    return hopper_cuda.note() if name == "hopper" else ""


def _choose(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> str:
    """The first backend without a reason; on a CPU the interpreter never is the fastest."""
    for backend in _BACKENDS:
        if not _may_choose(backend.name) or (backend.name == "triton" and query.device.type == "cpu"):
            continue
        if backend.name == "hopper" and _failure(query, value, blocks):
            continue
        if not backend.reasons(query, key, value, blocks):
            return backend.name
    raise ValueError("no backend can run this call")


def _named(name: str) -> Backend:
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(b.name for b in _BACKENDS)}")


@torch.compiler.assume_constant_result  # what a compiler traces ends here
def _triton_missing() -> str:
    """Why Triton cannot be used on this machine at all, "" when it can."""
    return _find_triton()


@functools.cache
def _find_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'dit-sparse[gpu]')"
    if not torch.cuda.is_available() and not _interpreted():
        return "no GPU (TRITON_INTERPRET=1, set before the start, runs it interpreted on the CPU)"
    try:
        from . import portable  # noqa: F401
    except Exception as error:
        return f"triton cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def triton_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks | None = None) -> list[str]:
    """Why the portable kernel cannot run these tensors, in words; empty when it can."""
    reasons = [missing] if (missing := _triton_missing()) else []
    interpreted = _interpreted()
    if not interpreted and query.device.type != "cuda":
        reasons.append(f"the tensors are on {query.device.type}, it needs a GPU")
    if query.dtype not in _DTYPES:
        reasons.append(f"dtype {query.dtype} is not float16, bfloat16 or float32")
    if interpreted and query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")
    if max(query.shape[3], value.shape[3]) > _MAX_HEAD_DIM:
        reasons.append(f"head dim {max(query.shape[3], value.shape[3])} is above {_MAX_HEAD_DIM}")
    if blocks is not None:
        for name, size in (("query", blocks.query_block), ("key", blocks.key_block)):
            if size not in _BLOCK_SIZES:
                reasons.append(f"{name} block size {size} is not one of {', '.join(map(str, _BLOCK_SIZES))}")
    if not interpreted and query.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < (8, 0):
            reasons.append(f"the GPU has compute capability {capability[0]}.{capability[1]}, it needs 8.0")
    return reasons


def _run_triton(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    from .portable import block_sparse_attention_triton

    return block_sparse_attention_triton(query, key, value, blocks, scale)


def _run_hopper(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    from .hopper import block_sparse_attention_hopper

    return block_sparse_attention_hopper(query, key, value, blocks, scale)


def _failure(query: Tensor, value: Tensor, blocks: Blocks) -> str:
    """Why the Hopper kernel does not start for calls of this kind, "" when it does, was not tried or is not wanted."""
    failed = _hopper.failed
    return failed.get(hopper_plan.kind_of(query, value, blocks), "") if failed and _may_choose("hopper") else ""


def _run_hopper_or_fall_back(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """The Hopper kernel; where it does not start (Gluon is experimental), the portable one, counted in `fallbacks`."""
    call = (query, key, value, blocks, scale)
    return _hopper.run(hopper_plan.kind_of(query, value, blocks), lambda: _run_hopper(*call),
                       lambda: _run_triton(*call), lambda: not triton_reasons(query, key, value, blocks))


def _run_pieces(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    from .cpu import block_sparse_attention_cpu

    return block_sparse_attention_cpu(query, key, value, blocks, scale)


def _run_reference(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    return block_sparse_reference(query, key, value, blocks, scale, blocks.key_mask)


def _cpu_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> list[str]:
    return [] if query.device.type == "cpu" else [f"the tensors are on {query.device.type}, it needs the CPU"]


def _pieces_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> list[str]:
    return ["the tensors are on the CPU: 'cpu' is the same there"] if query.device.type == "cpu" else []


def _none(*_: object) -> list[str]:
    return []


_BACKENDS = (
    Backend("hopper", "Hopper kernel (Gluon, CUDA C++)", hopper_plan.hopper_reasons, _run_hopper, hopper_plan.missing),
    Backend("triton", "portable Triton kernel", triton_reasons, _run_triton, _triton_missing),
    Backend("cpu", "pieces by PyTorch's CPU kernel", _cpu_reasons, _run_pieces, lambda: ""),
    Backend("pieces", "pieces by matrix products, any device, slow", _pieces_reasons, _run_pieces, lambda: ""),
    Backend("reference", "the formula, small sizes", _none, _run_reference, lambda: ""),
    Backend("int8", "Hopper kernels in 8 bits: INT8 queries and keys, e4m3 weights and values", fp8.fp8_reasons,
            functools.partial(fp8.block_sparse_attention_fp8, scores="int8"), hopper_plan.missing),
    Backend("fp8", "Hopper kernels in 8 bits: all in e4m3", fp8.fp8_reasons,
            functools.partial(fp8.block_sparse_attention_fp8, scores="e4m3"), hopper_plan.missing),
)
