"""What must hold of fp8 attention on a Hopper GPU, and its speeds. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel fp8
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import fp8, hopper_plan, nvrtc, quantise
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import attention_reference
from tests.gpu import random_cases
from tests.gpu.checks import poisoned
from tests.kernels.cases import Case, Inputs, build
from tests.kernels.fp8_rule import formula_problem, kernel_problem, noise_bound, noise_figures, rounding_noise

BF16, FP16 = torch.bfloat16, torch.float16
FITS = Case(1023, 1023, head_dim=128, dtype=BF16, query_block=128, key_block=128)
CASES = [dataclasses.replace(FITS, **changes) for changes in (  # type: ignore[arg-type]
    dict(), dict(query_tokens=1, key_tokens=1, lists="shared"), dict(query_tokens=63, key_tokens=113, dtype=FP16),
    dict(query_tokens=113, batch=2, lists="all"), dict(query_tokens=1024, key_tokens=1024, lists="shared", batch=2),
    dict(head_dim=64), dict(head_dim=64, dtype=FP16, order="permuted"), dict(head_dim=96), dict(head_dim=8),
    dict(head_dim=40, value_dim=128), dict(value_dim=64), dict(strided=True), dict(order="permuted", strided=True),
    dict(masked=True, batch=2), dict(order="heads", masked=True, batch=2), dict(window=1),
    dict(window=3, always=True, order="permuted"), dict(window=3, always=True, masked=True, batch=2, lists="all"),
    dict(query_tokens=129, key_tokens=4097, heads=5, lists="all", batch=2), dict(query_tokens=4097, key_tokens=1),
)]


def quantised_of(inputs: Inputs, blocks: Blocks, scores: str) -> tuple[quantise.Quantised, hopper_plan.Plan]:
    """The 8-bit numbers of a call by the kernels, and its plan."""
    plan = fp8.fp8_plan(blocks, inputs.key.shape[1], inputs.query.shape[3], inputs.value.shape[3])
    return quantise.quantise(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, plan.key_ok, scores), plan


def in_cuda(case: Case) -> bool:
    """Whether the kernel in CUDA C++ runs a case."""
    return not (case.window or case.masked) and max(case.head_dim, case.value_dim) > 64


def accuracy(inputs: Inputs, scores: str, cuda: bool = False, **options: Any) -> str:
    """The kernel keeps both accuracy rules, with NaN in all fresh memory.

    Args:
        cuda: the kernel in CUDA C++, not the one in Gluon.
        options: of the one in Gluon.
    """
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    with poisoned():
        quantised, plan = quantised_of(inputs, blocks, scores)
        call = quantised, blocks, plan, inputs.scale, inputs.query.shape[1], inputs.query.dtype
        out, lse = fp8.attend(*call, cuda=True) if cuda else fp8.attend_gluon(*call, **options)
        entry = fp8.block_sparse_attention_fp8(inputs.query, inputs.key, inputs.value, blocks, inputs.scale,
                                               scores=scores, cuda=cuda)
    if not options and not (torch.equal(out, entry[0]) and torch.equal(lse, entry[1])):
        return "the entry point computes something else"
    return kernel_problem(inputs, out, lse, quantised) or formula_problem(inputs, lse, quantised)


def quantising(case: Case, scores: str) -> str:
    """The quantising kernels give the bits of the twin for the mean that they found."""
    inputs = build(case, "cuda")
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    with poisoned():
        got, _ = quantised_of(inputs, blocks, scores)
        mean = quantise._statistics(inputs.key, inputs.value, blocks.key_mask, torch.empty_like(got.value_scale))
    if not torch.allclose(mean, quantise.key_mean(inputs.key, blocks.key_mask), rtol=1e-4, atol=1e-5):
        return "the mean of the keys is wrong"
    want = quantise.quantise_reference(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, mean,
                                      scores)
    found = []
    for field in dataclasses.fields(quantise.Quantised):
        x, y = (getattr(made, field.name) for made in (got, want))
        if field.name == "shift":
            same = torch.allclose(x, y, rtol=1e-4, atol=1e-4)
        else:
            same = torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        if not same:
            found.append(f"{field.name} {first_difference(x, y)}")
    return "; ".join(found)


def first_difference(got: torch.Tensor, want: torch.Tensor) -> str:
    """How many numbers differ, between which places along every dimension, and the first of them."""
    got, want = got.float(), want.float()
    places = (got != want).nonzero()
    if not len(places):
        return "in the sign of zeros or in NaN"
    ranges = ", ".join(f"{low} to {high}" for low, high in zip(places.amin(0).tolist(), places.amax(0).tolist(),
                                                               strict=True))
    first = tuple(places[0].tolist())
    return (f"in {len(places)} of {got.numel()}, places {ranges}, last place modulo 128 one of "
            f"{len((places[:, -1] % 128).unique())}; at {first} {float(got[first]):.5g} for {float(want[first]):.5g}")


def noise(kind: str, scores: str, cuda: bool = False) -> str:
    """Error and cosine on noise of 8,192 tokens: white, keys with a large mean, or outlier channels."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 8192, 2, 128, device="cuda").unbind(0)
    if kind == "large mean":
        key = key + 10 * torch.randn(128, device="cuda")
    elif kind == "outliers":
        key[..., 5], value[..., 7] = 10 * key[..., 5], 100 * value[..., 7]
    query, key, value = (x.to(BF16) for x in (query, key, value))
    layout = BlockLayout.raster(8192, 128, "cuda")
    inputs = Inputs(query, key, value, BlockMask.full(layout, layout), None, 128**-0.5)
    blocks = Blocks.from_mask(inputs.mask)
    quantised, plan = quantised_of(inputs, blocks, scores)
    out, _ = fp8.attend(quantised, blocks, plan, inputs.scale, 8192, BF16, cuda=cuda)
    want, _ = attention_reference(query, key, value)
    # Channel by channel, or the largest would hide all others; 512 queries are enough to see the error.
    rows = slice(-512, None)
    expected = rounding_noise(query[:, rows], key, value, inputs.scale, scores)
    found = []
    for name, channels in (("first", slice(0, 7)), ("outlier", slice(7, 8)), ("last", slice(8, None))):
        error, cosine = noise_figures(out[:, rows, :, channels], want[:, rows, :, channels])
        bound = float(expected[..., channels].sum().sqrt() / want[:, rows, :, channels].float().norm())
        if not (error <= bound and cosine >= 1 - bound**2 / 2):
            found.append(f"{name} channels: error {error:.4f}, bound {bound:.4f}, cosine {cosine:.5f}")
    return "; ".join(found)


