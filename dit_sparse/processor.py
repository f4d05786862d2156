"""SparseProc: the configuration, and the verbs that switch it on and off and report."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import reuse as reuses
from . import ring, stepcache
from .families import family_of
from .memory import totals as memories
from .methods import all_methods, build, family_options
from .methods.base import Method
from .report import Summary, summarize
from .schedule import Schedule
from .session import Run, RunSession

if TYPE_CHECKING:
    from .bridge import Binding

CHECKS = ("step", "call", "off")


@dataclass(frozen=True)
class Settings:
    """Options that every method shares.

    Args:
        dense_steps: leading steps that run dense, as a fraction of the run (float) or a number (int).
        dense_layers: leading self-attention layers that run dense.
        dense_last_steps: trailing steps that run dense, fraction or number.
        refresh: a scored method keeps its masks for this many steps; 1 makes them anew at every step.
        strict: raise instead of falling back to dense.
        step_cache: answers some steps from earlier ones: a name (first_block, taylorseer, magcache, pab, fastercache,
            teacache), a file of `dit-sparse calibrate`, or a configuration. See docs/step-caches.md.
        num_steps: length of the run, for a bare transformer that has no scheduler to ask.
        seed: seeds the rows that some methods sample.
        backend: name of the kernel to use, or None for the fastest that can run.
        check: when non-finite output is looked for: "step" (once a step, without blocking; the layer runs dense
            from the next step on), "call" (synchronises; the call itself is repeated dense) or "off".
        offload: keep what is remembered between steps in CPU memory.
        reuse: what sparse calls take from an earlier step: None, nothing; "complement", what the mask dropped, computed
            at every `reuse_every`-th step; "heads", the whole output of heads that hardly change. See docs/reuse.md.
        reuse_every: what is reused serves so many steps, the one that computed it included.
        reuse_drift: with "heads", the largest 1 - mean cosine between two outputs of a head that is reused.
    """

    dense_steps: float | int = 0.2
    dense_layers: int = 1
    dense_last_steps: float | int = 0
    refresh: int = 1
    strict: bool = False
    step_cache: Any = None
    num_steps: int | None = None
    seed: int = 0
    backend: str | None = None
    check: str = "step"
    offload: bool = False
    reuse: str | None = None
    reuse_every: int = 2
    reuse_drift: float = 0.1

    def __post_init__(self) -> None:
        _whole("refresh", self.refresh, 1)
        _whole("seed", self.seed, 0)
        if self.num_steps is not None:
            _whole("num_steps", self.num_steps, 1)
        reuses.check(self.reuse, self.reuse_every, self.reuse_drift)
        stepcache.check_name(self.step_cache)
        if self.check not in CHECKS:
            raise ValueError(f"check={self.check!r} is not allowed; use one of {', '.join(CHECKS)}")
        for name in ("strict", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use True or False")
        if self.backend is not None:
            from .kernels.attention import backends

            names = [b.name for b in backends()]
            if self.backend not in names:
                raise ValueError(f"backend={self.backend!r} is unknown; use one of {', '.join(names)}")
        self.schedule()

    def schedule(self) -> Schedule:
        """The dense steps and layers as a Schedule (which checks them)."""
        return Schedule(self.dense_steps, self.dense_layers, self.dense_last_steps)


def _whole(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed; use a whole number of at least {low}")


SETTINGS = tuple(f.name for f in dataclasses.fields(Settings))


class SparseProc:
    """Sparse attention for a Diffusers pipeline: `pipe.set_attn_processor(SparseProc())`.

    Despite the place it is given to, it is no processor itself: each layer keeps its own, which goes on doing
    projections, norms and rotary embedding; only the attention in the middle is computed by a method's mask.

    Args:
        method: name of a method (see `methods()`), a Method, or None for the default: `auto` with max_error 0.05, and
            with the `dense_steps` and `dense_layers` of the model's family where neither is given. Where `auto` cannot
            serve (Ulysses parallelism, reuse="complement"), `svg` at density 0.25 does, and the summary says so.
        options: the method's own options (`density`, ...) and the shared ones of `Settings` (`dense_steps`,
            `dense_layers`, `refresh`, `strict`, `step_cache`, ...).
        preset: a Preset, the name of one that comes along (`presets()`) or a JSON file; it names the method, and
            options that are given come before its own.

    Raises:
        ValueError: unknown method, option or preset, or a value out of range; one line that names what is allowed.
    """

    is_sparse_proc = True
    default_method = "auto"
    substitute = "svg"  # serves where the default method cannot

    def __init__(self, method: str | Method | None = None, *, preset: Any = None, **options: Any) -> None:
        self.preset = None
        if preset is not None:
            from .tuning.preset import Preset

            self.preset = Preset.of(preset)
            method, options = self.preset.method_and_options(method, options)  # type: ignore[arg-type]
        shared = {name: options.pop(name) for name in SETTINGS if name in options}
        self.settings = Settings(**shared)
        self.by_default = method is None
        self.given = frozenset([*options, *shared])
        self.note = ""  # for the summary: why another method than the default serves
        if isinstance(method, Method):
            self.method = _replaced(method, options)
        elif method is None or isinstance(method, str):
            name = self.default_method if method is None else method
            self._refuse_unknown(name, options)
            self.method = build(name, **options)
        else:
            raise ValueError(f"method={method!r} is not allowed; use a name: {', '.join(sorted(all_methods()))}")
        if reason := reuses.reason_against(self.method, self.settings.reuse):
            self._substitute(reason)

    def fitted(self, family: str, parallel: Any = None) -> SparseProc:
        """As it runs on a model: what was named stays, the default adapts.

        Args:
            family: name of the model's family; empty: not known.
            parallel: the model's ParallelConfig of Diffusers, or None.

        Raises:
            ValueError: the method cannot run under this parallelism.
        """
        found = copy.copy(self)
        if against := ring.against(self.method, parallel, self.settings.step_cache):
            found._substitute(against)
            if against := ring.against(found.method, parallel, self.settings.step_cache):
                raise ValueError(against)
        schedule = {"dense_steps", "dense_layers"}
        if self.by_default and found.method.name == self.default_method and not schedule & self.given:
            usual = family_options(found.method.name, family)
            found.settings = dataclasses.replace(
                self.settings, **{name: usual[name] for name in schedule & usual.keys()})
        same = (found.method, found.settings) == (self.method, self.settings)
        return self if same else found

    def _substitute(self, reason: str) -> None:
        """Take the substitute where the default method cannot serve; what the user chose is refused with the reason."""
        if not self.by_default or self.given - {*SETTINGS, "density"}:
            raise ValueError(reason)
        density = getattr(self.method, "density", None)
        self.method = build(self.substitute, **({} if density is None else {"density": density}))
        self.note = f"{self.substitute} in the place of the default method, {reason}"

    def __repr__(self) -> str:
        shared = [f"{n}={getattr(self.settings, n)!r}" for n in SETTINGS
                  if getattr(self.settings, n) != getattr(Settings(), n)]
        own = [f"{f.name}={getattr(self.method, f.name)!r}" for f in dataclasses.fields(self.method)
               if getattr(self.method, f.name) is not None]
        return f"SparseProc({', '.join([repr(self.method.name), *own, *shared])})"

    @staticmethod
    def _refuse_unknown(name: str, options: dict[str, Any]) -> None:
        """A misspelt option is refused with both lists, the method's own and the shared ones."""
        method = all_methods().get(name)
        if method is None:
            return
        own = [f.name for f in dataclasses.fields(method)]
        for option in options:
            if option not in own:
                raise ValueError(f"unknown option {option!r}; method {name!r} takes {', '.join(own) or 'none'}; "
                                 f"every method takes {', '.join(SETTINGS)}")


