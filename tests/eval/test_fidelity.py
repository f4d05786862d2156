"""PSNR and SSIM against their definitions and against torchmetrics."""

import math

import pytest
import torch

from dit_sparse.eval.fidelity import CAP, psnr, psnr_frames, ssim


def pair(*shape: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.rand(*shape)
    return a, (a + noise * torch.randn(*shape)).clamp(0, 1)


def test_psnr_is_over_the_whole_clip() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[1] = 0.5  # frame errors 0 and 0.25: over the clip 0.125
    assert psnr(a, b) == pytest.approx(-10 * math.log10(0.125), abs=1e-5)
    assert psnr_frames(a, b) == pytest.approx((CAP + -10 * math.log10(0.25)) / 2, abs=1e-5)


def test_psnr_is_capped_for_equal_clips() -> None:
    a = torch.rand(3, 3, 8, 8)
    assert psnr(a, a) == psnr_frames(a, a) == CAP


def test_psnr_of_several_clips_is_the_mean_over_clips() -> None:
    a, b = pair(3, 4, 3, 16, 16)
    each = [psnr(x, y) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b) == pytest.approx(sum(each) / 3, abs=1e-6)


@pytest.mark.parametrize("size", [(8, 9), (16, 23), (64, 48)], ids=str)
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_equals_torchmetrics(size: tuple[int, int], noise: float) -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair(3, 3, *size, noise=noise)
    want = functional.structural_similarity_index_measure(b, a, data_range=1.0)
    assert ssim(a, b) == pytest.approx(float(want), abs=1e-5)


def test_ssim_of_equal_clips_is_one() -> None:
    a = torch.rand(2, 3, 32, 32)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_ssim_does_not_depend_on_how_a_gpu_rounds_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN convolves float32 with 10 bits of mantissa by default: here as there, float64 is left alone."""
    a, b = pair(2, 3, 48, 64, noise=0.002)
    want, convolve = ssim(a, b), torch.nn.functional.conv2d

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, weight: convolve(rounded(x), rounded(weight)))
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert ssim(a, b) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("measure", [psnr, psnr_frames, ssim])
def test_wrong_shapes_are_refused_in_one_line(measure) -> None:
    for a, b in [((2, 3, 16, 16), (3, 3, 16, 16)), ((3, 16, 16), (3, 16, 16))]:
        with pytest.raises(ValueError, match="shape") as caught:
            measure(torch.zeros(a), torch.zeros(b))
        assert "\n" not in str(caught.value)


def test_ssim_refuses_frames_smaller_than_its_border() -> None:
    with pytest.raises(ValueError, match="more than 5 pixels"):
        ssim(torch.zeros(1, 3, 5, 40), torch.zeros(1, 3, 5, 40))
