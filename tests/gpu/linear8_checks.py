"""What must hold of 8-bit linear layers on a GPU, and their speed. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel linear8
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dit_sparse.linear8 import Fp8Linear, fp8_linear_reference, missing, quantise_rows

BF16 = torch.bfloat16
# Tokens, and channels of a layer of Wan-14B: attention, and both layers of the feed-forward.
TOKENS, LAYERS = 75_600, ((5120, 5120), (5120, 13_824), (13_824, 5120))


def layer(inside: int, outside: int, bias: bool = True, dtype: torch.dtype = BF16) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inside, outside, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)


def accuracy(rows: int, inside: int, outside: int, bias: bool, dtype: torch.dtype, compiled: bool) -> str:
    """The layer is what the formula says up to bf16 rounding, and some 4 per cent from the layer it replaces."""
    linear = layer(inside, outside, bias, dtype)
    x = torch.randn(1, rows, inside, device="cuda", dtype=dtype)
    module: Any = Fp8Linear(linear)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True)
    out, want = module(x), fp8_linear_reference(x, linear.weight, linear.bias)
    exact = torch.nn.functional.linear(x.float(), linear.weight.float(), None if not bias else linear.bias.float())
    error = ((out.float() - want).norm() / want.norm()).item()
    whole = ((out.float() - exact).norm() / exact.norm()).item()
    good = error < 4e-3 and whole < 0.06 and out.dtype == dtype
    return "" if good else f"{error:.2e} from the formula, {whole:.3f} from the layer, {out.dtype}"


def rounding_is_the_same_compiled() -> str:
    """Compiled rounding gives the bits of the plain one, or its neighbours where a division is rounded otherwise."""
    x = torch.randn(1023, 5120, device="cuda", dtype=BF16)
    torch._dynamo.reset()
    (rows, scale), (other, other_scale) = quantise_rows(x), torch.compile(quantise_rows, fullgraph=True)(x)
    different = (rows.view(torch.uint8) != other.view(torch.uint8)).float().mean().item()
    same = torch.allclose(scale, other_scale, rtol=1e-6)
    return "" if same and different < 1e-3 else f"{different:.2e} of the numbers differ, scales equal: {same}"


def never_waits() -> str:
    """No wait for the device in a call."""
    module, x = Fp8Linear(layer(256, 512)), torch.randn(300, 256, device="cuda", dtype=BF16)
    module(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name; none where the GPU has no 8-bit floats."""
    if missing("cuda"):
        return {}
    found: dict[str, Callable[[], str]] = {}
    for rows, inside, outside in ((1, 256, 512), (63, 16, 48), (1023, 5120, 5120), (512, 13_824, 5120)):
        for bias in (False, True):
            found[f"{rows} x {inside} x {outside}, bias {bias}"] = partial(
                accuracy, rows, inside, outside, bias, BF16, False)
    found["fp16"] = partial(accuracy, 113, 128, 256, True, torch.float16, False)
    found["compiled"] = partial(accuracy, 1023, 5120, 5120, True, BF16, True)
    for function in (rounding_is_the_same_compiled, never_waits):
        found[function.__name__.replace("_", " ")] = function
    return found


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times layers of Wan-14B in bf16 and in 8 bits, rounding included, plain and compiled.

    Args:
        log: takes every line.

    Returns:
        One dictionary a row: what, milliseconds, TFLOP/s.
    """
    from dit_sparse.eval.speed import in_turn

    rows: list[dict[str, Any]] = []
    if why := missing("cuda"):
        log(f"speeds of 8-bit linear layers left out: {why}")
        return rows
    for inside, outside in LAYERS:
        linear, x = layer(inside, outside), torch.randn(TOKENS, inside, device="cuda", dtype=BF16)
        module = Fp8Linear(linear)
        torch._dynamo.reset()
        calls = {"bf16": partial(linear, x), "8 bits": partial(module, x),
                 "8 bits, compiled": partial(torch.compile(module, fullgraph=True), x),
                 "rounding alone, compiled": partial(torch.compile(quantise_rows, fullgraph=True), x)}
        for name, took in in_turn(calls, "cuda", rounds=12).items():
            rate = 2e-9 * TOKENS * inside * outside / took
            rows.append({"what": f"{inside} x {outside}, {name}", "ms": took, "tflops": rate})
            log(f"{took:9.3f} ms  {rate:7.0f} TFLOP/s  {TOKENS} x {inside} x {outside}, {name}")
    return rows
