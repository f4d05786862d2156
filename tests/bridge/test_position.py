"""Step and branch of each forward: contexts, schedulers, timesteps, new runs, two denoisers, real pipelines."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.hooks.hooks import CacheContext

from dit_sparse import bridge
from dit_sparse.position import MAX_REPEATS, LiveScheduler, Position
from tests.bridge.hosts import HOSTS, Host, call
from tests.bridge.sessions import Recorder
from tests.tiny_wan import build_tiny_wan

COND, UNCOND, LATENT = torch.zeros(1), torch.zeros(1), torch.zeros(1)


def host(name: str) -> Host:
    return next(h for h in HOSTS if h.name == name)


def places(position: Position, forwards) -> list[tuple[int, str, bool]]:
    found = (position.advance(time, LATENT.clone(), text) for time, text in forwards)
    return [(p.step, p.branch, p.new_run) for p in found]


def guided(*times: float):
    return [(torch.tensor([t]), text) for t in times for text in (COND, UNCOND)]


def test_bare_transformer_counts_timesteps_and_orders_branches() -> None:
    position = Position()
    expected = [(0, "0", True), (0, "1", False), (1, "0", False), (1, "1", False), (2, "0", False), (2, "1", False)]
    assert places(position, guided(900, 500, 100)) == expected
    assert places(position, guided(900, 500, 100)) == expected, "back to the first timestep: a new run"


def test_rising_timesteps_are_steps_too() -> None:
    position = Position()
    assert [p[0] for p in places(position, guided(0.1, 0.5, 0.9))] == [0, 0, 1, 1, 2, 2]
    assert places(position, guided(0.1))[0] == (0, "0", True)


def test_per_token_timesteps_count_by_their_largest() -> None:
    position = Position()
    times = [torch.tensor([[0.0, 0.0, t, t]]) for t in (900.0, 500.0)]
    assert [p[0] for p in places(position, [(t, COND) for t in times])] == [0, 1]


def test_same_call_again_is_a_new_run_and_memory_stays_bounded() -> None:
    position = Position()
    for _ in range(3):
        place = position.advance(torch.tensor([5.0]), LATENT, COND)
        assert (place.step, place.branch, place.new_run) == (0, "0", True)
    windows = [position.advance(torch.tensor([5.0]), torch.zeros(1), COND) for _ in range(3 * MAX_REPEATS)]
    assert len({p.branch for p in windows}) <= MAX_REPEATS and sum(p.new_run for p in windows) >= 2


def test_context_names_and_step_index_win() -> None:
    position = Position()
    found = []
    for step in (0, 1):
        for name in ("cond", "uncond"):
            position.context = CacheContext(name, step_index=step, num_inference_steps=2)
            place = position.advance(torch.tensor([7.0]), LATENT, COND)
            found.append((place.step, place.num_steps, place.branch, place.new_run))
    assert found == [(0, 2, "cond", True), (0, 2, "uncond", False), (1, 2, "cond", False), (1, 2, "uncond", False)]
    position.context = CacheContext("cond", step_index=0, num_inference_steps=2)
    assert position.advance(torch.tensor([7.0]), LATENT, COND).new_run, "the step went back"


def test_context_may_be_a_plain_string() -> None:
    position = Position()
    position.context = "cond"
    assert position.advance(torch.tensor([7.0]), LATENT, COND).branch == "cond"


def run(position: Position, scheduler, steps: int, branches=(None,), timesteps=None, begin: int | None = None):
    """What a pipeline does: set_timesteps, then forwards and scheduler.step."""
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    found = []
    sample = torch.zeros(1, 4)
    for t in scheduler.timesteps[begin or 0:]:
        for name in branches:
            position.context = name
            place = position.advance(t.expand(2), sample, COND if name in (None, "cond") else UNCOND)
            found.append((place.step, place.num_steps, place.branch, place.new_run))
            position.context = None
        sample = scheduler.step(torch.zeros(1, 4), t, sample).prev_sample
    return found


@pytest.mark.parametrize("make", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, DDIMScheduler])
@pytest.mark.parametrize("branches", [("cond", "uncond"), (None, None), (None,)])
def test_scheduler_tells_the_step(make, branches) -> None:
    scheduler = make()
    position = Position(scheduler)
    names = [b or str(i) for i, b in enumerate(branches)]
    expected = [(step, 4, name, step == 0 and i == 0) for step in range(4) for i, name in enumerate(names)]
    assert run(position, scheduler, 4, branches) == expected
    assert run(position, scheduler, 4, branches) == expected, "set_timesteps begins a new run"


def test_runs_of_one_step_are_told_apart() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    position = Position(scheduler)
    for _ in range(2):
        assert run(position, scheduler, 1, (None, None)) == [(0, 1, "0", True), (0, 1, "1", False)]


def test_a_run_that_begins_in_the_middle_keeps_its_place() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    found = run(Position(scheduler), scheduler, 4, begin=2)
    assert [(step, length) for step, length, *_ in found] == [(2, 4), (3, 4)]


def test_no_device_is_read_when_the_scheduler_counts() -> None:
    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} on a timestep")

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    position = Position(scheduler)
    # Only the first step of a run may be read: the scheduler does not know yet where the pipeline begins.
    assert position.advance(scheduler.timesteps[0], LATENT, COND).step == 0
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    time = torch.zeros(1).as_subclass(Unreadable)
    for _ in range(2):
        assert position.advance(time, LATENT, COND).step == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_scheduler_that_stands_still_is_not_believed(named: bool) -> None:
    """The pipeline steps a copy of its scheduler (diffusion forcing)."""
    held = FlowMatchEulerDiscreteScheduler()
    held.set_timesteps(6)
    position = Position(held)
    steps = []
    for t in held.timesteps:
        position.context = "cond" if named else None
        steps.append(position.advance(t.expand(1), torch.zeros(1), COND).step)
    assert steps[-1] > steps[0] and (not named or steps == list(range(6)))


def test_windows_of_one_step_stay_in_it() -> None:
    """Several forwards of one name at one timestep are windows, not steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    position = Position(scheduler)
    position.context = "cond"
    found = [position.advance(scheduler.timesteps[0].expand(1), torch.zeros(1), COND) for _ in range(7)]
    assert {p.step for p in found} == {0} and [p.new_run for p in found] == [True] + [False] * 6


