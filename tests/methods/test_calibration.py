"""The calibration file of axis orders and static masks: written, read, used, refused; and the runs that make it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dit_sparse.axisorders import AXES
from dit_sparse.bits import pack_bits, unpack_bits
from dit_sparse.bridge import ForwardInfo
from dit_sparse.calibration import FORMAT, Calibration, calibrate, group_of, load_calibration
from dit_sparse.grid import TokenGrid
from dit_sparse.methods.paro import Paro
from dit_sparse.order import axis_order
from dit_sparse.processor import SparseProc, enable, summary
from dit_sparse.session import RunSession
from tests.tiny_wan import build_tiny_wan


def _made(groups: int = 2, layers: int = 3, heads: int = 2, grid: tuple = (3, 8, 8), block: int = 16) -> Calibration:
    blocks = -(-math.prod(grid) // block)
    keep = torch.rand(groups, layers, heads, blocks, blocks) < 0.4
    orders = torch.randint(6, (layers, heads), dtype=torch.uint8)
    return Calibration(grid, block, 0.4, orders, pack_bits(keep | torch.eye(blocks, dtype=torch.bool)))


@pytest.mark.parametrize(
    "groups, steps", [(6, [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5]), (1, [0] * 15), (2, [0] * 8 + [1] * 7)]
)
def test_groups_of_steps(groups: int, steps: list[int]) -> None:
    assert [group_of(step, 15, groups) for step in range(15)] == steps
    assert group_of(0, None, groups) == groups - 1
    ten = [min(10 * step // 50, 5) for step in range(50)]
    assert [group_of(step, 50, 6) for step in range(50)] == ten, "ten groups, the second half shared"


def test_file_is_written_read_and_used(tmp_path, make_call) -> None:
    made = _made()
    made.save(tmp_path / "c.safetensors")
    again = load_calibration(tmp_path / "c.safetensors")
    assert (again.grid, again.block_size, again.density) == (made.grid, made.block_size, made.density)
    assert torch.equal(again.orders, made.orders) and torch.equal(again.masks, made.masks)
    grid = TokenGrid(3, 8, 8, text=5, text_at="back")
    method = Paro(calibration=tmp_path / "c.safetensors")
    for layer, step, group in ((0, 0, 0), (2, 1, 0), (2, 7, 1)):
        call = make_call(grid, batch=2, layer=layer, layers=3, step=step, num_steps=10)
        mask = method.plan(call).mask
        assert torch.equal(mask.to_dense()[0, :, :12, :12], unpack_bits(made.masks[group, layer], 12).bool())
        for head in range(2):
            order = axis_order(grid, AXES[made.orders[layer, head]])
            assert torch.equal(mask.query.index[0, head, :192], order)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(size=(3, 8, 9)), "grid 3x8x8, not 3x8x9"),
        (dict(layers=4), "layers 3, not 4"),
        (dict(heads=3), "heads 2, not 3"),
    ],
    ids=str,
)
def test_file_of_another_model_is_refused(call: dict, words: str, tmp_path, make_call) -> None:
    _made().save(tmp_path / "c.safetensors")
    method = Paro(calibration=str(tmp_path / "c.safetensors"))
    grid = TokenGrid(*call.get("size", (3, 8, 8)))
    with pytest.raises(ValueError, match=words) as caught:
        method.plan(make_call(grid, heads=call.get("heads", 2), layers=call.get("layers", 3)))
    assert "\n" not in str(caught.value)
    if "size" in call:
        with pytest.raises(ValueError, match=words):
            method.check(grid)


def test_damaged_files_are_refused_in_one_line(tmp_path) -> None:
    from safetensors.torch import save_file

    made, path = _made(), tmp_path / "c.safetensors"
    about = {"grid": [3, 8, 8], "block_size": 16, "density": 0.4}
    good = {"orders": made.orders, "masks": made.masks}

    def write(tensors: dict, about: object = about, name: str = FORMAT) -> None:
        save_file(tensors, path, metadata={"format": name, "about": json.dumps(about)})

    cases = [
        (lambda: path.write_bytes(b"no such format"), "cannot be read"),
        (lambda: save_file(good, path), "format is None"),
        (lambda: write(good, name="paro 9"), "format is 'paro 9'"),
        (lambda: write({"orders": made.orders}), "masks"),
        (lambda: write(good, {"grid": [3, 8, 8]}), "block_size"),
        (lambda: write(good, about | {"grid": [3, 8, -8]}), "whole numbers"),
        (lambda: write(good, about | {"grid": [3, 8, 9]}), "masks is torch.uint8"),
        (lambda: write(good | {"orders": made.orders + 6}), "codes 0 ... 5"),
        (lambda: write(good | {"orders": made.orders.float()}), "orders is torch.float32"),
        (lambda: write(good | {"masks": made.masks[:, :, :1].contiguous()}), "masks is"),
    ]
    for make, words in cases:
        make()
        with pytest.raises(ValueError, match=words) as caught:
            Paro(calibration=str(path))
        assert "\n" not in str(caught.value) and "c.safetensors" in str(caught.value)


@pytest.fixture(scope="module")
def pipe():
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def _run(pipe, steps: int = 4) -> Tensor:
    return pipe("a red circle", height=64, width=96, num_frames=9, num_inference_steps=steps, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16).frames


def test_calibrating_a_pipeline_and_using_it(pipe, tmp_path) -> None:
    made = calibrate(pipe, lambda: _run(pipe), density=0.5, block_size=16, groups=2)
    layers, heads = len(pipe.transformer.blocks), 2
    blocks = -(-math.prod(made.grid) // 16)
    assert tuple(made.orders.shape) == (layers, heads) and made.masks.shape[0] == 2
    counts = unpack_bits(made.masks, blocks).sum((-2, -1))
    assert (counts == math.ceil(0.5 * blocks**2)).all()
    with pytest.raises(ValueError, match="not enabled"):
        summary(pipe)
    made.save(tmp_path / "wan.safetensors")
    enable(pipe, "paro", calibration=str(tmp_path / "wan.safetensors"), dense_steps=0, dense_layers=0, strict=True)
    assert _run(pipe).isfinite().all()
    found = summary(pipe)
    assert found.sparse_calls == found.calls == 4 * 2 * layers and found.sparse_density == pytest.approx(0.5, abs=0.05)


def test_runs_without_a_file(pipe) -> None:
    enable(pipe, "paro", density=0.5, block_size=16, dense_steps=1, dense_layers=0, strict=True)
    first = _run(pipe)
    found = summary(pipe)
    assert first.isfinite().all() and found.sparse_calls and not found.fallbacks
    assert torch.equal(_run(pipe), first), "the choice of a run does not outlive it"


def test_calibrate_refuses_what_it_cannot_use(pipe) -> None:
    with pytest.raises(ValueError, match="layer 0 made no self-attention call"):
        calibrate(pipe, lambda: None)
    with pytest.raises(ValueError, match="groups=0"):
        calibrate(pipe, lambda: None, groups=0)


def test_a_wrong_file_is_counted_in_a_run(tmp_path, make_call) -> None:
    _made().save(tmp_path / "c.safetensors")
    session = RunSession(SparseProc("paro", calibration=str(tmp_path / "c.safetensors")))
    session.layers = 3
    grid = TokenGrid(3, 8, 9)
    session.begin_forward(ForwardInfo(grid=grid, reason="", step=5, num_steps=10, branch="", new_run=False,
                                      family="wan"))
    call = make_call(grid)
    session.attention(1, call.query, call.key, call.value, None, call.scale)
    assert "grid 3x8x8" in session.report.records[0].reason


def test_options_that_the_file_settles(tmp_path) -> None:
    _made().save(tmp_path / "c.safetensors")
    path = str(tmp_path / "c.safetensors")
    assert Paro(density=0.4, block_size=16, calibration=path).file.density == 0.4
    for options in ({"density": 0.5}, {"block_size": 64}):
        with pytest.raises(ValueError, match="use None"):
            Paro(calibration=path, **options)
    with pytest.raises(ValueError, match="density=0.2"):
        Paro(calibration=path).at_density(0.2)
