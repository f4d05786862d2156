"""What must hold of the routing kernels on a GPU, and their speeds. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel routing
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_sparse import routing, scoring
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.budgets import budget_errors
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.selection import Rule
from tests.gpu.checks import poisoned

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("raster", "order", "heads")


def make_layout(kind: str, tokens: int, block: int, heads: int = 1) -> BlockLayout:
    """Raster, one random order in two segments, or an order per head."""
    if kind == "raster":
        return BlockLayout.raster(tokens, block, "cuda")
    orders = torch.stack([torch.randperm(tokens) for _ in range(heads if kind == "heads" else 1)])[None]
    return BlockLayout.from_order(orders, block, lengths=[tokens // 3, tokens - tokens // 3]).to("cuda")


def activations(tokens: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 2) -> Tensor:
    """(B, L, H, D) whose blocks differ in their means, inside memory that is NaN."""
    room = torch.full((batch, heads, tokens + 5, dim + 8), torch.nan, dtype=dtype, device="cuda")
    view = room.transpose(1, 2)[:, :tokens, :, :dim]
    drift = torch.randn(batch, tokens // 16 + 1, heads, dim, device="cuda").repeat_interleave(16, 1)[:, :tokens]
    return view.copy_(torch.randn(batch, tokens, heads, dim, device="cuda") + drift)


@contextlib.contextmanager
def switched(wanted: str) -> Iterator[None]:
    """DIT_SPARSE_ROUTING is this within."""
    before = os.environ.get("DIT_SPARSE_ROUTING", "")
    os.environ["DIT_SPARSE_ROUTING"] = wanted
    try:
        yield
    finally:
        os.environ["DIT_SPARSE_ROUTING"] = before


def close(got: Tensor, want: Tensor, rtol: float, atol: float) -> str:
    """"" when the numbers agree."""
    try:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return ""


def means(dtype: torch.dtype, kind: str, tokens: int, block: int, dim: int) -> str:
    """Block means equal the plain ones, with and without a mask over NaN."""
    torch.manual_seed(0)
    layout, x = make_layout(kind, tokens, block, 3), activations(tokens, 3, dim, dtype)
    mask = torch.rand(2, tokens, device="cuda") < 0.7
    with poisoned():
        found = close(routing.pool(x, layout, kernels=True), scoring.pool(x, layout), 2e-5, 2e-6)
        x[~mask] = torch.nan
        masked = routing.pool(x, layout, mask=mask, kernels=True)
    return found or close(masked, scoring.pool(x, layout, mask=mask), 2e-5, 2e-6)


def lists(kind: str, nq: int, nk: int) -> str:
    """Lists of given scores are exactly the plain ones: ties, infinities, tensors of amounts, forced blocks."""
    torch.manual_seed(nk)
    query = BlockLayout.raster(nq * 16 - 3, 16, "cuda")
    lengths = torch.where(torch.rand(nk) < 0.2, torch.randint(0, 16, (nk,)), 16).to(torch.int32)
    lengths[0] = 16
    key = BlockLayout.from_order(torch.randperm(int(lengths.sum())), 16, lengths=lengths).to("cuda")
    scores = torch.randn(2, 3, nq, nk, device="cuda")
    scores[0] = (scores[0] * 2).round() / 2
    scores[:, 0, 0] = -torch.inf
    scores[0, 0, :, nk // 2 :] = -0.0
    if kind == "top_p":
        scores = scores.clamp(min=-9).softmax(-1)
    amount = torch.randint(1, nk + 2, (3, 1, 1)) if kind == "top_k" else torch.rand(3, 1, 1)
    rules = [Rule(kind, 1), Rule(kind, amount.cuda(), columns=slice(nk // 5, None), forced_columns=slice(0, nk // 4)),
             Rule(kind, amount[:1].cuda(), rows=slice(1, None), forced_rows=torch.rand(1, 3, nq, device="cuda") < 0.1,
                  forced_columns=torch.rand(nk, device="cuda") < 0.1, least=3)]
    for rule in rules:
        want = routing.lists_of_scores(scores, query, key, rule, kernels=False)
        with poisoned():
            got = routing.lists_of_scores(scores, query, key, rule, kernels=True)
        for name in ("lists", "whole", "boundary", "pairs"):
            if not torch.equal(getattr(got, name), getattr(want, name)):
                return f"{name} differ with amount {rule.amount}"
    return ""


def masks(dtype: torch.dtype, kind: str, tokens: int, rule_kind: str) -> str:
    """Masks of activations are the plain ones, but for scores within rounding of the last one kept."""
    torch.manual_seed(1)
    layout = make_layout(kind, tokens, 64, 3)
    query, key = (activations(tokens, 3, 128, dtype) for _ in range(2))
    rule = Rule(rule_kind, layout.blocks // 4 if rule_kind == "top_k" else 0.5 if rule_kind == "top_p" else 0.01,
                softmax=rule_kind != "top_k")
    arguments = query, key, layout, layout, 128**-0.5, rule
    want = routing.route(*arguments, kernels=False).to_dense()
    with poisoned():
        got = routing.route(*arguments, kernels=True)
    if not torch.equal(got.pairs, dataclasses.replace(got).pairs):
        return "the count of pairs is wrong"
    scores = scoring.pooled_scores(query, key, layout, layout, 128**-0.5)
    last = scores.masked_fill(~want, torch.inf).amin(-1, keepdim=True)
    wrong = (got.to_dense() ^ want) & ((scores - last).abs() > 1e-4)
    return f"{int(wrong.sum())} blocks differ" if wrong.any() else ""


def sampled_errors(dtype: torch.dtype, tokens: int, dim: int) -> str:
    """Errors of sampled rows are those of float32."""
    torch.manual_seed(2)
    query, key, value = (activations(tokens, 3, dim, dtype) for _ in range(3))
    rows = torch.randint(tokens, (64,), device="cuda")
    allowed = torch.rand(2, 64, tokens, device="cuda") < 0.3
    mask = torch.rand(2, tokens, device="cuda") < 0.8
    wide = [x.float() for x in (query, key, value)]
    want = routing.row_errors(*wide, rows, allowed, dim**-0.5, mask, kernels=False)
    key[~mask], value[~mask] = torch.nan, torch.nan
    with poisoned():
        got = routing.row_errors(query, key, value, rows, allowed, dim**-0.5, mask, kernels=True)
    return close(got, want, 1e-3 if dtype == FP32 else 3e-2, 1e-6)


def budgets(dtype: torch.dtype, kind: str, tokens: int, block: int, dim: int, soft: bool) -> str:
    """Errors of sampled rows at every budget are those of float32, with NaN where nothing is real."""
    torch.manual_seed(4)
    layout, count = make_layout(kind, tokens, block, 3), 11
    query, key, value = (activations(tokens, 3, dim, dtype) for _ in range(3))
    mask = torch.rand(2, tokens, device="cuda") < 0.8
    rows = torch.randint(tokens, (64,), device="cuda")
    left = torch.randint(count, (2, 3, 64, layout.blocks), device="cuda", dtype=torch.int32)
    words: dict[str, Any] = {"key_mask": mask}
    if soft:
        words |= {"entry": torch.randn(left.shape, device="cuda"), "mean_value": routing.pool(value, layout, mask=mask)}
    wide = [x.float() for x in (query, key, value)]
    want = budget_errors(*wide, rows, layout, left, count, dim**-0.5, **words, kernels=False)
    query[~mask], key[~mask], value[~mask] = torch.nan, torch.nan, torch.nan
    with poisoned():
        got = budget_errors(query, key, value, rows, layout, left, count, dim**-0.5, **words, kernels=True)
    tolerance = (1e-3, 1e-5) if dtype == FP32 else (3e-2, 1e-4)
    return close(got[0], want[0], *tolerance) or close(got[1], want[1], *tolerance)


def moments(dtype: torch.dtype, kind: str, tokens: int, block: int, dim: int) -> str:
    """Means, and means of squares, are the plain ones, with a mask over NaN."""
    torch.manual_seed(5)
    layout, x = make_layout(kind, tokens, block, 3), activations(tokens, 3, dim, dtype)
    mask = torch.rand(2, tokens, device="cuda") < 0.7
    x[~mask] = 0
    want = routing.pool_moments(x, layout, mask=mask, kernels=False)
    x[~mask] = torch.nan
    with poisoned():
        got = routing.pool_moments(x, layout, mask=mask, kernels=True)
    return close(got[0], want[0], 2e-5, 2e-6) or close(got[1], want[1], 2e-5, 2e-6)


def plan_of_auto() -> str:
    """The kernels' estimate is the plain one within rounding of bf16, and so are the blocks that it buys."""
    grid = TokenGrid(5, 30, 52, text=50, text_at="back")
    query, key, value = (activations(grid.tokens, 3, 128, BF16) for _ in range(3))
    method, found = build("auto", density=0.3, block_size=64), []
    for wanted in ("0", "1"):
        call = Call(query, key, value, grid, 128**-0.5, generator=torch.Generator(device="cuda").manual_seed(0))
        with switched(wanted):
            kept = method.budget(call)  # type: ignore[attr-defined]
            mask = method.plan(call).mask
        assert mask is not None
        found.append((kept["errors"], kept["weight"], kept["counts"].float(), mask.density()))
    names = {"errors": (5e-2, 1e-4), "weight": (1e-3, 1e-3), "counts": (5e-2, 1.5), "density": (5e-3, 0)}
    return "; ".join(f"{name}: {wrong}" for (name, tolerance), got, want in zip(names.items(), found[1], found[0],
                     strict=True) if (wrong := close(got, want, *tolerance)))


