"""The walk over every transformer class of the installed Diffusers: no class without an answer."""

from __future__ import annotations

from pathlib import Path

import diffusers
from diffusers.models.modeling_utils import ModelMixin

from dit_sparse.families import FAMILIES, UNSUPPORTED
from dit_sparse.walk import table, walk


def test_every_transformer_is_supported_or_has_a_reason(capsys) -> None:
    rows = walk()
    with capsys.disabled():
        print("\n" + table(rows))
    names = [row.cls for row in rows]
    assert len(set(names)) == len(names)
    public = {name for name in dir(diffusers) if "Transformer" in name and not name.startswith(("Flax", "Unet", "UNet"))
              and isinstance(getattr(diffusers, name), type) and issubclass(getattr(diffusers, name), ModelMixin)}
    assert not public - set(names) - {"T5FilmDecoder"}, "a public transformer that the walk misses"
    unanswered = ("no entry in dit_sparse/families.py", "no attention call", "cannot be imported")
    silent = [row.cls for row in rows if not row.supported and row.detail.startswith(unanswered) or not row.cls]
    assert not silent, f"transformers without an answer: {silent}"


def test_the_table_has_no_entry_for_a_class_that_is_gone() -> None:
    names = {row.cls for row in walk()}
    assert set(UNSUPPORTED) <= names
    assert {name for family in FAMILIES for name in family.classes} <= names
    assert not set(UNSUPPORTED) & {name for family in FAMILIES for name in family.classes}


def test_supported_rows_name_processors_that_can_be_rebound() -> None:
    rows = {row.cls: row for row in walk()}
    assert all(row.processors for row in rows.values() if row.supported)
    wan, sana = rows["WanTransformer3DModel"], rows["SanaVideoTransformer3DModel"]
    assert wan.supported and wan.family == "wan" and "WanAttnProcessor" in wan.processors
    assert not sana.supported and "linear" in sana.detail
    assert rows["FluxTransformer2DModel"].text_at == "front" and rows["SD3Transformer2DModel"].text_at == "back"
    assert sum(row.supported for row in rows.values()) == sum(len(family.classes) for family in FAMILIES)


def test_the_table_in_the_docs_is_the_one_of_the_walk():
    text = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    assert table(walk()) in text, "docs/hosts.md is out of date"
