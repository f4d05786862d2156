"""Rebinds the core attention call inside a Diffusers processor; the rest of the processor's code stays its own.

A processor class is subclassed once. The subclass's `__call__` runs the same code object with private globals, in
which `dispatch_attention_fn` and `F.scaled_dot_product_attention` lead to `core`. Projections, norms and rotary
embedding are thus the model's own. `core` hands (query, key, value) to one opaque operator, which reads the state of
the run when it is executed: nothing that changes from step to step is frozen into a compiled graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from . import ulysses
from .balance import place_heads
from .ring import mixed, ring_attention
from .runtime import SDPA, find, own_dense

NAMES = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})

# Why a call of a bound layer stays on the model's own path; the operator below takes the place in this list.
CAUSAL, GROUPED, DROPOUT, FLEX, RING, MODE, LENGTHS, RANK = range(8)
REASONS = (
    "causal attention",
    "grouped-query attention (fewer key heads than query heads)",
    "attention dropout",
    "flex-attention BlockMask",
    "ring context parallelism combined with Ulysses, or with pieces of unequal length",
    "a torch function mode changes attention (skip_attention_scores, SEG guidance)",
    "query and key lengths differ",
    "query, key and value are not 4-D",
)


@torch.library.custom_op("dit_sparse::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
               handle: torch.Tensor, backend: str, world: int) -> torch.Tensor:
    runtime, layer = find(handle)
    reason = runtime.refusal(query.shape[1], world) if runtime else ""
    if runtime is None or reason:
        if runtime is not None:
            runtime.session.fallback(layer, reason)
        # Between ranks the gathered sequence is whole: any local backend will do.
        out = own_dense(query, key, value, mask, scale, SDPA if world > 1 else backend)
    else:
        out = runtime.attend(layer, query, key, value, mask, scale, world)
    # An operator must not return its arguments' memory.
    shared = {x.untyped_storage().data_ptr() for x in (query, key, value)}
    out = out.contiguous()
    return out.clone() if out.untyped_storage().data_ptr() in shared else out


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
      handle: torch.Tensor, backend: str, world: int) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("dit_sparse::no_backward", mutates_args=())
def _no_backward(grad: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("dit-sparse has no backward pass; call disable(...) before training")


@_no_backward.register_fake
def _(grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


def _refuse_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # Raised by an operator, so that compiling a graph with gradients switched on still works.
    grad = _no_backward(grad)
    return grad, grad, grad, None, None, None, None, None


torch.library.register_autograd("dit_sparse::attention", _refuse_backward)


# `handle` counts as written: otherwise a compiler removes the operator, which returns nothing.
@torch.library.custom_op("dit_sparse::left_dense", mutates_args=("handle",))
def _left_dense(handle: torch.Tensor, code: int, key_length: int) -> None:
    runtime, layer = find(handle)
    if runtime is None:
        return
    grid = getattr(runtime.info, "grid", None)
    if code == LENGTHS and grid is not None and key_length < grid.video:
        return  # cross-attention inside a bound processor (an image prompt): no self-attention was lost
    runtime.session.fallback(layer, REASONS[code])


@_left_dense.register_fake
def _(handle: torch.Tensor, code: int, key_length: int) -> None:
    return None


class _Here(threading.local):
    """The bound processor that is running in this thread."""

    def __init__(self) -> None:
        self.processor: Any = None


_here = _Here()


def _changed_by_mode() -> bool:
    """Whether a torch function mode other than the default device's is active."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(m, TorchFunctionMode) and not isinstance(m, DeviceContext) for m in modes)


def _refusal_code(query: Any, key: Any, value: Any, mask: Any, causal: bool, dropout: float, strange: bool) -> int:
    """Place in REASONS of what is visible in the arguments, or -1; `strange`: a ring that we do not know."""
    if causal:
        return CAUSAL
    if dropout:
        return DROPOUT
    if mask is not None and not isinstance(mask, torch.Tensor):
        return FLEX
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return RANK
    if query.shape[1] != key.shape[1]:
        return LENGTHS
    if query.shape[2] != key.shape[2]:
        return GROUPED
    if strange:
        return RING
    return MODE if _changed_by_mode() else -1


def core(dense: Callable[[], torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
         scale: float | None, causal: bool, dropout: float, backend: str, parallel: Any) -> torch.Tensor:
    """The attention call of a bound processor.

    Args:
        dense: the call as the model would have made it.
        query, key, value: (B, S, H, D).
        mask, scale, causal, dropout: as the model passed them.
        backend: value of the model's attention backend, "" for the active one, or "sdpa" for a direct call.
        parallel: Diffusers' ParallelConfig or None.

    Returns:
        (B, S, H, D).
    """
    processor = _here.processor
    if processor is None:
        return dense()
    ranks: Any = getattr(parallel, "context_parallel_config", None)
    code = _refusal_code(query, key, value, mask, causal, dropout, ranks is not None and mixed(ranks))
    if code >= 0:
        _left_dense(processor._handle, code, key.shape[1] if key.dim() == 4 else 0)
        return dense()
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = float(scale) if scale is not None else query.shape[-1] ** -0.5
    if ranks is not None and ranks.ring_degree > 1:
        return ring_attention(query, key, value, mask, scale, processor._handle)
    world = ranks.ulysses_degree if ranks is not None else 1
    if world == 1:
        return _attention(query, key, value, mask, scale, processor._handle, backend, 1)
    placed = not ranks.ulysses_anything and not query.shape[2] % world
    if placed:
        query, key, value = (place_heads(x, processor._handle, False) for x in (query, key, value))
    out = ulysses.exchange(_attention, query, key, value, mask, scale, processor._handle, backend, world, parallel)
    return place_heads(out, processor._handle, True) if placed else out


def _routes(source: dict[str, Any]) -> dict[str, Any]:
    """The two names as a bound processor sees them."""
    dispatch_original: Any = source.get("dispatch_attention_fn")

    def dispatch(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
                 is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
                 attention_kwargs: Any = None, *, backend: Any = None, parallel_config: Any = None) -> Any:
        def dense() -> Any:
            return dispatch_original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                                     attention_kwargs, backend=backend, parallel_config=parallel_config)

        name = "" if backend is None else str(getattr(backend, "value", backend))
        return core(dense, query, key, value, attn_mask, scale, is_causal, dropout_p, name, parallel_config)

    def sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
             is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Any:
        def dense() -> Any:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                                                 is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
            return out.transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return core(dense, q, k, v, attn_mask, scale, is_causal, dropout_p, SDPA, None).transpose(1, 2)

    names: dict[str, Any] = {}
    if dispatch_original is not None:
        names["dispatch_attention_fn"] = dispatch
    if source.get("F") is F:
        functional = {n: o for n, o in vars(F).items() if not n.startswith("__")}
        names["F"] = types.SimpleNamespace(**{**functional, "scaled_dot_product_attention": sdpa})
    return names


