"""torch.compile: no more graphs than without us, live state, counting at run time, inductor."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch._dynamo

from dit_sparse import bridge
from tests.bridge.hosts import HOSTS, Host, call, wan_config
from tests.bridge.sessions import Recorder

# HunyuanVideo 1.5 branches on a tensor's value and cannot be compiled into one graph without us either.
BROKEN_BY_ITSELF = ("hunyuan15",)
# Same classes as others of the list.
TWINS = ("wan-i2v", "wan-5b", "cogvideox1.5")
HOST = {host.name: host for host in HOSTS}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Frames:
    """The "eager" backend, counting the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("host", [pytest.param(h, id=h.name) for h in HOSTS if h.name not in BROKEN_BY_ITSELF + TWINS])
def test_one_graph_whose_state_is_live(host: Host) -> None:
    model, inputs, session = host.build(), host.inputs(2), Recorder()
    later = inputs | {"timestep": inputs["timestep"] // 2 if host.name != "flux" else inputs["timestep"] * 0.5}
    expected = [call(model, inputs), call(model, later)]
    bridge.bind(model, session)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for kwargs, output in zip((inputs, later), expected, strict=True):
        torch.testing.assert_close(call(compiled, kwargs), output, atol=1e-5, rtol=1e-5)
    assert [i.step for i in session.infos] == [0, 1]
    half = len(session.calls) // 2
    assert [c.info.step for c in session.calls] == [0] * half + [1] * half, "the operator sees the step of its forward"
    assert len(session.calls) == 2 * host.layers * (2 if host.per_sample else 1) and not session.fallbacks


@pytest.mark.parametrize("name", BROKEN_BY_ITSELF + ("mochi",))
def test_no_graph_more_where_the_model_breaks_by_itself(name: str) -> None:
    host, counts, reasons = HOST[name], [], []
    for ours in (False, True):
        torch._dynamo.reset()
        model, session = host.build(), Recorder()
        if ours:
            bridge.bind(model, session)
        with torch.no_grad():
            found = torch._dynamo.explain(model)(**host.inputs(2), return_dict=False)
        counts.append(found.graph_count)
        reasons.append(len(found.break_reasons))
    assert counts[0] >= counts[1] and reasons[0] >= reasons[1] and session.calls


def wan_layers(count: int) -> Host:
    return dataclasses.replace(HOST["wan-t2v"], config=wan_config(num_layers=count), layers=count)


def test_blocks_compiled_one_by_one_share_one_graph() -> None:
    host = wan_layers(6)
    for ours in (False, True):
        torch._dynamo.reset()
        model, inputs, session, frames = host.build(), host.inputs(1), Recorder(), Frames()
        untouched = call(model, inputs)
        if ours:
            bridge.bind(model, session)
        model.compile_repeated_blocks(backend=frames, fullgraph=True)
        torch.testing.assert_close(call(model, inputs), untouched)
        assert frames.count == 1
    assert [c.layer for c in session.calls] == list(range(6))


def test_fallbacks_are_counted_when_they_happen_not_when_they_are_traced() -> None:
    host = HOST["wan-t2v"]
    model, inputs, session = host.build(), host.inputs(1), Recorder()
    binding = bridge.bind(model, session)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    call(compiled, inputs)

    def unreadable(model, inputs):
        raise ValueError("no grid today")

    binding.family = dataclasses.replace(binding.family, grid=unreadable)
    for _ in range(3):
        call(compiled, inputs)
    assert len(session.fallbacks) == 3 * host.layers and "no grid today" in session.fallbacks[0][1]
    assert len(session.calls) == host.layers


def test_static_reasons_are_counted_at_run_time_too() -> None:
    """A causal call is seen while tracing; the count must still follow the runs."""
    from tests.bridge.test_core import Dispatching, made, qkv

    processor, session = made(Dispatching)
    for backend in ("eager", "aot_eager"):
        session.fallbacks.clear()
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v: processor(None, q, k, v, is_causal=True) * 2, backend=backend,
                                 fullgraph=True)
        q, k, v = qkv()
        for _ in range(3):
            torch.testing.assert_close(compiled(q, k, v), 2 * Dispatching()(None, q, k, v, is_causal=True))
        assert session.fallbacks == [(7, "causal attention")] * 3


def test_a_function_mode_inside_a_compiled_region_is_seen() -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    from tests.bridge.test_core import Direct, made, qkv

    processor, session = made(Direct)
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: processor(None, q, k, v), backend="eager")
    compiled(q, k, v)
    with AttentionScoreSkipFunctionMode():
        torch.testing.assert_close(compiled(q, k, v), v)
    assert len(session.calls) == 1 and "function mode" in session.fallbacks[0][1]


@pytest.mark.parametrize("way", ["compile then bind", "bind then compile", "method"])
def test_binding_before_or_after_compiling_and_unbinding(way: str) -> None:
    host = HOST["flux"]
    model, inputs, session = host.build(), host.inputs(1), Recorder()
    untouched = call(model, inputs)
    if way == "compile then bind":
        compiled = torch.compile(model, backend="eager")
        call(compiled, inputs)
    binding = bridge.bind(compiled if way == "compile then bind" else model, session)
    if way == "bind then compile":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    elif way == "method":
        model.compile(backend="eager", fullgraph=True)
        compiled = model
    assert bridge.binding_of(compiled) is binding and bridge.transformers_of(compiled)[0][1] is model
    torch.testing.assert_close(call(compiled, inputs), untouched)
    assert len(session.calls) == 2 and len(session.infos) == 1
    binding.unbind()
    assert torch.equal(call(compiled, inputs), untouched)
    assert len(session.calls) == 2 and len(session.infos) == 1, "a compiled graph follows the unbinding"


def test_a_compiled_copy_of_a_bound_model_is_the_untouched_one() -> None:
    host = HOST["wan-t2v"]
    model, inputs, session = host.build(), host.inputs(1), Recorder()
    untouched = call(model, inputs)
    binding = bridge.bind(model, session)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    call(compiled, inputs)
    torch.testing.assert_close(call(compiled, inputs), untouched)
    assert not session.calls
    binding.unbind()
    torch.testing.assert_close(call(compiled, inputs), untouched)


@pytest.mark.parametrize(("name", "size"), [("wan-t2v", {"num_layers": 1}), ("flux", {"num_single_layers": 0})])
def test_inductor(name: str, size: dict) -> None:
    host = dataclasses.replace(HOST[name], config=HOST[name].config | size, layers=1)
    model, inputs, session = host.build(), host.inputs(1), Recorder()
    untouched = call(model, inputs)
    bridge.bind(model, session)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(call(compiled, inputs), untouched, atol=1e-5, rtol=1e-4)
    assert len(session.calls) == 2 * host.layers
