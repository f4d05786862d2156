"""Each measure against its definition, and what is refused."""

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.eval.measures import features, motion, reference, table
from dit_sparse.eval.measures.clips import read_clip
from dit_sparse.eval.measures.table import FROZEN_IS_BEST, MEASURES, VBENCH, coverage, measure, with_motion
from dit_sparse.pipelines.video_io import write_video

PROMPT = "a large red star moving right on a black background"


def clip(frames: int = 4, height: int = 48, width: int = 64) -> torch.Tensor:
    """Smooth random pictures that change a little."""
    base = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), size=(height, width), mode="bicubic")
    return (base + 0.02 * torch.randn(frames, 3, height, width)).clamp(0, 1)


def can(*names: str) -> None:
    for name in names:
        if MEASURES[name].missing():
            pytest.skip(f"{name} {MEASURES[name].missing()}")


def call(name: str, video: torch.Tensor, **more):
    entry = MEASURES[name]
    given = {"pair": (video, video), "clip": (video,), "prompt": (video, PROMPT)}[entry.kind]
    return entry.compute(*given, **more)


def test_flickering_is_vbench_on_eight_bit_frames() -> None:
    video = clip(5)
    frames = (video * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8).astype(np.float32)
    errors = [np.mean(np.abs(a - b)) for a, b in zip(frames[:-1], frames[1:], strict=True)]
    assert motion.temporal_flickering(video) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-6)
    assert motion.temporal_flickering(video[:1].expand(3, -1, -1, -1)) == 1


def test_consistency_is_vbench() -> None:
    vectors = torch.randn(6, 10)
    total = 0.0
    for i in range(1, 6):
        before, first = (torch.cosine_similarity(vectors[i], vectors[k], dim=0).item() for k in (i - 1, 0))
        total += (max(0.0, before) + max(0.0, first)) / 2
    assert features.consistency(vectors) == pytest.approx(total / 5, abs=1e-6)


def test_dynamic_degree_is_the_rule_of_vbench() -> None:
    can("dynamic_degree_proxy")
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 32, 32), size=(128, 128), mode="bicubic").clamp(0, 1)[0]
    threshold = 6 * 128 / 256
    for shift, moves in ((threshold + 1, 1.0), (threshold - 1, 0.0)):
        video = torch.stack([ground.roll(round(shift) * i, 2) for i in range(8)])
        assert motion.dynamic_degree_proxy(video) == moves
        assert motion.motion_magnitude_proxy(video) >= 0.8 * shift / 128 * 8
    # twice the frames of the same motion in the same time: every second one is looked at
    slow = torch.stack([ground.roll(2 * i, 2) for i in range(16)])
    assert motion.dynamic_degree_proxy(slow, fps=16) == 1 and motion.dynamic_degree_proxy(slow, fps=8) == 0


def test_smoothness_of_even_motion_beats_stutter() -> None:
    can("motion_smoothness_proxy")
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=(96, 96), mode="bicubic").clamp(0, 1)[0]
    even, stutter = (torch.stack([ground.roll(s, 2) for s in places]) for places in ([0, 2, 4, 6, 8], [0, 4, 4, 8, 8]))
    assert motion.motion_smoothness_proxy(even) > motion.motion_smoothness_proxy(stutter)


def test_ssim_and_ms_ssim_equal_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    a = clip(2, 176, 192)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    assert reference.ssim(a, b) == pytest.approx(
        float(image.structural_similarity_index_measure(b, a, data_range=1.0)), abs=1e-5
    )
    want = image.multiscale_structural_similarity_index_measure(b, a, data_range=1.0, normalize="relu")
    assert reference.ms_ssim(a, b) == pytest.approx(float(want), abs=1e-5)
    with pytest.raises(ValueError, match="161 pixels"):
        reference.ms_ssim(a[..., :160], b[..., :160])


