"""What must hold of the Hopper kernel in CUDA C++ on a GPU: the checks of the one in Gluon, as far as it runs them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval import speed
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import hopper_plan, nvrtc
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.starting import fallbacks
from tests.gpu import hopper_checks, random_cases
from tests.gpu.hopper_checks import BF16, HOPPER_CASES
from tests.kernels.cases import Case, Inputs, build, check

CUDA = Tuning(cuda=True)
CUDA_CASES = [case for case in HOPPER_CASES
              if not (case.window or case.masked)]


def attend(inputs: Inputs, tuning: Tuning = CUDA) -> tuple[torch.Tensor, torch.Tensor]:
    """This kernel on a case, with NaN in all fresh memory; an error where it cannot run."""
    return hopper_checks.attend(inputs, tuning)


def accuracy(case: Case, tuning: Tuning) -> str:
    """The kernel keeps the accuracy rule on a case."""
    inputs = build(case, "cuda")
    return check(inputs, *attend(inputs, tuning))


def repeats_bit_equal() -> str:
    """A thousand calls give equal bits: one program per tile and persistent, raster and permuted."""
    for kind in ("raster", "heads"):
        inputs = build(Case(2047, 2047, heads=12, head_dim=128, dtype=BF16, query_block=128, key_block=128,
                            order=kind), "cuda")
        for persistent in (False, True):
            call = partial(attend, inputs, dataclasses.replace(CUDA, persistent=persistent))
            first, differing = call(), torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(999):
                differing += sum((a.view(bits) != b.view(bits)).sum() for a, b, bits in zip(
                    first, call(), (torch.int16, torch.int32), strict=True))
            if differing.item():
                return f"{kind}, persistent={persistent}: {differing.item()} numbers of 999 repeats differ"
    return ""


def random_calls(calls: int = 300) -> str:
    """Random calls of every kind, against float64."""
    lines: list[str] = []
    random_cases.run(random_cases.cuda_seeds(0, calls), "cuda", lines.append, kernels=random_cases.only_cuda)
    return lines[0] if lines else ""


def is_the_default() -> str:
    """Calls that it is measured to be faster for go to it without being asked to, and nothing falls back."""
    from dit_sparse.kernels.attention import block_sparse_attention
    from dit_sparse.kernels.hopper_cuda import starting

    inputs = build(Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128), "cuda")
    before = sum(fallbacks.values())
    block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask)
    kind = hopper_plan.kind_of(inputs.query, inputs.value, Blocks.from_mask(inputs.mask))
    return "" if kind in starting.started and sum(fallbacks.values()) == before else f"left: {starting.failed}"


def never_waits() -> str:
    """No call waits for the device."""
    for kind in ("raster", "heads"):
        inputs = build(Case(dtype=BF16, query_block=128, key_block=128, order=kind), "cuda")
        attend(inputs)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(inputs)
        except RuntimeError as error:
            return f"{kind}: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Beside the kernel in Gluon, taking turns on the same lists."""
    if why := hopper_plan.missing() or nvrtc.missing():
        log(f"speeds of the kernel in CUDA C++ left out: {why}")
        return []
    rows = []
    for row in itertools.chain(_raster_speeds(), _permuted_speeds()):
        rows.append(dataclasses.asdict(row))
        ratio = f"{rows[-2]['milliseconds'] / row.milliseconds:.3f} of Gluon" if row.backend == "CUDA C++" else ""
        log("  ".join([*row.cells(), ratio]))
    return rows


def _in_turn(
    what: str, heads: int, dim: int, mask: BlockMask, dtype: torch.dtype = BF16, rounds: int = 9
) -> Iterator[speed.Row]:
    """The calls of one mask, of random activations."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    tokens = mask.query.tokens
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=dtype) for _ in range(3))
    arguments, density = (query, key, value, Blocks.from_mask(mask), dim**-0.5), mask.density().item()
    tunings = {"Gluon": Tuning(cuda=False), "CUDA C++": CUDA}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(block_sparse_attention_hopper, *arguments, tuning) for name, tuning in tunings.items()}
    for name, took in speed.in_turn(calls, "cuda", rounds=rounds).items():
        yield speed.Row(tokens, heads, dim, 1, str(dtype).removeprefix("torch."), mask.key.block_size, what, name,
                        density, took, 4 * heads * dim * tokens**2 * density / took / 1e9, 0.0)


def _raster_speeds() -> Iterator[speed.Row]:
    """Random lists, heads of uneven density, 64-key blocks and tested blocks, in raster order."""
    layout = BlockLayout.raster(32768, 128, "cuda")

    def keep_of(heads: int, density: float) -> torch.Tensor:
        return speed.random_keep(heads, layout.blocks, layout.blocks, density, "cuda")

    cases = [(f"random {density}", heads, dim, BF16, keep_of(heads, density))
             for heads, dim in ((12, 128), (24, 64)) for density in (1.0, 0.5, 0.25, 0.1)]
    uneven = torch.logspace(math.log10(0.02), 0, 12).tolist()
    cases += [("random 0.25", 12, 128, torch.float16, keep_of(12, 0.25)),
              ("uneven heads", 12, 128, BF16, torch.cat([keep_of(1, density) for density in uneven], dim=1)),
              ("even heads, same work", 12, 128, BF16, keep_of(12, sum(uneven) / 12))]
    for what, heads, dim, dtype, keep in cases:
        yield from _in_turn(what, heads, dim, BlockMask.from_dense(keep, layout, layout), dtype)
    halves = BlockLayout.raster(32768, 64, "cuda")
    for density in (1.0, 0.5, 0.25, 0.1):
        keep = speed.random_keep(12, layout.blocks, halves.blocks, density, "cuda")
        yield from _in_turn(f"random {density}", 12, 128, BlockMask.from_dense(keep, layout, halves))
    keep = keep_of(12, 0.25)
    yield from _in_turn("every block tested, 0.25", 12, 128, BlockMask.from_dense(keep, layout, layout, partial=keep))


def _permuted_speeds() -> Iterator[speed.Row]:
    """Random lists through an index: a random order, and that of tiles of grids that they do not divide."""
    places = torch.randperm(32768, generator=torch.Generator().manual_seed(0))
    layouts = {"permuted": BlockLayout.from_order(places, 128).to("cuda")}
    for grid, tile in ((TokenGrid(21, 45, 80), (2, 8, 8)), (TokenGrid(21, 30, 52), (4, 8, 4))):
        positions, _ = order.tile(grid, tile)
        layouts[f"order of tiles of {grid.frames}x{grid.height}x{grid.width}"] = order.layout(
            grid, positions, 128, device="cuda")
    for name, layout in layouts.items():
        for density in (1.0, 0.5, 0.25, 0.1) if name == "permuted" else (0.25, 0.1):
            keep = speed.random_keep(12, layout.blocks, layout.blocks, density, "cuda")
            mask = BlockMask.from_dense(keep, layout, layout)
            yield from _in_turn(f"{name}, random {density}", 12, 128, mask, rounds=5 if layout.blocks > 300 else 9)


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
    checks |= {"random calls": random_calls, "repeats bit equal": repeats_bit_equal, "never waits": never_waits,
               "is the default": is_the_default, "strides": partial(hopper_checks.strides, attend),
               "equals dense": partial(hopper_checks.equals_dense, CUDA),
               "addresses beyond 32 bits": partial(hopper_checks.addresses_beyond_32_bits, CUDA)}
    return checks
