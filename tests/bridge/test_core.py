"""The rebound attention call by itself: what stays on the model's own path, and why."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks._common import _ATTENTION_CLASSES  # noqa: F401  (loads the registries)
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.rebind import REASONS, RING, dress, sparse_class, undress
from dit_sparse.runtime import Runtime
from tests.bridge.sessions import Recorder


class Dispatching:
    """A processor on the dispatch route."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, query, key, value, **kw):
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend,
                                     parallel_config=self._parallel_config, **kw)


def helper(query, key, value, **kw):
    return F.scaled_dot_product_attention(query, key, value, **kw)


class Direct:
    """A processor that calls scaled_dot_product_attention, in a helper of its module."""

    def __call__(self, attn, query, key, value, attn_mask=None, **kw):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return helper(q, k, v, attn_mask=attn_mask, **kw).transpose(1, 2)


class Linear:
    """A processor without softmax attention."""

    def __call__(self, attn, query, key, value):
        return query @ (key.transpose(-1, -2) @ value)


GRID = TokenGrid(2, 3, 4)


def made(cls, grid: TokenGrid | None = GRID, text_at: str = "none", session: Recorder | None = None):
    session = session or Recorder(scale=3.0)
    runtime = Runtime(session, text_at, False)
    session.keep = runtime
    if grid is not None:
        runtime.begin(ForwardInfo(grid, "", 0, None, "0", True, "toy"))
    return dress(cls(), torch.tensor([runtime.id, 7])), session


def qkv(length: int = 24, keys: int | None = None, heads: int = 2, key_heads: int = 2):
    gen = torch.Generator().manual_seed(0)
    keys = length if keys is None else keys
    return (torch.randn(2, length, heads, 8, generator=gen), torch.randn(2, keys, key_heads, 8, generator=gen),
            torch.randn(2, keys, key_heads, 8, generator=gen))


@pytest.mark.parametrize("cls", [Dispatching, Direct])
def test_the_session_computes_the_core(cls) -> None:
    processor, session = made(cls)
    q, k, v = qkv()
    expected = cls()(None, q, k, v, scale=3.0 * 8**-0.5)
    torch.testing.assert_close(processor(None, q, k, v), expected)
    assert session.calls[0].layer == 7 and not session.fallbacks
    half = torch.rand(2, 1, 1, 24) > 0.3
    torch.testing.assert_close(processor(None, q, k, v, attn_mask=half, scale=0.1),
                               cls()(None, q, k, v, attn_mask=half, scale=0.3))


@pytest.mark.parametrize("cls", [Dispatching, Direct])
@pytest.mark.parametrize(("change", "reason"), [
    ({"is_causal": True}, "causal"),
    ({"key_heads": 1, "enable_gqa": True}, "grouped-query"),
    ({"dropout_p": 1e-9}, "dropout"),
    ({"keys": 30}, "lengths differ"),
    ({"length": 20}, "fewer than the grid's 24"),
    ({"length": 26}, "2 tokens beyond the grid's 24"),
    ({"grid": None}, "outside the transformer's forward"),
])
def test_what_cannot_be_sparse_is_dense_and_counted(cls, change: dict, reason: str) -> None:
    sizes = {name: value for name, value in change.items() if name in ("length", "keys", "key_heads")}
    processor, session = made(cls, change.get("grid", GRID))
    change = {name: value for name, value in change.items() if name not in (*sizes, "grid")}
    q, k, v = qkv(**sizes)
    expected = cls()(None, q, k, v, **change)
    torch.testing.assert_close(processor(None, q, k, v, **change), expected)
    (layer, found), = session.fallbacks
    assert layer == 7 and reason in found and not session.calls


def test_cross_attention_inside_a_bound_processor_is_not_counted() -> None:
    processor, session = made(Dispatching)
    q, k, v = qkv(keys=4)
    torch.testing.assert_close(processor(None, q, k, v), Dispatching()(None, q, k, v))
    assert not session.fallbacks and not session.calls


def test_flex_block_mask_stays_with_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 24, device="cpu")
    processor, session = made(Dispatching)
    processor._attention_backend = "flex"
    q, k, v = qkv()
    expected = Dispatching()(None, q, k, v, is_causal=True)
    torch.testing.assert_close(processor(None, q, k, v, attn_mask=mask), expected, atol=1e-5, rtol=1e-5)
    assert session.fallbacks == [(7, "flex-attention BlockMask")]


def test_ring_parallelism_combined_with_ulysses_stays_with_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(
        ring_degree=2, ulysses_degree=2, ring_anything=False, ulysses_anything=False))
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.NATIVE,
                        lambda query, _parallel_config, **kw: query if _parallel_config is ring else None)
    processor, session = made(Dispatching)
    processor._parallel_config = ring
    q, k, v = qkv()
    assert processor(None, q, k, v) is q
    assert session.fallbacks == [(7, REASONS[RING])] and "combined with Ulysses" in REASONS[RING]


@pytest.mark.parametrize("cls", [Dispatching, Direct])
def test_function_modes_of_guidance_keep_their_effect(cls) -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    processor, session = made(cls)
    q, k, v = qkv()
    with AttentionScoreSkipFunctionMode():
        skipped = processor(None, q, k, v)
    torch.testing.assert_close(skipped, v)
    (layer, reason), = session.fallbacks
    assert layer == 7 and "function mode" in reason
    with torch.device("cpu"):
        processor(None, q, k, v)
    assert len(session.fallbacks) == 1 and len(session.calls) == 1, "a default device is no such mode"


