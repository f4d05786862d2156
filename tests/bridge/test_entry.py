"""`set_attn_processor` on pipelines and transformers, the version gate, and finding transformers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse import bridge, entry
from dit_sparse.position import LiveScheduler
from tests.bridge.hosts import HOSTS
from tests.bridge.sessions import processors_of
from tests.tiny_wan import build_tiny_wan

HOST = {host.name: host for host in HOSTS}


class Proc:
    is_sparse_proc = True


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch):
    """Entry points that note what they were given; the classes are put back afterwards."""
    for cls in (DiffusionPipeline, ModularPipeline, ModelMixin):
        monkeypatch.setattr(cls, "set_attn_processor", None, raising=False)
    monkeypatch.setattr(AttentionMixin, "set_attn_processor", AttentionMixin.set_attn_processor)
    calls: list = []
    for _ in range(2):
        for cls in (DiffusionPipeline, ModularPipeline, AttentionMixin, ModelMixin):
            entry.attach(cls, lambda target, proc: calls.append((target, proc)))
    return calls


@pytest.fixture(scope="module")
def pipe():
    return build_tiny_wan()


def test_pipelines_take_a_sparse_proc_and_pass_others_on(given: list, pipe) -> None:
    proc, other = Proc(), WanAttnProcessor()
    pipe.set_attn_processor(proc)
    assert given == [(pipe, proc)]
    pipe.set_attn_processor(other)
    assert len(given) == 1 and set(map(id, processors_of(pipe.transformer).values())) == {id(other)}
    many = {path: WanAttnProcessor() for path in pipe.transformer.attn_processors}
    pipe.set_attn_processor(many)
    assert pipe.transformer.attn_processors == many, "the dict is left as it was"


def test_modular_pipelines_have_it(given: list, pipe) -> None:
    from diffusers.modular_pipelines import WanBlocks

    modular, proc = WanBlocks().init_pipeline(), Proc()
    modular.update_components(transformer=pipe.transformer)
    modular.set_attn_processor(proc)
    assert given == [(modular, proc)]


@pytest.mark.parametrize("name", [n for n in HOST if n not in ("wan-5b", "cogvideox1.5")])
def test_transformers_take_a_sparse_proc(given: list, name: str) -> None:
    model, proc = HOST[name].build(), Proc()
    model.set_attn_processor(proc)
    assert given == [(model, proc)]


def test_transformers_take_other_processors_as_before(given: list) -> None:
    wan, mochi, other = HOST["wan-t2v"].build(), HOST["mochi"].build(), WanAttnProcessor()
    wan.set_attn_processor(other)
    assert set(map(id, processors_of(wan).values())) == {id(other)} and not given
    with pytest.raises(ValueError, match="MochiTransformer3DModel has no set_attn_processor"):
        mochi.set_attn_processor(other)


def test_models_that_are_no_host_still_have_no_such_method(given: list) -> None:
    vae = diffusers.AutoencoderTiny
    assert not hasattr(vae, "set_attn_processor")
    with pytest.raises(AttributeError, match="set_attn_processor"):
        vae(encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
            num_decoder_blocks=(1,)).set_attn_processor(Proc())
    assert hasattr(diffusers.UNet2DConditionModel, "set_attn_processor")


def test_a_pipeline_without_denoiser_says_so(given: list) -> None:
    class Empty:
        components: dict = {}

    with pytest.raises(ValueError, match="no denoiser that takes attention processors"):
        DiffusionPipeline.set_attn_processor(Empty(), WanAttnProcessor())


def test_transformers_of_names_parts_and_follows_the_scheduler(pipe) -> None:
    (name, model, scheduler), = bridge.transformers_of(pipe)
    assert name == "transformer" and model is pipe.transformer and isinstance(scheduler, LiveScheduler)
    assert scheduler.current() is pipe.scheduler
    assert bridge.transformers_of(model) == [("transformer", model, None)]
    assert bridge.transformers_of(torch.nn.DataParallel(model)) == [("transformer", model, None)]


@pytest.mark.parametrize(("version", "accepted"), [
    ("0.42.0", True), ("0.42.1", True), ("0.42.9.post1", True), ("0.42.0.dev0", True), ("0.41.3", False),
    ("0.43.0", False), ("0.43.0.dev0", False), ("1.42.0", False), ("main", False), (None, False),
])
def test_only_tested_versions_pass(monkeypatch: pytest.MonkeyPatch, version, accepted: bool) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    reason = bridge.check_diffusers()
    assert (reason is None) == accepted
    assert accepted or ("diffusers>=0.42,<0.43" in reason and "\n" not in reason)
