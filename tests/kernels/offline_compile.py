"""Compiles the GPU kernels for sm_90 on any machine, without a GPU, and counts registers, spills, products and waits.

    python tests/kernels/offline_compile.py [--cases bf16-128 fp16-64 ...]

Cases called hopper-... are the Hopper kernel, all others the portable one. Exits with 1 when a compile fails, spills
more than the case may, or when the matrix products of the Hopper kernel are not as many, or as overlapped, as
written. Works with triton 3.6 and later.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dit_sparse import order  # noqa: E402
from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow  # noqa: E402
from dit_sparse.grid import TokenGrid  # noqa: E402
from dit_sparse.kernels import hopper, hopper_kernel, portable  # noqa: E402
from dit_sparse.kernels.blocks import Blocks  # noqa: E402
from dit_sparse.kernels.hopper_plan import Tuning  # noqa: E402

BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER_SHARED = 232448
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = dict(LSE="*fp32", LISTS="*i32", WHOLE="*i32", BOUNDARY="*i32", ORDER="*i32", KEY_LENGTHS="*i32")


@dataclass(frozen=True)
class Case:
    """One specialisation of the kernel."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    query_block: int = 128
    key_block: int = 128
    coordinates: int = 0
    key_mask: bool = False
    permuted: bool = False
    descriptors: bool = True
    spills: int = 0  # instructions that may spill


CASES = {
    "bf16-128": Case(),
    "fp16-128": Case(dtype=torch.float16),
    "bf16-128-window": Case(coordinates=3, permuted=True),
    "bf16-128-key-mask": Case(key_mask=True),
    "bf16-128-everything": Case(coordinates=3, permuted=True, key_mask=True),
    "bf16-128-pointers": Case(descriptors=False),
    "bf16-96": Case(head_dim=96),
    "bf16-64": Case(head_dim=64),
    "fp16-64": Case(dtype=torch.float16, head_dim=64),
    "bf16-128-blocks-64": Case(query_block=64, key_block=64),
    "bf16-128-blocks-128x64": Case(key_block=64),
    "bf16-128-blocks-32": Case(query_block=32, key_block=32),
    # Products in three passes keep both halves of the queries in registers; what spills lies outside of the main loop.
    "fp32-128": Case(dtype=torch.float32, spills=70),
    "fp32-64-blocks-64": Case(dtype=torch.float32, head_dim=64, query_block=64, key_block=64, coordinates=1),
}