def test_niqe_equals_scikit_video() -> None:
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(300.0), indexing="ij")
    gray = 0.5 + 0.2 * torch.sin(x / 7) * torch.cos(y / 11) + 0.1 * torch.sin(x * y / 97)
    gray = (gray + 0.05 * torch.sin(1.7 * x + 2.3 * y)).clamp(0, 1)
    # what scikit-video 1.1.11 gives for this picture
    assert call("imaging_quality_proxy", gray.expand(1, 3, -1, -1)) == pytest.approx(47.5299, abs=0.01)


def test_xpsnr_and_vmaf_rank_clips() -> None:
    can("vmaf", "xpsnr")
    a = clip(3, 64, 65)  # odd sides too
    little, much = ((a + s * torch.randn_like(a)).clamp(0, 1) for s in (0.02, 0.2))
    for name in ("vmaf", "xpsnr"):
        same, near, far = (MEASURES[name].compute(a, x, fps=8) for x in (a, little, much))
        assert same > near > far
    assert MEASURES["xpsnr"].compute(a, a) == 100


def test_drifts_and_latents() -> None:
    a = clip(3)
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert reference.sharpness_drift(a, a) == 0 > reference.sharpness_drift(a, blurred)
    assert reference.flicker_difference(a, a[:1].expand_as(a)) > 0
    x = torch.randn(2, 3, 4)
    assert reference.latent_error(x, 1.1 * x) == pytest.approx(0.1, abs=1e-5)
    assert reference.latent_errors([x, x], [x, 2 * x]) == pytest.approx([0, 1])
    for left, right, match in (([x], [x, x], "2 steps"), ([x], [x[:1]], "shape"), ([x], [x / 0], "finite")):
        with pytest.raises(ValueError, match=match):
            reference.latent_errors(left, right)


def test_table_is_complete() -> None:
    assert {entry.dimension for entry in MEASURES.values()} - {""} == set(VBENCH) and len(VBENCH) == 16
    for name, entry in MEASURES.items():
        assert entry.name == name and entry.range and entry.compute.__doc__
        networks = entry.kind == "clip" and name not in ("temporal_flickering",) and not entry.network
        assert name.endswith("_proxy") == networks
        assert entry.reencode_bound > 0 or entry.range == "0 or 1"


def test_no_dimension_of_vbench_is_silently_missing() -> None:
    from dit_sparse.eval.vbench import DIMENSIONS

    rows = {row.dimension: row for row in coverage()}
    assert list(rows) == list(VBENCH) and set(rows) == set(DIMENSIONS)
    for row in rows.values():
        assert row.any_video or row.world or row.network
        cells = row.cells()
        assert len(cells) == 5 and all(cells)
        # a stand-in says so wherever it appears; what has no stand-in is imported
        stand_ins = [name for name in row.any_video if name not in ("temporal_flickering",)]
        assert all(name.endswith("_proxy") for name in stand_ins)
        assert ("import" in cells[2]) == (not row.any_video)
    on_world = {name for name, row in rows.items() if row.world}
    assert on_world >= {"object_class", "multiple_objects", "color", "spatial_relationship", "human_action", "scene"}
    assert rows["aesthetic_quality"].any_video == ("colourfulness_proxy",)


def test_the_guide_lists_every_dimension_with_what_measures_it() -> None:
    guide = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text()
    for row in coverage():
        line = next(line for line in guide.splitlines() if line.startswith(f"| `{row.dimension}`"))
        cells = [cell.strip() for cell in line.strip("|").replace("`", "").split("|")]
        assert cells == row.cells()


def test_colourfulness_is_hasler_and_suesstruncks() -> None:
    assert call("colourfulness_proxy", torch.full((2, 3, 8, 8), 0.4)) == 0
    frame = torch.zeros(1, 3, 8, 8)
    frame[:, 0, :, :4], frame[:, 2, :, 4:] = 1, 1  # half red, half blue
    # rg = 255, 0 and yb = 127.5, -255: deviations 127.5 and 191.25, means 127.5 and -63.75
    want = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert call("colourfulness_proxy", frame) == pytest.approx(want, rel=1e-5)
    pale = frame * 0.2 + 0.4
    assert call("colourfulness_proxy", pale) == pytest.approx(0.2 * want, rel=1e-4)