def test_an_exchanged_scheduler_is_followed() -> None:
    class Pipe:
        scheduler = None

    pipe = Pipe()
    position = Position(LiveScheduler(pipe))
    pipe.scheduler = UniPCMultistepScheduler()
    assert [p[0] for p in run(position, pipe.scheduler, 3)] == [0, 1, 2]
    pipe.scheduler = DDIMScheduler()
    assert [p[0] for p in run(position, pipe.scheduler, 2)] == [0, 1]


# -- real pipelines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan():
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


SETTINGS = {"num_frames": 3, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 16}


def generate(pipe, steps: int = 3, **kw) -> torch.Tensor:
    gen = torch.Generator().manual_seed(3)
    return pipe("a red circle", num_inference_steps=steps, generator=gen, **SETTINGS, **kw).frames


def test_wan_pipeline_names_its_branches_and_resets_after_the_run(wan: WanPipeline) -> None:
    untouched = generate(wan, guidance_scale=3.0)
    (name, model, scheduler), = bridge.transformers_of(wan)
    session = Recorder()
    binding = bridge.bind(model, session, scheduler=scheduler)
    assert name == "transformer" and model is wan.transformer
    for _ in range(2):
        assert torch.equal(generate(wan, guidance_scale=3.0), untouched)
    expected = [(s, b, s == 0 and b == "cond") for s in range(3) for b in ("cond", "uncond")]
    assert session.places() == expected * 2 and session.ended == 2
    assert {i.num_steps for i in session.infos} == {3}
    assert len(session.calls) == 2 * 2 * 3 * 2
    binding.unbind()
    assert torch.equal(generate(wan, guidance_scale=3.0), untouched)


