"""What must hold of attention with the inner filter on a GPU, and its cost. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel skip
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.skip import skip_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from tests.gpu.checks import poisoned
from tests.kernels.cases import Case
from tests.kernels.skip_rule import CASES, FP16, check, inputs_of

BF16 = torch.bfloat16
TOKENS, HEADS, DIM = 75_600, 40, 128
# Blocks of 128 x 128 at this head dim are too large for a GPU's shared memory in float32.
MORE = [Case(1023, 1500, query_block=128, key_block=128, head_dim=128, dtype=BF16, order="heads", masked=True),
        Case(511, 700, query_block=128, key_block=64, head_dim=128, window=1)]


def accuracy(case: Case) -> str:
    """The kernel leaves out what the twin does and keeps the accuracy rule, with NaN in all fresh memory."""
    with poisoned():
        return check(inputs_of(case), True, device="cuda")


def repeats_and_never_waits() -> str:
    """A hundred equal results, and no wait for the device."""
    inputs = inputs_of(Case(1023, 1500, head_dim=128, dtype=BF16, order="heads", heads=3))
    arguments = [x.to("cuda") for x in (inputs.query, inputs.key, inputs.value, inputs.mask)]
    thresholds, first = torch.full((1, 1), 0.3, device="cuda"), None
    for _ in range(100):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = skip_attention(*arguments, thresholds)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if first is not None and not all(torch.equal(a, b) for a, b in zip(got, first, strict=True)):
            return "two runs differ"
        first = got
    return ""


def method_never_waits() -> str:
    """Planning and computing of `skip_softmax`: the first call, which measures, and later ones; with `carry` too."""
    grid, memory = TokenGrid(5, 30, 45, text=40, text_at="front"), Memory()
    query, key, value = torch.randn(3, 1, grid.tokens, 3, 64, device="cuda", dtype=BF16).unbind(0)
    for carry in (False, True):
        method = build("skip_softmax", carry=carry)
        for step in range(4):
            call = Call(query, key, value, grid, 0.125, cached=memory.static, step=step,
                        state=State(memory, (carry,), step=step))
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                plan = method.plan(call)
                plan.operator.run(call, plan.mask, block_sparse_attention)  # type: ignore[arg-type]
                plan.operator.computed(call, plan.mask)  # type: ignore[arg-type]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return ""


def costs(log: Callable[[str], None]) -> None:
    """Milliseconds with the filter beside those of the kernel that runs without, 75,600 tokens, 40 heads of 128, bf16.

    Args:
        log: takes every line.
    """
    from dit_sparse.eval.speed import median_ms

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, TOKENS, HEADS, DIM, device="cuda", dtype=BF16).unbind(0)
    layout = BlockLayout.raster(TOKENS, 128, "cuda")
    # Key blocks whose scores lie apart: about so much of each share below the largest met before.
    height = torch.randn(layout.blocks, device="cuda").repeat_interleave(128)[:TOKENS]
    query[..., 0], key[..., 0] = 3 * DIM**0.5, (4 * height)[None, :, None]
    mask = BlockMask.full(layout, layout)
    time = partial(median_ms, device="cuda", seconds=0.25)
    for backend in (None, "triton"):
        log(f"{time(lambda b=backend: block_sparse_attention(query, key, value, mask, backend=b)):8.2f} ms  without "
            f"filter, {backend or 'fastest kernel'}")
    for threshold in (0.0, 1e-8, 1e-4, 1e-2, 1.0):
        thresholds = torch.full((1, 1), threshold, device="cuda")
        took = time(lambda t=thresholds: skip_attention(query, key, value, mask, t))
        share = float((skip_attention(query, key, value, mask, thresholds)[2] > 0).float().mean())
        log(f"{took:8.2f} ms  threshold {threshold:g}, {100 * share:.1f} % of the blocks left out")
    trials = torch.logspace(0, -12, 22, device="cuda")[None]
    log(f"{time(lambda: skip_attention(query, key, value, mask, trials, apply=False)):8.2f} ms  22 thresholds counted")


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name."""
    cases = [dataclasses.replace(case, dtype=dtype) for case in CASES + MORE
             for dtype in dict.fromkeys((case.dtype, BF16, FP16))]
    found: dict[str, Callable[[], str]] = {f"accuracy {case.name}": partial(accuracy, case) for case in cases}
    return found | {f.__name__: f for f in (repeats_and_never_waits, method_never_waits)}
