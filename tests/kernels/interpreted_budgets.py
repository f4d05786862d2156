"""The kernels of budgets in Triton's interpreter. Run by test_routing.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from dit_sparse import routing
from dit_sparse.budgets import budget_errors
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.base import Call
from tests.kernels.interpreted_routing import FP16, FP32, INF, NAN, make_layout, same, strided

pytestmark = pytest.mark.usefixtures("poisoned_memory")


BUDGETED = [
    (113, 5, 64, FP32, "raster", 32, False, True), (300, 40, 96, FP16, "order", 64, True, True),
    (1, 1, 64, FP32, "raster", 16, False, False), (150, 70, 128, FP16, "order", 128, False, False),
    (63, 7, 40, FP32, "heads", 16, True, True),
]


@pytest.mark.parametrize("case", BUDGETED, ids=lambda case: "-".join(map(str, case)))
def test_errors_at_every_budget_are_those_of_the_twin(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.kernels import budgets as kernels

    tokens, count, dim, dtype, kind, block, masked, soft = case
    torch.manual_seed(9)
    layout, scale, budgets = make_layout(kind, tokens, block, 3), 0.3, 5
    query, key, value = (strided(x) for x in torch.randn(3, 2, tokens, 3, dim).to(dtype).unbind(0))
    rows, mask = torch.randint(tokens, (count,)), None
    if masked:
        mask = torch.rand(2, tokens) < 0.7
        mask[:, tokens // 2] = True
        query[~mask], key[~mask], value[~mask] = NAN, NAN, NAN
    left = torch.randint(budgets, (2, 3, count, layout.blocks), dtype=torch.int32)
    entry = mean_value = None
    if soft:
        mean_value = routing.pool(value, layout, mask=mask)
        entry = torch.randn(left.shape)
        entry[..., -1] = -INF
    words: dict[str, Any] = dict(entry=entry, mean_value=mean_value, key_mask=mask)
    wide = [x.float() for x in (query, key, value)]
    want = budget_errors(*wide, rows, layout, left, budgets, scale, **words)
    assert all(x.isfinite().all() for x in want) and (want[1] > 0).any()
    for most in (2**28, 1):
        monkeypatch.setattr(kernels, "_BYTES_AT_ONCE", most)
        got = budget_errors(query, key, value, rows, layout, left, budgets, scale, kernels=True, **words)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4 if dtype == FP32 else 5e-3, atol=1e-5)
        assert not got[0][..., -1].any()


@pytest.mark.parametrize("soft", [True, False])
def test_auto_plans_the_same_mask(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.methods import auto, base

    torch.manual_seed(10)
    grid = TokenGrid(3, 6, 10, text=20, text_at="back")
    query, key, value = torch.randn(3, 1, grid.tokens, 2, 64).unbind(0)
    key_mask = torch.rand(1, grid.tokens) < 0.9
    key[~key_mask], value[~key_mask] = NAN, NAN
    method = auto.Auto(density=0.4, block_size=16, rows=20, soft=soft)
    found = []
    for used in (False, True):
        generator = torch.Generator().manual_seed(1)
        call = Call(query, key, value, grid, 0.125, key_mask=key_mask, generator=generator)
        with monkeypatch.context() as patch:
            for module, name in ((auto, "route_means"), (auto, "budget_errors"), (base, "pool"),
                                 (base, "pool_moments")):
                patch.setattr(module, name, functools.partial(getattr(module, name), kernels=used))
            found.append((method.budget(call), method.plan(call).mask))
    (plain, want), (kernels, got) = found
    torch.testing.assert_close(kernels["errors"], plain["errors"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(kernels["weight"], plain["weight"], rtol=1e-4, atol=1e-5)
    assert torch.equal(kernels["counts"], plain["counts"]) and same(got, want)