def exact_mass(dtype: torch.dtype, kind: str, block: int) -> str:
    """The mass from the LSE of the attention kernel is that of the full softmax."""
    torch.manual_seed(3)
    layout = make_layout(kind, 1023, block, 3)
    query, key = (activations(1023, 3, 128, dtype) for _ in range(2))
    full = BlockMask.full(layout, layout)
    _, lse = block_sparse_attention(query, key, key, full, scale=128**-0.5)
    with poisoned():
        mass = routing.listed_mass(query, key, lse, full, 128**-0.5, kernels=True)
        rows = routing.listed_mass(query, key, lse, full, 128**-0.5, per_row=True, kernels=True)
    want = scoring.block_mass(query, key, layout, layout, 128**-0.5)
    want = want.gather(-1, full.lists.expand(2, 3, -1, -1).long())
    return close(mass, want, 2e-3, 1e-5) or close(rows, torch.ones_like(rows), 2e-3, 0)


def never_waits_and_repeats() -> str:
    """No path waits for the device, and repeated calls give equal bits."""
    layout = make_layout("heads", 1023, 64, 3)
    query, key, value = (activations(1023, 3, 128, BF16) for _ in range(3))
    mask = torch.ones(2, 1023, dtype=torch.bool, device="cuda")
    rows = torch.randint(1023, (64,), device="cuda")
    allowed = torch.rand(2, 64, 1023, device="cuda") < 0.3
    lse = torch.randn(2, 3, 1023, device="cuda").abs() + 9
    first: list[Tensor] = []
    for mode in ("default", *["error"] * 10):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found = routing.route(query, key, layout, layout, 0.1, Rule("top_p", 0.4, softmax=True, own=True),
                                  key_mask=mask, kernels=True)
            now = [found.lists, found.whole, found.boundary, found.density(),
                   routing.row_errors(query, key, value, rows, allowed, 0.1, mask, kernels=True),
                   routing.listed_mass(query, key, lse, found, 0.1, key_mask=mask, kernels=True)]
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        first = first or now
        if not all(torch.equal(a, b) for a, b in zip(first, now, strict=True)):
            return "repeated calls differ"
    return ""