@dataclass(frozen=True)
class HopperCase:
    """One specialisation of the Hopper kernel."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    key_block: int = 128
    order: str = "raster"
    coordinates: int = 0
    always: bool = False
    key_mask: bool = False
    persistent: bool = False
    text: int = 77

    @property
    def wgmma(self) -> int:
        """Matrix instructions of both consumer groups: each multiplies over 16 columns, or keys, at a time.

        Scores and outputs stand three times in the code: the first block's scores and the last one's output, the loop
        of whole blocks, the loop of boundary blocks.
        """
        width = 64 if self.head_dim <= 64 else 128
        return 2 * 3 * (width + self.key_block) // 16


# Waits for matrix products: per consumer group one for the first scores, two in each of the two loops, one for the last
# output. More of them mean that the assembler gave up on overlapping the products: then every single one is waited for.
HOPPER_WAITS = 12

HOPPER_CASES = {
    f"hopper-{TYPES[dtype]}-{head_dim}-{key_block}-{order}": HopperCase(dtype, head_dim, key_block, order)
    for dtype in (torch.bfloat16, torch.float16) for head_dim in (64, 128) for key_block in (64, 128)
    for order in ("raster", "permuted")
} | {
    f"hopper-{TYPES[dtype]}-{head_dim}-{tiles}": HopperCase(dtype, head_dim, order=tiles)
    for dtype in (torch.bfloat16, torch.float16) for head_dim in (64, 128) for tiles in ("tiles", "tiles-ragged")
} | {
    "hopper-bf16-tiles-no-text": HopperCase(order="tiles", text=0),
    "hopper-bf16-tiles-key-mask": HopperCase(order="tiles", key_mask=True),
    "hopper-bf16-tiles-everything": HopperCase(order="tiles", coordinates=3, always=True, key_mask=True),
} | {
    "hopper-bf16-96": HopperCase(head_dim=96),
    "hopper-bf16-persistent": HopperCase(persistent=True),
    "hopper-bf16-64-persistent": HopperCase(head_dim=64, persistent=True),
    "hopper-bf16-key-mask": HopperCase(key_mask=True),
    "hopper-bf16-key-mask-persistent": HopperCase(key_mask=True, persistent=True),
    "hopper-bf16-key-mask-permuted": HopperCase(key_mask=True, order="permuted"),
    "hopper-bf16-window-1": HopperCase(coordinates=1),
    "hopper-bf16-window-2": HopperCase(coordinates=2),
    "hopper-bf16-window-3": HopperCase(coordinates=3),
    "hopper-bf16-window-3-permuted": HopperCase(coordinates=3, order="permuted"),
    "hopper-bf16-window-1-always": HopperCase(coordinates=1, always=True, order="permuted"),
    "hopper-bf16-window-2-key-mask": HopperCase(coordinates=2, key_mask=True),
    "hopper-bf16-everything": HopperCase(coordinates=3, always=True, key_mask=True, order="permuted"),
    "hopper-fp16-everything-raster": HopperCase(torch.float16, coordinates=3, always=True, key_mask=True),
    "hopper-bf16-64-window-3": HopperCase(head_dim=64, coordinates=3),
    "hopper-bf16-blocks-128x64-everything": HopperCase(key_block=64, coordinates=3, always=True, key_mask=True),
}


@dataclass(frozen=True)
class Figures:
    """What the assembler made of a case."""

    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: int
    waits: int
    bulk_copies: int


def compile_case(case: Case) -> Figures:
    """Compiles one case for sm_90 and reads the machine code."""
    name, width = TYPES[case.dtype], portable._width(case.head_dim)
    tile = portable.choose_tile(case.query_block, case.key_block, width, case.dtype, HOPPER_SHARED)
    constants: dict[str, Any] = dict(
        D=case.head_dim, DV=case.head_dim, WIDTH=width, WIDTH_V=width, QUERY_BLOCK=case.query_block,
        KEY_BLOCK=case.key_block, BM=tile.queries, BN=tile.keys, COORDINATE_COUNT=case.coordinates,
        DESCRIPTORS=case.descriptors, PRECISION="tf32x3" if case.dtype == torch.float32 else "tf32",
        STAGES=tile.stages, TESTED_STAGES=portable.tested_stages(tile, case.coordinates, case.key_mask),
        stride_qd=1, stride_kd=1, stride_vd=1)
    kinds = POINTERS | dict(Q=f"*{name}", K=f"*{name}", V=f"*{name}", OUT=f"*{name}", scale_log2="fp32")
    if case.descriptors:
        kinds |= dict.fromkeys("KV", f"tensordesc<{name}[1, 1, {tile.keys}, {width}]>")
    window = dict(COORDINATES="*i32", LOW="*i32", HIGH="*i32", ALWAYS="*i1")
    optional = window if case.coordinates else {}
    optional = optional | (dict(KEY_OK="*i8", EXEMPT="*i32") if case.key_mask else {})
    optional = optional | (dict(QUERY_INDEX="*i64") if case.permuted else {})
    kinds |= optional
    constants |= dict.fromkeys({*window, "KEY_OK", "EXEMPT", "QUERY_INDEX"} - set(optional), None)

    names = portable.attention_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    # As at run time: pointers and strides are multiples of 16, unless the kernel says not to look.
    fixed = {"H", "Lq", "NQ", "query_slots", "key_slots"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
             if signature[n].startswith("*") or (signature[n] == "i32" and n not in fixed)}
    source = ASTSource(portable.attention_kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=tile.warps))
    return read_figures(compiled.asm["cubin"], compiled.metadata.shared)


class _Sm90:
    """Stands for a Hopper GPU's driver: enough for triton to specialise and compile a call, not to launch it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def hopper_call(case: HopperCase) -> tuple[list[Any], dict[str, Any]]:
    """What the launcher hands the kernel for a small call of this kind, on CPU tensors."""
    heads = 3
    grid = TokenGrid(*((8, 8, 16) if case.order == "tiles" else (7, 9, 17)), text=case.text,
                     text_at="back" if case.text else "none")
    tokens, tile = grid.tokens, (4, 4, 8)
    query, key, value = (torch.zeros(1, tokens, heads, case.head_dim, dtype=case.dtype) for _ in range(3))
    positions, lengths = order.tile(grid, tile)
    made = {
        "raster": lambda size: BlockLayout.raster(tokens, size),
        "permuted": lambda size: BlockLayout.from_order(torch.arange(tokens).flip(0), size),
    }.get(case.order, lambda size: order.layout(grid, positions, size, lengths=lengths, tile_shape=tile))
    layouts = [made(size) for size in (128, case.key_block)]
    window = None
    if case.coordinates:
        place = torch.arange(tokens).expand(case.coordinates, -1)
        always = torch.zeros(tokens, dtype=torch.bool) if case.always else None
        window = TokenWindow.from_tokens(place, place - 5, place + 5, *layouts, always=always)
    keep = torch.ones(1, heads, layouts[0].blocks, layouts[1].blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, *layouts, partial=keep, window=window)
    blocks = Blocks.from_mask(mask, torch.ones(1, tokens, dtype=torch.bool) if case.key_mask else None)
    gather, hopper.gather_slots = hopper.gather_slots, _gather
    try:
        calls = hopper.launches(query, key, value, blocks, 0.1, torch.empty_like(query),
                                torch.empty(1, heads, tokens), Tuning(
                                    persistent=case.persistent, ragged_boxes=case.order == "tiles-ragged"))
        arguments, constants, _ = next(calls)
    finally:
        hopper.gather_slots = gather
    if (constants["TILE"] is not None) != case.order.startswith("tiles"):
        raise AssertionError(f"the launcher took TILE={constants['TILE']} for a layout in {case.order} order")
    return arguments, constants