def _replaced(method: Method, options: dict[str, Any]) -> Method:
    names = [f.name for f in dataclasses.fields(method)]
    for option in options:
        if option not in names:
            raise ValueError(f"unknown option {option!r}; method {method.name!r} takes {', '.join(names) or 'none'}")
    return dataclasses.replace(method, **options) if options else method


# -- the verbs -----------------------------------------------------------------------------------------------------

def enable(target: Any, method: str | Method | SparseProc | None = None, **options: Any) -> Any:
    """Switch sparse attention on for a pipeline or a bare transformer; twice equals once.

    Args:
        target: any Diffusers pipeline with a diffusion transformer (both denoisers of Wan 2.2 are bound), or a
            transformer.
        method: method name, Method, a ready SparseProc, or None for the default.
        options: see `SparseProc`; `preset=` is one of them.

    Returns:
        `target`.

    Raises:
        ValueError: wrong method or option, no diffusion transformer in `target`, or an unsupported Diffusers.
    """
    from . import bridge

    if isinstance(method, SparseProc):
        if options:
            raise ValueError(f"options {', '.join(options)} cannot follow a SparseProc; give them to SparseProc()")
        proc = method
    else:
        proc = SparseProc(method, **options)
    reason = bridge.check_diffusers()
    if reason:
        raise ValueError(reason)
    parts = bridge.transformers_of(target)
    if proc.preset is not None:
        proc = proc.preset.fitted(proc, target)
    bindings = [bridge.binding_of(model) for _, model, _ in parts]
    before = [b.session for b in bindings if b is not None and isinstance(b.session, RunSession)]
    try:
        _enable_parts(parts, proc)
    except Exception:
        for _, model, _ in parts:
            _disable_model(model)
        if before:
            _enable_parts(parts, before[0].proc)  # what was on stays on
        raise
    return target


