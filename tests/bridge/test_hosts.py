"""Every tested host: same output with a dense core, the core is really used, grid and text place, unbinding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse import bridge, disable, enable, summary
from dit_sparse.families import FAMILIES
from tests.bridge.hosts import HOSTS, Host, call
from tests.bridge.more_hosts import MORE
from tests.bridge.sessions import Recorder, processors_of

ALL = [pytest.param(host, id=host.name) for host in HOSTS + MORE]
JOINT = [pytest.param(host, id=host.name) for host in HOSTS + MORE if host.text_at != "none"]


def bound(host: Host, session: Recorder, batch: int = 2):
    model = host.build()
    inputs = host.inputs(batch)
    untouched = call(model, inputs)
    return model, inputs, untouched, bridge.bind(model, session)


@pytest.mark.parametrize("host", ALL)
def test_dense_core_equals_the_untouched_model_and_unbind_restores_it(host: Host) -> None:
    model = host.build()
    inputs = host.inputs(2)
    before, weights = processors_of(model), set(model.state_dict())
    untouched = call(model, inputs)
    session = Recorder()
    binding = bridge.bind(model, session)
    torch.testing.assert_close(call(model, inputs), untouched, atol=1e-6, rtol=1e-6)
    assert set(model.state_dict()) == weights

    layers = [layer for layer in binding.layers if layer.bound]
    assert [layer.index for layer in layers] == list(range(host.layers))
    assert len(binding.layers) == len(before)
    rows = inputs["hidden_states"].shape[0] if host.per_sample else 1
    assert len(session.calls) == host.layers * rows and not session.fallbacks
    info, = session.infos
    assert info.family == host.family == binding.family.name
    assert info.grid.sizes == host.grid and info.grid.text == 0 and info.grid.text_at == host.text_at
    assert (info.step, info.num_steps, info.branch, info.new_run) == (0, None, "0", True)

    binding.unbind()
    binding.unbind()
    after = processors_of(model)
    assert all(after[path] is before[path] for path in before)
    assert torch.equal(call(model, inputs), untouched) and len(session.calls) == host.layers * rows
    assert bridge.binding_of(model) is None and not model._forward_pre_hooks


@pytest.mark.parametrize("host", ALL)
def test_sharper_softmax_changes_the_output(host: Host) -> None:
    model, inputs, untouched, _ = bound(host, Recorder(scale=3.0))
    assert (call(model, inputs) - untouched).abs().max() > 1e-5


@pytest.mark.parametrize("host", ALL)
def test_hidden_keys_change_exactly_what_they_should(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five keys hidden by the session equal the same five hidden inside the untouched model's attention."""
    hide = torch.zeros(host.video + host.text, dtype=torch.bool)
    hide[host.video // 2: host.video // 2 + 5] = True
    model, inputs, untouched, binding = bound(host, Recorder(hide=hide))
    got = call(model, inputs)
    binding.unbind()
    original, lengths = F.scaled_dot_product_attention, {host.video + text for text in range(host.text + 1)}

    def hiding(query, key, value, attn_mask=None, **kw):
        if key.shape[2] in lengths and query.shape[2] == key.shape[2]:
            keep = ~hide[: key.shape[2]][None, None, None]
            attn_mask = keep if attn_mask is None else attn_mask & keep
        return original(query, key, value, attn_mask=attn_mask, **kw)

    monkeypatch.setattr(F, "scaled_dot_product_attention", hiding)
    torch.testing.assert_close(got, call(model, inputs), atol=1e-6, rtol=1e-6)
    assert (got - untouched).abs().max() > 1e-5


@pytest.mark.parametrize("host", JOINT)
def test_text_tokens_are_where_the_family_says(host: Host) -> None:
    session = Recorder()
    model, inputs, _, _ = bound(host, session, batch=1)
    call(model, inputs)
    name = host.text_inputs[0]
    # Mochi pools its text into the modulation of the video; the pool does not see the order of the text.
    changed = inputs[name][:, [3, 2, 1, 0, 4]] if host.name == "mochi" else inputs[name] + 1.0
    call(model, inputs | {name: changed})
    first, second = session.calls[0], session.calls[len(session.calls) // 2]
    assert first.layer == second.layer
    length = first.query.shape[1]
    text = length - host.video
    assert 0 < text <= host.text
    video = slice(text, None) if host.text_at == "front" else slice(0, host.video)
    place = slice(0, text) if host.text_at == "front" else slice(host.video, None)
    for part in ("query", "key", "value"):
        one, two = getattr(first, part), getattr(second, part)
        torch.testing.assert_close(one[:, video], two[:, video], atol=1e-6, rtol=1e-6)
        assert (one[:, place] - two[:, place]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "qwen"])
def test_padding_text_is_masked_as_the_model_does(name: str) -> None:
    host = next(host for host in HOSTS if host.name == name)
    session = Recorder()
    model, inputs, _, _ = bound(host, session, batch=1)
    call(model, inputs)
    mask = session.calls[0].mask
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 1, host.video + host.text)
    keep = mask.flatten()
    valid = {"hunyuan": 4, "hunyuan15": 7, "qwen": 5}[name]
    text = keep[: host.text] if host.text_at == "front" else keep[host.video:]
    assert int(keep.sum()) == host.video + valid and text[:valid].all() and not text[valid:].any()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, the model's weights left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.numel = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() not in self.weights:
                self.numel = max(self.numel, item.untyped_storage().nbytes() // item.element_size())
        return out


def test_hunyuan15_makes_no_mask_of_all_pairs() -> None:
    class Linear(Recorder):
        """No attention at all, so that nothing but the bridge could make a tensor of S x S elements."""

        def attention(self, layer, query, key, value, mask, scale):
            return value.contiguous() + 0

    host = next(host for host in HOSTS if host.name == "hunyuan15")
    model = host.build()
    inputs = host.inputs(1) | {"hidden_states": torch.randn(1, 4, 5, 12, 12)}
    length = 5 * 12 * 12 + host.text
    with Largest(model) as untouched:
        call(model, inputs)
    bridge.bind(model, Linear())
    with Largest(model) as ours:
        call(model, inputs)
    assert untouched.numel >= length * length > 2 * ours.numel


def test_mochi_rows_are_branches_of_their_own() -> None:
    host = next(host for host in HOSTS if host.name == "mochi")
    session = Recorder()
    model, inputs, _, _ = bound(host, session)
    call(model, inputs)
    assert [(c.layer, c.info.branch) for c in session.calls] == [(0, "0"), (0, "0/1"), (1, "0"), (1, "0/1")]
    assert [c.query.shape[1] - host.video for c in session.calls[:2]] == [5, 4], "only valid text tokens are kept"
    assert session.infos[0].branch == "0"


@pytest.mark.parametrize("host", ALL[:3] + JOINT[:2])
def test_positional_arguments_are_read_like_named_ones(host: Host) -> None:
    session = Recorder()
    model, inputs, untouched, _ = bound(host, session)
    hidden = inputs.pop("hidden_states")
    with torch.no_grad():
        out = model(hidden, **inputs, return_dict=False)[0]
    torch.testing.assert_close(out, untouched)
    assert session.infos[0].grid.sizes == host.grid


def test_every_class_of_the_table_has_a_tested_host() -> None:
    tested = {host.cls for host in HOSTS + MORE}
    assert tested == {name for family in FAMILIES for name in family.classes}
    assert len({name for family in FAMILIES for name in family.classes}) == sum(len(f.classes) for f in FAMILIES)


def one_row(host: Host, row: int) -> dict[str, Any]:
    """The inputs of a batch of two, cut to one row; what does not grow with the batch stays."""

    def cut(one: Any, two: Any) -> Any:
        if isinstance(two, torch.Tensor | list) and len(two) != len(one):
            return two[row:row + 1]
        return [cut(*pair) for pair in zip(one, two, strict=True)] if isinstance(two, list) else two

    one, two = host.inputs(1), host.inputs(2)
    return {name: cut(one[name], value) for name, value in two.items()}


@pytest.mark.parametrize("host", ALL)
def test_guidance_in_one_forward_or_in_two_is_the_same(host: Host) -> None:
    """Two steps, the first dense: both branches go by the step that is theirs, and neither sees the other."""
    model, found = host.build(), {}
    together = [host.inputs(2)]
    if len(together[0]["hidden_states"]) == 1:  # Kandinsky takes one clip a forward: the same branch twice
        together.append(host.inputs(2))
    both = [together, [one_row(host, 0), one_row(host, 1)]]
    for name, forwards in zip(("batched", "separate"), both, strict=True):
        enable(model, "gna", window=(1, 3, 3), dense_steps=0.5, num_steps=2, dense_layers=0)
        found[name] = [
            torch.cat([call(model, inputs | {"timestep": torch.full_like(inputs["timestep"], time)})
                       for inputs in forwards])
            for time in (900.0, 500.0)
        ]
        report = summary(model)
        calls = host.layers * (2 if host.per_sample else len(forwards))
        assert (report.steps, report.dense_calls, report.sparse_calls) == (2, calls, calls), name
        assert not report.fallbacks
        disable(model)
    for batched, separate in zip(*found.values(), strict=True):
        torch.testing.assert_close(separate, batched, atol=1e-5, rtol=1e-4)