def _gather(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, slots: int) -> tuple[torch.Tensor, ...]:
    """`portable.gather_slots` as far as shapes and strides go: that kernel does not run without a GPU."""
    return tuple(x.new_zeros(x.shape[0], x.shape[2], slots, x.shape[3]).transpose(1, 2) for x in (key, value))


def compile_hopper(case: HopperCase) -> Figures:
    """Compiles the Hopper kernel as the launcher would, pointer alignments and fixed strides included."""
    arguments, constants = hopper_call(case)
    triton.runtime.driver.set_active(_Sm90())
    compiled = hopper_kernel.attention_kernel.run(*arguments, grid=(1,), warmup=True, **constants, num_warps=4,
                                                  maxnreg=hopper_kernel.MAX_REGISTERS)
    return read_figures(compiled.asm["cubin"], compiled.metadata.shared)


def hopper_problem(case: HopperCase, figures: Figures) -> str:
    """What is wrong with the machine code of a case, "" when it is as it must be."""
    wanted = dict(spills=0, stack=0, wgmma=case.wgmma, waits=HOPPER_WAITS)
    return ", ".join(f"{name} must be {value}" for name, value in wanted.items() if getattr(figures, name) != value)


def read_figures(cubin: bytes, shared: int) -> Figures:
    """Registers, stack and spills from the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([BINARIES / "nvdisasm", file.name], capture_output=True, text=True).stdout

    def count(word: str) -> int:
        return len(re.findall(rf"\b{word}\b", code))

    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    return Figures(registers, stack, count("STL") + count("LDL"), shared, count("[HQI]GMMA"),
                   count("WARPGROUP.DEPBAR"), count("UTMALDG"))


def main() -> int:
    """Compiles the cases asked for and prints a table; 1 when one fails or spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every: dict[str, Case | HopperCase] = {**CASES, **HOPPER_CASES}
    parser.add_argument("--cases", nargs="*", choices=list(every), default=list(every))
    bad = 0
    print(f"triton {triton.__version__}, target sm_90")
    for name in parser.parse_args().cases:
        case = every[name]
        try:
            figures = compile_case(case) if isinstance(case, Case) else compile_hopper(case)
        except Exception as error:
            bad += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        if isinstance(case, Case):
            problem = f"spills must be at most {case.spills}" if figures.spills > case.spills else ""
        else:
            problem = hopper_problem(case, figures)
        bad += bool(problem)
        text = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(figures).items())
        print(f"{name}: {text}" + (f": {problem}" if problem else ""), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
