"""Finding methods by looking, building them by name, and the recipe of docs/adding-a-method.md."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

import dit_sparse.methods as methods
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import all_methods, build, family_options
from dit_sparse.methods.base import Call

SHIPPED = ["dense", "gna", "radial", "rainfusion", "rainfusion2", "sol", "svg"]
PARTS = ["order", "score", "select", "operate", "remember"]
DOCS = Path(__file__).parents[2] / "docs"


def test_shipped_methods_are_found() -> None:
    assert set(SHIPPED) <= set(all_methods())
    assert list(all_methods()) == sorted(all_methods())


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_methods_describe_themselves(name: str) -> None:
    method = all_methods()[name]
    assert method.name == name and method.title and list(method.parts) == PARTS
    assert (method.arxiv is None) == (name in ("dense", "auto"))
    assert method() == build(name) and hash(method()) == hash(build(name))
    for field in dataclasses.fields(method):
        assert f"{field.name}" in (method.__doc__ or ""), f"{name}.{field.name} has no line in the docstring"


def test_methods_list_their_papers_parts_and_needs() -> None:
    found = {method.name: method for method in methods()}
    assert list(found) == list(all_methods())
    for name, method in found.items():
        known = all_methods()[name]
        assert (method.title, method.arxiv, method.needs) == (known.title, known.arxiv, known.needs)
        assert list(method.parts) == PARTS and list(method.options) == [f.name for f in dataclasses.fields(known)]
    assert not found["svg"].needs


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: build("nope"), ["nope", "dense", "svg"]),
        (lambda: build("svg", densty=0.5), ["densty", "density", "rows"]),
        (lambda: build("dense", density=0.5), ["density", "none"]),
        (lambda: build("svg", density=0), ["density", "(0, 1]"]),
        (lambda: build("svg", density=True), ["density"]),
        (lambda: build("svg", sink="frame1"), ["sink", "frame0"]),
        (lambda: build("svg", edge="soft"), ["edge", "strict"]),
        (lambda: build("svg", rows=0), ["rows"]),
        (lambda: build("svg", rows=None), ["rows"]),
        (lambda: build("svg", block_size=48), ["block_size", "64"]),
        (lambda: build("svg", block_size=64.0), ["block_size=64.0", "64"]),
        (lambda: build("svg", block_size=torch.tensor([64])), ["block_size", "64"]),
        (lambda: build("svg", count_forced=1), ["count_forced=1", "True or False"]),
        (lambda: build("svg", count_forced="x"), ["count_forced"]),
        (lambda: build("radial", decay=2), ["decay"]),
        (lambda: build("radial", sink="yes"), ["sink", "True"]),
        (lambda: build("radial", mask="soft"), ["mask", "paper"]),
        (lambda: build("gna", window=(1, 2)), ["window"]),
        (lambda: build("gna", window=(1, 2, 3), density=0.5), ["window", "density"]),
        (lambda: build("gna", window=(2, 2, 2), stride=(3, 1, 1)), ["stride", "frames"]),
        (lambda: build("gna", stride=(1, 1, 1)), ["stride", "window"]),
        (lambda: build("gna", causal=(1, 0, 0), window=(2, 2, 2)), ["causal"]),
        (lambda: build("gna", tile_windows=()), ["tile_windows"]),
        (lambda: build("gna", tile_windows=((1, 1, 1), (0, 1, 1))), ["tile_windows"]),
        (lambda: build("gna", tile_windows=((1, 1, 1), ((1, 1, 1),))), ["tile_windows", "nesting"]),
        (lambda: build("rainfusion", alpha=1.5), ["alpha"]),
        (lambda: build("rainfusion", bandwidths=(0.5, 0.25), density=0.5), ["bandwidths", "density"]),
        (lambda: build("rainfusion", bandwidths=(2.0,)), ["bandwidths"]),
        (lambda: build("rainfusion", samples=None), ["samples"]),
        (lambda: build("rainfusion2", tile=0), ["tile"]),
        (lambda: build("rainfusion2", sink=1), ["sink"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(call, words) -> None:
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_lists_are_taken_for_tuples() -> None:
    assert build("gna", window=[3, 3, 3]) == build("gna", window=(3, 3, 3))
    assert build("gna", tile_windows=[[1, 3, 3], [3, 1, 1]]).tile_windows == ((1, 3, 3), (3, 1, 1))
    assert build("rainfusion", bandwidths=[0.5, 0.125]).bandwidths == (0.125, 0.5)


def test_at_density() -> None:
    for name in ("svg", "gna", "rainfusion", "rainfusion2"):
        assert build(name).at_density(0.4).density == 0.4
    with pytest.raises(ValueError, match="no option 'density'"):
        build("radial").at_density(0.4)


def test_family_options_are_options() -> None:
    schedule = {"dense_steps", "dense_layers"}
    seen = 0
    for name, method in all_methods().items():
        for family in getattr(method, "family_defaults", {}):
            options = family_options(name, family)
            build(name, **{k: v for k, v in options.items() if k not in schedule})
            seen += 1
    assert seen >= 10
    assert family_options("svg", "no such family") == {}


def _file_of_the_recipe() -> str:
    """The method file printed in docs/adding-a-method.md."""
    text = (DOCS / "adding-a-method.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return next(block for block in blocks if "class " in block)


def test_recipe_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_call) -> None:
    """Following docs/adding-a-method.md gives a method that is found, runs, and is inspected by name."""
    (tmp_path / "checkered.py").write_text(_file_of_the_recipe())
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        assert "checkered" in all_methods()
        with pytest.raises(ValueError, match="every=0"):
            build("checkered", every=0)
        method = build("checkered", every=3)
        call: Call = make_call(TokenGrid(4, 8, 8, text=10, text_at="back"))
        mask = method.plan(call).mask
        assert mask is not None
        tokens = mask.token_mask()[0, 0]
        assert tokens.any(1).all() and tokens[-10:].all() and tokens[:, -10:].all()
        blocks = mask.to_dense()[0, 0, :-1, :-1]
        at = torch.arange(blocks.shape[0])
        assert torch.equal(blocks, (at[:, None] - at) % 3 == 0)

        from dit_sparse.inspect import inspect_method

        assert 0 < inspect_method("checkered", call.grid).density < 1
    finally:
        sys.modules.pop("dit_sparse.methods.checkered", None)
        vars(methods).pop("checkered", None)


def test_table_of_methods_is_complete() -> None:
    text = (DOCS / "methods.md").read_text()
    for name, method in all_methods().items():
        assert f"`{name}`" in text, name
        if method.arxiv:
            assert method.arxiv in text
        for field in dataclasses.fields(method):
            assert f"`{field.name}`" in text, f"{name}: option {field.name} is not in docs/methods.md"
