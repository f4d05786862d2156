"""Loading: an ordinary pipeline, or one line that says what is wrong."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from dit_sparse.pipelines.load import check_folder, load


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "wan"))


def refusal(model) -> str:
    with pytest.raises(ValueError) as caught:
        load(model, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_loads_as_an_ordinary_pipeline(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args, **_kwargs):
        raise AssertionError("a local model asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    pipe = load(tiny_folder, device="cpu")
    assert type(pipe).__name__ == "WanPipeline"
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert not pipe.transformer.training


def test_dtype_is_honoured(tiny_folder: Path) -> None:
    assert load(tiny_folder, device="cpu", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_unknown_model_names_what_is_allowed() -> None:
    assert "'embedded'" in refusal("no-such-model")
    assert "model_index.json" in refusal(str(Path(__file__).parent))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("file", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_missing_weights_are_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    text = refusal(copy)
    assert "missing" in text and file.split("/")[0] in text


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000], ids="{} bytes".format)
def test_truncated_weights_are_named(copy: Path, keep: int) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:keep])
    text = refusal(copy)
    assert "damaged" in text and WEIGHTS in text


def test_noise_instead_of_weights_is_named(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0" + bytes(range(100)))
    assert "damaged" in refusal(copy)


def test_missing_tensor_is_not_filled_with_noise(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / WEIGHTS)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, copy / WEIGHTS)
    assert gone in refusal(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"x": "part-2.safetensors"}}
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "part-2.safetensors" in refusal(copy)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"])
def test_damaged_configuration_is_one_line(copy: Path, file: str) -> None:
    (copy / file).write_text("{ not json")
    assert refusal(copy)


def test_embedded_model_is_complete() -> None:
    from dit_sparse.pipelines.embedded import folder

    assert {"transformer", "vae", "text_encoder"} <= set(check_folder(folder()))


def test_method_is_switched_on(tiny_folder: Path) -> None:
    from dit_sparse import disable, summary

    pipe = load(tiny_folder, device="cpu", method="dense")
    assert "dense" in summary(pipe).method
    disable(pipe)
    with pytest.raises(ValueError, match="no-such-method"):
        load(tiny_folder, device="cpu", method="no-such-method")


HEADERS = ["[1, 2]", '{"x": 3}', '{"x": {"data_offsets": [0, "y"]}}', '{"x": {"data_offsets": [0, null]}, "z": null}']


@pytest.mark.parametrize("header", HEADERS)
def test_foreign_headers_are_named(copy: Path, header: str) -> None:
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert "damaged" in refusal(copy)


def test_a_part_without_a_class_is_one_line(copy: Path) -> None:
    file = copy / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vae": []}))
    assert refusal(copy)


def test_layers_that_would_be_left_out_are_named(copy: Path) -> None:
    file = copy / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 1}))
    assert "blocks.1." in refusal(copy)
