"""The cover of all pairs, and the page that is written from it."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.composition import page
from tests.composition.cases import AXES, MOST, REFUSED, all_pairs, cover, product


def test_every_pair_is_covered_or_refused() -> None:
    chosen = cover(product())
    covered = {pair for case in chosen for pair in case.pairs()}
    refused = {pair for pair in all_pairs() if any(refusal.values <= pair for refusal in REFUSED)}
    assert covered == all_pairs() - refused and not covered & refused
    assert len(chosen) == len(set(chosen)) <= MOST
    assert chosen == cover(product()), "the same every time"
    assert not any(refusal.concerns(case.values()) for case in product() for refusal in REFUSED)


def test_the_cover_is_small_for_any_axes() -> None:
    axes = {"method": ("a", "b", "c"), "step cache": ("x", "y"), "run": ("1", "2"), "LoRA": ("l",), "guidance": ("g",),
            "offload": ("o", "p"), "linear": ("f",)}
    chosen = cover(product(axes), effort=lambda case: 0)
    assert {pair for case in chosen for pair in case.pairs()} == all_pairs(axes)
    assert len(chosen) < len(list(itertools.product(*axes.values()))) / 2


def test_the_axes_name_what_there_is() -> None:
    from dit_sparse.methods import all_methods
    from dit_sparse.stepcache import NAMES

    assert set(AXES["method"]) <= set(all_methods()) and AXES["step cache"] == ("none", *NAMES)


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    text = page.PAGE.read_text()
    if request.config.getoption("write_docs", default=False):
        text = page.merged(text)
        page.PAGE.write_text(text)
    assert page.merged(text) == text, "run: python -m pytest tests/composition --write-docs"
    assert text.count(page.BEGIN) == text.count(page.END) == 1


def test_the_page_says_every_pair_and_every_refusal() -> None:
    text = page.render()
    assert all(refusal.reason in text for refusal in REFUSED)
    assert all(re.search(rf"\| {re.escape(value)} \|", text) for values in AXES.values() for value in values
               if value not in (*page.PLAIN_VALUES, *AXES["method"]))
    lora = ("LoRA", "LoRA")
    assert page.mark(lora, ("method", "svg")) == "~" and page.mark(lora, ("linear", "fp8")) == "="
    assert page.mark(*REFUSED[0].values) == "no (1)"
