"""Options read from dataclasses and docstrings, and requests checked before anything runs."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from dit_sparse.app import forms, wanted
from dit_sparse.commands.console import UserError
from dit_sparse.methods import all_methods
from dit_sparse.methods.base import Method
from dit_sparse.stepcache import NAMES

from .conftest import PROMPT


@dataclass(frozen=True)
class Made(Method):
    """A method that nobody has seen before.

    Args:
        rows, columns: how many of
            each.
        order: "morton" or "raster", as one likes.
        edge: what to do there.
    """

    name: ClassVar[str] = "made"
    rows: int = 3
    columns: int | None = None
    density: float = 0.3
    order: str = "morton"
    edge: Literal["soft", "hard"] = "soft"
    box: tuple[int, int, int] = (1, 2, 3)
    on: bool = True


def test_a_form_needs_nothing_but_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "all_methods", lambda: {"made": Made})
    found = {f.name: f for f in forms.fields_of("made")}
    assert list(found)[0] == "density"
    assert {name: f.kind for name, f in found.items()} == {
        "density": "density", "rows": "whole number", "columns": "whole number", "order": "choice", "edge": "choice",
        "box": "text", "on": "yes or no",
    }
    assert found["rows"].text == found["columns"].text == "how many of each."
    assert found["order"].choices == ("morton", "raster") and found["columns"].optional
    assert found["box"].shown() == "1x2x3" and found["columns"].shown() == ""


@pytest.mark.parametrize("name", all_methods())
def test_every_method_comes_back_from_its_form(name: str) -> None:
    """What the form shows at the start is the method's own default: nothing to pass on."""
    fields = forms.fields_of(name)
    assert [f.name for f in fields if not f.text] == [], "an option without a word about it"
    assert {f.name for f in fields} == {f.name for f in dataclasses.fields(all_methods()[name])}
    shown = {f.name: f.default if f.kind in ("density", "yes or no") else f.shown() for f in fields}
    assert forms.read(fields, shown) == {}


def test_values_are_read_as_their_type() -> None:
    fields = forms.fields_of("svg")
    given = {"density": 1, "rows": 32.0, "row_range": "500", "sink": "none", "profile_frames": "1.5", "block_size": ""}
    assert forms.read(fields, given) == {"density": 1, "rows": 32, "row_range": 500, "sink": "none",
                                         "profile_frames": 1.5}
    assert forms.read(forms.fields_of("gna"), {"window": "3x5x7"}) == {"window": (3, 5, 7)}
    assert forms.read(forms.shared_fields(), {"dense_steps": 1}) == {"dense_steps": 1}  # one step, not all of them


@pytest.mark.parametrize("given, words", [
    ({"rows": 10**9}, "up to 65536"),
    ({"rows": "9" * 200}, "longer than 120"),
    ({"nothing": 1}, "use one of density"),
    ({"row_range": float("nan")}, "up to 65536"),
])
def test_values_that_no_option_takes(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        forms.read(forms.fields_of("svg"), given)


def test_step_caches() -> None:
    assert forms.step_cache("none", 3) is None
    assert set(forms.STEP_CACHES) == set(NAMES) and all(forms.step_cache(name, None) == name for name in NAMES)
    for name in ("first_block", "teacache"):
        assert forms.step_cache(name, 0.2).threshold == 0.2
    for name, value in (("os.system", None), ("first_block", -1), ("pab", 0.5)):
        with pytest.raises(UserError, match="step.cache"):
            forms.step_cache(name, value)


@pytest.mark.parametrize("given, words", [
    ({"prompt": "  "}, "prompt is empty"),
    ({"prompt": "x" * 2000}, "the limit is 1000"),
    ({"prompt": ["a"]}, "prompt is empty"),
    ({"width": 250, "height": 256}, "use 240 or 256"),
    ({"width": "../../etc/passwd"}, "whole number"),
    ({"width": 2048, "height": 2048, "frames": 257}, "the limit is"),
    ({"frames": 4}, "use 3 or 5"),
    ({"steps": 10**6}, "from 1 to 200"),
    ({"steps": 2.5}, "whole number"),
    ({"seed": -1}, "seed: -1"),
    ({"guidance": "much"}, "guidance"),
    ({"mode": "rm -rf"}, "use one of both, sparse, dense"),
    ({"model": "/etc"}, "not offered; use one of embedded"),
    ({"method": "/tmp/method.py"}, "unknown; use one of"),
    ({"options": {"density": 7}}, "density=7 is not allowed"),
    ({"options": [1]}, "names and values"),
    ({"method": "gna", "options": {"window": "99x99x99"}}, "does not fit the grid"),
    ({"step_cache": "Evil"}, "step_cache='Evil' is unknown"),
])
def test_requests_that_are_refused(shelf: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        wanted.check(shelf, **{"prompt": PROMPT, **given})
    assert "--" not in str(error.value) and "\n" not in str(error.value)


def test_memory_is_asked_before_it_is_spent(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted.check(shelf, prompt=PROMPT).shape.tokens == 2304
    monkeypatch.setattr(wanted, "free_bytes", lambda device: 2**27)
    with pytest.raises(UserError, match=r"needs about .* GiB; cpu has 0\.1 GiB left"):
        wanted.check(shelf, prompt=PROMPT)


def test_settings_are_all_that_was_asked(shelf: Any) -> None:
    asked = wanted.check(shelf, prompt=f" {PROMPT} ", width=64, height=96, frames=5, steps=4, seed=9, method="svg",
                         options={"density": 0.4}, shared={"dense_steps": 0}, step_cache="pab")
    assert asked.settings["prompt"] == PROMPT and asked.settings["options"]["density"] == 0.4
    assert (asked.settings["width"], asked.settings["height"], asked.settings["seed"]) == (64, 96, 9)
    assert asked.settings["shared"]["dense_steps"] == 0 and asked.settings["step_cache"] == "pab"
    assert asked.proc.settings.step_cache == "pab"
    assert any("256x256" in note for note in asked.notes)
    assert any("zebra" in note for note in wanted.check(shelf, prompt="a zebra").notes)