def test_wan22_two_denoisers_share_one_run(wan: WanPipeline) -> None:
    parts = {name: part for name, part in wan.components.items() if name != "transformer_2"}
    pipe = WanPipeline(**parts, transformer_2=copy.deepcopy(wan.transformer), boundary_ratio=0.6)
    pipe.set_progress_bar_config(disable=True)
    untouched = generate(pipe, steps=5)
    sessions = {}
    for name, model, scheduler in bridge.transformers_of(pipe):
        sessions[name] = Recorder()
        bridge.bind(model, sessions[name], scheduler=scheduler)
    assert list(sessions) == ["transformer", "transformer_2"]
    assert torch.equal(generate(pipe, steps=5), untouched)
    high, low = ([i.step for i in sessions[n].infos if i.branch == "cond"] for n in sessions)
    assert high + low == list(range(5)) and high and low
    assert sessions["transformer_2"].infos[0].new_run and not sessions["transformer_2"].infos[1].new_run
    assert {i.num_steps for s in sessions.values() for i in s.infos} == {5}
    for _, model, _ in bridge.transformers_of(pipe):
        bridge.binding_of(model).unbind()


def test_modular_pipeline_tells_its_branches_by_order(wan: WanPipeline) -> None:
    from diffusers.modular_pipelines import WanBlocks

    pipe = WanBlocks().init_pipeline()
    names = pipe.component_names
    pipe.update_components(**{n: c for n, c in wan.components.items() if n in names and c is not None})
    (name, model, scheduler), = bridge.transformers_of(pipe)
    assert model is wan.transformer
    session = Recorder()
    binding = bridge.bind(model, session, scheduler=scheduler)
    # The text encoder block of modular Wan pads to 512 tokens; the tiny model takes any number.
    pipe(prompt="a red circle", num_inference_steps=3, num_frames=3, height=32, width=32, output="latents",
         generator=torch.Generator().manual_seed(0))
    binding.unbind()
    branches = list(dict.fromkeys(i.branch for i in session.infos))
    assert len(branches) == 2 and [i.step for i in session.infos] == [0, 0, 1, 1, 2, 2]
    assert [i.new_run for i in session.infos] == [True] + [False] * 5
    assert {i.num_steps for i in session.infos} == {3}


def test_batched_guidance_is_one_forward_of_two_rows() -> None:
    h = host("ltx")
    model, scheduler, session = h.build(), FlowMatchEulerDiscreteScheduler(), Recorder()
    bridge.bind(model, session, scheduler=scheduler)
    scheduler.set_timesteps(3)
    sample = torch.zeros(1, 36, 8)
    for t in scheduler.timesteps:
        with model.cache_context("cond_uncond"):
            call(model, h.inputs(2) | {"timestep": t.expand(2)})
        scheduler.step(sample, t, sample)
    assert session.places() == [(0, "cond_uncond", True), (1, "cond_uncond", False), (2, "cond_uncond", False)]
    assert all(c.query.shape[0] == 2 for c in session.calls)


@pytest.mark.parametrize("name", ["sd3", "cosmos", "pixart"])
def test_models_without_contexts_tell_branches_by_order(name: str) -> None:
    h = host(name)
    model, scheduler, session = h.build(), FlowMatchEulerDiscreteScheduler(), Recorder()
    bridge.bind(model, session, scheduler=scheduler)
    for _ in range(2):
        scheduler.set_timesteps(2)
        sample = torch.zeros(1, 4)
        for t in scheduler.timesteps:
            for _ in ("cond", "uncond"):
                call(model, h.inputs(1) | {"timestep": t.expand(1)})
            scheduler.step(sample, t, sample)
    once = [(0, "0", True), (0, "1", False), (1, "0", False), (1, "1", False)]
    assert session.places() == once * 2
