"""A step cache on a bound transformer: switched on and off, kept in step with the run, and counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager

from ..blocklayout import storage_bytes
from ..memory import tensors_of
from .names import FASTERCACHE, MAGCACHE, PAB, name_of
from .refusals import RESIDUAL, against_ranks
from .resolve import FittedMagCacheConfig, resolve
from .teacache import TeaCacheConfig, apply_teacache, remove_teacache

FEW_STEPS = 8  # caches are tuned for 28 to 50 steps


def _hooks(model: torch.nn.Module) -> Iterator[ModelHook]:
    """All hooks of Diffusers in a model."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            yield from registry.hooks.values()


def apply(model: Any, config: Any, where: Callable[[], tuple[int, int | None]] | None = None) -> list[ModelHook]:
    """Put a cache on a transformer.

    Args:
        model: the transformer.
        config: what `resolve` returned.
        where: for TeaCache, see `apply_teacache`.

    Returns:
        The hooks that were added.

    Raises:
        ValueError: the configuration does not fit, or no layer of the model is reached; one line.
    """
    before = {id(hook) for hook in _hooks(model)}
    name = name_of(config)
    try:
        if isinstance(config, TeaCacheConfig):
            apply_teacache(model, config, where)
            model._cache_config = config  # Diffusers then refuses a second cache
        else:
            model.enable_cache(config)
    except (TypeError, ValueError, LookupError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"step_cache={name!r} cannot run on {type(model).__name__}: {text[:200]}") from error
    added = [hook for hook in _hooks(model) if id(hook) not in before]
    if not added:
        _take_off(model)
        raise ValueError(f"step_cache={name!r} reaches no layer of {type(model).__name__}")
    return added


def _take_off(model: Any) -> None:
    if isinstance(getattr(model, "_cache_config", None), TeaCacheConfig):
        remove_teacache(model)
        model._cache_config = None
    elif getattr(model, "is_cache_enabled", False):
        model.disable_cache()


class ActiveCache:
    """A cache that `enable` put on one transformer.

    Before every forward it tells the cache's hooks the branch where the pipeline names none, gives each branch a state
    of its own where the cache has only one, and sets counters to the true step. So a cache never depends on how often
    it was called.

    Args:
        model: the transformer; held weakly.
        config: what runs, from `resolve`.
        session: the RunSession whose `info` is the forward under way.
        scheduler: as `bridge.transformers_of` returns it.

    Raises:
        ValueError: see `apply`.
    """

    def __init__(self, model: Any, config: Any, session: Any, scheduler: Any = None) -> None:
        self._model, self.config, self.name = weakref.ref(model), config, name_of(config)
        self._session, self._scheduler = session, scheduler
        self._check_ranks(getattr(model, "_parallel_config", None))
        self.hooks = apply(model, config, self._where)
        managers = {id(x): x for hook in self.hooks for x in vars(hook).values() if isinstance(x, StateManager)}
        self._managers: list[StateManager] = list(managers.values())
        self._single = [hook for hook in self.hooks if hasattr(hook, "state")]  # one state, whatever the branch
        self._states: dict[str, list[Any]] = {}
        self._context: CacheContext | None = None
        self._step: int | None = None
        self._branches: set[str] = set()
        self.peak_nbytes = 0
        self._handle = model.register_forward_pre_hook(_Begin(self), with_kwargs=True)

    def _where(self) -> tuple[int, int | None]:
        """Step and length of the forward under way, for TeaCache."""
        info = self._session.info
        return info.step, info.num_steps or self._session.settings.num_steps or self.config.num_inference_steps

    def _check_ranks(self, parallel: Any) -> None:
        """Refuse what would make ranks wait for each other."""
        if getattr(parallel, "context_parallel_config", None) and (reason := against_ranks(self.config)):
            raise ValueError(reason)

    # -- around the run --------------------------------------------------------------------------------------------

    def begin(self, inputs: dict[str, Any]) -> None:
        """A forward begins; the session knows its place already.

        Args:
            inputs: keyword arguments of the forward.

        Raises:
            ValueError: the forward is one that the cache would spoil; one line.
        """
        info = self._session.info
        if info is None:
            return
        self._check_ranks(info.parallel)  # it may have been switched on since
        if info.new_run:
            self._reset()
            self.peak_nbytes, self._step = 0, None
            self._branches.clear()
            length = info.num_steps or self._session.settings.num_steps
            if isinstance(self.config, FittedMagCacheConfig) and length:
                self.config.fit(length)
        elif info.step != self._step:
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self._step = info.step
        self._branches.add(info.branch)
        self._check(inputs)
        self._name_branch(info)
        if self.name == PAB:
            kept = self._states.setdefault(info.branch, [type(hook.state)() for hook in self._single])
            for hook, state in zip(self._single, kept, strict=True):
                hook.state = state
        if self.name == MAGCACHE:
            for manager in self._managers:
                manager.get_state().step_index = info.step

    def _name_branch(self, info: Any) -> None:
        """Where the pipeline opens no cache context, ours says which branch runs."""
        for manager in self._managers:
            if manager._context is None or manager._context is self._context:
                context = CacheContext(info.branch, step_index=info.step, num_inference_steps=info.num_steps)
                break
        else:
            return
        for manager in self._managers:
            manager.set_context(context)
        self._context = context

    def _check(self, inputs: dict[str, Any]) -> None:
        if self.name in RESIDUAL and any("controlnet" in key and x is not None for key, x in inputs.items()):
            raise ValueError(f"step_cache={self.name!r} cannot run with a ControlNet: what it adds between the blocks "
                             "would be added twice at a skipped step; use 'pab' or 'taylorseer'")
        if self.name != FASTERCACHE:
            return
        if len(self._branches) > 1:
            raise ValueError("step_cache='fastercache' cannot tell the conditional forward from the unconditional one, "
                             "and this pipeline runs one after the other; use another cache")
        states = inputs.get("hidden_states")
        pipe = getattr(self._scheduler, "_pipe", lambda: None)()
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        odd = isinstance(states, torch.Tensor) and states.shape[0] % 2 == 1
        if not self.config.is_guidance_distilled and (odd or guided is False):
            raise ValueError("step_cache='fastercache' leaves out the unconditional half of the batch, and there is "
                             "none: raise guidance_scale above 1, or use another cache")

    def _reset(self) -> None:
        """Forget the states of a run that came before, which an error may have left behind."""
        for manager in self._managers:
            context = manager._context
            manager.reset()
            manager.set_context(context)
        self._free_single()

    def end_run(self) -> None:
        """The run is over: what it kept is freed, by the pipeline itself where a cache has a state for every branch."""
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self._free_single()

    def _free_single(self) -> None:
        """Forget the states of a cache that has one, and ours of every branch."""
        self._states.clear()
        for hook in self._single:
            hook.state.reset()

    def close(self) -> None:
        """Take the cache off."""
        self._handle.remove()
        model = self._model()
        if model is not None:
            _take_off(model)

    # -- reporting -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now, wherever they are."""
        states = [state for manager in self._managers for state in manager._state_cache.values()]
        states += [hook.state for hook in self._single] + [x for kept in self._states.values() for x in kept]
        return storage_bytes(tensor for state in states for tensor in tensors_of(vars(state)))

    def notes(self) -> list[str]:
        """What the reader of a summary should know."""
        info, notes = self._session.info, []
        length = None if info is None else info.num_steps or self._session.settings.num_steps
        if length is not None and length <= FEW_STEPS:
            notes.append(f"step cache {self.name}: tuned for 28 to 50 steps; with {length} every skipped one shows")
        made = getattr(self.config, "num_inference_steps", None)
        if self.name == MAGCACHE and not isinstance(self.config, FittedMagCacheConfig) and length and made != length:
            notes.append(f"step cache magcache: num_inference_steps is {made}, the run has {length} steps: the ratios "
                         "are those of other steps")
        return notes