def plan_of_rainfusion2() -> str:
    """Switched on by the environment, the method's plan is the plain one but for near ties."""
    grid = TokenGrid(5, 30, 52)
    query, key, value = (activations(grid.tokens, 3, 128, BF16) for _ in range(3))
    method, found = build("rainfusion2", density=0.3), []
    for wanted in ("0", "1"):
        with switched(wanted):
            mask = method.plan(Call(query, key, value, grid, 128**-0.5)).mask
        assert mask is not None
        found.append(mask.to_dense())
    share = (found[0] != found[1]).float().mean().item()
    return "" if share < 1e-4 else f"{share:.2e} of the pairs differ"


def means_beyond_32_bits() -> str:
    """A tensor of more than 2^31 elements: the last block of the last head."""
    x = torch.randn(1, 75_600, 240, 128, device="cuda", dtype=BF16)
    layout = BlockLayout.raster(75_600, 128, "cuda")
    want = x[0, 75_600 // 128 * 128 :, -1].float().mean(0)
    return close(routing.pool(x, layout, kernels=True)[0, -1, -1], want, 2e-5, 2e-6)


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name."""
    found: dict[str, Callable[[], str]] = {}
    for dtype, kind, tokens, block, dim in ((BF16, "raster", 1023, 128, 128), (BF16, "order", 1023, 128, 96),
                                            (FP16, "heads", 113, 64, 64), (FP32, "order", 1023, 128, 128),
                                            (BF16, "order", 300, 48, 40), (BF16, "raster", 1, 128, 128)):
        found[f"block means {kind} {tokens} {block} {dim} {dtype}"] = partial(means, dtype, kind, tokens, block, dim)
    for rule in ("top_k", "top_p", "threshold"):
        for nq, nk in ((1, 1), (5, 7), (33, 591), (9, 1025), (3, 4096), (2, 8192)):
            found[f"lists {rule} {nq}x{nk}"] = partial(lists, rule, nq, nk)
        for kind, dtype in zip(KINDS, (BF16, FP16, FP32), strict=True):
            found[f"masks {rule} {kind} {dtype}"] = partial(masks, dtype, kind, 8191, rule)
    for dtype, tokens, dim in ((BF16, 8191, 128), (FP16, 1023, 64), (FP32, 1023, 128), (BF16, 113, 96)):
        found[f"sampled rows {tokens} {dim} {dtype}"] = partial(sampled_errors, dtype, tokens, dim)
    for case in ((BF16, "order", 8191, 128, 128, True), (FP16, "raster", 1023, 64, 64, False),
                 (FP32, "heads", 1023, 128, 128, True), (BF16, "heads", 113, 16, 96, True)):
        found[f"errors at budgets {' '.join(map(str, case))}"] = partial(budgets, *case)
        found[f"moments {' '.join(map(str, case[:-1]))}"] = partial(moments, *case[:-1])
    for dtype, kind, block in ((BF16, "order", 128), (FP16, "raster", 64), (FP32, "heads", 128)):
        found[f"exact mass {kind} {block} {dtype}"] = partial(exact_mass, dtype, kind, block)
    for check in (never_waits_and_repeats, plan_of_rainfusion2, plan_of_auto,
                  means_beyond_32_bits):
        found[f"routing {check.__name__.replace('_', ' ')}"] = check
    return found


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times the parts of routing and two methods' plans at 21x45x80, 40 heads of 128, bf16, beside plain PyTorch.

    Args:
        log: takes every line.

    Returns:
        One dictionary a row: what, milliseconds, share of the attention at density .2.
    """
    from dit_sparse.eval.speed import median_ms
    from dit_sparse.kernels.portable import gather_slots
    from dit_sparse.kernels.routing import route_triton, select_triton

    torch.manual_seed(0)
    grid, heads, scale = TokenGrid(21, 45, 80), 40, 128**-0.5
    query, key, value = torch.randn(3, 1, grid.tokens, heads, 128, device="cuda", dtype=BF16).unbind(0)
    memory = Memory()
    call = Call(query, key, value, grid, scale, cached=memory.static,
                generator=torch.Generator(device="cuda").manual_seed(0))
    ranked, banded, budgeted = (build(name, density=x) for name, x in (("rainfusion2", 0.2), ("svg", 0.25),
                                                                       ("auto", 0.2)))
    kept = State()
    mask = ranked.plan(call).mask
    assert mask is not None
    layout = mask.query
    assert layout.index is not None
    rule = Rule("top_k", 119)
    time = partial(median_ms, device="cuda", seconds=0.25)
    rows: list[dict[str, Any]] = []

    def row(what: str, function: Callable[[], Any]) -> None:
        took = time(function)
        share = took / rows[0]["ms"] if rows else 1.0
        rows.append({"what": what, "ms": took, "share": share})
        log(f"{took:8.3f} ms  {100 * share:6.2f} %  {what}")

    def planned(method: Any, used: bool, state: State | None = None) -> Any:
        with switched(str(int(used))):  # a fresh call: it keeps the means that it made
            return method.plan(dataclasses.replace(call, state=state or State()))

    log(f"routing at {grid}, {heads} heads of 128, bf16; % of the attention at density .2")
    row("attention, density .2, K and V put in order", lambda: block_sparse_attention(query, key, value, mask))
    index = layout.index.reshape(1, 1, -1)

    def put_in_order() -> Any:
        return gather_slots(key, value, index, layout.slots)

    row("of which K and V put in order", put_in_order)
    row("plan of rainfusion2, then K and V put in order", lambda: (planned(ranked, True), put_in_order()))
    row("plan of svg, then K and V put in order", lambda: (planned(banded, True), put_in_order()))
    for used in (True, False):
        name = "kernels" if used else "plain"
        row(f"pool queries, tile order, {name}", lambda u=used: routing.pool(query, layout, kernels=u))
        row(f"route, top-k 119, {name}",
            lambda u=used: routing.route(query, key, layout, layout, scale, rule, kernels=u))
        row(f"plan of rainfusion2, {name}", lambda u=used: planned(ranked, u))
        row(f"plan of svg, {name}", lambda u=used: planned(banded, u))
        row(f"plan of auto, estimate, {name}", lambda u=used: planned(budgeted, u))
        planned(budgeted, used, kept)
        row(f"plan of auto, budgets kept, {name}", lambda u=used: planned(budgeted, u, kept))
    raster = BlockLayout.raster(grid.tokens, 128, "cuda")
    row("pool queries, raster, kernels", lambda: routing.pool(query, raster, kernels=True))
    block_query, block_key = (routing.pool(x, layout, kernels=True) for x in (query, key))
    lengths = layout.lengths
    scores = block_query @ block_key.transpose(-1, -2) * scale
    near = Rule("top_k", 119, near=1)
    for name, one in (("top-k 119", rule), ("top-k 119, own block first", near),
                      ("top-p", Rule("top_p", 0.5, softmax=True)),
                      ("threshold", Rule("threshold", 0.002, softmax=True))):
        row(f"means to lists, {name}",
            lambda r=one: route_triton(block_query, block_key, scale, r, lengths, lengths, 128))
        row(f"scores to lists, {name}", lambda r=one: select_triton(scores, r, lengths, lengths, 128))
    sampled = torch.randint(grid.tokens, (64,), device="cuda")
    allowed = torch.rand(2, 64, grid.tokens, device="cuda") < 0.3
    for used in (True, False):
        row(f"errors of 64 sampled rows, two candidates, {'kernels' if used else 'plain'}",
            lambda u=used: routing.row_errors(query, key, value, sampled, allowed, scale, kernels=u))
    lse = block_sparse_attention(query, key, value, mask)[1]
    row("exact mass of the listed blocks, density .2",
        lambda: routing.listed_mass(query, key, lse, mask, scale, kernels=True))
    return rows
