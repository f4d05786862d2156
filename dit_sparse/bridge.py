"""The only module that knows how Diffusers calls attention: binds a transformer to a session, and lets go again."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

from .families import Family, family_of, reason_against
from .grid import TokenGrid
from .position import LiveScheduler, Position
from .rebind import SparseMixin, dress, sparse_class, undress
from .runtime import Runtime

__all__ = ["Binding", "ForwardInfo", "LayerInfo", "Session", "bind", "binding_of", "check_diffusers",
           "release", "transformers_of", "unwrap"]

TESTED = ((0, 42), (0, 43))  # first tested release of Diffusers, first untested one
HOOK = "dit_sparse"


def check_diffusers() -> str | None:
    """Why the installed Diffusers is refused; None when it is inside the tested range."""
    import diffusers

    version = str(getattr(diffusers, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    if numbers is None or not TESTED[0] <= tuple(map(int, numbers.groups())) < TESTED[1]:
        return f"Diffusers {version} is untested; install 'diffusers>={low},<{high}'"
    return None


@dataclass
class ForwardInfo:
    """One forward of a transformer, as it begins.

    Args:
        grid: the video part of the grid (text=0; text_at as the family has it), or None.
        reason: why there is no grid.
        step: denoising step of the run, from 0.
        num_steps: length of the run, None for a bare transformer.
        branch: name of the CFG branch ("cond", "uncond", ...; "0", "1", ... in order when the pipeline names none).
        new_run: whether a run begins with this forward.
        family: name of the family.
        parallel: Diffusers' ParallelConfig of the transformer, or None.
    """

    grid: TokenGrid | None
    reason: str
    step: int
    num_steps: int | None
    branch: str
    new_run: bool
    family: str
    parallel: Any = None


class Session(Protocol):
    """What receives the attention calls of one bound transformer."""

    def begin_forward(self, info: ForwardInfo) -> None:
        """A forward begins; called eagerly, once per forward."""

    def attention(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """One self-attention call, (B, S, H, D); returns a fresh contiguous (B, S, H, D)."""

    def fallback(self, layer: int, reason: str) -> None:
        """A self-attention call that was left on the model's own path."""


@dataclass
class LayerInfo:
    """One attention layer of a transformer: its place, and whether the session receives its calls.

    `index` counts the self-attention layers; it is -1 for layers that are none (cross-attention, text refiners).
    """

    index: int
    path: str
    processor: str
    bound: bool
    reason: str


class _Contexts(StateManager):
    """Listens to `cache_context`; a plain string is accepted as well."""

    def __init__(self, position: Position) -> None:
        super().__init__(BaseState)  # type: ignore[arg-type]
        self._position = position

    def set_context(self, context: Any) -> None:
        self._position.context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._position.context = None


class _Listener(ModelHook):
    """Receives `cache_context` names and the reset at the end of a pipeline call through Diffusers' hook registry."""

    _is_stateful = True

    def __init__(self, position: Position, session: Any) -> None:
        super().__init__()
        self.contexts, self._position, self._session = _Contexts(position), position, session

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """The pipeline call is over."""
        self.contexts.reset()
        self._position.restart()
        end_run = getattr(self._session, "end_run", None)
        if end_run is not None:
            end_run()
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return _Listener(Position(), None)  # a copied model has no session

    def __reduce__(self) -> Any:
        return ModelHook, ()


class _Passive:
    """Place of a hook that wraps no forward in the registry's chain: what is written to it goes to the next hook.

    Wrapping `forward` would make deep copies of the transformer run the original's weights, and add a frame to
    every forward.
    """

    pre_forward = post_forward = original_forward = None

    def __init__(self, registry: HookRegistry) -> None:
        self._registry = registry

    def _next(self) -> tuple[Any, str]:
        refs = self._registry._fn_refs
        place = refs.index(self) + 1
        return (refs[place], "forward") if place < len(refs) else (self._registry._module_ref, "forward")

    @property
    def forward(self) -> Any:
        """What the next in the chain runs."""
        return getattr(*self._next())

    @forward.setter
    def forward(self, function: Any) -> None:
        setattr(*self._next(), function)


def _listen(model: torch.nn.Module, hook: _Listener) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[HOOK] = hook
    registry._hook_order.append(HOOK)
    registry._fn_refs.append(_Passive(registry))


def _unlisten(model: torch.nn.Module) -> None:
    registry = model.__dict__.get("_diffusers_hook")
    if registry is None or HOOK not in registry.hooks:
        return
    place = registry._hook_order.index(HOOK)
    del registry.hooks[HOOK], registry._hook_order[place], registry._fn_refs[place]