def _clone(function: Any, scope: dict[str, Any]) -> Any:
    # A code object of its own: Dynamo keeps what it compiled with the code, and with it names in one of the scopes.
    clone = types.FunctionType(function.__code__.replace(), scope, function.__name__, function.__defaults__,
                               function.__closure__)
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


def _rebound(function: Any) -> Any | None:
    """`function` with its core attention leading to `core`; None when it makes no such call."""
    source = function.__globals__
    scope = dict(source)
    # A scope without a name: Dynamo then guards on this dict, not on the module the code came from.
    scope.pop("__name__", None)
    scope.update(_routes(source))
    found = bool(NAMES & set(function.__code__.co_names))
    for name, helper in list(scope.items()):
        # Helpers of the same module that attend (FLUX.2 with a KV cache).
        if isinstance(helper, types.FunctionType) and helper.__globals__ is source:
            if NAMES & set(helper.__code__.co_names):
                scope[name] = _clone(helper, scope)
                found = found or name in function.__code__.co_names
    return _clone(function, scope) if found else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.cache
def _never_alone() -> None:
    """Where a compiler gave up on a processor, its attention call runs eagerly; do not compile our part by itself.

    Without this, models that break inside the processor (Mochi) get graphs more than they have without us. Being
    inlined into a compiled processor is not affected.
    """
    try:
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return
    for function in (core, _refusal_code, _changed_by_mode, _routes, ulysses.exchange):
        for code in _codes(function.__code__):
            skip_code(code)


_classes: dict[type, type | None] = {}


def _itself(processor: Any) -> Any:
    return processor


class SparseMixin:
    """Marks the subclasses made here; their instances hold `_handle` (runtime, layer) and `_dense` (the original)."""

    _handle: torch.Tensor
    _dense: tuple[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds the original processor: the session lives in this process only."""
        return _itself, self._dense

    def __copy__(self) -> Any:
        return dress(copy.copy(self._dense[0]), self._handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model is the untouched one, as a pickled one is: it has no session of its own to go through."""
        return copy.deepcopy(self._dense[0], memo)


def sparse_class(cls: type) -> type | None:
    """The subclass of a processor class whose core attention goes to the session.

    Args:
        cls: class of a Diffusers attention processor.

    Returns:
        The subclass (always the same one), or None when its code makes no attention call that can be replaced.
    """
    if cls not in _classes:
        _classes[cls] = _make(cls)
    return _classes[cls]


def _make(cls: type) -> type | None:
    from .hunyuan15 import replacement

    _never_alone()
    original = replacement(cls) or (cls.__call__ if callable(cls) else None)
    function = inspect.unwrap(original) if original is not None else None
    inner = _rebound(function) if isinstance(function, types.FunctionType) else None
    if inner is None:
        return None

    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        previous, _here.processor = _here.processor, self
        try:
            return inner(self, attn, *args, **kwargs)
        finally:
            _here.processor = previous

    # Attention modules drop keyword arguments that the signature does not name (image_rotary_emb).
    __call__.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]
    body = {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    made = type("Sparse" + cls.__name__, (SparseMixin, cls), body)
    _register(cls, made)
    return made


def _register(cls: type, made: type) -> None:
    """Diffusers keeps facts about processors by exact class (layer skipping): the subclass shares its base's."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(cls))
    except ValueError:
        return  # nothing is known about the base either


def dress(processor: Any, handle: torch.Tensor) -> Any:
    """A sparse twin of `processor`: same attributes, its core attention replaced.

    Args:
        processor: instance of a class for which `sparse_class` is not None.
        handle: CPU int64 (2,): number of the runtime, index of the layer. A tensor and not a number, so that one
            compiled graph serves all layers.
    """
    made = sparse_class(type(processor))
    if made is None:
        raise ValueError(f"{type(processor).__name__} makes no attention call that can be replaced")
    twin: Any = object.__new__(made)
    # A Module keeps its parameter dicts shared with the original: weights exist once and are trained, moved once.
    twin.__dict__.update(processor.__dict__)
    twin.__dict__["_handle"], twin.__dict__["_dense"] = handle, (processor,)
    return twin


def undress(processor: Any) -> Any:
    """The original of a sparse twin, with the settings made on the twin since (backend, parallelism) carried over."""
    if not isinstance(processor, SparseMixin):
        return processor
    original = processor._dense[0]
    for name, value in processor.__dict__.items():
        if name not in ("_handle", "_dense") and original.__dict__.get(name, None) is not value:
            original.__dict__[name] = value
    return original