def tiles(sizes: tuple[int, int, int], text: int, scores: str, cuda: bool = False) -> str:
    """Tiles of 4 x 4 x 8 tokens of a grid, ragged or not, with text."""
    grid = TokenGrid(*sizes, text=text, text_at="back" if text else "none")
    positions, lengths = order.tile(grid, (4, 4, 8))
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8), device="cuda")
    keep = torch.rand(1, 3, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)).to("cuda") < 0.4
    query, key, value = (torch.randn(2, grid.tokens, 3, 128, device="cuda", dtype=BF16) for _ in range(3))
    return accuracy(Inputs(query, key, value, BlockMask.from_dense(keep, layout, layout), None, 128**-0.5), scores,
                    cuda)


def not_finite(scores: str, cuda: bool = False) -> str:
    """What a model did wrong is seen: where a query, a key or a value is infinite or NaN, outputs are not finite."""
    found = []
    for name, number in itertools.product(("query", "key", "value"), (math.inf, math.nan)):
        inputs = build(dataclasses.replace(FITS, heads=2), "cuda")
        getattr(inputs, name)[0, 60, 1, 5] = number
        out, _ = fp8.block_sparse_attention_fp8(inputs.query, inputs.key, inputs.value,
                                                Blocks.from_mask(inputs.mask), inputs.scale, scores=scores,
                                                cuda=cuda)
        # The first block of queries sees all keys.
        rows = slice(60, 61) if name == "query" else slice(0, 128)
        channels = slice(5, 6) if name == "value" else slice(None)
        if not torch.isfinite(out[:, :, 0]).all():
            found.append(f"{number} in a {name} spoils another head")
        if torch.isfinite(out[:, rows, 1, channels]).any():
            found.append(f"{number} in a {name} is hidden")
    return "; ".join(found)


def never_waits_and_repeats(scores: str, cuda: bool = False) -> str:
    """No call waits for the device, and repeated calls give equal bits."""
    for case in (FITS, dataclasses.replace(FITS, order="heads", masked=not cuda, batch=2)):
        inputs = build(case, "cuda")
        blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
        first: tuple[torch.Tensor, ...] = ()
        for i in range(20):  # the first call compiles
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                now = fp8.block_sparse_attention_fp8(inputs.query, inputs.key, inputs.value, blocks, inputs.scale,
                                                     scores=scores, cuda=cuda)
            except RuntimeError as error:
                return f"{case.name}: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
            first = first or now
            if not all(torch.equal(a, b) for a, b in zip(first, now, strict=True)):
                return f"{case.name}: repeated calls differ"
    return ""