class _Before:
    """The forward-pre-hook on the transformer's root: a frame of its own even when the transformer is compiled."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._names = list(inspect.signature(type(binding.model).forward).parameters)[1:]

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._binding._begin(module, {**dict(zip(self._names, args, strict=False)), **kwargs})

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _inert


def _inert(*args: Any) -> None:
    """What an unpickled or copied transformer has in place of the hook."""


class Binding:
    """One transformer bound to one session. Made by `bind`; `unbind` ends it."""

    def __init__(self, model: torch.nn.Module, session: Session, family: Family, scheduler: Any) -> None:
        self._model = weakref.ref(model)
        self.session, self.family, self.position = session, family, Position(scheduler)
        self.layers: list[LayerInfo] = []
        self._runtime = Runtime(session, family.text_at, family.split_text)
        self._modules: list[tuple[LayerInfo, Any]] = []
        self._find_layers(model)
        if not any(layer.bound for layer in self.layers):
            reason = next((layer.reason for layer in self.layers if layer.index >= 0), "no self-attention layer found")
            raise ValueError(f"{type(model).__name__}: nothing to bind: {reason}")
        _listen(model, _Listener(self.position, session))
        self._hook = model.register_forward_pre_hook(_Before(self), with_kwargs=True)
        _bindings[model] = self

    @property
    def model(self) -> Any:
        """The bound transformer."""
        return self._model()

    def _find_layers(self, model: torch.nn.Module) -> None:
        count = 0
        for path, module in model.named_modules():
            processor = getattr(module, "processor", None)
            if processor is None or not callable(processor):
                continue
            name = type(processor).__name__
            against = self.family.against(model, path)
            if against:
                self.layers.append(LayerInfo(-1, path, name, False, against))
                continue
            layer = LayerInfo(count, path, name, False, "")
            count += 1
            self.layers.append(layer)
            self._modules.append((layer, module))
            self._dress(layer, module)

    def _dress(self, layer: LayerInfo, module: Any) -> None:
        """Put a sparse twin of the module's processor in place, unless its code makes no call we know."""
        processor = undress(module.processor)
        layer.processor = type(processor).__name__
        layer.bound = sparse_class(type(processor)) is not None
        layer.reason = "" if layer.bound else f"{layer.processor} makes no attention call that can be replaced"
        if layer.bound:
            with torch.inference_mode(False):
                handle = torch.tensor([self._runtime.id, layer.index], device="cpu")
            module.processor = dress(processor, handle)

    def _begin(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """A forward begins: read grid, step and branch; take back layers whose processor was replaced."""
        place = self.position.advance(inputs.get("timestep"), inputs.get("hidden_states"),
                                      inputs.get("encoder_hidden_states"))
        grid, reason = self.family.read_grid(model, inputs)
        self._runtime.begin(ForwardInfo(grid, reason, place.step, place.num_steps, place.branch, place.new_run,
                                        self.family.name, getattr(model, "_parallel_config", None)))
        for layer, module in self._modules if model is self.model else ():
            handle = getattr(module.processor, "_handle", None)
            if handle is None or not isinstance(module.processor, SparseMixin):
                # fuse_qkv_projections, an IP-Adapter or the user put another processor here since
                self._dress(layer, module)
            if not layer.bound:
                self.session.fallback(layer.index, layer.reason)

    def unbind(self) -> None:
        """Put back the very same processor objects and remove the hooks; twice equals once."""
        self._runtime.close()
        self._hook.remove()
        model = self.model
        if model is not None:
            release(model)


_bindings: weakref.WeakKeyDictionary[torch.nn.Module, Binding] = weakref.WeakKeyDictionary()


def bind(model: torch.nn.Module, session: Session, *, scheduler: Any = None) -> Binding:
    """Let a session compute the self-attention of a transformer; binding a bound one unbinds it first.

    Args:
        model: a Diffusers transformer (compiled ones are unwrapped).
        session: receives the calls.
        scheduler: tells the step; as `transformers_of` returns it. None: steps are told apart by the timestep.

    Returns:
        The binding.

    Raises:
        ValueError: the transformer is not supported; one line with the reason.
    """
    model = unwrap(model)
    family = family_of(model)
    if family is None:
        reason = reason_against(model) or "no entry in dit_sparse/families.py"
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")
    old = binding_of(model)
    if old is not None:
        old.unbind()
    release(model)  # a deep copy of a bound model carries hooks without a binding
    return Binding(model, session, family, scheduler)


def binding_of(model: torch.nn.Module) -> Binding | None:
    """The binding of a transformer, or None."""
    return _bindings.get(unwrap(model))


def release(model: torch.nn.Module) -> None:
    """Remove every trace of a binding from a transformer, also from a deep copy of a bound one.

    Args:
        model: the transformer; one that was never bound is left as it is.
    """
    _bindings.pop(model, None)
    _unlisten(model)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Before) or hook is _inert:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), SparseMixin):
            module.processor = undress(module.processor)
    # fuse_qkv_projections keeps the processors it replaced, to put them back
    kept = getattr(model, "original_attn_processors", None)
    if isinstance(kept, dict):
        kept.update({name: undress(processor) for name, processor in kept.items()})


def unwrap(model: Any) -> Any:
    """The transformer inside torch.compile, DataParallel and the like."""
    while isinstance(model, torch.nn.Module) and type(model).__module__.startswith("torch."):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            break
        model = inner
    return model


def transformers_of(target: Any) -> list[tuple[str, torch.nn.Module, LiveScheduler | None]]:
    """The diffusion transformers of a pipeline, or the transformer itself.

    Args:
        target: a DiffusionPipeline, a ModularPipeline, or a transformer (also compiled).

    Returns:
        (component name, transformer, scheduler for `bind`) each; ("transformer", model, None) for a bare one.

    Raises:
        ValueError: there is no supported diffusion transformer; one line.
    """
    if isinstance(target, torch.nn.Module):
        found: list[tuple[str, Any, LiveScheduler | None]] = [("transformer", unwrap(target), None)]
    else:
        parts = getattr(target, "components", None)
        if not isinstance(parts, dict):
            raise ValueError(f"target={type(target).__name__} is not allowed; use a Diffusers pipeline or transformer")
        scheduler = LiveScheduler(target)
        found = [(name, unwrap(part), scheduler) for name, part in sorted(parts.items())
                 if isinstance(part, torch.nn.Module)]
    supported = [entry for entry in found if family_of(entry[1]) is not None]
    if supported:
        return supported
    for _, model, _ in found:
        if reason_against(model):
            raise ValueError(f"{type(model).__name__} is not supported: {reason_against(model)}")
    raise ValueError(f"{type(target).__name__} has no supported diffusion transformer; see 'dit-sparse doctor --hosts'")
