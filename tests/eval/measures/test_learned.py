"""LPIPS and DISTS: their formulas on random weights, torchvision's networks being stood in for."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit_sparse.eval.measures import reference
from dit_sparse.eval.measures.table import MEASURES, measure

pytest.importorskip("torchmetrics")
FILES = {"lpips": "alexnet-owt-7be5be79.pth", "dists": "vgg16-397923af.pth"}


def alexnet(weights: object = None) -> nn.Module:
    """torchvision's AlexNet, the layers before the classifier: the real widths, random weights."""
    layers: list[nn.Module] = []
    before = 3
    for width, size, stride, padding, pool in ((64, 11, 4, 2, 1), (192, 5, 1, 2, 1), (384, 3, 1, 1, 0),
                                               (256, 3, 1, 1, 0), (256, 3, 1, 1, 1)):  # fmt: skip
        layers += [nn.Conv2d(before, width, size, stride, padding), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] * pool
        before = width
    return with_features(layers)


def vgg16(weights: object = None) -> nn.Module:
    """torchvision's VGG-16, likewise."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        layers.append(nn.MaxPool2d(2, 2))
    return with_features(layers)


def with_features(layers: list[nn.Module]) -> nn.Module:
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    return network


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, nn.Module]]:
    """torchvision with random weights, and files where its weights would lie; yields the networks that were made."""
    made: dict[str, nn.Module] = {}

    def keep(name: str, build):
        def builder(weights: object = None) -> nn.Module:
            torch.manual_seed(1)
            made[name] = build(weights)
            return made[name]

        return builder

    known = types.SimpleNamespace(DEFAULT="random")
    models = types.ModuleType("torchvision.models")
    vars(models).update(alexnet=keep("lpips", alexnet), vgg16=keep("dists", vgg16), AlexNet_Weights=known,
                        VGG16_Weights=known)  # fmt: skip
    package = types.ModuleType("torchvision")
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for name in ("torchmetrics.functional.image.lpips", "torchmetrics.functional.image.dists",
                 "torchmetrics.image.lpip", "torchmetrics.image.dists"):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(name), "_TORCHVISION_AVAILABLE", True)
    for name in ("vgg16", "VGG16_Weights"):  # dists takes them by name when it is imported
        module = importlib.import_module("torchmetrics.functional.image.dists")
        monkeypatch.setattr(module, name, getattr(models, name), raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for file in FILES.values():
        (tmp_path / "checkpoints" / file).touch()
    for cache in (reference._missing_weights, reference._learned):
        cache.cache_clear()
    yield made
    for cache in (reference._missing_weights, reference._learned):
        cache.cache_clear()


def pair(side: int = 64) -> tuple[Tensor, Tensor]:
    a = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), size=(side, side), mode="bicubic").clamp(0, 1)
    return a, (a + 0.1 * torch.randn_like(a)).clamp(0, 1)


@torch.no_grad()
def test_lpips_is_the_papers_formula(stood_in: dict[str, nn.Module]) -> None:
    """Unit channels, squared difference, learned weights, mean over places, sum over layers (arXiv 1801.03924)."""
    a, b = pair()
    found = reference.lpips(a, b)
    module = importlib.import_module("torchmetrics.functional.image.lpips")
    weights = torch.load(Path(module.__file__).parent / "lpips_models/alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def layers(x: Tensor) -> list[Tensor]:
        x = (2 * x - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        kept = []
        for layer in stood_in["lpips"].features:  # type: ignore[union-attr]
            x = layer(x)
            kept += [x.clone()] if isinstance(layer, nn.ReLU) else []
        return kept

    want = torch.zeros(len(a))
    for i, (x, y) in enumerate(zip(layers(a), layers(b), strict=True)):
        x, y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-8) for z in (x, y))
        linear = weights[f"lin{i}.model.1.weight"].view(1, -1, 1, 1)
        want += ((x - y).square() * linear).sum(1).mean((1, 2))
    assert found == pytest.approx(float(want.mean()), rel=1e-3) and found > 0
    assert reference.lpips(a, a) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_dists_is_the_papers_formula(stood_in: dict[str, nn.Module]) -> None:
    """1 - sum over layers of alpha * (means alike) + beta * (covariances alike) (arXiv 2004.07728)."""
    a, b = pair()
    found = reference.dists(a, b)
    network = reference._learned("dists")
    xs, ys = network.forward_once(a), network.forward_once(b)
    assert [x.shape[1] for x in xs] == [3, 64, 128, 256, 512, 512] and torch.equal(xs[0], a)
    total = network.alpha.sum() + network.beta.sum()
    alphas, betas = (w.flatten().split([x.shape[1] for x in xs]) for w in (network.alpha, network.beta))
    want = torch.ones(len(a))
    for x, y, alpha, beta in zip(xs, ys, alphas, betas, strict=True):
        mx, my = x.mean((2, 3)), y.mean((2, 3))
        vx, vy = x.var((2, 3), correction=0), y.var((2, 3), correction=0)
        both = ((x - mx[..., None, None]) * (y - my[..., None, None])).mean((2, 3))
        want -= ((2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6) * alpha).sum(1) / total
        want -= ((2 * both + 1e-6) / (vx + vy + 1e-6) * beta).sum(1) / total
    assert found == pytest.approx(float(want.mean()), abs=2e-4) and found > 0
    assert reference.dists(a, a) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_more_noise_is_farther_and_bad_input_is_refused(stood_in: dict[str, nn.Module], name: str) -> None:
    a, _ = pair()
    grain = torch.randn_like(a)
    near, far = (MEASURES[name].compute(a, (a + s * grain).clamp(0, 1)) for s in (0.02, 0.2))
    assert 0 < near < far
    for other, match in ((a[:1], "equal clips"), (a[:, :, :20, :20], "sides of 32"), (a * torch.nan, "not finite")):
        with pytest.raises(ValueError, match=match):
            MEASURES[name].compute(a, other)


@pytest.mark.parametrize("name", FILES)
def test_without_weights_the_reason_names_the_file(stood_in: dict[str, nn.Module], tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / FILES[name]).unlink()
    values, reasons = measure(pair()[0], reference=pair()[1], names=["psnr", name])
    assert set(values) == {"psnr"} and FILES[name] in reasons[name] and "torch.hub's checkpoints" in reasons[name]
    with pytest.raises(ValueError, match=f"{name} needs torchvision's weights"):
        MEASURES[name].compute(*pair())


@pytest.mark.parametrize("name", FILES)
def test_without_torchvision_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    reference._missing_weights.cache_clear()
    try:
        reasons = measure(pair()[0], reference=pair()[1], names=[name])[1]
        assert reasons[name].startswith("needs torchvision (ModuleNotFoundError")
    finally:
        reference._missing_weights.cache_clear()
