"""The training's parts: the whole-clip VAE, states, the optimiser, block masks for the measurement."""

import time

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.pipelines.embedded import (
    discriminate,
    graphs,
    model,
    sampling,
    state,
    train_transformer,
    whole,
    world,
)
from dit_sparse.pipelines.embedded.optimise import Optimiser, orthogonalise


@pytest.mark.parametrize("frames", [1, 9])
def test_one_pass_through_the_vae_equals_the_chunked_one(frames):
    vae = model.build_vae().eval()
    clips = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, log_variance = whole.moments(vae, clips)
        chunked = vae.encode(clips).latent_dist
        assert torch.allclose(mean, chunked.mean, atol=1e-5)
        assert torch.allclose(log_variance, chunked.logvar, atol=1e-5)
        assert torch.allclose(whole.reconstruct(vae, mean).clamp(-1, 1), vae.decode(mean).sample, atol=1e-4)
        assert torch.allclose(whole.encode(vae, clips), mean, atol=1e-5)  # mean 0, deviation 1 until measured


def test_state_round_trip_and_replacement(tmp_path):
    module = torch.nn.Linear(8, 8)
    tensors = state.put("part", module) | {"average.x": torch.randn(5).bfloat16()}
    files = state.save(tmp_path, tensors, facts := {"spent": {"images": 3.5}})
    assert files[-1].name == "state.json" and facts["serial"] == 1
    state.save(tmp_path, tensors, facts)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # the first state is gone
    loaded, found = state.load(tmp_path)
    assert found["spent"] == {"images": 3.5}
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items()
    )
    fresh = torch.nn.Linear(8, 8)
    fresh.load_state_dict(state.take(loaded, "part"))
    assert torch.equal(fresh.weight, module.weight)
    assert state.load(tmp_path / "nothing") == ({}, {})


def test_state_is_sharded_below_the_file_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SHARD", 4000)
    tensors = {f"t{i}": torch.full((300,), float(i)) for i in range(9)}
    files = state.save(tmp_path, tensors, {})
    assert len(files) == 4 and all(file.stat().st_size < 5000 for file in files)
    state.copy(tmp_path, tmp_path / "copy")
    loaded, _ = state.load(tmp_path / "copy")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_orthogonalise_levels_singular_values():
    levels = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 16)))
    assert levels.min() > 0.5 and levels.max() < 1.4


def test_a_few_steps_lower_the_loss_and_a_resume_continues():
    transformer, text = model.build_transformer(layers=1), model.build_text_encoder()
    optimiser = Optimiser({"transformer": transformer, "text_encoder": text})
    latents, ids = torch.randn(4, 16, 1, 4, 4), world.TokenTables()(world.sample(4))
    losses = []
    for _ in range(12):
        torch.manual_seed(0)  # the same noise: the loss must fall
        optimiser.prepare(2e-3, 2e-3, 0.9)
        optimiser.zero()
        loss = train_transformer.loss_of(transformer, text, latents, ids, 2.0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    again = Optimiser({"transformer": transformer, "text_encoder": text})
    again.load_average(optimiser.averaged())
    assert all(torch.equal(a, b) for a, b in zip(again.average, optimiser.average, strict=True))


def test_a_stage_stops_at_its_time_and_keeps_its_count():
    source = train_transformer.Source(1, 32, 2, 4, 2, 2.0)
    stage = train_transformer.Stage("tiny", 5.0, ((source, 1.0),), 1.0, 0.0, 0.9)
    parts = dict(vae=model.build_vae(), transformer=model.build_transformer(layers=1))
    parts |= dict(text_encoder=model.build_text_encoder(), tables=world.TokenTables())
    optimiser = Optimiser({"transformer": parts["transformer"]})
    records: list[dict] = []
    session = train_transformer.Session(parts, optimiser, records.append)
    spent = train_transformer.train(stage, 4.0, time.time() + 60, session)
    assert 5.0 <= spent < 9.0 and records[-1]["done"]
    assert train_transformer.train(stage, spent, time.time() + 60, session) == pytest.approx(spent, abs=0.5)


def test_rates_stay_flat_and_then_fall():
    stage = train_transformer.Stage("x", 1.0, (), 1.0, 0.1, 0.9, 0.5)
    rates = [train_transformer.rate_at(stage, share) for share in (0.0, 0.5, 0.75, 1.0)]
    assert rates[:2] == [1.0, 1.0] and 0.1 < rates[2] < 1 and rates[3] == pytest.approx(0.1)


def test_replay_without_a_gpu_only_calls():
    calls = []
    replay = graphs.Replay(lambda: calls.append(1), torch.device("cpu"))
    replay()
    assert calls == [1] and graphs.pool(torch.device("cpu")) is None


def test_kept_blocks_at_full_density_are_dense_attention():
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    dense = F.scaled_dot_product_attention(q, k, v)
    for kind in ("exact", "random", "near"):
        index = discriminate.choose(kind, q, k, 64, 1.0, torch.Generator().manual_seed(0))
        assert torch.allclose(discriminate.gathered(q, k, v, index, 64), dense, atol=1e-5)
    mass = discriminate.block_mass(q, k, 64, rows=128)
    assert torch.allclose(mass.sum(-1), torch.ones(1, 2, 4), atol=1e-5)
    few = discriminate.choose("exact", q, k, 64, 0.5, None)
    assert few.shape == (1, 2, 4, 2)
    own = torch.arange(4).view(1, 1, 4, 1)
    assert (few == own).any(-1).all()  # the own block is kept
    with pytest.raises(ValueError, match="unknown choice"):
        discriminate.choose("best", q, k, 64, 0.5, None)


def test_a_schedule_keeps_layer_0_and_the_first_steps_dense():
    q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    run = discriminate.scheduled(lambda q, k, v, layer: torch.full_like(q, layer), layers=3, steps=10, dense_share=0.2)
    seen = ["dense" if torch.equal(run(q, k, v, call), dense) else "sparse" for call in range(60)]
    one = ["dense"] * 6 + ["dense", "sparse", "sparse"] * 8
    assert seen == one * 2  # a second batch starts anew
    always = discriminate.scheduled(lambda q, k, v, layer: torch.full_like(q, layer), 3, 10, 0.0)
    assert always(q, k, v, 0).eq(0).all()


def test_replaced_attention_reaches_the_transformer_and_is_taken_back():
    from diffusers.models.transformers import transformer_wan

    real = transformer_wan.dispatch_attention_fn
    transformer, text = model.build_transformer(layers=2).eval(), model.build_text_encoder().eval()
    ids = world.TokenTables()(world.sample(1))
    noise = torch.randn(model.latent_shape(1, 7, 64))  # 4 x 4 x 4 = 64 tokens
    dense = sampling.generate_latents(transformer, text, ids, 7, 64, steps=2, noise=noise)
    with discriminate.attention(discriminate.sparse("exact", 16, 1.0)):
        same = sampling.generate_latents(transformer, text, ids, 7, 64, steps=2, noise=noise)
    with discriminate.attention(discriminate.sparse("random", 16, 0.25)):
        other = sampling.generate_latents(transformer, text, ids, 7, 64, steps=2, noise=noise)
    assert torch.allclose(dense, same, atol=1e-4) and not torch.allclose(dense, other, atol=1e-4)
    assert transformer_wan.dispatch_attention_fn is real
