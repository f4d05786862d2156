"""Sparse attention together with everything else: every pair of values of the axes, in a cover of few cases."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

from dit_sparse import Summary, summary
from dit_sparse.linear8 import Fp8Linear, fp8_linears
from dit_sparse.replay import Recording, overlap
from tests.composition import hosts
from tests.composition.cases import AXES, REFUSED, Case, Refusal
from tests.composition.compare import DIFFERENCE, difference, plain, problem_live, problem_replayed, ran, replayed

NEVER_COMPILED = ("magcache",)  # Diffusers keeps the compiler out of blocks with this hook


def one(method: str, cache: str, guidance: str) -> Case:
    return Case(method, cache, "eager", "no LoRA", guidance, "no offload", "bf16")


def assert_composed(case: Case, pipe: Any, report: Summary, graphs: hosts.Graphs) -> None:
    """Everything that the case names was really on, and nothing fell back."""
    model = pipe.transformer
    assert not report.fallbacks and report.sparse_calls and case.method in report.method
    assert (report.skipped_calls > 0) == (case.cache != "none")
    assert (graphs.count > 0) == (case.run == "compiled" and case.cache not in NEVER_COMPILED)
    assert any(isinstance(part, Fp8Linear) for part in model.modules()) == (case.linear == "fp8")
    assert any("lora_A" in name for name, _ in model.named_modules()) == (case.lora == "LoRA" and case.linear == "bf16")
    hooks = {name for part in model.modules() if (held := part.__dict__.get("_diffusers_hook")) for name in held.hooks}
    assert any("group_offload" in name for name in hooks) == (case.offload == "group")
    assert all(weight.is_meta for weight in model.parameters()) == (case.offload == "sequential")
    assert model.dtype == torch.bfloat16


@pytest.fixture
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hooks of caches and offloading make Dynamo compile a block again for most steps: it gives up earlier here."""
    torch._dynamo.reset()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep its every line
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("few_graphs")
def test_a_composed_run_is_the_plain_one(case: Case) -> None:
    graphs = hosts.Graphs()
    pipe, want = hosts.compose(case, backend=graphs), plain(case)
    live = ran(pipe, case.guidance)
    assert_composed(case, pipe, live.summary, graphs)
    assert problem_live(live, want) == ""
    again = replayed(pipe, case.guidance, want.masks)
    if case.exact:
        assert torch.equal(again, want.out)
    else:
        assert problem_replayed(case, again, want) == ""


# -- step caches: what a cached run is compared with ---------------------------------------------------------------

CACHED = [(cache, guidance) for cache in AXES["step cache"][1:] for guidance in AXES["guidance"]
          if not any(refusal.concerns([("step cache", cache), ("guidance", guidance)]) for refusal in REFUSED)]


@pytest.mark.parametrize(("cache", "guidance"), CACHED)
def test_with_every_block_kept_a_cached_run_is_the_dense_cached_one(cache: str, guidance: str) -> None:
    """The sparse path is in the place of the dense one: at which steps it runs is the cache's business alone."""
    dense = hosts.compose(one("dense", cache, guidance), torch.float32)
    want = hosts.run(dense, guidance)
    everything = hosts.compose(one("svg", cache, guidance), torch.float32, density=1.0)
    out = hosts.run(everything, guidance)
    assert difference(out, want) < 1e-4 and summary(everything).sparse_calls
    assert summary(everything).skipped_per_step == summary(dense).skipped_per_step != {}


@pytest.mark.parametrize(("cache", "guidance"), CACHED)
def test_masks_stay_true_when_steps_are_skipped(cache: str, guidance: str) -> None:
    """Every call that is computed knows its step; up to the first skipped one the masks are those without a cache."""
    alone = plain(one("svg", "none", guidance))
    cached = plain(one("svg", cache, guidance))
    assert cached.masks.keys() < alone.masks.keys() or cache == "fastercache"
    first = min(cached.summary.skipped_per_step)
    before = [Recording({place: kept for place, kept in masks.items() if place.step < first})
              for masks in (alone.masks, cached.masks)]
    assert overlap(*before).share == 1 and before[0].keys() == before[1].keys()
    assert difference(cached.out, alone.out) > 0


# -- the comparison can see what it is for -------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", AXES["guidance"])
def test_a_wrong_mask_or_a_lost_lora_would_be_seen(guidance: str) -> None:
    base = plain(one("svg", "none", guidance))
    assert difference(plain(one("radial", "none", guidance)).out, base.out) > 2 * DIFFERENCE
    assert difference(plain(one("svg", "none", guidance)._replace(lora="LoRA")).out, base.out) > 2 * DIFFERENCE
    fp8 = difference(plain(one("svg", "none", guidance)._replace(linear="fp8")).out, base.out)
    assert 0.005 < fp8 < 0.2


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_what_is_refused_is_refused_with_the_reason(refusal: Refusal) -> None:
    values = {axis: values[-1] if axis == "method" else values[0] for axis, values in AXES.items()}
    case = Case(*(values | dict(refusal.values)).values())
    with pytest.raises(ValueError, match=refusal.match) as error:
        hosts.compose(case)
    assert "\n" not in str(error.value)


def test_a_lora_that_is_not_fused_is_refused_before_8_bits() -> None:
    """Its own small matrices would be taken for layers, and its input rounded to whole numbers."""
    pipe = hosts.build("separate")
    hosts.add_lora(pipe, fuse=False)
    with pytest.raises(ValueError, match=r"belongs to a LoRA .*fuse_lora\(\)"):
        fp8_linears(pipe)
    assert not any(isinstance(part, Fp8Linear) for part in pipe.transformer.modules())


def test_a_lora_loaded_after_8_bits_is_refused() -> None:
    pipe = fp8_linears(hosts.build("separate"))
    with pytest.raises(ValueError, match="Fp8Linear"):
        hosts.add_lora(pipe, fuse=False)


def test_8_bits_after_sequential_offloading_is_refused() -> None:
    pipe = hosts.compose(one("svg", "none", "separate")._replace(offload="sequential"))
    with pytest.raises(ValueError, match="device meta"):
        fp8_linears(pipe)


def test_compiled_pieces_of_bound_and_untouched_processors_are_kept_apart() -> None:
    """Offloading hooks cut Wan's block, so that its two processors, of one class, are compiled each by itself."""
    torch._dynamo.reset()
    inputs = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.full((1,), 500.0),
              "encoder_hidden_states": torch.randn(1, 8, 32)}
    outputs = []
    for run in AXES["run"]:
        case = one("radial", "none", "separate")._replace(run=run, offload="sequential")
        model = hosts.compose(case, torch.float32).transformer
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
            outputs.append(model(**inputs, return_dict=False)[0])
    assert torch.equal(*outputs)
    torch._dynamo.reset()
