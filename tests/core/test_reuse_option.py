"""The option `reuse` of every method: refusals, ages, branches, notes, bytes in the summary, a whole pipeline."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dit_sparse import SparseProc, enable, summary
from dit_sparse import memory as memories
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.commands.request import parse_options, sparse_proc
from dit_sparse.grid import TokenGrid
from dit_sparse.memory import STATIC, Held, Memory, totals
from dit_sparse.methods import all_methods, build
from dit_sparse.methods.base import Call, Method, Plan
from dit_sparse.operators import Drop
from dit_sparse.operators_reuse import ReuseComplement, ReuseHeads
from dit_sparse.replay import record, replay
from dit_sparse.report import Summary
from dit_sparse.reuse import reason_against
from dit_sparse.ring import Share
from dit_sparse.session import RunSession
from tests.test_processor import GRID, info, qkv
from tests.tiny_wan import build_tiny_wan

STEPS = 4


def worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def call_of(grid: TokenGrid) -> Call:
    return Call(*torch.randn(3, 1, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(0)), grid, 0.25)


@dataclasses.dataclass(frozen=True)
class Drawn(Method):
    """A drawn mask, another one at every step; counts how often it was asked."""

    name: ClassVar[str] = "drawn"
    scored: ClassVar[bool] = True
    plans: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def plan(self, call: Call) -> Plan:
        self.plans.append((call.step, call.branch))
        layout = BlockLayout.raster(call.grid.tokens, 32, call.device)
        keep = torch.rand(1, 2, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(call.step)) < 0.5
        return Plan(BlockMask.from_dense(keep, layout, layout))


def session(**options: Any) -> RunSession:
    made = RunSession(SparseProc(Drawn(), dense_steps=0, dense_layers=0, **options))
    made.layers = 3
    return made


def densities(s: RunSession) -> list[float]:
    return [round(float(record.density), 3) for record in s.report.records]


def test_ages_are_counted_in_steps_and_a_skipped_refresh_comes_with_the_next_step() -> None:
    s = session(reuse="complement", reuse_every=3)
    for step in (0, 1, 2, 5, 6, 7, 8):  # a step cache skipped 3 and 4
        s.begin_forward(info(step, new_run=step == 0))
        s.attention(0, *qkv(), None, 0.25)
    assert [d == 1 for d in densities(s)] == [True, False, False, True, False, False, True]
    assert s.method.plans == [(0, "cond"), (5, "cond"), (8, "cond")], "a mask stays as long as its complement"


def computed_at(s: RunSession, places: list[tuple[int, str, TokenGrid]]) -> list[float]:
    """Densities of calls at (step, branch, grid); step 0 of the first branch begins a run."""
    found = []
    for step, branch, grid in places:
        s.begin_forward(info(step, branch=branch, grid=grid, new_run=(step, branch) == (0, "cond")))
        s.attention(0, *qkv(grid.video), None, 0.25)
        found.append(float(s.report.records[-1].density))
    return found


@pytest.mark.parametrize("reuse", ["complement", "heads"])
def test_branches_are_apart_and_a_new_run_or_resolution_starts_anew(reuse: str) -> None:
    s, other = session(reuse=reuse, reuse_every=9, reuse_drift=2.0), TokenGrid(3, 5, 7)
    steps = [(step, branch, GRID) for step in range(4) for branch in ("cond", "uncond")]
    whole = 1.0 if reuse == "complement" else 0.0  # all pairs where the rest is computed, none where heads are kept
    found = computed_at(s, steps)
    want = [True, False, False, False] if reuse == "complement" else [False, False, True, True]
    assert [d == whole for d in found[::2]] == want == [d == whole for d in found[1::2]]
    again = computed_at(s, [(4, "cond", other), (5, "cond", other), (0, "cond", GRID)])
    first = reuse == "complement"
    assert [d == whole for d in again] == [first, False, first], "another resolution, and another run"


@pytest.mark.parametrize(("options", "words"), [
    ({"reuse": "mask"}, ["reuse", "complement", "heads"]), ({"reuse": True}, ["reuse", "complement"]),
    ({"reuse_every": 0}, ["reuse_every", "1"]), ({"reuse_every": 2.5}, ["reuse_every"]),
    ({"reuse_drift": -1}, ["reuse_drift", "[0, 2]"]), ({"reuse_drift": "a"}, ["reuse_drift"]),
    ({"method": "sol", "reuse": "complement"}, ["sol", "Soft", "heads"]),
    ({"method": "psa", "reuse": "heads"}, ["psa", "lists"]),
    ({"method": "skip_softmax", "reuse": "complement"}, ["skip_softmax", "reuse=None"]),
    ({"method": "rettention", "reuse": "heads"}, ["rettention", "reuse=None"]),
])
def test_what_cannot_be_reused_is_refused_in_one_line(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        SparseProc(**options)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_every_method_says_which_operators_it_has() -> None:
    """What `operators` names is what plans carry: else a kind of reuse is refused, or does nothing."""
    for name in sorted(set(all_methods()) - {"dense"}):
        method = build(name)
        plan = method.plan(call_of(TokenGrid(5, 7, 9)))
        assert type(plan.operator) in method.operators(), name


@pytest.mark.parametrize(("options", "note"), [
    ({"reuse_every": 3}, "reuse_every=3 without effect"),
    ({"reuse": "complement", "reuse_drift": 0.3}, "reuse_drift=0.3 has no effect"),
    ({"reuse": "complement", "reuse_every": 1}, "every sparse call is dense"),
    ({"reuse": "heads", "reuse_every": 1}, "nothing is reused"),
    ({"reuse": "complement", "refresh": 2, "reuse_every": 3}, "refresh=2 has no effect"),
    ({"reuse": "complement"}, ""),
    ({"reuse": "heads"}, ""),
])
def test_options_without_effect_are_noted(options: dict, note: str) -> None:
    s = session(**options)
    s.begin_forward(info(0, new_run=True))
    s.attention(0, *qkv(), None, 0.25)
    assert note in "\n".join(s.notes()) and bool(note) == bool(s.notes())


def test_a_plan_whose_operator_cannot_is_noted() -> None:
    s = session(reuse="complement")
    object.__setattr__(s.method, "plan", lambda call: dataclasses.replace(Drawn.plan(s.method, call), operator=Own()))
    s.begin_forward(info(0, new_run=True))
    s.attention(0, *qkv(), None, 0.25)
    assert any("had no effect on 1 call(s): its own" in note for note in s.notes())


@dataclasses.dataclass(frozen=True)
class Own(Drop):
    """Accounts for the rest."""

    title: ClassVar[str] = "its own"
    reuses: ClassVar[tuple[str, ...]] = ()


def test_ranks_that_share_rows_are_no_place_for_it() -> None:
    share = Share(0, 2)
    assert not share.refusal(Drop())
    assert all("ring" in share.refusal(operator) for operator in (ReuseComplement(), ReuseHeads()))


def test_the_command_lines_take_the_options() -> None:
    proc = sparse_proc("svg", parse_options(["reuse=heads", "reuse_every=3", "reuse_drift=0.05"]))
    assert (proc.settings.reuse, proc.settings.reuse_every, proc.settings.reuse_drift) == ("heads", 3, 0.05)


# -- a pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, method: str, steps: int = STEPS, **options: Any) -> Tensor:
    enable(pipe, method, **({"dense_steps": 0, "dense_layers": 0} | options))
    return again(pipe, steps)


def again(pipe: Any, steps: int = STEPS) -> Tensor:
    return pipe("a red circle", height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16).frames


def test_a_pipeline_that_refreshes_at_every_step_is_the_dense_one(pipe: Any) -> None:
    dense, sparse = run(pipe, "dense"), run(pipe, "svg", density=0.3)
    exact = run(pipe, "svg", density=0.3, reuse="complement", reuse_every=1)
    assert worst(exact, dense) <= 1e-4 * float(dense.abs().max()) < worst(sparse, dense)
    near = run(pipe, "svg", density=0.3, reuse="complement", refresh=2)
    assert worst(near, dense) < worst(sparse, dense)
    assert all(density == 1 for step, density in summary(pipe).per_step.items() if step % 2 == 0)
    assert all(density < 0.9 for step, density in summary(pipe).per_step.items() if step % 2)


@pytest.mark.parametrize("reuse", ["complement", "heads"])
def test_bytes_are_in_the_summary_by_kind_and_offload_changes_nothing(pipe: Any, reuse: str) -> None:
    options = {"density": 0.3, "reuse": reuse, "reuse_drift": 2.0}
    plain, report = run(pipe, "svg", **options), summary(pipe)
    assert torch.equal(run(pipe, "svg", offload=True, **options), plain)
    layers, branches, heads, dim = 2, 2, 2, 32
    rows = layers * branches * heads * report.tokens
    kinds = report.memory
    assert kinds["outputs"] == {"device": 0, "cpu": rows * dim * 4}
    if reuse == "complement":
        assert kinds["LSE"]["cpu"] == rows * 4 and kinds["masks"]["cpu"] > 0
    else:
        assert kinds["statistics"]["cpu"] > 0 and "LSE" not in kinds
        assert report.per_step[2] == 0 and report.density == pytest.approx(0.75 * report.per_step[0])
    assert report.memory_bytes == sum(sum(held.values()) for held in kinds.values())
    assert "kept across steps: outputs" in str(report) and report.to_dict()["memory"] == kinds


@pytest.mark.parametrize(("method", "kinds"), [
    ("adaspa", {"LSE", "masks"}), ("sparsed", {"masks"}), ("rettention", {"outputs", "statistics"}),
])
def test_what_methods_keep_is_counted_by_kind(pipe: Any, method: str, kinds: set[str]) -> None:
    run(pipe, method, dense_steps=1)
    report = summary(pipe)
    assert kinds <= set(report.memory) <= kinds | {STATIC, "statistics"}
    if "LSE" in kinds:
        assert report.memory["LSE"]["cpu"] == 2 * 2 * 2 * report.tokens * 4  # layers, branches, heads


def test_bytes_are_told_apart_by_kind_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor stands in for one on a GPU."""
    monkeypatch.setattr(memories, "_to_host", lambda t: torch.zeros(t.shape, dtype=t.dtype))
    memory = Memory(offload=True)
    memory.static("table", lambda: torch.zeros(3, device="meta"))
    memory.put("a", torch.zeros(8, device="meta"), step=0, kind="outputs")
    memory.put("b", torch.zeros(8, device="meta"), step=0, kind="LSE")
    assert memory.kinds() == {STATIC: Held(12, 0), "outputs": Held(0, 32), "LSE": Held(0, 32)}
    memory.note()
    memory.reset()
    assert memory.kinds() == {STATIC: Held(12, 0)}
    found = totals([memory, Memory()])
    assert found["outputs"] == {"device": 0, "cpu": 32}
    text = str(Summary("x", device="cuda:0", memory=found, memory_bytes=96))
    assert "outputs 0.0 MiB in CPU memory" in text and "layouts and tables 0.0 MiB" in text


@pytest.mark.parametrize("reuse", ["complement", "heads"])
def test_a_replayed_run_reuses_as_the_recorded_one(pipe: Any, reuse: str) -> None:
    options = {"density": 0.3, "reuse": reuse, "reuse_drift": 2.0}
    run(pipe, "svg", **options)
    with record(pipe) as recording:
        want = again(pipe)
    with replay(pipe, recording):
        assert torch.equal(again(pipe), want)
    assert summary(pipe).density < 1 and not summary(pipe).fallbacks


def test_reuse_goes_with_a_step_cache(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    run(pipe, "svg", 8, density=0.3, reuse="complement", step_cache=FirstBlockCacheConfig(threshold=0.9))
    report = summary(pipe)
    assert report.steps == 8 and report.calls < 8 * 2 * 2 and not report.fallbacks


def test_the_document_names_the_methods_that_complement_does_not_fit() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "reuse.md").read_text()
    sentence = text.split("It needs a method that drops")[1].split("account for the rest")[0]
    refused = {name for name in all_methods() if reason_against(build(name), "complement")}
    assert set(re.findall(r"`(\w+)`", sentence)) == refused
