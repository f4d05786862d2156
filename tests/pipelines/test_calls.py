"""text_to_video, text_to_image and video_to_video on a video host, and the naming rules on stand-in hosts."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.pipelines.text_to_image import text_to_image
from dit_sparse.pipelines.text_to_video import text_to_video
from dit_sparse.pipelines.video_to_video import video_to_video

SMALL = {"height": 32, "width": 48, "steps": 2}


def check_clip(clip: torch.Tensor, *shape: int) -> None:
    assert clip.shape == shape
    assert clip.dtype == torch.float32
    assert 0 <= float(clip.min()) <= float(clip.max()) <= 1


def test_text_to_video(tiny_pipe) -> None:
    seen = []
    clip = text_to_video(tiny_pipe, "a red circle", frames=5, callback=lambda *at: seen.append(at), **SMALL)
    check_clip(clip, 5, 3, 32, 48)
    assert seen == [(1, 2), (2, 2)]


def test_the_seed_decides(tiny_pipe) -> None:
    make = lambda seed: text_to_video(tiny_pipe, "a red circle", frames=3, seed=seed, **SMALL)  # noqa: E731
    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))


def test_text_to_image_with_a_video_host(tiny_pipe) -> None:
    check_clip(text_to_image(tiny_pipe, "a red circle", **SMALL)[None], 1, 3, 32, 48)


def test_text_length_follows_the_tokenizer(tiny_pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    encode = tiny_pipe.encode_prompt

    def spy(*args, **kwargs):
        lengths.append(kwargs["max_sequence_length"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(tiny_pipe, "encode_prompt", spy)
    text_to_image(tiny_pipe, "a red circle", **SMALL)
    text_to_image(tiny_pipe, "a red circle", max_sequence_length=8, **SMALL)
    assert lengths == [32, 8]


def test_the_longest_tokenizer_decides() -> None:
    class TwoTokenizers(FluxLike):
        tokenizer, tokenizer_2 = SimpleNamespace(model_max_length=77), SimpleNamespace(model_max_length=512)

    host = TwoTokenizers()
    text_to_image(host, "a cat", callback=lambda *at: None)
    assert host.arguments["length"] == 512


@pytest.mark.parametrize("size", [(32, 48), (64, 32)], ids=str)
def test_video_to_video_starts_from_the_clip(tiny_pipe, size: tuple[int, int]) -> None:
    video = torch.rand(5, 3, *size)
    make = lambda clip, strength: video_to_video(tiny_pipe, clip, "a red circle", strength, steps=4)  # noqa: E731
    seen = []
    again = video_to_video(
        tiny_pipe, video, "a red circle", 0.5, steps=4, callback=lambda done, steps: seen.append(done)
    )
    check_clip(again, 5, 3, *size)
    assert seen == [1, 2], "half the strength runs half the steps"
    assert torch.equal(again, make(video, 0.5))
    assert not torch.equal(again, make(1 - video, 0.5))
    assert not torch.equal(again, make(video, 1.0))


def test_video_to_video_is_sparse_too(tiny_pipe) -> None:
    from dit_sparse import disable, enable, summary

    video = torch.rand(5, 3, 32, 48)
    plain = video_to_video(tiny_pipe, video, "a red circle", 0.5, steps=4)
    enable(tiny_pipe, "dense")
    try:
        bound = video_to_video(tiny_pipe, video, "a red circle", 0.5, steps=4)
        assert summary(tiny_pipe).calls > 0
    finally:
        disable(tiny_pipe)
    torch.testing.assert_close(bound, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", [0, -1, 1.5])
def test_wrong_strength_is_refused(tiny_pipe, strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        video_to_video(tiny_pipe, torch.zeros(5, 3, 32, 48), "a", strength)


def test_wrong_clip_is_refused(tiny_pipe) -> None:
    with pytest.raises(ValueError, match="frames, 3, height, width"):
        video_to_video(tiny_pipe, torch.zeros(5, 32, 48, 3), "a")


class ImageHost:
    """Takes what FLUX takes, and shows what it was given."""

    scheduler = SimpleNamespace(timesteps=[3, 2, 1])

    def run(self, **arguments):
        self.arguments = arguments
        return SimpleNamespace(images=torch.full((1, 3, 8, 8), 2.0))


class FluxLike(ImageHost):
    def __call__(self, prompt=None, height=None, num_inference_steps=None, generator=None, output_type="pil",
                 callback_on_step_end=None, max_sequence_length=512):
        callback_on_step_end(self, 0, 3, {})
        return self.run(prompt=prompt, height=height, output_type=output_type, length=max_sequence_length)


class OldStyle(ImageHost):
    def __call__(self, prompt=None, generator=None, output_type="pil", callback=None, callback_steps=1):
        callback(0, 3, None)
        return self.run(prompt=prompt, output_type=output_type)


@pytest.mark.parametrize("host", [FluxLike(), OldStyle()], ids=lambda host: type(host).__name__)
def test_image_hosts(host: ImageHost) -> None:
    seen = []
    image = text_to_image(host, "a cat", callback=lambda *at: seen.append(at))
    check_clip(image[None], 1, 3, 8, 8)
    assert host.arguments["prompt"] == "a cat" and host.arguments["output_type"] == "pt"
    assert seen == [(1, 3)]


def test_arguments_a_host_lacks_are_named() -> None:
    with pytest.raises(ValueError, match="OldStyle takes no argument 'height'"):
        text_to_image(OldStyle(), "a cat", height=64)
    with pytest.raises(ValueError, match="no argument 'num_frames'"):
        text_to_video(FluxLike(), "a cat", frames=5)
    with pytest.raises(ValueError, match="cannot start from a video"):
        video_to_video(FluxLike(), torch.zeros(5, 3, 32, 48), "a")
