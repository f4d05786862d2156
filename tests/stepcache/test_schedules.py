"""Which steps each cache computes, held against its paper's arithmetic; and what a skipped step gives."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from dit_sparse import enable
from dit_sparse.stepcache import TeaCacheConfig, apply_teacache, coefficients, remove_teacache
from dit_sparse.stepcache.resolve import FittedMagCacheConfig
from dit_sparse.stepcache.teacache import TeaCacheState, polynomial
from tests.bridge.hosts import HOSTS, call
from tests.stepcache.runs import ALL, Pipe, deeper, two_branches

PUBLISHED = {row["name"]: row["coefficients"] for row in coefficients.published("teacache")}


def host(name: str):
    return next(h for h in HOSTS if h.name == name)


def counted(model, blocks) -> list[int]:
    """Counts the calls of each block's attention from now on."""
    counts = [0] * len(blocks)
    for i, block in enumerate(blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


@pytest.mark.parametrize(("name", "x", "value"), [
    ("flux.1-dev", 0.05, 0.180503), ("flux.1-dev", 0.10, 0.206847), ("flux.1-dev", 0.15, 0.242626),
    ("flux.1-dev", 0.20, 0.261995), ("wan2.1-t2v-14b", 0.05, 0.218949), ("hunyuanvideo", 0.1, 0.129196),
])
def test_the_published_polynomials(name: str, x: float, value: float) -> None:
    assert polynomial(PUBLISHED[name], x) == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(("threshold", "computed"), [
    (0.4, [*range(0, 28, 2), 27]), (0.6, list(range(0, 28, 3))), (0.8, [*range(0, 28, 4), 27]),
])
def test_teacache_with_a_constant_change(threshold: float, computed: list[int]) -> None:
    """A change of 0.1 at every step, 28 steps, FLUX."""
    state = TeaCacheState()
    config = TeaCacheConfig(coefficients=PUBLISHED["flux.1-dev"], threshold=threshold)
    found, signal = [], torch.ones(4)
    for step in range(28):
        if not state.decide(config, step, 28, signal):
            found.append(step)
            state.residual = (signal, None)
        signal = signal * 1.1
    assert found == computed


def test_the_previous_signal_moves_on_at_skipped_steps() -> None:
    """Two small changes are two estimates, not one of the whole way since the last computed step."""
    state, config = TeaCacheState(), TeaCacheConfig(coefficients=(1.0, 0.0), threshold=10.0)
    for step, value in enumerate((1.0, 1.1, 1.21)):
        state.decide(config, step, None, torch.tensor([value]))
        state.residual = (torch.zeros(1), None)
    assert state.accumulated == pytest.approx(0.2, abs=1e-6)


def flux_steps(config: TeaCacheConfig, scales: list[float]) -> tuple[list[int], list[torch.Tensor], torch.nn.Module]:
    h = host("flux")
    model, inputs = h.build(), h.inputs(1)
    counts = counted(model, model.transformer_blocks)
    apply_teacache(model, config)
    computed, results = [], []
    for step, scale in enumerate(scales):
        before = counts[0]
        with model.cache_context("cond"):
            results.append(call(model, inputs | {"timestep": torch.tensor([0.5 * scale])}))
        # The signal itself is the first block's norm: a computed step takes it twice.
        computed += [step] if counts[0] - before == 2 else []
    return computed, results, model


def test_teacache_on_a_model() -> None:
    length = 6
    config = TeaCacheConfig(coefficients=(0.0,), threshold=1.0, num_inference_steps=length)
    computed, results, model = flux_steps(config, [1.0] * length)
    assert computed == [0, 5], "nothing changes: the first and the last step alone"
    for got in results:  # with the same input a skipped step is the computed one, up to the rounding of one sum
        torch.testing.assert_close(got, results[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="No cache context"):
        call(model, host("flux").inputs(1))
    remove_teacache(model)
    assert torch.equal(call(model, host("flux").inputs(1)), call(host("flux").build(), host("flux").inputs(1)))


def test_teacache_always_computes_at_threshold_0() -> None:
    config = TeaCacheConfig(coefficients=(1.0, 0.0), threshold=0.0)
    computed, results, _ = flux_steps(config, [1.0, 0.9, 0.8, 0.7])
    plain = host("flux").build()
    assert computed == [0, 1, 2, 3]
    for scale, got in zip([1.0, 0.9, 0.8, 0.7], results, strict=True):
        assert torch.equal(got, call(plain, host("flux").inputs(1) | {"timestep": torch.tensor([0.5 * scale])}))


def mag_skips(steps: int, threshold: float, most: int, retention: float) -> list[int]:
    h = host("wan-t2v")
    model, inputs = h.build(), h.inputs(1)
    ratios = next(r["ratios"] for r in coefficients.published("magcache") if r["name"] == "flux.1-dev")
    config = FittedMagCacheConfig(mag_ratios=ratios, num_inference_steps=28, threshold=threshold, max_skip_steps=most,
                                  retention_ratio=retention, all_ratios=ratios)
    config.fit(steps)
    counts = counted(model, model.blocks)
    model.enable_cache(config)
    skipped = []
    for step in range(steps):
        before = counts[0]
        with model.cache_context("cond"):
            call(model, inputs)
        skipped += [step] if counts[0] == before else []
    return skipped


def test_magcache_with_the_ratios_of_flux() -> None:
    assert mag_skips(28, 0.06, 3, 0.2) == [6, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 25]
    assert mag_skips(28, 0.24, 5, 0.1) == [3, 4, 6, 7, 8, *range(10, 15), *range(16, 21), *range(22, 26), 27]
    assert len(mag_skips(50, 0.06, 3, 0.2)) == 24


def test_taylorseer_computes_these_steps_and_predicts_a_line() -> None:
    h = host("wan-t2v")
    model, inputs = h.build(), h.inputs(1)
    from dit_sparse.stepcache.defaults import defaults

    model.enable_cache(TaylorSeerCacheConfig(**defaults("taylorseer", "wan")))
    calls: list[int] = []
    model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(step))
    for step in range(28):  # noqa: B007  (the hook reads it)
        with model.cache_context("cond"):
            call(model, inputs)
    assert calls == [0, 1, 2, 4, 9, 14, 19, 24]
    state = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=1)
    start, slope = torch.randn(2, 5), torch.randn(2, 5)
    for state.current_step in (2, 4):
        state.update((start + slope * state.current_step,))
    state.current_step = 8
    torch.testing.assert_close(state.predict()[0], start + slope * 8)


