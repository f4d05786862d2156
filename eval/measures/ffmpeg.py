"""VMAF and XPSNR by FFmpeg's filters: the ffmpeg program of imageio-ffmpeg carries both with their models."""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .clips import check_fps, check_pair, eight_bit

CAP = 100.0  # dB, where two clips count as equal
_SIDE = 32
_SECONDS = 600


def vmaf(reference: torch.Tensor, video: torch.Tensor, *, fps: float = 8.0) -> float:
    """VMAF v0.6.1, mean over the frames: a regression on visual information fidelity, detail loss and motion.

    Range 0 to 100, higher is nearer; about 97 or more for equal clips, since a still reference gets less. It was
    trained on large pictures at the distance of a television. (github.com/Netflix/vmaf; filter libvmaf)
    """
    log = "vmaf.json"
    _, files = _filter(reference, video, fps, f"libvmaf=log_fmt=json:log_path={log}", log)
    return float(json.loads(files[log])["pooled_metrics"]["vmaf"]["mean"])


def xpsnr(reference: torch.Tensor, video: torch.Tensor, *, fps: float = 8.0) -> float:
    """PSNR of the luma, weighted by how visible an error is where it lies; over all frames, capped at 100 dB.

    Range 0 to 100 dB, higher is nearer. (Helmrich et al. 2020, doi 10.1109/ICASSP40776.2020.9054089; filter xpsnr)
    """
    text, _ = _filter(reference, video, fps, "xpsnr")
    found = re.search(r"XPSNR\s+y: *(\S+)", text)
    if not found:
        raise RuntimeError(f"ffmpeg's xpsnr printed no result: {text[-200:]!r}")
    value = float(found[1])
    return CAP if math.isnan(value) else min(value, CAP)


def without_vmaf() -> str:
    """Why `vmaf` cannot be measured here; empty when it can."""
    return _missing("libvmaf")


def without_xpsnr() -> str:
    """Why `xpsnr` cannot be measured here; empty when it can."""
    return _missing("xpsnr")


@functools.cache
def _missing(name: str) -> str:
    program = _program()
    if program is None:
        return "needs ffmpeg; pip install 'dit-sparse[eval]'"
    done = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, timeout=60)
    found = re.search(rf"^ \S+ +{name} ", done.stdout, re.MULTILINE)
    return "" if found else f"needs an ffmpeg with the filter {name}; pip install 'dit-sparse[eval]'"


@functools.cache
def _program() -> str | None:
    # The one of the package first: a system's ffmpeg seldom has libvmaf.
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def _filter(
    reference: torch.Tensor, video: torch.Tensor, fps: float, name: str, *wanted: str
) -> tuple[str, dict[str, str]]:
    """Run a filter on the video and the reference; its messages, and the files it wrote."""
    reference, video = check_pair(reference, video, side=_SIDE)
    fps, program = check_fps(fps), _program()
    reason = _missing(name.split("=")[0])
    if program is None or reason:
        raise ValueError(f"{name.split('=')[0]} {reason}")
    with tempfile.TemporaryDirectory() as folder:
        height, width = video.shape[2:]
        words: list[str] = [program, "-hide_banner", "-nostdin", "-nostats", "-threads", "1"]
        for file, clip in (("video.rgb", video), ("reference.rgb", reference)):
            (Path(folder) / file).write_bytes(eight_bit(clip).tobytes())
            words += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", file]
        # 4:4:4 keeps odd sides; both filters look at the luma
        graph = f"[0:v]format=yuv444p[a];[1:v]format=yuv444p[b];[a][b]{name}"
        text = _run([*words, "-lavfi", graph, "-f", "null", "-"], folder)
        return text, {file: (Path(folder) / file).read_text(encoding="utf-8") for file in wanted}


def _run(words: Sequence[str], folder: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"ffmpeg failed with code {done.returncode}: {lines[-1]}")
    return done.stderr