def test_dense_calls_use_the_users_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(query, key, value, **kw):
        seen.append(tuple(query.shape))
        return query.clone()

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, spy)
    processor, session = made(Dispatching)
    processor._attention_backend = "_native_math"
    processor(None, *qkv(20))
    processor._attention_backend = AttentionBackendName._NATIVE_MATH
    processor(None, *qkv(20))
    assert seen == [(2, 20, 2, 8)] * 2 and len(session.fallbacks) == 2
    processor(None, *qkv(24))
    assert len(seen) == 2 and len(session.calls) == 1


def test_autocast_casts_as_it_does_for_the_model() -> None:
    processor, session = made(Dispatching, session=Recorder())
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = processor(None, q, k, v.bfloat16()), Dispatching()(None, q, k, v)
    assert got.dtype == expected.dtype == torch.bfloat16 == session.calls[0].query.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_way_of_switching_gradients_off(mode) -> None:
    with mode():
        processor, session = made(Dispatching)
        q, k, v = qkv()
        processor(None, q, k, v)
        processor(None, q, k, v, is_causal=True)
    processor(None, q.clone(), k.clone(), v.clone(), is_causal=True)
    assert len(session.calls) == 1 and len(session.fallbacks) == 2


def test_gradients_are_refused_at_backward_only() -> None:
    processor, _ = made(Dispatching)
    q, k, v = qkv()
    out = processor(None, q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="no backward pass; call disable"):
        out.sum().backward()


def test_a_session_that_returns_its_argument_is_copied() -> None:
    class Identity(Recorder):
        def attention(self, layer, query, key, value, mask, scale):
            return query

    processor, _ = made(Dispatching, session=Identity())
    q, k, v = qkv()
    out = processor(None, q, k, v)
    assert torch.equal(out, q) and out.data_ptr() != q.data_ptr()


def test_the_operator_passes_torchs_own_checks() -> None:
    processor, _ = made(Dispatching)
    q, k, v = qkv()
    torch.library.opcheck(torch.ops.dit_sparse.attention.default, (q, k, v, None, 0.3, processor._handle, "", 1),
                          test_utils=("test_schema", "test_faketensor"))


def test_a_closed_runtime_leaves_plain_attention() -> None:
    processor, session = made(Dispatching)
    session.keep.close()
    q, k, v = qkv()
    torch.testing.assert_close(processor(None, q, k, v), Dispatching()(None, q, k, v))
    assert not session.calls and not session.fallbacks


def test_a_processor_without_attention_is_recognised() -> None:
    assert sparse_class(Linear) is None
    with pytest.raises(ValueError, match="Linear makes no attention call"):
        dress(Linear(), torch.tensor([0, 0]))


@pytest.mark.parametrize("cls", [WanAttnProcessor, HunyuanVideoAttnProcessor2_0, AttnProcessor2_0])
def test_the_subclass_keeps_signature_attributes_and_registry_entry(cls) -> None:
    made_cls = sparse_class(cls)
    assert made_cls is sparse_class(cls) and issubclass(made_cls, cls) and cls.__name__ in made_cls.__name__
    assert inspect.signature(made_cls.__call__) == inspect.signature(cls.__call__)
    for name in ("_attention_backend", "_parallel_config"):
        assert hasattr(made_cls, name) == hasattr(cls, name)
    if cls in AttentionProcessorRegistry._registry:
        assert AttentionProcessorRegistry.get(made_cls) is AttentionProcessorRegistry.get(cls)
    else:
        assert made_cls not in AttentionProcessorRegistry._registry


def test_the_handle_is_a_small_tensor_on_the_cpu() -> None:
    processor, _ = made(WanAttnProcessor)
    assert processor._handle.device.type == "cpu" and processor._handle.dtype == torch.int64
    assert processor._handle.shape == (2,)


def test_undress_gives_the_original_back_with_later_settings() -> None:
    original = WanAttnProcessor()
    twin = dress(original, torch.tensor([0, 0]))
    twin._attention_backend = AttentionBackendName.NATIVE
    assert undress(twin) is original and original._attention_backend is AttentionBackendName.NATIVE
    assert undress(original) is original and "_handle" not in vars(original)


def test_deep_copies_and_pickles_are_the_original() -> None:
    twin, session = made(Dispatching)
    q, k, v = qkv()
    copied = copy.deepcopy(twin)
    assert type(copied) is Dispatching and copied is not twin._dense[0]
    torch.testing.assert_close(copied(None, q, k, v), Dispatching()(None, q, k, v))
    assert not session.calls
    assert type(pickle.loads(pickle.dumps(dress(WanAttnProcessor(), torch.tensor([0, 0]))))) is WanAttnProcessor


def test_threads_keep_their_layers_apart() -> None:
    pairs = [made(Dispatching, session=Recorder()) for _ in range(4)]
    q, k, v = qkv()

    def work(processor) -> None:
        for _ in range(20):
            processor(None, q, k, v)

    threads = [threading.Thread(target=work, args=(p,)) for p, _ in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(s.calls) for _, s in pairs] == [20] * 4


def test_reasons_are_texts_in_the_order_of_their_codes() -> None:
    from dit_sparse import rebind

    codes = [rebind.CAUSAL, rebind.GROUPED, rebind.DROPOUT, rebind.FLEX, rebind.RING, rebind.MODE, rebind.LENGTHS,
             rebind.RANK]
    assert codes == list(range(len(REASONS)))