def test_pab_computes_33_of_50_calls() -> None:
    h = host("wan-t2v")
    model, inputs = h.build(), h.inputs(1)
    place = {"t": 0.0}
    model.enable_cache(PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: place["t"]))
    calls: list[int] = []
    model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    for step in range(50):
        place["t"] = 999 - 20 * step
        call(model, inputs)
    assert len(calls) == 33


def test_first_block_cache_at_its_two_ends() -> None:
    h = host("wan-t2v")
    model = h.build()
    counts = counted(model, model.blocks)
    times = [torch.full((1,), 900.0 - 100 * i) for i in range(5)]
    plain = [call(h.build(), h.inputs(1) | {"timestep": t}) for t in times]
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        for t, x in zip(times, plain, strict=True):
            assert torch.equal(call(model, h.inputs(1) | {"timestep": t}), x)
    assert counts == [5, 5]
    model.disable_cache()
    ends: dict[str, list[torch.Tensor]] = {"first": [], "last": []}
    model.enable_cache(FirstBlockCacheConfig(threshold=float("inf")))
    model.norm_out.register_forward_pre_hook(lambda _, args: ends["last"].append(args[0]))
    forward = h.build()
    heads = []
    forward.blocks[0].register_forward_hook(lambda _m, _a, out: heads.append(out))
    forward.norm_out.register_forward_pre_hook(lambda _, args: ends["first"].append(args[0]))
    with model.cache_context("cond"):
        for t in times:
            call(model, h.inputs(1) | {"timestep": t})
            call(forward, h.inputs(1) | {"timestep": t})
    assert counts[1] == 5 + 1, "one compute"
    tail = ends["first"][0] - heads[0]
    for got, head in zip(ends["last"][1:], heads[1:], strict=True):
        assert torch.equal(got, (head + tail).float())


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("name", "refused"), [("flux", True), ("cogvideox", False)])
def test_a_decision_by_one_ranks_tokens_is_refused_between_ranks(name: str, refused: bool, later: bool) -> None:
    """The others would wait for ever; the time embedding is the same on all ranks."""
    given = deeper(ALL[name])
    pipe = Pipe(given.build())
    parallel = SimpleNamespace(context_parallel_config=SimpleNamespace(
        ulysses_degree=1, ring_degree=1, ring_anything=False, ulysses_anything=False))
    cache = TeaCacheConfig(coefficients=(0.0,), threshold=1.0)
    with pytest.raises(ValueError, match="tokens of one rank") if refused else nullcontext():
        if not later:
            pipe.transformer._parallel_config = parallel
        enable(pipe, "svg", step_cache=cache)
        assert later or not refused, "refused when it is switched on"
        pipe.transformer._parallel_config = parallel
        pipe.run(two_branches(given), 2)
