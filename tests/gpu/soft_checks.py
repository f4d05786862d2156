"""What must hold of soft blocks on a GPU, and their cost. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel soft
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dit_sparse import routing
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval import speed
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import hopper_plan, nvrtc
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import kind_of
from dit_sparse.kernels.soft import merge_soft_blocks, soft_attention, soft_means
from dit_sparse.memory import Memory
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from tests.gpu.checks import poisoned
from tests.gpu.random_cases import moved
from tests.kernels import soft_rule
from tests.kernels.cases import Case
from tests.kernels.soft_rule import BF16, CASES, FP16, check, inputs_of, masked_out, means_of, merge, run

TOKENS, HEADS, DIM = 75_600, 40, 128


def accuracy(case: Case) -> str:
    """The kernel keeps the accuracy rule, with NaN in all fresh memory."""
    inputs = inputs_of(case, "cuda")
    with poisoned():
        return (check(inputs, *run(inputs, True)) or check(inputs, *run(inputs, None))
                or check(inputs, *merge(inputs, True)))


def together(case: Case) -> str:
    """Listed and soft blocks in one launch, with NaN in all fresh memory."""
    from dit_sparse.kernels.hopper_cuda import block_sparse_attention_cuda

    inputs = inputs_of(case, "cuda")
    with poisoned():
        return soft_rule.check_together(inputs, block_sparse_attention_cuda)


def random_calls_together(calls: int = 150) -> str:
    """Random shapes, types, orders and lists."""
    for seed in range(calls):
        draw = random.Random(seed)
        sizes = [int(2 ** draw.uniform(0, 11.5)) for _ in range(2)]
        case = Case(*sizes, batch=draw.choice((1, 2)), heads=draw.choice((1, 3)),
                    head_dim=draw.choice((64, 72, 96, 128)), value_dim=draw.choice((0, 0, 64)),
                    dtype=draw.choice((BF16, FP16)), query_block=128, key_block=draw.choice((64, 128)),
                    order=draw.choice(("raster", "permuted", "heads")), lists=draw.choice(("heads", "shared", "all")),
                    strided=draw.random() < 0.3)
        if problem := together(case):
            return f"seed {seed}, {case.name}: {problem}"
    return ""


def one_launch_is_the_default() -> str:
    """Calls with soft blocks go to the kernel that computes them with the listed ones, and nothing falls back."""
    from dit_sparse.kernels.hopper_cuda import soft_starting as starting
    from dit_sparse.kernels.starting import fallbacks

    inputs, before = inputs_of(soft_rule.TOGETHER_CASES[3], "cuda"), sum(fallbacks.values())
    run(inputs, None)
    kind = kind_of(inputs.query, inputs.value, Blocks.from_mask(inputs.mask))
    return "" if kind in starting.started and sum(fallbacks.values()) == before else f"left: {starting.failed}"


def blocks_without_keys() -> str:
    """Blocks whose keys are all masked are no entries."""
    with poisoned():
        inputs = masked_out("cuda", dtype=BF16)
        return check(inputs, *run(inputs, True))


def repeats_and_never_waits() -> str:
    """A hundred equal results, and no wait for the device."""
    inputs = inputs_of(Case(1023, 1500, head_dim=128, dtype=BF16, order="heads", heads=3), "cuda")
    means, first = means_of(inputs), None
    hard = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask)
    for _ in range(100):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = merge_soft_blocks(inputs.query, *means, inputs.mask, *(x.clone() for x in hard))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if first is not None and not all(torch.equal(a, b) for a, b in zip(got, first, strict=True)):
            return "two runs differ"
        first = got
    return ""


def together_repeats_and_never_waits() -> str:
    """The same of listed and soft blocks in one launch, raster and permuted."""
    for kind in ("raster", "heads"):
        inputs = inputs_of(Case(1023, 3000, head_dim=128, dtype=BF16, order=kind, heads=3, query_block=128,
                                key_block=128), "cuda")
        means, first = means_of(inputs), None
        soft_attention(inputs.query, inputs.key, inputs.value, *means, inputs.mask)  # compiles
        for _ in range(300):
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = soft_attention(inputs.query, inputs.key, inputs.value, *means, inputs.mask)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if first is not None and not all(torch.equal(a, b) for a, b in zip(got, first, strict=True)):
                return f"{kind}: two runs differ"
            first = got
    return ""


def sol_never_waits() -> str:
    """Planning and computing of `sol`."""
    grid = TokenGrid(5, 30, 45, text=40, text_at="front")
    query, key, value = torch.randn(3, 1, grid.tokens, 3, 64, device="cuda", dtype=BF16).unbind(0)
    memory = Memory()
    for attempt in range(2):
        call = Call(query, key, value, grid, 0.125, cached=memory.static)
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            plan = build("sol").plan(call)
            plan.operator.run(call, plan.mask, block_sparse_attention)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""


def _together(log: Callable[[str], None], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              means: list[torch.Tensor], mask: BlockMask) -> None:
    """Listed blocks, soft ones in the same launch, and soft ones merged afterwards, taking turns."""
    def merged() -> object:
        hard = block_sparse_attention(query, key, value, mask)
        return merge_soft_blocks(query, *means, mask, *hard)

    took = speed.in_turn({
        "listed blocks": lambda: block_sparse_attention(query, key, value, mask),
        "and soft blocks in one launch": lambda: soft_attention(query, key, value, *means, mask),
        "and soft blocks merged": merged}, "cuda", rounds=9)
    least = took["listed blocks"]
    for what, ms in took.items():
        log(f"{ms:8.3f} ms  {100 * (ms / least - 1):6.2f} % more  {what}, keys in blocks of {mask.key.block_size}, "
            f"density {float(mask.density()):.3f}")


def small_calls() -> dict[str, Callable[[], str]]:
    """Calls with soft blocks in one launch, made and compared on the CPU, for compute-sanitizer."""
    from dit_sparse.kernels.hopper_cuda import block_sparse_attention_cuda

    def compared(case: Case) -> str:
        inputs = inputs_of(case, "cpu")
        there, (key, value) = moved(inputs, "cuda"), (x.cuda() for x in means_of(inputs))
        soft = soft_means(key, value, there.mask)
        out, lse = block_sparse_attention_cuda(there.query, there.key, there.value, Blocks.from_mask(there.mask),
                                               there.scale, soft=soft)
        return check(inputs, out.cpu(), lse.cpu())

    return {f"soft {case.name}": partial(compared, case) for case in soft_rule.TOGETHER_CASES}


def costs(log: Callable[[str], None]) -> None:
    """Milliseconds of soft blocks beside the attention that they complete, 75,600 tokens, 40 heads of 128, bf16.

    Args:
        log: takes every line.
    """
    from dit_sparse.eval.speed import median_ms
    from dit_sparse.kernels import soft_kernel
    from dit_sparse.kernels.blocks import Blocks
    from dit_sparse.kernels.portable import Tile

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, TOKENS, HEADS, DIM, device="cuda", dtype=BF16).unbind(0)
    time = partial(median_ms, device="cuda", seconds=0.25)
    for block in (128, 64):
        layout = BlockLayout.raster(TOKENS, block, "cuda")
        keep = torch.rand(1, HEADS, layout.blocks, layout.blocks, device="cuda") < 0.15
        mask = BlockMask.from_dense(keep, layout, layout)
        means = [routing.pool(x, layout) for x in (key, value)]
        _together(log, query, key, value, means, mask)
        out, lse = block_sparse_attention(query, key, value, mask)
        whole = time(lambda m=mask: block_sparse_attention(query, key, value, m))
        log(f"blocks of {block}: {whole:.3f} ms for the listed blocks, density {float(mask.density()):.3f}")

        def row(what: str, function: Callable[[], Any], whole: float = whole) -> None:
            took = time(function)
            log(f"{took:8.3f} ms  {100 * took / whole:6.2f} %  {what}")

        blocks, columns = Blocks.from_mask(mask), -(-layout.blocks // 128) * 128
        row("means of the values", lambda y=layout: routing.pool(value, y))
        row("marks of the listed blocks", lambda b=blocks, c=columns: soft_kernel.listed_blocks(b, c))
        original = soft_kernel.tile_of
        # (128, 32, 4, 2): 4 warps hold 128 rows, so that two programs fit on a processor.
        tiles = [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 4, 2), (64, 64, 4, 2),
                 (64, 64, 4, 3)]
        try:
            for sizes in [None, *(t for t in tiles if t[0] <= block)]:
                soft_kernel.tile_of = original if sizes is None else lambda *_, s=sizes: Tile(*s)
                row(f"soft blocks, marks and casts included, {sizes or 'tile as chosen'}",
                    lambda p=means, m=mask, o=out, e=lse: merge_soft_blocks(query, *p, m, o, e, kernels=True))
        finally:
            soft_kernel.tile_of = original


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name."""
    types = (BF16, FP16)
    cases = [dataclasses.replace(case, dtype=dtype) for case in CASES for dtype in dict.fromkeys((case.dtype, *types))]
    found: dict[str, Callable[[], str]] = {f"accuracy {case.name}": partial(accuracy, case) for case in cases}
    checks = [blocks_without_keys, repeats_and_never_waits, sol_never_waits]
    if not (hopper_plan.missing() or nvrtc.missing()):
        found |= {f"together {case.name}": partial(together, case) for case in soft_rule.TOGETHER_CASES}
        checks += [random_calls_together, together_repeats_and_never_waits, one_launch_is_the_default]
    return found | {f.__name__: f for f in checks}
