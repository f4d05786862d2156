"""What must hold of reuse between steps on a GPU, and what it costs. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel reuse
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.dense import dense_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call, Plan
from dit_sparse.operators import Operator, merge_parts
from dit_sparse.operators_reuse import ReuseComplement, ReuseHeads
from dit_sparse.reuse import FlashBlock

STEPS = 5
GRIDS = (TokenGrid(9, 16, 24), TokenGrid(5, 17, 23, text=40, text_at="back"),
         TokenGrid(7, 15, 19, text=77, text_at="front"))
METHODS = ("svg", "radial", "gna", "svg2", "adaspa", "rainfusion2")
LARGE, HEADS = TokenGrid(21, 45, 80), 40  # Wan-14B, 720p, 81 frames


def inputs(grid: TokenGrid, device: str, *, seed: int = 0, heads: int = 4, dim: int = 64) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [torch.randn(1, grid.tokens, heads, dim, device=device, dtype=dtype, generator=generator) for _ in range(3)]


def call_at(memory: Memory, grid: TokenGrid, step: int, activations: list[Tensor]) -> Call:
    generator = torch.Generator(device=activations[0].device).manual_seed(0)
    return Call(*activations, grid, 0.125, step=step, num_steps=STEPS, cached=memory.static, generator=generator,
                state=State(memory, (0, ""), step=step, shape=grid))


def run(operator: Callable[[Plan], Operator], method: str, grid: TokenGrid, device: str, *, offload: bool = False,
        guard: Callable[[bool], None] | None = None) -> list[Tensor]:
    """Outputs of the steps of a run; one head of four keeps its activations."""
    guard = guard or (lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default"))
    memory, found, first = Memory(offload=offload), list[Tensor](), inputs(grid, device)
    for attempt in range(2):  # at the first everything is compiled and built, which may wait
        memory.reset()
        found.clear()
        for step in range(STEPS):
            activations = inputs(grid, device, seed=step)
            for now, before in zip(activations, first, strict=True):
                now[:, :, 1] = before[:, :, 1]
            call = call_at(memory, grid, step, activations)
            guard(attempt > 0)
            try:
                plan = build(method).plan(call)
                assert plan.mask is not None
                wrapped = operator(plan)
                found.append(wrapped.run(call, plan.mask, partial(block_sparse_attention, scale=call.scale))[0])
                wrapped.computed(call, plan.mask)
            finally:
                guard(False)
    return found


def complement(method: str, grid: TokenGrid, device: str = "cuda", guard: Any = None) -> str:
    """Dense at every other step, and offloading changes no bit.

    Two parts are rounded each by itself before they are merged: 1.4 times the error of one in the mean, while the worst
    of half a million numbers can be nearly three times plain attention's.
    """
    outs = [run(lambda plan: ReuseComplement(plan.operator), method, grid, device, offload=offload, guard=guard)
            for offload in ((False, True) if guard is None else (False,))]
    for step in range(0, STEPS, 2):
        activations = inputs(grid, device, seed=step)
        for now, before in zip(activations, inputs(grid, device), strict=True):
            now[:, :, 1] = before[:, :, 1]
        plain = dense_attention(*activations, scale=0.125)[0].float()
        exact = dense_attention(*(x.float() for x in activations), scale=0.125)[0]
        found, allowed = ((x - exact).abs() for x in (outs[0][step].float(), plain))
        for factor, size in ((2, lambda x: x.square().mean().sqrt()), (4, torch.max)):
            error, plain_error = float(size(found)), float(size(allowed))
            if error > factor * plain_error + 1e-5:
                return f"step {step}: {error:.2e} from dense attention, plain dense {plain_error:.2e}"
    return "" if all(torch.equal(a, b) for a, b in zip(outs[0], outs[-1], strict=True)) else "offloading changes bits"


def heads(method: str, grid: TokenGrid, device: str = "cuda", guard: Any = None) -> str:
    """The head that stays as it was is left out at steps 2 and 4, and its output is the kept one; others are fresh."""
    found = run(lambda plan: ReuseHeads(plan.operator, drift=1e-3), method, grid, device, guard=guard)
    plain = run(lambda plan: plan.operator, method, grid, device, guard=guard)
    video = grid.video_slice
    for step, (out, want) in enumerate(zip(found, plain, strict=True)):
        want = want.clone()
        if step in (2, 4):
            want[:, video, 1] = plain[step - 1][:, video, 1]
        if not torch.equal(out, want):
            return f"step {step}: {(out.float() - want.float()).abs().max().item():.2e} from what was kept"
    return ""


def fixed_keys(device: str = "cuda") -> str:
    """Attention to a kept context and fresh keys is attention to both; offloading changes no bit."""
    grid, context = TokenGrid(3, 13, 17), TokenGrid(9, 13, 17)
    query, key, value = inputs(grid, device)
    _, fixed_key, fixed_value = inputs(context, device, seed=1)
    flash, away = FlashBlock(4), FlashBlock(4, offload=True)
    for step in range(4):
        exact = dense_attention(*(x.float() for x in (
            query, torch.cat((fixed_key, key), 1), torch.cat((fixed_value, value), 1))))[0]
        parts = [f(query, key, value, fixed_key, fixed_value, step=step)[0] for f in (flash, away)]
        if not torch.equal(*parts):
            return f"step {step}: offloading changes bits"
        if (error := (parts[0].float() - exact).abs().max().item()) > 2e-2:
            return f"step {step}: {error:.2e} from one softmax"
        key, value = inputs(grid, device, seed=2 + step)[1:]
    return "" if flash.external == 1 else f"the context was computed {flash.external} times"


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name."""
    found: dict[str, Callable[[], str]] = {"fixed keys": fixed_keys}
    for method in METHODS:
        for grid in GRIDS:
            found[f"complement, {method}, {grid}"] = partial(complement, method, grid)
            found[f"heads, {method}, {grid}"] = partial(heads, method, grid)
    return found


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times svg at density .25 at Wan-14B's 720p geometry: alone, with half of the heads emptied, and what reuse adds.

    Args:
        log: takes every line.

    Returns:
        One dictionary a row: what, milliseconds.
    """
    from dit_sparse.eval.speed import in_turn

    memory = Memory()
    call = call_at(memory, LARGE, 0, inputs(LARGE, "cuda", heads=HEADS, dim=128))
    mask = build("svg", density=0.25).plan(call).mask
    assert mask is not None
    half = mask.without_rows((torch.arange(HEADS, device="cuda") % 2 == 0)[None, :, None])
    attend = partial(block_sparse_attention, scale=call.scale)
    activations = (call.query, call.key, call.value)
    part, rest = attend(*activations, mask), attend(*activations, mask.complement())

    def of_heads(drift: float) -> Callable[[], Any]:
        """A step whose activations are those before: no head is steady below a drift of 0, every head at 2."""
        own = call_at(Memory(), LARGE, 0, list(activations))
        return lambda: ReuseHeads(drift=drift).run(own, mask, attend)

    calls = {"dense": partial(dense_attention, *activations, scale=call.scale),
             "svg": partial(attend, *activations, mask),
             "svg, half of the heads emptied": partial(attend, *activations, half),
             "svg, heads judged, none reused": of_heads(-1.0), "svg, all heads reused": of_heads(2.0),
             "merge of two parts": lambda: merge_parts([rest, part]), "lists of the complement": mask.complement}
    rows = []
    for name, took in in_turn(calls, "cuda", rounds=8).items():
        rows.append({"what": name, "ms": took})
        log(f"{took:9.3f} ms  {LARGE}, {HEADS} heads of 128, {name}")
    return rows
