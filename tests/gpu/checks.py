"""What must hold of the portable kernel on a GPU. Every check returns "" or what is wrong; run by run.py and pytest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import attention_reference
from tests.kernels.cases import Case, build, check

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128),
    Case(1024, 1024, head_dim=128, dtype=BF16, query_block=128, key_block=128, lists="shared", batch=2),
    Case(113, 1023, head_dim=128, dtype=FP16, query_block=128, key_block=128, lists="all", batch=2),
    Case(1, 1, head_dim=128, dtype=BF16, query_block=128, key_block=128, lists="shared"),
    Case(63, 113, head_dim=128, dtype=BF16, query_block=128, key_block=128),
    Case(1023, 1023, head_dim=96, dtype=BF16, query_block=128, key_block=128),
    Case(1023, 1023, head_dim=64, dtype=FP16, query_block=128, key_block=128),
    Case(1023, 511, head_dim=128, dtype=BF16, query_block=128, key_block=64),
    Case(511, 1023, head_dim=128, dtype=BF16, query_block=64, key_block=128),
    Case(511, 1023, head_dim=64, dtype=BF16, query_block=64, key_block=64),
    Case(511, 1023, head_dim=128, dtype=FP16, query_block=32, key_block=32),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, strided=True),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, order="permuted"),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, order="heads", masked=True, batch=2),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, window=1),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, window=3, always=True, order="permuted"),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, window=3, always=True, masked=True,
         batch=2),
    Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, masked=True, batch=2),
    Case(511, 511, head_dim=128, dtype=FP32, query_block=128, key_block=128),
    Case(511, 511, head_dim=64, dtype=FP32, window=2, order="permuted", masked=True),
    Case(511, 511, head_dim=96, dtype=FP32, query_block=32, key_block=64),
    Case(511, 511, head_dim=128, value_dim=64, dtype=BF16, query_block=128, key_block=128),
]

@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def accuracy(case: Case, descriptors: bool | None = None) -> str:
    """The portable kernel keeps the accuracy rule on a case, with NaN in all fresh memory."""
    from dit_sparse.kernels.portable import block_sparse_attention_triton

    inputs = build(case, "cuda")
    with poisoned():
        out, lse = block_sparse_attention_triton(inputs.query, inputs.key, inputs.value,
                                                 Blocks.from_mask(inputs.mask, inputs.key_mask), inputs.scale,
                                                 descriptors=descriptors)
    return check(inputs, out, lse)


def pieces() -> str:
    """The path without triton agrees."""
    inputs = build(Case(window=1, order="permuted", masked=True, batch=2), "cuda")
    out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, scale=inputs.scale,
                                      key_mask=inputs.key_mask, backend="pieces")
    return check(inputs, out, lse)


def repeats_bit_equal() -> str:
    """Twenty calls give equal bits."""
    inputs = build(Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128, window=2), "cuda")
    call = partial(block_sparse_attention, inputs.query, inputs.key, inputs.value, inputs.mask, backend="triton")
    first, *others = (call() for _ in range(20))
    same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return "" if same else "repeated calls differ"


def never_waits() -> str:
    """No call, with or without key mask and permuted order, waits for the device."""
    for case in (Case(dtype=BF16), Case(dtype=BF16, order="heads", masked=True)):
        inputs = build(case, "cuda")
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, key_mask=inputs.key_mask,
                                       backend="triton")
                dense_attention(inputs.query, inputs.key, inputs.value, key_mask=inputs.key_mask)
            except RuntimeError as error:
                return f"{case.name}: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return ""


def dense_with_key_mask() -> str:
    """dense_attention leaves masked keys out, NaN or not."""
    inputs = build(Case(1023, 1023, batch=2, head_dim=128, dtype=BF16, masked=True), "cuda")
    out, _ = dense_attention(inputs.query, inputs.key, inputs.value, key_mask=inputs.key_mask)
    want, _ = attention_reference(inputs.query, inputs.key, inputs.value, key_mask=inputs.key_mask)
    error = (out.float() - want.float()).abs().max().item()
    return "" if error < 2e-2 else f"error {error:.2e}"


def density_one_equals_dense() -> str:
    """A full mask at 32,768 tokens equals the dense kernel."""
    query, key, value = (torch.randn(1, 32768, 2, 128, device="cuda", dtype=BF16) for _ in range(3))
    layout = BlockLayout.raster(32768, 128, "cuda")
    out, _ = block_sparse_attention(query, key, value, BlockMask.full(layout, layout), backend="triton")
    error = (out.float() - dense_attention(query, key, value)[0].float()).abs().max().item()
    return "" if error < 2e-3 else f"error {error:.2e}"


def addresses_beyond_32_bits() -> str:
    """Tensors of more than 2^31 elements: the last head of the last tokens is right."""
    tokens, heads, dim = 75_600, 240, 128
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=BF16) for _ in range(3))
    layout = BlockLayout.raster(tokens, 128, "cuda")
    block = torch.arange(layout.blocks, device="cuda")
    mask = BlockMask.from_dense((block[:, None] - block).abs() <= 1, layout, layout)
    last = tokens // 128 * 128
    for descriptors in (True, False):
        from dit_sparse.kernels.portable import block_sparse_attention_triton

        out, _ = block_sparse_attention_triton(query, key, value, Blocks.from_mask(mask), dim**-0.5,
                                               descriptors=descriptors)
        want, _ = attention_reference(query[:, last:, -1:], key[:, last - 128 :, -1:], value[:, last - 128 :, -1:])
        error = (out[:, last:, -1:].float() - want.float()).abs().max().item()
        if not error < 2e-2:
            return f"descriptors={descriptors}: error {error:.2e}"
    return ""


def memory_is_not_leaked() -> str:
    """A hundred calls leave no memory behind."""
    inputs = build(Case(1023, 1023, dtype=BF16, order="permuted", masked=True), "cuda")
    used = []
    for _ in range(100):
        block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, key_mask=inputs.key_mask,
                               backend="triton")
        used.append(torch.cuda.memory_allocated())
    return "" if used[-1] <= used[2] else f"{used[-1] - used[2]} bytes more after 100 calls"


def all_checks() -> dict[str, Callable[[], str]]:
    """Name and function of every check of the portable kernel."""
    checks: dict[str, Callable[[], str]] = {}
    for case in CASES:
        checks[f"accuracy {str(case.dtype).removeprefix('torch.')} {case.name}"] = partial(accuracy, case)
    for case in (CASES[0], CASES[5], CASES[13], CASES[16], CASES[18]):
        checks[f"pointers {str(case.dtype).removeprefix('torch.')} {case.name}"] = (
            partial(accuracy, case, descriptors=False))
    for function in (pieces, repeats_bit_equal, never_waits, dense_with_key_mask, density_one_equals_dense,
                     addresses_beyond_32_bits, memory_is_not_leaked):
        checks[function.__name__.replace("_", " ")] = function
    return checks