def test_a_frozen_clip_is_best_at_these_and_motion_stands_beside() -> None:
    can("subject_consistency_proxy", "motion_smoothness_proxy", "dynamic_degree_proxy")
    video = clip(5, 64, 64)
    names = [name for name in FROZEN_IS_BEST if not MEASURES[name].network]
    still, moving = (measure(x, names=names)[0] for x in (video[:1].expand_as(video), video))
    for name in names:
        assert still[name] == pytest.approx(1, abs=1e-4) and still[name] > moving[name]
        assert with_motion([name]) == [name, "dynamic_degree_proxy", "motion_magnitude_proxy"]
    assert with_motion(["psnr"]) == ["psnr"]


def test_a_clip_that_was_looked_at_is_looked_at_again_when_it_changes() -> None:
    video = clip(3)
    values, _ = measure(video, names=["temporal_flickering", "colourfulness_proxy"])
    assert measure(video, names=list(values))[0] == values
    video[1] = math.nan
    with pytest.raises(ValueError, match="frame 1"):
        measure(video, names=["temporal_flickering"])


BAD = {
    "NaN": (lambda v: v.index_fill(0, torch.tensor([1]), math.nan), "frame 1"),
    "alpha": (lambda v: torch.cat([v, v[:, :1]], 1), "alpha"),
    "bytes": (lambda v: (v * 255).byte(), "uint8"),
    "0 to 255": (lambda v: v * 255, r"in \[0, 1\]"),
    "channels last": (lambda v: v.permute(0, 2, 3, 1), "shape"),
    "no batch": (lambda v: v[0], "shape"),
    "empty": (lambda v: v[:0], "shape"),
}


# Those that need a folder: test_networks.py
@pytest.mark.parametrize("name", [name for name, entry in MEASURES.items() if not entry.network])
def test_no_measure_takes_what_is_no_clip(name: str) -> None:
    if name in ("lpips", "dists"):
        can(name)
    video = clip(3, 192, 192)
    for spoil, match in BAD.values():
        with pytest.raises(ValueError, match=match) as caught:
            call(name, spoil(video))
        assert str(caught.value).startswith(("video ", "reference ")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n, m in MEASURES.items() if m.kind == "pair" and n not in ("lpips", "dists")])
def test_pairs_refuse_other_lengths_and_sizes(name: str) -> None:
    a = clip(3, 164, 168)
    for b in (a[:2], a[..., :166], a[:, :, :162]):
        with pytest.raises(ValueError, match="equal clips"):
            MEASURES[name].compute(a, b)


def test_one_frame_and_portrait_and_small_clips_say_what_they_lack() -> None:
    for name in ("temporal_flickering", "flicker_difference", "subject_consistency_proxy", "motion_smoothness_proxy"):
        can(name)
        with pytest.raises(ValueError, match="1 frame; this measure needs"):
            call(name, clip(1))
    values, reasons = measure(clip(3, 96, 40), reference=clip(3, 96, 40), prompt=PROMPT)
    assert {"psnr", "ssim", "temporal_flickering", "world_color"} <= set(values)
    assert "192 pixels" in reasons["imaging_quality_proxy"] and "ms_ssim" in reasons
    assert "world_action" not in values and "world_action" not in reasons  # three frames show no motion


@pytest.mark.parametrize("fps", [0, -8, math.nan, math.inf, "8", True])
def test_wrong_fps(fps) -> None:
    with pytest.raises(ValueError, match=r"fps=.* use a number in \(0, 1000\]"):
        measure(clip(3), fps=fps)


def test_unknown_measure() -> None:
    with pytest.raises(ValueError, match="'pnsr' is unknown; use some of psnr"):
        measure(clip(3), names=["pnsr"])


