"""The one path of a call: schedule, plan, remembered masks, fallbacks, non-finite output, counting."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.base import Call, Method, Plan
from dit_sparse.operators import Drop
from dit_sparse.processor import SparseProc, methods
from dit_sparse.report import summarize
from dit_sparse.session import RunSession, SparseFallbackError, key_mask_of

GRID = TokenGrid(4, 6, 8)


@dataclasses.dataclass(frozen=True)
class Diagonal(Method):
    """Every query block sees only its own block; counts how often it was asked."""

    name: ClassVar[str] = "diagonal"
    scored: ClassVar[bool] = True
    plans: list[int] = dataclasses.field(default_factory=list)

    def plan(self, call: Call) -> Plan:
        self.plans.append(call.step)
        layout = BlockLayout.raster(call.grid.tokens, 32, call.device)
        keep = torch.eye(layout.blocks, dtype=torch.bool)[None, None]
        return Plan(BlockMask.from_dense(keep, layout, layout))


@dataclasses.dataclass(frozen=True)
class Watcher(Diagonal):
    """Keeps the output of dense calls, and counts one in four of its pairs."""

    name: ClassVar[str] = "watcher"
    observes: ClassVar[bool] = True
    seen: list[tuple] = dataclasses.field(default_factory=list)

    def observe(self, call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if out.isnan().any():
            raise RuntimeError("cannot look at this")
        call.state.keep("out", out)
        self.seen.append((call.layer, call.step, call.branch))

    def plan(self, call: Call) -> Plan:
        self.seen.append((call.layer, call.step, call.state.age("out")))
        return dataclasses.replace(super().plan(call), operator=Quarter())


@dataclasses.dataclass(frozen=True)
class Quarter(Drop):
    """Says that it computed a quarter."""

    def density(self, mask: BlockMask) -> float:
        return 0.25


def session(method: Method | None = None, **options) -> RunSession:
    options = {"dense_steps": 0, "dense_layers": 0} | options
    made = RunSession(SparseProc(method or Diagonal(), **{k: v for k, v in options.items() if k == "x"}))
    made.settings = dataclasses.replace(made.settings, **options)
    made.schedule = made.settings.schedule()
    made.layers = 3
    return made


def info(step: int = 0, grid: TokenGrid | None = GRID, new_run: bool = False, **kw) -> ForwardInfo:
    return ForwardInfo(grid=grid, reason="" if grid else "no grid here", step=step, num_steps=kw.pop("num_steps", 10),
                       branch=kw.pop("branch", "cond"), new_run=new_run, family="wan")


def qkv(length: int = GRID.video, seed: int = 0) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, length, 2, 16, generator=gen) for _ in range(3))


def test_sparse_call_equals_masked_softmax_and_is_counted():
    s = session()
    s.begin_forward(info(new_run=True))
    q, k, v = qkv()
    out = s.attention(1, q, k, v, None, 0.25)
    block = torch.arange(GRID.video) // 32
    keep = block[:, None] == block
    ref = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=keep, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(out, ref, atol=1e-5, rtol=1e-5)
    total = summarize("x", [s.report])
    assert (total.calls, total.sparse_calls, total.fallbacks) == (1, 1, {})
    assert total.density == pytest.approx(keep.float().mean().item())


def test_schedule_makes_leading_steps_and_layers_dense():
    s = session(dense_steps=0.2, dense_layers=1)
    for step in range(10):
        s.begin_forward(info(step, new_run=step == 0))
        for layer in range(3):
            s.attention(layer, *qkv(), None, 0.25)
    total = summarize("x", [s.report])
    assert total.sparse_calls == 8 * 2 and total.dense_calls == 30 - 16
    assert total.per_layer[0] == 1.0 and total.per_step[0] == total.per_step[1] == 1.0 > total.per_step[2]
    assert total.density == pytest.approx((14 + 16 * total.sparse_density) / 30)


def test_refresh_keeps_masks_by_age_even_when_steps_are_skipped():
    s = session(refresh=3)
    for step in (0, 1, 2, 3, 7, 8):  # a step cache skipped 4, 5 and 6
        s.begin_forward(info(step, new_run=step == 0))
        s.attention(0, *qkv(), None, 0.25)
    assert s.method.plans == [0, 3, 7]
    assert summarize("x", [s.report]).reused_masks == 3
    s.begin_forward(info(0, new_run=True))
    s.attention(0, *qkv(), None, 0.25)
    assert s.method.plans[-1] == 0, "a new run starts with fresh masks"


def test_branches_and_layers_keep_their_own_masks():
    s = session(refresh=5)
    for branch in ("cond", "uncond"):
        s.begin_forward(info(0, branch=branch))
        for layer in (0, 1):
            s.attention(layer, *qkv(), None, 0.25)
    assert len(s.method.plans) == 4


@pytest.mark.parametrize(("make", "reason"), [
    (lambda s: (info(grid=None), qkv(), None), "no grid here"),
    (lambda s: (info(), qkv(GRID.video + 5), None), "5 tokens beyond the grid"),
    (lambda s: (info(), qkv(GRID.video - 1), None), "fewer than the grid"),
    (lambda s: (info(), qkv(), torch.zeros(1, 1, 1, GRID.video)), "not a bool one"),
    (lambda s: (info(), qkv(), torch.ones(1, 1, GRID.video, GRID.video, dtype=torch.bool)), "not a mask of keys"),
])
def test_a_call_that_cannot_be_sparse_is_dense_counted_and_refused_when_strict(make, reason):
    for strict in (False, True):
        s = session(strict=strict)
        where, (q, k, v), mask = make(s)
        s.begin_forward(where)
        if strict:
            with pytest.raises(SparseFallbackError, match=reason):
                s.attention(0, q, k, v, mask, 0.25)
            continue
        out = s.attention(0, q, k, v, mask, 0.25)
        ref = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=0.25).transpose(1, 2)
        torch.testing.assert_close(out, ref, atol=1e-5, rtol=1e-5)
        (found, count), = summarize("x", [s.report]).fallbacks.items()
        assert reason in found and count == 1


def test_a_failing_plan_falls_back_with_its_first_line():
    class Failing(Diagonal):
        def plan(self, call):
            raise ValueError("window=9 is larger than the grid\nmore")

    s = session(Failing())
    s.begin_forward(info())
    s.attention(0, *qkv(), None, 0.25)
    assert summarize("x", [s.report]).fallbacks == {"ValueError: window=9 is larger than the grid": 1}


def test_non_finite_output_makes_the_layer_dense_from_the_next_step_on():
    s = session()
    q, k, v = qkv()
    bad = v.clone()
    bad[0, 3, 1, 2] = float("inf")
    for step, value in enumerate((bad, v, v)):
        s.begin_forward(info(step, new_run=step == 0))
        for layer in (0, 1):
            s.attention(layer, q, k, value if layer == 0 else v, None, 0.25)
    total = summarize("x", [s.report])
    assert total.fallbacks == {"non-finite output at an earlier step": 2}
    assert total.per_layer[0] > total.per_layer[1]
    s.begin_forward(info(0, new_run=True))
    s.attention(0, q, k, v, None, 0.25)
    assert summarize("x", [s.report]).fallbacks == {}, "a new run trusts the layer again"


def test_check_call_repeats_the_call_dense():
    s = session(check="call")
    q, k, v = qkv()
    v[0, 0, 0, 0] = float("nan")
    s.begin_forward(info())
    s.attention(0, q, k, v, None, 0.25)
    assert summarize("x", [s.report]).fallbacks == {"non-finite output": 1}


def test_key_mask_of_reads_masks_of_keys_only():
    keys = torch.rand(2, 7) > 0.5
    for shape in ((2, 7), (2, 1, 7), (2, 1, 1, 7)):
        got, reason = key_mask_of(keys.reshape(shape), 2, 7)
        assert not reason and torch.equal(got, keys)
    got, _ = key_mask_of(keys[:1].reshape(1, 1, 1, 7), 2, 7)
    assert got.shape == (2, 7)
    assert key_mask_of(keys, 2, 8)[1] and key_mask_of(keys.float(), 2, 7)[1]


@pytest.mark.parametrize(("options", "words"), [
    ({"method": "svgg"}, ["svgg", "radial"]),
    ({"method": "svg", "densty": 0.2}, ["densty", "density", "dense_steps"]),
    ({"method": "svg", "density": 0}, ["density"]),
    ({"method": "svg", "density": 1.5}, ["density"]),
    ({"method": "svg", "density": "a"}, ["density"]),
    ({"dense_steps": -0.1}, ["dense_steps"]),
    ({"dense_steps": 1.2}, ["dense_steps"]),
    ({"dense_layers": -1}, ["dense_layers"]),
    ({"refresh": 0}, ["refresh"]),
    ({"backend": "cuda9"}, ["backend", "triton"]),
    ({"check": "never"}, ["check", "step"]),
    ({"strict": 1}, ["strict"]),
    ({"preset": "wan"}, ["preset"]),
    ({"method": 3}, ["method", "svg"]),
])
def test_wrong_configuration_raises_one_line_naming_what_is_allowed(options, words):
    with pytest.raises(ValueError) as error:
        SparseProc(**options)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_default_is_auto_with_the_schedule_of_the_family():
    proc = SparseProc()
    assert proc.method.name == "auto" and (proc.method.max_error, proc.method.density) == (0.05, None)
    assert SparseProc(density=0.3).method.density == 0.3
    for family, dense_layers in (("wan", 1), ("cogvideox", 0), ("", 1)):
        fitted = proc.fitted(family)
        assert (fitted.settings.dense_steps, fitted.settings.dense_layers) == (0.2, dense_layers)
        assert (fitted is proc) == (dense_layers == 1) and ("dense_layers=0" in repr(fitted)) == (dense_layers == 0)
    for given in (SparseProc(dense_steps=2), SparseProc("auto"), SparseProc("svg")):
        assert given.fitted("cogvideox") is given, "what the user says holds"


def test_where_the_default_cannot_serve_svg_does_and_says_so():
    ranks = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=1, ulysses_degree=2))
    for proc in (SparseProc().fitted("cogvideox", ranks), SparseProc(reuse="complement")):
        assert proc.method.name == "svg" and proc.method.density == 0.25
        assert (proc.settings.dense_steps, proc.settings.dense_layers) == (0.2, 1)
        assert proc.note.startswith("svg in the place of the default method") and proc.note in RunSession(proc).notes()
    assert SparseProc(density=0.4).fitted("wan", ranks).method.density == 0.4
    for proc in (SparseProc("auto"), SparseProc(max_error=0.1)):
        with pytest.raises(ValueError, match="auto"):
            proc.fitted("wan", ranks)
    with pytest.raises(ValueError, match="complement"):
        SparseProc("auto", reuse="complement")


def test_methods_lists_name_paper_parts_and_options():
    listed = {m.name: m for m in methods()}
    assert {"dense", "radial", "gna", "svg", "rainfusion"} <= set(listed)
    assert listed["svg"].arxiv == "2502.01776" and "density" in listed["svg"].options
    for item in listed.values():
        assert item.title and (item.name == "dense" or set(item.parts) == {
            "order", "score", "select", "operate", "remember"}), item


def test_methods_can_be_called_whatever_was_imported_before():
    code = ("import dit_sparse; {}; print([m.name for m in dit_sparse.methods()]);"
            "from dit_sparse import methods as m; m()")
    for before in ("pass", "dit_sparse.SparseProc", "import dit_sparse.methods.svg", "from dit_sparse import methods"):
        done = subprocess.run([sys.executable, "-c", code.format(before)], capture_output=True, text=True)
        assert "radial" in done.stdout, (before, done.stderr)


def test_a_method_sees_dense_calls_and_keeps_what_it_wants_until_the_run_is_over():
    method = Watcher()
    s = session(method, dense_steps=2)
    for step in range(3):
        s.begin_forward(info(step, new_run=step == 0))
        s.attention(1, *qkv(), None, 0.25)
    assert method.seen == [(1, 0, "cond"), (1, 1, "cond"), (1, 2, 1)]
    assert summarize("x", [s.report]).density == pytest.approx((1 + 1 + 0.25) / 3), "the operator's own density"
    s.begin_forward(info(5, new_run=True))
    s.attention(1, *qkv(), None, 0.25)
    assert method.seen[-1] == (1, 5, None)


def test_what_a_method_trips_over_while_it_looks_is_counted():
    s = session(Watcher(), dense_steps=2)
    s.begin_forward(info(0, new_run=True))
    q, k, v = qkv()
    s.attention(1, q, k, torch.full_like(v, torch.nan), None, 0.25)
    assert list(summarize("x", [s.report]).fallbacks) == ["RuntimeError: cannot look at this"]