def addresses_beyond_32_bits(scores: str, cuda: bool = False) -> str:
    """Activations of more than 2^31 elements: the last head of the last tokens is right."""
    tokens, heads, dim = 75_600, 240, 128
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=BF16) for _ in range(3))
    layout = BlockLayout.raster(tokens, 128, "cuda")
    block = torch.arange(layout.blocks, device="cuda")
    mask = BlockMask.from_dense((block[:, None] - block).abs() <= 1, layout, layout)
    out, _ = fp8.block_sparse_attention_fp8(query, key, value, Blocks.from_mask(mask), dim**-0.5, scores=scores,
                                            cuda=cuda)
    last = tokens // 128 * 128
    want, _ = attention_reference(query[:, last:, -1:], key[:, last - 128 :, -1:], value[:, last - 128 :, -1:])
    error, _ = noise_figures(out[:, last:, -1:], want)
    return "" if error < noise_bound(1.1) else f"error {error:.3f}"


def random_calls(scores: str, part: int, calls: int = 25) -> str:
    """Random calls of the kernel in CUDA C++: raster, permuted and tiles, short blocks and empty lists, any strides."""
    kinds = [i for i, kind in enumerate(random_cases.KINDS)
             if kind.head_dim > 64 and kind.key_block == 128 and not (kind.window or kind.masked)]
    for kind in kinds:
        for i in range(calls):
            seed = kind + len(random_cases.KINDS) * (part * calls + i)
            drawn = random_cases.draw(seed, "cuda", 900)
            if problem := accuracy(drawn.inputs, scores, cuda=True):
                return f"seed {seed} ({drawn.kind.name}): {problem}"
    return ""


