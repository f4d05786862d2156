"""What must hold of the Hopper kernel in CUDA C++ on a GPU: the checks of the one in Gluon, as far as it runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval import speed
from dit_sparse.kernels import hopper_plan, nvrtc
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from tests.gpu import hopper_checks, random_cases
from tests.gpu.checks import poisoned
from tests.gpu.hopper_checks import BF16, HOPPER_CASES
from tests.kernels.cases import Case, Inputs, build, check

CUDA = Tuning(cuda=True)
CUDA_CASES = [case for case in HOPPER_CASES
              if case.query_block == case.key_block == hopper_plan.QUERY_BLOCK and not (case.window or case.masked)]
RANDOM_KINDS = [i for i, kind in enumerate(random_cases.KINDS)
                if kind.key_block == 128 and not (kind.window or kind.masked) and "boxes" not in kind.order]


def attend(inputs: Inputs, tuning: Tuning = CUDA) -> tuple[torch.Tensor, torch.Tensor]:
    """This kernel, not another one in its place, on a case, with NaN in all fresh memory."""
    from dit_sparse.kernels.hopper_cuda import block_sparse_attention_cuda, cuda_reasons

    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    if reasons := cuda_reasons(inputs.query, inputs.key, inputs.value, blocks):
        raise AssertionError("; ".join(reasons))
    with poisoned():
        return block_sparse_attention_cuda(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, tuning)


def accuracy(case: Case, tuning: Tuning) -> str:
    """The kernel keeps the accuracy rule on a case."""
    inputs = build(case, "cuda")
    return check(inputs, *attend(inputs, tuning))


def repeats_bit_equal() -> str:
    """A thousand calls give equal bits: one program per tile and persistent, raster and permuted."""
    for order in ("raster", "heads"):
        inputs = build(Case(2047, 2047, heads=12, head_dim=128, dtype=BF16, query_block=128, key_block=128,
                            order=order), "cuda")
        for persistent in (False, True):
            call = partial(attend, inputs, dataclasses.replace(CUDA, persistent=persistent))
            first, differing = call(), torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(999):
                differing += sum((a.view(kind) != b.view(kind)).sum() for a, b, kind in zip(
                    first, call(), (torch.int16, torch.int32), strict=True))
            if differing.item():
                return f"{order}, persistent={persistent}: {differing.item()} numbers of 999 repeats differ"
    return ""


def random_calls(kind: int, calls: int = 200) -> str:
    """Random calls of one kind, against float64."""
    lines: list[str] = []
    seeds = range(kind, kind + calls * len(random_cases.KINDS), len(random_cases.KINDS))
    random_cases.run(seeds, "cuda", lines.append, kernels=lambda _: {"cuda": lambda drawn: attend(
        drawn.inputs, dataclasses.replace(CUDA, persistent=drawn.kind.persistent))})
    return lines[0] if lines else ""


def never_waits() -> str:
    """No call waits for the device."""
    for order in ("raster", "heads"):
        inputs = build(Case(dtype=BF16, query_block=128, key_block=128, order=order), "cuda")
        attend(inputs)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(inputs)
        except RuntimeError as error:
            return f"{order}: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Persistent and not, the kernel in Gluon, cuDNN and FlashAttention-4 (where installed), taking turns."""
    if why := hopper_plan.missing() or nvrtc.missing():
        log(f"speeds of the kernel in CUDA C++ left out: {why}")
        return []
    from dit_sparse.eval.peers import available
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper
    from dit_sparse.kernels.hopper_cuda import block_sparse_attention_cuda

    peers = [peer for peer in available("cuda", BF16)[0] if peer.name in ("cuDNN", "FlashAttention-4")]
    rows, tokens = [], 32768
    layout = BlockLayout.raster(tokens, 128, "cuda")
    for heads, dim, densities in ((12, 128, (1.0, 0.5, 0.25, 0.1)), (24, 64, (1.0, 0.25))):
        query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=BF16) for _ in range(3))
        for density in densities:
            keep = speed.random_keep(heads, layout.blocks, layout.blocks, density, "cuda")
            mask = BlockMask.from_dense(keep, layout, layout)
            call, found = (query, key, value, Blocks.from_mask(mask), dim**-0.5), mask.density().item()
            calls: dict[str, Callable[[], Any]] = {
                "cuda": partial(block_sparse_attention_cuda, *call),
                "cuda, one program per tile": partial(block_sparse_attention_cuda, *call, Tuning(persistent=False)),
                "gluon": partial(block_sparse_attention_hopper, *call, Tuning(cuda=False))}
            calls |= {peer.name: peer.prepare(query, key, value, keep, 128) for peer in peers
                      if peer.sparse or density == 1.0}
            for name, took in speed.in_turn(calls, "cuda", rounds=9).items():
                rows.append(speed.Row(tokens, heads, dim, 1, "bf16", 128, f"random {density}", name, found, took,
                                      4 * heads * dim * tokens**2 * found / took / 1e9, 0.0))
                log("  ".join(rows[-1].cells()))
    return [dataclasses.asdict(row) for row in rows]


def all_checks() -> dict[str, Callable[[], str]]:
    """Name and function of every check."""
    if why := hopper_plan.missing() or nvrtc.missing():
        # A check that passes, so that the log says what was left out and why.
        return {f"checks left out: {why}": lambda: ""}
    checks: dict[str, Callable[[], str]] = {}
    for case in CUDA_CASES:
        for persistent in (False, True):
            name = f"{'persistent ' * persistent}{str(case.dtype).removeprefix('torch.')} {case.name}"
            checks[name] = partial(accuracy, case, dataclasses.replace(CUDA, persistent=persistent))
    for kind in RANDOM_KINDS:
        checks[f"random calls {random_cases.KINDS[kind].name}"] = partial(random_calls, kind)
    checks |= {"repeats bit equal": repeats_bit_equal, "never waits": never_waits,
               "strides": partial(hopper_checks.strides, attend)}
    return checks
