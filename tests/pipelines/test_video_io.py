"""Files: right content, complete or absent."""

import os
from pathlib import Path

import pytest
import torch

from dit_sparse.eval.fidelity import psnr
from dit_sparse.pipelines.video_io import (
    BAND,
    contact_sheet,
    finished_file,
    read_video,
    side_by_side,
    write_image,
    write_video,
)


def gradient(frames: int = 5, height: int = 48, width: int = 64) -> torch.Tensor:
    y = torch.linspace(0, 1, height).view(1, -1, 1).expand(frames, -1, width)
    x = torch.linspace(0, 1, width).view(1, 1, -1).expand(frames, height, -1)
    t = torch.linspace(0, 1, frames).view(-1, 1, 1).expand(-1, height, width)
    return torch.stack([y, x, t], dim=1)


def test_video_survives_the_round_trip(tmp_path: Path) -> None:
    import av

    clip = gradient()
    write_video(tmp_path / "clip.mp4", clip, fps=8)
    again = read_video(tmp_path / "clip.mp4")
    assert again.shape == clip.shape
    assert psnr(clip, again) > 30
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 8.0)
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_image_survives_the_round_trip(tmp_path: Path) -> None:
    from PIL import Image

    image = gradient()[2]
    write_image(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as picture:
        assert picture.size == (64, 48)
        assert picture.getpixel((63, 0))[1] == 255


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_half_written_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "clip.mp4"
    target.write_text("old")
    with pytest.raises(error), finished_file(target) as part:
        part.write_text("half")
        assert target.read_text() == "old"
        raise error
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert target.read_text() == "old"


def test_odd_sides_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even sides"):
        write_video(tmp_path / "clip.mp4", torch.zeros(2, 3, 15, 16))
    with pytest.raises(ValueError, match="frames, 3, height, width"):
        write_video(tmp_path / "clip.mp4", torch.zeros(2, 16, 16, 3))
    assert os.listdir(tmp_path) == []


def test_unreadable_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize("frames", [1, 2, 9, 17])
def test_contact_sheet_holds_first_and_last_frame(frames: int) -> None:
    clip = torch.zeros(frames, 3, 32, 32)
    clip[0, 0] = 1  # red
    clip[-1, 2] = 1  # blue
    colours = {colour for _, colour in contact_sheet(clip).getcolors()}
    assert ((255, 0, 255) if frames == 1 else (0, 0, 255)) in colours


def test_side_by_side_keeps_both_clips() -> None:
    left, right = gradient(), 1 - gradient()
    both = side_by_side([left, right], ["dense", "sparse"])
    assert both.shape == (5, 3, 48 + BAND, 128)
    assert torch.equal(both[..., BAND:, :64], left)
    assert torch.equal(both[..., BAND:, 64:], right)


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "x" * 251 + ".mp4"], ids=["colon", "protocol", "long"])
def test_any_legal_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, gradient())
    assert os.listdir() == [name]
    assert read_video(name).shape == gradient().shape


def test_an_error_of_ffmpeg_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def fail(*_args, **_kwargs):
        raise av.error.ProtocolNotFoundError(1, "no such protocol")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(OSError, match="no such protocol"):
        write_video(tmp_path / "clip.mp4", gradient())
