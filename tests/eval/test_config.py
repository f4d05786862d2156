"""The configuration file is read strictly."""

import json
from pathlib import Path

import pytest

from dit_sparse.eval.config import parse_config, read_config

GOOD = {"methods": ["svg"], "prompts": ["a red circle"]}


def test_defaults_and_everything() -> None:
    config = parse_config(GOOD)
    assert config.pipeline == "embedded" and config.seeds == (0,) and config.methods[0].label == "svg"
    options = {"decay": 0.2}
    config = parse_config({
        **GOOD, "pipeline": "owner/name", "seeds": [1, 2], "steps": 4, "size": 64, "guidance": 1, "fps": 16, "clips": 0,
        "measures": ["psnr"], "device": "cpu", "noise_ceiling": True,
        "methods": [{"name": "radial", "label": "r.2", "options": options}, {"name": "gna", "options": {
            "window": [3, 5, 5]}}],
    })
    assert [m.label for m in config.methods] == ["r.2", "gna", "noise-ceiling"]
    assert config.methods[1].options == {"window": (3, 5, 5)} and config.size == "64" and config.guidance == 1.0
    assert json.dumps(config.to_dict())


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n# remark\n\n a blue star \n")
    (tmp_path / "config.yaml").write_text("methods: [svg]\nprompts: prompts.txt\n")
    assert read_config(tmp_path / "config.yaml").prompts == ("a red circle", "a blue star")
    (tmp_path / "config.json").write_text(json.dumps({**GOOD}))
    assert read_config(tmp_path / "config.json").prompts == ("a red circle",)


WRONG = {
    "unknown key": ({"promts": ["a"]}, "key 'promts' is unknown; did you mean 'prompts'"),
    "missing": ({"prompts": None}, "prompts is nothing; write a list"),
    "method": ({"methods": ["svgg"]}, "methods, entry 1: unknown method 'svgg'"),
    "option": ({"methods": [{"name": "svg", "options": {"decay": 1}}]}, "methods, entry 1: unknown option 'decay'"),
    "value": ({"methods": [{"name": "svg", "options": {"density": 2}}]}, "density"),
    "method key": ({"methods": [{"name": "svg", "option": {}}]}, "did you mean 'options'"),
    "method type": ({"methods": [3]}, "methods, entry 1 is a number"),
    "no methods": ({"methods": []}, "methods is an empty list"),
    "labels": ({"methods": ["svg", "svg"]}, "'svg' stands twice"),
    "dense label": ({"methods": ["dense"]}, "label 'dense' belongs"),
    "path label": ({"methods": [{"name": "svg", "label": "../x"}]}, "label '../x' is not allowed"),
    "empty prompt": ({"prompts": ["a", " "]}, "prompts, entry 2 is blank; write a text"),
    "twice": ({"prompts": ["a", "a"]}, "'a' stands twice"),
    "prompt file": ({"prompts": "none.txt"}, "the file none.txt cannot be read"),
    "seed": ({"seeds": [-1]}, "seeds, entry 1 is -1; use a whole number"),
    "seeds": ({"seeds": 3}, "seeds is a number; write a list"),
    "steps": ({"steps": 2.5}, "steps is 2.5; write a whole number"),
    "steps true": ({"steps": True}, "steps is True; write a whole number"),
    "size": ({"size": "64x"}, "size is '64x'; write 256"),
    "guidance": ({"guidance": "3"}, "guidance is '3'; use a number"),
    "NaN": ({"guidance": float("nan")}, "guidance is nan; use a number"),
    "measure": ({"measures": ["vnaf"]}, "measure 'vnaf' is unknown"),
    "flag": ({"noise_ceiling": "yes"}, "noise_ceiling is 'yes'; write true or false"),
    "too many": ({"seeds": list(range(30000))}, "60000 clips; the limit is 50000"),
    "attention": ({"attention": -1}, "attention is -1; use a whole number from 0 to 100"),
    "attention true": ({"attention": True}, "attention is True; write a whole number from 0 to 100"),
    "dino": ({"dino": "nowhere"}, "nowhere is no folder; name one with config.json and model.safetensors"),
    "cache": ({"methods": [{"name": "svg", "options": {"step_cache": 1}}]}, "step_cache takes a name"),
    "unknown cache": ({"methods": [{"name": "svg", "options": {"step_cache": "seven"}}]}, "use one of first_block"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_line(case: str) -> None:
    changes, match = WRONG[case]
    with pytest.raises(ValueError) as caught:
        parse_config({**GOOD, **changes}, source="c.yaml")
    text = str(caught.value)
    assert text.startswith("c.yaml: ") and match in text and "\n" not in text


FILES = {
    "list": ("- a\n", "holds a list"),
    "empty": ("", "holds nothing"),
    "twice": ("methods: [svg]\nmethods: [radial]\n", "line 2: key 'methods' stands twice"),
    "number key": ("1: a\n", "key 1 is not text"),
    "syntax": ("methods: [svg\nprompts", "line"),
    "tag": ("methods: !!python/object:os.system {}\n", "line 1"),
    "bytes": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_one_line(tmp_path: Path, case: str) -> None:
    text, match = FILES[case]
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        read_config(file)
    assert match in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