def test_weights_are_read_only_when_known(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"cos\nsystem\n(S'echo no'\ntR.")
    with pytest.raises(ValueError, match="SHA-256 .* it is not read"):
        features.read_weights(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not exist"):
        features.read_weights(tmp_path / "none.pth")


def test_features_know_pictures() -> None:
    can("subject_consistency_proxy")
    network = features._network()
    assert not network.training
    still = clip(1, 64, 64).expand(3, -1, -1, -1)
    assert features.subject_consistency_proxy(still) == pytest.approx(1, abs=1e-4)
    other = torch.cat([still[:2], torch.rand(1, 3, 64, 64)])
    for name in ("subject_consistency_proxy", "background_consistency_proxy"):
        assert call(name, other) < 0.95


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(motion.importlib, "import_module", absent)
    values, reasons = measure(clip(3), reference=clip(3), names=["psnr", "ms_ssim", "dynamic_degree_proxy"])
    assert set(values) == {"psnr"}
    for name in ("ms_ssim", "dynamic_degree_proxy"):
        assert "pip install 'dit-sparse[eval]'" in reasons[name]


def write(path: Path, video: torch.Tensor, codec: str, pix_fmt: str, fps: int = 8) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], pix_fmt
        for frame in (video * 255).byte().permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


def test_files(tmp_path: Path) -> None:
    video = clip(3, 64, 48)
    write_video(tmp_path / "clip.mp4", video, 12)
    read = read_clip(tmp_path / "clip.mp4", fps=12)
    assert read.fps == 12 and read.video.shape == video.shape
    with pytest.raises(ValueError, match="12 frames per second; fps=8"):
        read_clip(tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match="is not a file"):
        read_clip(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_clip(tmp_path / "text.mp4")
    ten = read_clip(write(tmp_path / "ten.mkv", video, "ffv1", "yuv444p10le")).video
    assert ten.shape == video.shape and float((ten - video).abs().mean()) < 0.02
    with pytest.raises(ValueError, match="alpha channel"):
        read_clip(write(tmp_path / "alpha.mkv", video, "ffv1", "bgra"))


def test_files_whose_alpha_the_decoder_leaves_out_and_files_of_sound(tmp_path: Path) -> None:
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    made = {"alpha.webm": ["testsrc=s=64x48:r=8,format=yuva420p", "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"],
            "sound.wav": ["sine=d=0.2"]}
    for name, (source, *words) in made.items():
        command = [program, "-f", "lavfi", "-i", source, "-t", "0.5", *words, name]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    with pytest.raises(ValueError, match=r"alpha\.webm has an alpha channel"):
        read_clip(tmp_path / "alpha.webm")
    with pytest.raises(ValueError, match=r"sound\.wav cannot be read as a video: it holds no video stream"):
        read_clip(tmp_path / "sound.wav")


def test_a_clip_that_a_phone_took_upright_is_turned(tmp_path: Path) -> None:
    """The file holds 64x48 and says that players turn it: it is measured as people see it, 48x64."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    video = clip(3, 48, 64)
    write_video(tmp_path / "flat.mp4", video, 8)
    words = [program, "-display_rotation", "90", "-i", "flat.mp4", "-c", "copy", "upright.mp4"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    flat, upright = (read_clip(tmp_path / f"{name}.mp4").video for name in ("flat", "upright"))
    assert upright.shape == (3, 3, 64, 48)
    assert torch.equal(upright, flat.rot90(1, (2, 3)))  # a quarter to the left, as -display_rotation 90 says
    assert measure(upright, reference=upright, names=["psnr", "ssim"])[0] == {"psnr": 100, "ssim": pytest.approx(1)}


def test_directions() -> None:
    signed = {name: table.MEASURES[name].signed for name in ("psnr", "lpips", "sharpness_drift")}
    assert signed["psnr"](30) > signed["psnr"](20)
    assert signed["lpips"](0.1) > signed["lpips"](0.2)
    assert signed["sharpness_drift"](-0.1) > signed["sharpness_drift"](0.2)
