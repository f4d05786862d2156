"""Clips and images in and out of files; a file appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

BAND = 24  # pixels above a clip that hold its label
CELL = 256


def part_name(path: Path) -> Path:
    """The name in the folder of `path` that a file has while it is made: short, whatever the length of its own."""
    digest = hashlib.sha1(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{digest}.{os.getpid()}.part{path.suffix if len(path.suffix) < 9 else ''}")


@contextmanager
def finished_file(path: str | Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; moved to `path` at the end, removed after any error or Ctrl-C.

    Args:
        path: the file to be made; an older one is replaced.
    """
    path = Path(path)
    part = part_name(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_bytes(video: torch.Tensor) -> np.ndarray:
    """(F, 3, H, W) float in [0, 1] -> (F, H, W, 3) uint8."""
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}; use (frames, 3, height, width)")
    scaled = (video.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def write_video(path: str | Path, video: torch.Tensor, fps: int = 8, *, crf: int = 16) -> None:
    """Write an H.264 mp4 (yuv420p, which every player shows).

    Args:
        path: the file, ending in .mp4.
        video: (F, 3, H, W) float in [0, 1], H and W even.
        fps: frames per second.
        crf: x264's quality, lower is better.

    Raises:
        ValueError: wrong shape or odd sides.
        OSError: the file cannot be written.
    """
    import av

    frames = to_bytes(video)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"a clip of {height}x{width} cannot be H.264: use even sides")
    try:
        with finished_file(path) as part, av.open(_plain_name(part), "w", format="mp4") as container:
            # one thread: the same clip gives the same bytes on every machine
            stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "threads": "1"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        # Only some of FFmpeg's errors are errors of the system as well.
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _plain_name(path: str | Path) -> str:
    """FFmpeg takes what stands before a colon for a protocol, except after a slash."""
    return os.path.abspath(path)


def read_video(path: str | Path) -> torch.Tensor:
    """Read a clip with PyAV.

    Args:
        path: any file that FFmpeg reads.

    Returns:
        (F, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: the file cannot be read or holds no video.
    """
    import av

    try:
        with av.open(_plain_name(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except IndexError as error:  # no stream 0 of this kind
        raise ValueError(f"{path} cannot be read as a video: it holds no video stream") from error
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255


def write_image(path: str | Path, image: torch.Tensor | Image.Image) -> None:
    """Write a PNG.

    Args:
        path: the file, ending in .png.
        image: (3, H, W) float in [0, 1], or a Pillow image.

    Raises:
        OSError: the file cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(to_bytes(image[None])[0])
    with finished_file(path) as part:
        picture.save(part, format="PNG")


def contact_sheet(
    video: torch.Tensor, *, most: int = 9, columns: int | None = None, cell: int = CELL
) -> Image.Image:
    """Frames at even distances on one picture, numbered from 0.

    Args:
        video: (F, 3, H, W) float in [0, 1].
        most: how many frames at most; the first and the last are always among them.
        columns: frames side by side; None lays them out in about a square.
        cell: larger frames are shrunk until their longest side has this many pixels.

    Returns:
        A Pillow image.
    """
    frames = to_bytes(video)
    count = min(most, len(frames))
    chosen = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    columns = columns or math.ceil(math.sqrt(count))
    height, width = frames.shape[1:3]
    shrink = min(1.0, cell / max(height, width))
    box = (max(round(width * shrink), 1), max(round(height * shrink), 1))
    gap, caption = 4, 14
    rows = math.ceil(count / columns)
    size = (columns * (box[0] + gap) + gap, rows * (box[1] + caption + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x = gap + (place % columns) * (box[0] + gap)
        y = gap + (place // columns) * (box[1] + caption + gap)
        sheet.paste(Image.fromarray(frames[index]).resize(box, Image.Resampling.LANCZOS), (x, y + caption))
        pen.text((x + 2, y + 1), str(index), fill="black")
    return sheet


def side_by_side(clips: Sequence[torch.Tensor], labels: Sequence[str]) -> torch.Tensor:
    """Clips of one size next to each other, each under its label.

    Args:
        clips: each (F, 3, H, W) float in [0, 1].
        labels: one text for each clip.

    Returns:
        (F, 3, H + BAND, W * clips) float in [0, 1].
    """
    titled = []
    for clip, label in zip(clips, labels, strict=True):
        band = Image.new("RGB", (clip.shape[3], BAND), "white")
        ImageDraw.Draw(band).text((4, 6), label, fill="black")
        pixels = torch.from_numpy(np.asarray(band).copy()).permute(2, 0, 1).float() / 255
        titled.append(torch.cat([pixels.expand(len(clip), -1, -1, -1), clip.float().cpu()], dim=2))
    return torch.cat(titled, dim=3)
