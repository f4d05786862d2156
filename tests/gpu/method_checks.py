"""What must hold of every method on a GPU: real widths and grids run sparse, and nothing waits for the device.

    python tests/gpu/run.py --out DIR --only checks --kernel methods --part 1/2    # beside it 2/2

The models have two layers of the real width with random weights, made on the device; they need Diffusers and are left
out without it. A check returns what is wrong, and numbers: milliseconds of a plan, bytes kept between steps, memory.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dit_sparse.eval.method_speed import comparable, state_bytes_of
from dit_sparse.eval.step_models import GEOMETRIES, Geometry, build
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build as build_method
from dit_sparse.methods.base import Call

MODELS = ("wan-14b-720p", "hunyuan-720p", "cogvideox1.5-768p")
LAYERS, DENSE, SPARSE = 2, 1, 2  # layers; steps that run dense, which some methods look at, and sparse
STEPS = 6  # of the run in which nothing may wait
GRIDS = (TokenGrid(5, 30, 45, text=40, text_at="front"), TokenGrid(9, 16, 23, text=17, text_at="back"),
         TokenGrid(7, 31, 33))
Outcome = tuple[str, dict[str, Any]]


@functools.lru_cache(maxsize=1)
def model_of(name: str, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of `LAYERS` layers, at least one of each kind, and its inputs; the last is kept for the next check."""
    return made(GEOMETRIES[name], device)


def made(geometry: Geometry, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The same of any geometry."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = dict.fromkeys(geometry.kinds, max(1, LAYERS // len(geometry.kinds)))
    return build(geometry, counts, device, dtype), geometry.inputs(device, dtype)


def runs_sparse(method: str, model: torch.nn.Module, inputs: dict[str, Any], device: str = "cuda") -> Outcome:
    """One dense step and two sparse ones of a model: finite, nothing falls back, and what it cost.

    Args:
        method: its name; default options.
        model, inputs: of `made`.
        device: where they are.
    """
    import dit_sparse
    from dit_sparse import bridge

    cuda = device == "cuda"
    proc = dit_sparse.SparseProc(method, dense_steps=DENSE, dense_layers=0, num_steps=DENSE + SPARSE, strict=True)
    dit_sparse.enable(model, proc)
    try:
        before = torch.cuda.memory_allocated() if cuda else 0
        for step in range(DENSE + SPARSE):
            if cuda and step == DENSE:
                torch.cuda.reset_peak_memory_stats()
            now = torch.full_like(inputs["timestep"], 900.0 - 100.0 * step)
            with torch.no_grad():
                out = model(**(inputs | {"timestep": now}), return_dict=False)[0]
        finite = bool(torch.isfinite(out).all())
        report = dit_sparse.summary(model)
        binding = bridge.binding_of(model)
        kept = state_bytes_of(binding.session.memory) if binding is not None else 0  # type: ignore[attr-defined]
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    finally:
        dit_sparse.disable(model)
    numbers = {"density": round(report.sparse_density or 1.0, 4), "sparse_calls": report.sparse_calls,
               "plan_ms": round(1e3 * report.routing_seconds / max(report.sparse_calls, 1), 3),
               "attention_ms": round(1e3 * report.attention_seconds / max(report.calls, 1), 2),
               "peak_mib": round(peak / 2**20), "state_bytes": kept // max(report.layers, 1),
               "backends": "+".join(report.backends)}  # fmt: skip
    if not finite:
        return "the output is not finite", numbers
    if report.fallbacks:
        return f"fell back: {next(iter(report.fallbacks))}", numbers
    return ("" if report.sparse_calls else f"no call ran sparse: {report.dense_reasons}"), numbers


def on_model(method: str, name: str, device: str = "cuda") -> Outcome:
    """`runs_sparse` on one of `MODELS`."""
    return runs_sparse(method, *model_of(name, device), device)


def never_waits(method: str, grid: TokenGrid, device: str = "cuda", guard: Callable[[bool], None] | None = None) -> str:
    """Plan, operator and what a method does at dense calls make the host wait for nothing.

    The run is made twice: at the first every kernel is compiled and every static part built, which may wait.

    Args:
        method: its name; default options.
        grid: text included.
        device: where.
        guard: called with True before and with False after what may not wait; None: CUDA's own.
    """
    guard = guard or (lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default"))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = torch.randn(3, 1, grid.tokens, 3, 64, device=device, dtype=dtype).unbind(0)
    dense, memory, rule = dense_attention(query, key, value, scale=0.125), Memory(), build_method(method)
    for attempt in range(2):
        memory.reset()
        generator = torch.Generator(device=device).manual_seed(0)
        for step in range(STEPS):
            call = Call(query, key, value, grid, 0.125, step=step, num_steps=STEPS, cached=memory.static,
                        generator=generator, state=State(memory, (0, ""), step=step, shape=grid))
            guard(attempt > 0)
            try:
                if step < DENSE:
                    if rule.observes:
                        rule.observe(call, *dense)
                    continue
                plan = rule.plan(call)
                if plan.mask is not None:
                    plan.operator.run(call, plan.mask, partial(block_sparse_attention, scale=0.125))
            finally:
                guard(False)
    return ""


def all_checks() -> dict[str, Callable[[], Any]]:
    """Every check by name, those of a model next to each other."""
    models = MODELS if importlib.util.find_spec("diffusers") is not None else ()
    names = comparable()
    found: dict[str, Callable[[], Any]] = {
        f"{method} never waits, {grid}": partial(never_waits, method, grid) for method in names for grid in GRIDS
    }
    return found | {f"{method} on {name}": partial(on_model, method, name) for name in models for method in names}
