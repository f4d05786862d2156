"""The shipped folder: its files, and that an unmodified WanPipeline runs it offline and follows prompts."""

import json

import pytest
import torch
from safetensors import safe_open

from dit_sparse.pipelines.embedded import (
    DEFAULTS,
    EXAMPLES,
    checks,
    folder,
    model,
    sampling,
    unknown_words,
    world,
)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_are_small_safetensors_in_bf16():
    files = [file for file in folder().rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    for file in folder().rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}


def test_folder_is_the_plain_diffusers_format():
    index = json.loads((folder() / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    config = json.loads((folder() / "vae" / "config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert all(value > 0 for value in config["latents_std"])


def test_defaults_and_examples():
    assert model.token_count(DEFAULTS["frames"], DEFAULTS["height"], DEFAULTS["width"]) == 2304
    assert model.token_count(33, 512, 512) == 17408
    assert len(EXAMPLES) == 8 and not any(unknown_words(prompt) for prompt in EXAMPLES)


def test_all_parts_load_in_fp32(pipe):
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.scheduler.config.shift == model.SHIFT
    assert pipe.tokenizer.get_vocab() == {word: i for i, word in enumerate(world.vocabulary())}


@pytest.mark.parametrize("frames", [1, 5])
def test_a_clip_has_the_shape_asked_for(pipe, frames):
    options = dict(height=128, width=128, num_frames=frames, num_inference_steps=2, max_sequence_length=32)
    clip = pipe("a red star moving right", output_type="pt", **options).frames
    assert clip.shape == (1, frames, 3, 128, 128) and clip.isfinite().all()


def test_batched_sampling_equals_the_pipeline(pipe):
    prompt, shape = "a green ring growing", model.latent_shape(1, 5, 64)
    noise = torch.randn(shape)
    options = dict(height=64, width=64, num_frames=5, num_inference_steps=3, guidance_scale=3.0)
    theirs = pipe(prompt, latents=noise, output_type="latent", max_sequence_length=32, **options).frames
    ids = pipe.tokenizer([prompt], padding="max_length", max_length=32, return_tensors="pt").input_ids
    ours = sampling.generate_latents(pipe.transformer, pipe.text_encoder, ids, 5, 64, 3, 3.0, noise=noise)
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_a_sampled_clip_follows_its_prompt(pipe):
    options = dict(height=256, width=256, num_frames=17, num_inference_steps=4, guidance_scale=3.0)
    prompt = "a large red heart growing on a black background"
    frames = pipe(
        prompt,
        output_type="pt",
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    clip = frames.frames[0].permute(1, 0, 2, 3) * 2 - 1
    spec = dict(colour=list(world.COLOURS).index("red"), shape=world.SHAPES.index("heart"))
    spec |= dict(motion=world.MOTIONS.index("growing"), two=0, cam=0, rel=0, colour2=0, shape2=0)
    found = checks.check(clip, {name: torch.tensor([value]) for name, value in spec.items()}, 0)
    assert found["colour"] == 1 and found["motion"] == 1