def repeats_with_many_tiles(scores: str) -> str:
    """Five hundred calls of the kernel in CUDA C++ give equal bits, raster and permuted."""
    many = dataclasses.replace(FITS, query_tokens=2047, key_tokens=2047, heads=12)
    for case in (many, dataclasses.replace(many, order="heads")):
        inputs = build(case, "cuda")
        blocks = Blocks.from_mask(inputs.mask)
        quantised, plan = quantised_of(inputs, blocks, scores)
        call = partial(fp8.attend, quantised, blocks, plan, inputs.scale, 2047, BF16, cuda=True)
        first, differing = call(), torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(499):
            differing += sum((a.view(kind) != b.view(kind)).sum() for a, b, kind in zip(
                first, call(), (torch.int16, torch.int32), strict=True))
        if differing.item():
            return f"{case.name}: {differing.item()} numbers of 499 repeats differ"
    return ""


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name; none where there is no Hopper GPU."""
    if hopper_plan.missing():
        return {}
    found: dict[str, Callable[[], str]] = {}
    for scores in quantise.SCORES:
        for case in CASES:
            found[f"{scores} quantising {case.name}"] = partial(quantising, case, scores)
            found[f"{scores} attention {case.name}"] = partial(_built_accuracy, case, scores)
        for options in (dict(stages=2), dict(fresh=False)):
            found[f"{scores} attention {options}"] = partial(_built_accuracy, FITS, scores, **options)
        for kind in ("white", "large mean", "outliers"):
            found[f"{scores} noise {kind}"] = partial(noise, kind, scores)
        for sizes, text in (((8, 8, 16), 0), ((5, 11, 13), 77)):
            found[f"{scores} tiles {sizes} text {text}"] = partial(tiles, sizes, text, scores)
        for check in (not_finite, never_waits_and_repeats, addresses_beyond_32_bits):
            found[f"{scores} {check.__name__.replace('_', ' ')}"] = partial(check, scores)
    return found | (cuda_checks() if not nvrtc.missing() else {})


def cuda_checks() -> dict[str, Callable[[], str]]:
    """Those of the kernel in CUDA C++: the same as far as it runs them, and random calls."""
    found: dict[str, Callable[[], str]] = {}
    for scores in quantise.SCORES:
        name = f"cuda {scores}"
        for case in filter(in_cuda, CASES):
            found[f"{name} attention {case.name}"] = partial(_built_accuracy, case, scores, cuda=True)
        for kind in ("white", "large mean", "outliers"):
            found[f"{name} noise {kind}"] = partial(noise, kind, scores, cuda=True)
        for sizes, text in (((8, 8, 16), 0), ((5, 11, 13), 77)):
            found[f"{name} tiles {sizes} text {text}"] = partial(tiles, sizes, text, scores, cuda=True)
        for check in (not_finite, never_waits_and_repeats, addresses_beyond_32_bits):
            found[f"{name} {check.__name__.replace('_', ' ')}"] = partial(check, scores, cuda=True)
        for part in range(4):
            found[f"{name} random calls, part {part}"] = partial(random_calls, scores, part)
        found[f"{name} repeats with many tiles"] = partial(repeats_with_many_tiles, scores)
    return found


def _built_accuracy(case: Case, scores: str, **options: Any) -> str:
    return accuracy(build(case, "cuda"), scores, **options)


def speeds(log: Callable[[str], None], tokens: int = 75_600, heads: Sequence[int] = (12, 40)) -> list[dict[str, Any]]:
    """Times 8-bit attention beside bf16 on Hopper, taking turns: attention alone, with quantising, quantising alone.

    Args:
        log: takes every line.
        tokens: of one head, head dim 128, batch 1.
        heads: how many, one table each.

    Returns:
        One dictionary a row: heads, what, milliseconds, TFLOP/s over the pairs computed or GB/s of quantising.
    """
    if why := hopper_plan.missing():
        log(f"speeds of fp8 left out: {why}")
        return []
    rows: list[dict[str, Any]] = []
    for count in heads:
        rows += _speeds_of(log, tokens, count)
        torch.cuda.empty_cache()
    return rows


def _speeds_of(log: Callable[[str], None], tokens: int, heads: int) -> list[dict[str, Any]]:
    from dit_sparse.eval.speed import in_turn, random_keep
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    torch.manual_seed(0)
    dim, scale = 128, 128**-0.5
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=BF16) for _ in range(3))
    call = query, key, value
    layout = BlockLayout.raster(tokens, 128, "cuda")
    rows: list[dict[str, Any]] = []

    def measure(calls: dict[str, Callable[[], Any]], density: float = math.nan, moved: float = math.nan) -> None:
        for what, took in in_turn(calls, "cuda").items():
            rates = 4e-9 * heads * dim * tokens**2 * density / took, 1e-6 * moved / took
            rows.append({"heads": heads, "what": what, "ms": took, "tflops": rates[0], "gb_per_s": rates[1],
                         "density": density})
            rate = f"{rates[0]:7.0f} TFLOP/s" if math.isnan(moved) else f"{rates[1]:7.0f} GB/s"
            log(f"{took:9.3f} ms  {rate}  {what}")

    log(f"fp8 at {tokens} tokens, {heads} heads of {dim}, activations in bf16; calls of a table take turns")
    for density in (0.5, 0.25, 0.1):
        mask = BlockMask.from_dense(random_keep(heads, layout.blocks, layout.blocks, density, "cuda"), layout, layout)
        blocks = Blocks.from_mask(mask)
        plan = fp8.fp8_plan(blocks, tokens, dim, dim)
        calls: dict[str, Callable[[], Any]] = {
            f"{density} bf16": partial(block_sparse_attention_hopper, *call, blocks, scale)}
        for scores in quantise.SCORES:
            made = quantise.quantise(*call, blocks, scale, scores=scores)
            for kernel, cuda in (("Gluon", False), ("CUDA", True)):
                if cuda and nvrtc.missing():
                    continue
                calls[f"{density} {scores}, {kernel}, quantised before"] = partial(
                    fp8.attend, made, blocks, plan, scale, tokens, BF16, cuda=cuda)
                calls[f"{density} {scores}, {kernel}, quantising included"] = partial(
                    fp8.block_sparse_attention_fp8, *call, blocks, scale, scores=scores, cuda=cuda)
        measure(calls, mask.density().item())
    permuted = BlockLayout.from_order(torch.randperm(tokens), 128).to("cuda")
    other = Blocks.from_mask(BlockMask.from_dense(
        random_keep(heads, layout.blocks, layout.blocks, 0.25, "cuda"), permuted, permuted))
    numbers = tokens * heads * dim
    measure({f"quantising, {scores}{name}": partial(quantise.quantise, *call, of, scale, scores=scores)
             for scores in quantise.SCORES for name, of in (("", blocks), (", random order", other))},
            moved=13 * numbers)
    unused = torch.empty(1, heads, dim, device="cuda")
    measure({"of which statistics": partial(quantise._statistics, key, value, None, unused)}, moved=4 * numbers)
    measure({f"0.25 {scores}, random order, quantising included": partial(
        fp8.block_sparse_attention_fp8, *call, other, scale, scores=scores) for scores in quantise.SCORES}, 0.25)
    return rows
