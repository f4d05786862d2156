"""DINO and CLIP from local safetensors: shapes and formulas on random weights, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.eval.config import parse_config
from dit_sparse.eval.evaluation import jobs_of
from dit_sparse.eval.measures import networks
from dit_sparse.eval.measures.networks import Networks, check_network, resized
from dit_sparse.eval.measures.table import MEASURES, VBENCH, measure
from tests.eval.measures.test_measures import BAD, clip

NAMES = [name for name, entry in MEASURES.items() if entry.network]
STYLED = "The bund Shanghai, oil painting"
MERGES = [("o", "i"), ("oi", "l</w>"), ("r", "e"), ("re", "d</w>")]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """Both networks, tiny, with random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("networks")
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = {**tiny, "image_size": 32, "patch_size": 8}
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), *map("".join, MERGES)]
    text = {
        **tiny,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    ViTModel(ViTConfig(**image), add_pooling_layer=False).save_pretrained(place / "dino")
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(place / "clip")
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=MERGES).save_pretrained(place / "clip")
    return Networks(place / "dino", place / "clip")


def vbench_consistency(features: torch.Tensor) -> float:
    """The loop of vbench/subject_consistency.py."""
    total = 0.0
    for i in range(1, len(features)):
        before, first = (torch.cosine_similarity(features[i], features[k], dim=0).item() for k in (i - 1, 0))
        total += (max(0.0, before) + max(0.0, first)) / 2
    return total / (len(features) - 1)