def _enable_parts(parts: list[tuple[str, Any, Any]], proc: SparseProc) -> None:
    """Bind every transformer of a pipeline to a session of its own, all reporting on the same run."""
    from . import bridge

    run = Run()
    for _, model, scheduler in parts:
        family = family_of(bridge.unwrap(model))
        fitted = proc.fitted(family.name if family else "", getattr(model, "_parallel_config", None))
        _disable_model(model)
        session = RunSession(fitted, run)
        binding = bridge.bind(model, session, scheduler=scheduler)
        session.layers = sum(layer.index >= 0 for layer in binding.layers)
        stepcache.switch_on(model, proc.settings.step_cache, session, binding.family.name, scheduler,
                            denoisers=len(parts))


def disable(target: Any) -> Any:
    """Switch sparse attention off: the very same processors are back and results are bit-identical to before.

    Args:
        target: what `enable` was called on, or one of its transformers.

    Returns:
        `target`.
    """
    from . import bridge

    for _, model, _ in bridge.transformers_of(target):
        _disable_model(model)
    return target


def _disable_model(model: Any) -> None:
    from . import bridge

    binding = bridge.binding_of(model)
    if binding is not None:
        binding.unbind()
    else:
        bridge.release(bridge.unwrap(model))  # a deep copy of a bound transformer carries our hooks
    stepcache.remove(model)


def summary(target: Any) -> Summary:
    """What the last run did: density per layer and step, reuse, fallbacks with reasons, time.

    Args:
        target: a pipeline or transformer that `enable` was called on.

    Returns:
        A Summary; print it, or take `.to_dict()`.

    Raises:
        ValueError: when sparse attention is not enabled on `target`.
    """
    from . import bridge

    bindings: list[Binding] = [b for _, m, _ in bridge.transformers_of(target) if (b := bridge.binding_of(m))]
    if not bindings:
        raise ValueError("sparse attention is not enabled here; call enable(target) or set_attn_processor first")
    sessions = [b.session for b in bindings if isinstance(b.session, RunSession)]
    result = summarize(repr(sessions[0].proc), [s.report for s in sessions])
    used = next((s for s in sessions if s.grid is not None), sessions[0])
    result.device = used.device
    if used.grid is not None:
        result.tokens = used.grid.tokens
        g = used.grid
        result.grid = f"{g.frames}x{g.height}x{g.width}" + (f" + {g.text} text at the {g.text_at}" if g.text else "")
    result.num_steps = used.info.num_steps if used.info else None
    result.memory = memories(s.memory for s in sessions)
    result.memory_bytes = sum(n for held in result.memory.values() for n in held.values())
    result.layers = sum(s.layers for s in sessions)
    for binding in bindings:
        result.coverage.update({layer.path: layer.reason for layer in binding.layers if not layer.bound})
    result.notes = list(dict.fromkeys(note for s in sessions for note in s.notes()))
    stepcache.report(result, [b.model for b in bindings], sessions)
    return result


@dataclass(frozen=True)
class MethodInfo:
    """One entry of `methods()`: what a method is and what it takes.

    Args:
        name: what users write.
        title, arxiv: its paper, and the paper's number on arXiv (None without one).
        parts: order, score, select, operate and remember, in a few words each.
        options: the method's own options with their defaults.
        scored: masks depend on the activations, so `refresh` has an effect.
        needs: what it needs beyond a pipeline, such as trained weights; empty: nothing.
    """

    name: str
    title: str
    arxiv: str | None
    parts: dict[str, str]
    options: dict[str, Any]
    scored: bool
    needs: str = ""


def methods() -> list[MethodInfo]:
    """All methods of this installation, by name: paper, five parts, default options and what each needs."""
    found = []
    for name, method in sorted(all_methods().items()):
        options = {f.name: f.default for f in dataclasses.fields(method)}
        found.append(MethodInfo(name, method.title, method.arxiv, dict(method.parts), options, method.scored,
                                method.needs))
    return found