class _Begin:
    """The forward-pre-hook on the transformer's root, behind that of `bridge`."""

    def __init__(self, cache: ActiveCache) -> None:
        self._cache = cache

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._cache._model():
            self._cache.begin({**({"hidden_states": args[0]} if args else {}), **kwargs})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Begin:
        raise ValueError("a transformer with a step cache cannot be copied: Diffusers' hooks of the copy would run the "
                         "blocks of the original; call disable(pipe) first")


_active: weakref.WeakKeyDictionary[Any, ActiveCache] = weakref.WeakKeyDictionary()


def active_of(model: Any) -> ActiveCache | None:
    """The cache that `enable` put on a transformer, or None."""
    return _active.get(model)


def switch_on(model: Any, step_cache: Any, session: Any, family: str, scheduler: Any = None, *,
              denoisers: int = 1) -> ActiveCache | None:
    """Resolve what the user asked for and put it on a bound transformer.

    Args:
        model: the transformer, bound to `session`.
        step_cache, family, scheduler, denoisers: see `resolve`.
        session: its RunSession.

    Raises:
        ValueError: see `resolve` and `apply`.
    """
    if step_cache is None:
        return None
    config = resolve(step_cache, model, family, scheduler, num_steps=session.settings.num_steps, denoisers=denoisers)
    cache = _active[model] = ActiveCache(model, config, session, scheduler)
    session.step_cache = cache
    return cache


def remove(model: Any) -> None:
    """Take off what `switch_on` put on; a cache that the user enabled stays."""
    cache = _active.pop(model, None)
    if cache is not None:
        cache.close()


def report(result: Any, models: Sequence[Any], sessions: Sequence[Any]) -> None:
    """Write into a Summary what the step caches of a run did; a cache that the user enabled himself is counted too.

    Args:
        result: the Summary.
        models: the bound transformers.
        sessions: their RunSessions.
    """
    shares: dict[int, list[int]] = {}
    for model, session in zip(models, sessions, strict=True):
        config, cache = getattr(model, "_cache_config", None), active_of(model)
        if config is None:
            continue
        result.step_cache = name_of(config)
        for step, counts in session.report.skipped(session.layers).items():
            shares[step] = [a + b for a, b in zip(shares.get(step, (0, 0)), counts, strict=True)]
        if cache is not None:
            result.step_cache_bytes += cache.peak_nbytes
            result.notes += [note for note in cache.notes() if note not in result.notes]
    result.skipped_calls = sum(missed for missed, _ in shares.values())
    result.skipped_per_step = {step: missed / total for step, (missed, total) in sorted(shares.items()) if missed}
    result.skipped_steps = len(result.skipped_per_step)
    if result.step_cache and result.calls and not result.skipped_calls:
        result.notes.append(f"step cache {result.step_cache}: it answered no attention call in this run")