def pixels(frames: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    return torch.stack([(frames[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)


@torch.no_grad()
def test_subject_consistency_is_vbench_on_the_class_token(given: Networks) -> None:
    from transformers import ViTModel

    video = torch.rand(9, 3, 64, 90)
    frames = (video * 255).round()
    # the shorter side to 32, the longer to int(32 * 90 / 64), the ratio kept
    frames = torch.nn.functional.interpolate(frames, size=(32, 45), mode="bilinear").round()
    network = ViTModel.from_pretrained(given.dino, add_pooling_layer=False).eval()
    frames = pixels(frames, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tokens = network(pixel_values=frames, interpolate_pos_encoding=True).last_hidden_state
    assert tokens.shape == (9, 1 + 4 * 5, 16)
    found = networks.subject_consistency(video, networks=given)
    assert found == pytest.approx(vbench_consistency(tokens[:, 0]), abs=1e-5) and found < 1
    assert networks.subject_consistency(video[:1].expand(3, -1, -1, -1), networks=given) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_background_consistency_and_clip_score(given: Networks) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    video = torch.rand(3, 3, 50, 40)  # portrait
    frames = (video * 255).round()
    frames = torch.nn.functional.interpolate(frames, size=(40, 32), mode="bicubic").clamp(0, 255).round()[..., 4:36, :]
    frames = pixels(frames, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    network = CLIPModel.from_pretrained(given.clip).eval()
    images = network.get_image_features(pixel_values=frames).pooler_output
    assert images.shape == (3, 8)
    found = networks.background_consistency(video, networks=given)
    assert found == pytest.approx(vbench_consistency(images), abs=1e-5)
    tokens = CLIPTokenizer.from_pretrained(given.clip)(["red"], return_tensors="pt")
    text = network.get_text_features(**tokens).pooler_output
    want = torch.cosine_similarity(images, text, dim=1).mean().item()
    assert networks.clip_score(video, "red", networks=given) == pytest.approx(want, abs=1e-5)
    # a text beyond the network's positions is cut off
    assert -1 <= networks.clip_score(video, "red " * 50, networks=given) <= 1


@torch.no_grad()
def test_appearance_style_takes_the_style_of_vbenchs_prompt(given: Networks) -> None:
    from PIL import Image
    from transformers import CLIPModel

    video = torch.rand(2, 3, 32, 32)
    assert networks.appearance_style(video, "a red circle", networks=given) is None
    found = networks.appearance_style(video, STYLED, networks=given)
    # nothing to resize: the same frames as for the score, with the style's words alone
    assert found == pytest.approx(networks.clip_score(video, "oil painting", networks=given), abs=1e-5)
    assert found != pytest.approx(networks.clip_score(video, STYLED, networks=given), abs=1e-5)
    network, big = CLIPModel.from_pretrained(given.clip).eval(), torch.rand(1, 3, 64, 64)
    frame = Image.fromarray((big[0] * 255).round().byte().permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC)
    frame = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    frame = pixels(frame, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    image = torch.nn.functional.normalize(network.get_image_features(pixel_values=frame).pooler_output, dim=1)
    style = networks._text_features(given.clip, "oil painting")
    assert networks.appearance_style(big, STYLED, networks=given) == pytest.approx(float(image[0] @ style), abs=1e-5)


def test_frames_are_resized_as_bytes() -> None:
    video = torch.rand(2, 3, 60, 44)
    small = resized(video, 20, "bicubic")
    assert small.shape == (2, 3, 27, 20) and torch.equal(small, small.round()) and small.max() <= 255
    assert torch.equal(resized(video, 44, "bilinear"), (video * 255).round())


def test_measures_without_and_with_folders(given: Networks) -> None:
    video = clip(3, 64, 64)
    values, reasons = measure(video, prompt=STYLED, names=NAMES)
    assert values == {} and set(reasons) == set(NAMES)
    assert reasons["subject_consistency"] == "needs DINO ViT-B/16: name its folder by the key dino"
    values, reasons = measure(video, prompt=STYLED, names=NAMES, networks=given)
    assert set(values) == set(NAMES) and reasons == {}
    half, reasons = measure(video, prompt="a cat", names=NAMES, networks=Networks(clip=given.clip))
    assert set(half) == {"background_consistency", "clip_score"} and set(reasons) == {"subject_consistency"}
    assert {MEASURES[name].dimension for name in NAMES} - {""} <= set(VBENCH)


@pytest.mark.parametrize("name", NAMES)
def test_no_measure_takes_what_is_no_clip(given: Networks, name: str) -> None:
    for spoil, match in BAD.values():
        arguments = (spoil(clip(3, 48, 48)), STYLED)[: 1 + (MEASURES[name].kind == "prompt")]
        with pytest.raises(ValueError, match=match):
            MEASURES[name].compute(*arguments, networks=given)


def test_only_safetensors_of_the_right_kind_are_read(given: Networks, tmp_path: Path) -> None:
    def copy(name: str, source: Path | None = given.dino) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    pickled = copy("pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    check_network("dino", pickled)  # safetensors beside it: the other file is not looked at
    (pickled / "model.safetensors").unlink()
    damaged = copy("damaged")
    (damaged / "model.safetensors").write_bytes((given.dino / "model.safetensors").read_bytes()[:-8])
    plain = copy("plain")
    (plain / "config.json").write_text("[]")
    for folder, match in (
        (pickled, "holds pytorch_model.bin; only safetensors are read"),
        (damaged, "model.safetensors is damaged"),
        (plain, "config.json cannot be read"),
        (given.clip, "model of type 'clip'; use one of type 'vit'"),
        (tmp_path / "none", "is no folder"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            check_network("dino", folder)
        assert str(caught.value).startswith("dino: ") and "\n" not in str(caught.value)


def test_code_in_a_folder_is_never_run(given: Networks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(given.dino, tmp_path / "dino"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    assert math.isfinite(networks.subject_consistency(torch.rand(2, 3, 32, 32), networks=Networks(folder)))
    assert not (tmp_path / "ran").exists()


def test_what_a_file_lacks_is_said(given: Networks, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(given.dino, tmp_path / "dino"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "layer" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"dino: .* lacks \S+ \(1 tensors missing\)"):
        networks.subject_consistency(torch.rand(2, 3, 32, 32), networks=Networks(folder))
    silent = Path(shutil.copytree(given.clip, tmp_path / "clip", ignore=shutil.ignore_patterns("tokenizer*")))
    values, reasons = measure(torch.rand(2, 3, 32, 32), prompt="a", names=NAMES, networks=Networks(clip=silent))
    assert set(values) == {"background_consistency"} and "holds no tokenizer.json" in reasons["clip_score"]


def test_the_configuration_names_them(given: Networks, tmp_path: Path) -> None:
    config = {"methods": ["svg"], "prompts": ["a"]}
    found = parse_config({**config, "dino": "dino", "clip": str(given.clip)}, folder=given.dino.parent)
    assert found.networks == Networks(given.dino.resolve(), given.clip.resolve())
    # results with one network are never taken for those with another, or with none
    jobs = [jobs_of(parse_config(c), {})[0] for c in (config, {**config, "dino": str(given.dino)})]
    assert "networks" not in jobs[0] and set(jobs[1]["networks"]) == {"dino"} and jobs[1]["networks"]["dino"]
    with pytest.raises(ValueError, match="dino: .* holds a model of type 'clip'"):
        parse_config({**config, "dino": str(given.clip)})
    with pytest.raises(ValueError, match="clip is a number; write a text"):
        parse_config({**config, "clip": 3})


def test_a_run_measures_with_them(given: Networks, tmp_path: Path) -> None:
    from dit_sparse.eval.evaluation import evaluate
    from tests.tiny_wan import build_tiny_wan

    content = {"methods": ["svg"], "prompts": [STYLED], "measures": NAMES, "pipeline": "tiny"}
    config = parse_config({**content, "dino": str(given.dino), "clip": str(given.clip)})
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    shape = {"frames": 5, "height": 32, "width": 48, "steps": 2, "guidance_scale": 1.0}
    results = evaluate(config, shape, pipe, tmp_path, command="")
    # a frozen clip is best at the consistencies: how much the clip moves stands beside them
    names = {*NAMES, "dynamic_degree_proxy", "motion_magnitude_proxy"}
    assert all({*result["values"], *result["reasons"]} == names >= set(NAMES) for result in results)
    assert all(set(NAMES) <= set(result["values"]) for result in results)
    text = (tmp_path / "report.html").read_text()
    assert "the configuration names" in text and all(f">{name}</text>" in text for name in NAMES)
