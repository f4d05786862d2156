"""Photographed clips through the included model's VAE and video-to-video, and before the measures.

The model was trained on drawn shapes; a latent of 16 numbers stands for 8 x 8 pixels in two frames: photographs lose
detail. The bounds are what it does keep (November 2026), with a little room.
"""

import pytest
import torch

from dit_sparse import disable, enable, summary
from dit_sparse.eval.fidelity import psnr, ssim
from dit_sparse.eval.measures.degradations import reencode
from dit_sparse.eval.measures.table import MEASURES, measure
from dit_sparse.pipelines.load import load
from dit_sparse.pipelines.video_to_video import video_to_video
from tests.eval.real_clips import CLIPS, real_clip

SIZES = {"carphone": (144, 176, 9), "bikes": (144, 208, 9), "world": (144, 256, 9)}
KEPT = {"carphone": (18.5, 0.56), "bikes": (23.5, 0.76), "world": (24.5, 0.26)}  # PSNR in dB, SSIM
PROMPT = "a large red star moving right on a speckled background"


@pytest.fixture(scope="module")
def pipe():
    pipe = load("embedded", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=CLIPS)
def named(request: pytest.FixtureRequest) -> tuple[str, torch.Tensor]:
    """A clip's name and its frames."""
    return request.param, real_clip(request.param, *SIZES[request.param])


@torch.no_grad()
def test_the_vae_keeps_what_it_can(pipe, named) -> None:
    name, video = named
    frames, _, height, width = video.shape
    latents = pipe.vae.encode((2 * video - 1).movedim(0, 1)[None]).latent_dist.mode()
    assert latents.shape == (1, 16, (frames + 1) // 2, height // 8, width // 8)
    back = (pipe.vae.decode(latents).sample[0].movedim(1, 0) / 2 + 0.5).clamp(0, 1)
    assert back.shape == video.shape and bool(torch.isfinite(back).all())
    least_psnr, least_ssim = KEPT[name]
    assert psnr(video, back) > least_psnr and ssim(video, back) > least_ssim
    flat = video.mean((0, 2, 3), keepdim=True).expand_as(video)
    assert psnr(video, back) > psnr(video, flat) + 3
    # frames stay in their order: each is nearer to its own than to the one half a clip away
    there = torch.stack([(back - video.roll(shift, 0)).square().mean() for shift in (0, frames // 2)])
    assert there[0] < there[1]


def test_video_to_video_keeps_more_at_less_strength_and_runs_sparse(pipe, named) -> None:
    _, video = named
    shape = {"steps": 4, "guidance_scale": 1.0}
    little, much = (video_to_video(pipe, video, PROMPT, strength, **shape) for strength in (0.25, 0.75))
    for clip in (little, much):
        assert clip.shape == video.shape and 0 <= float(clip.min()) and float(clip.max()) <= 1
        assert bool(torch.isfinite(clip).all())
    assert psnr(video, little) > psnr(video, much) + 2 and ssim(video, little) > ssim(video, much)
    enable(pipe, "svg", density=0.3, dense_steps=0)
    try:
        sparse = video_to_video(pipe, video, PROMPT, 0.75, **shape)
        report = summary(pipe)
    finally:
        disable(pipe)
    # three of the four steps are run; of the eight layers the first is dense
    assert report.calls == 3 * 8 and report.sparse_calls == 3 * 7 and not report.fallbacks
    assert 20 < psnr(much, sparse) < 60


NAMES = ["psnr", "ssim", "ms_ssim", "vmaf", "xpsnr", "temporal_flickering", "imaging_quality_proxy"]


def test_measures_take_photographs_and_encoding_them_well_changes_little() -> None:
    # NIQE needs more than the four blocks of a small frame: see its docstring
    video = real_clip("bikes", 272, 400, 3)
    noisy = (video + 0.08 * torch.randn_like(video)).clamp(0, 1)
    expected = {name for name in NAMES if not MEASURES[name].unmet()}
    clean, worse, after = (measure(x, reference=video, names=NAMES)[0] for x in (video, noisy, reencode(noisy)))
    assert set(clean) == set(worse) == expected
    assert all(MEASURES[name].signed(worse[name]) < MEASURES[name].signed(clean[name]) for name in expected), worse
    moved = {name: abs(after[name] - worse[name]) for name in expected}
    assert not {n: (m, MEASURES[n].reencode_bound) for n, m in moved.items() if m > MEASURES[n].reencode_bound}


FILMED = {"bikes": (272, 640), "world": (270, 480)}  # as they were filmed: nothing is scaled


@pytest.mark.parametrize("name", FILMED)
def test_niqe_of_photographs_answers_to_noise_and_encoding_moves_it_little(name: str) -> None:
    niqe = MEASURES["imaging_quality_proxy"]
    video = real_clip(name, *FILMED[name], 3)
    noisy = (video + 0.08 * torch.randn_like(video)).clamp(0, 1)
    clean, worse, after, again = (niqe.compute(x) for x in (video, noisy, reencode(video), reencode(noisy)))
    assert clean < 22 and worse > clean + 4  # as its docstring says
    assert abs(after - clean) <= niqe.reencode_bound and abs(again - worse) <= niqe.reencode_bound
    # a smooth picture has lost what NIQE looks at: there the bound is 10
    smooth = torch.nn.functional.avg_pool2d(video, 3, 1, 1)
    assert abs(niqe.compute(reencode(smooth)) - niqe.compute(smooth)) <= 10


def test_passing_riders_move_and_a_frozen_clip_does_not() -> None:
    if MEASURES["dynamic_degree_proxy"].unmet():
        pytest.skip(MEASURES["dynamic_degree_proxy"].unmet())
    video = real_clip("bikes", *SIZES["bikes"])
    names = ["dynamic_degree_proxy", "temporal_flickering"]
    moving, still = (measure(x, names=names)[0] for x in (video, video[:1].expand_as(video)))
    assert moving["dynamic_degree_proxy"] == 1 and still["dynamic_degree_proxy"] == 0
    assert moving["temporal_flickering"] < still["temporal_flickering"] == 1
