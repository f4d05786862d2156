"""The generated part of docs/compatibility.md, from the axes, the refusals and the cover of the pairs."""

from __future__ import annotations

from pathlib import Path

from tests.composition.cases import AXES, REFUSED, Case, Value, all_pairs, cover, product

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN = "<!-- Written by `python -m pytest tests/composition --write-docs`: edit tests/composition/page.py instead. -->"
END = "<!-- End of what is written. -->"
MATRIX = "`tests/composition/test_matrix.py"

HOW = {
    "method": "one dense step, no dense layer",
    "step cache": "`enable(..., step_cache=...)`; the plain run has the same",
    "run": "`compile_repeated_blocks`, graphs run without code generation; the plain run is eager",
    "LoRA": "loaded on queries, keys, values and outputs; in the plain run fused into the weights",
    "guidance": "both branches in one forward (CogVideoX) or in two (Wan); the plain run is of the same model",
    "offload": "by blocks, and as `enable_sequential_cpu_offload` does; the plain run has none",
    "linear": "`fp8_linears`; the plain run has the same",
}
NEUTRAL = Case("svg", "none", "eager", "no LoRA", "separate", "no offload", "bf16")
PLAIN_VALUES = ("none", "eager", "no LoRA", "no offload", "bf16")  # the absence of something needs no row
ORDERS = (
    ("a LoRA that is not fused, then `fp8_linears`",
     "its small matrices would be taken for layers of the model, and its input be rounded to whole numbers",
     "test_a_lora_that_is_not_fused_is_refused_before_8_bits"),
    ("`fp8_linears`, then a LoRA", "PEFT knows no such layer", "test_a_lora_loaded_after_8_bits_is_refused"),
    ("sequential offloading, then `fp8_linears`", "the weights are away",
     "test_8_bits_after_sequential_offloading_is_refused"),
)
TEMPLATE = """{begin}

## Everything with everything

{cases} cases cover all {pairs} pairs of values that are not refused; each case composes one value of every axis
({matrix}::test_a_composed_run_is_the_plain_one`, `tests/composition/test_cover.py`). The full product has {product:,}
cases, 40 minutes on one core: `python -m pytest tests/composition --full-matrix`. What needs a GPU is in
`tests/gpu/composition_checks.py`: 8 of 8 pass on an H200, November 2026
([log](benchmarks/composition-h200-2026-11-checks.log)).

| axis | values | how it is run, and the plain run that it is compared with |
| --- | --- | --- |
{axes}

The composed run and the plain one make the same calls at the same steps, and

- with live routing their block lists overlap by at least 98 % (pairs of blocks that both compute, of those that either
  does), and their latents differ by at most 2 % (root mean square);
- with the masks of the plain run replayed (`dit_sparse/replay.py`) their latents are equal bit for bit, or within
  rounding: the error against float32 is at most twice that of the plain run.

A step cache changes the result by itself, so both runs have it. What it means for sparse attention is tested apart:
with every block kept, a cached run is the dense cached one; and masks stay those of their step when steps are skipped
({matrix}::test_with_every_block_kept_a_cached_run_is_the_dense_cached_one`,
{matrix}::test_masks_stay_true_when_steps_are_skipped`).

`=` equal bit for bit, `~` within rounding, `no` refused:

{table}

Refused, with the reason in the error:

| what | why | test |
| --- | --- | --- |
{refused}

The order that is tested: LoRA (fused, if the linear layers become 8-bit), `fp8_linears`, `enable`, offloading,
compiling. Worth knowing:

- MagCache keeps the compiler out of the blocks: Diffusers marks its hooks so. The run is right, and compiling brings
  nothing.
- The hooks of the other caches and of sequential offloading cut a compiled block into pieces, and Dynamo compiles some
  of them anew at every step until it gives up on them. The run is right; group offloading compiles better.
- With a step cache and sequential offloading, call `pipe.remove_all_hooks()` before `disable`: both wrap the same
  `forward`.

{end}"""


def _names() -> list[Value]:
    return [(axis, value) for axis, values in AXES.items() for value in values if value not in PLAIN_VALUES]


def mark(one: Value, other: Value) -> str:
    """How two values go together: "" of one axis, "=", "~", or the number of the refusal."""
    if one[0] == other[0]:
        return ""
    for number, refusal in enumerate(REFUSED, start=1):
        if refusal.values <= {one, other}:
            return f"no ({number})"
    values = dict(zip(AXES, NEUTRAL, strict=True)) | dict([one, other])
    return "=" if Case(*values.values()).exact else "~"


def _pairs() -> list[str]:
    names = _names()
    columns = [name for name in names if name[0] != list(AXES)[-1]]
    lines = ["| | " + " | ".join(value for _, value in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, name in enumerate(names):
        marks = [mark(column, name) if names.index(column) < row else "" for column in columns]
        if any(marks):
            lines.append(f"| {name[1]} | " + " | ".join(marks) + " |")
    return lines


def render() -> str:
    """The text between the markers, markers included."""
    every = product()
    axes = [f"| {axis} | {', '.join(values)} | {HOW[axis]} |" for axis, values in AXES.items()]
    refused = [f"| {refusal.name} ({number}) | {refusal.reason} | "
               f"{MATRIX}::test_what_is_refused_is_refused_with_the_reason` |"
               for number, refusal in enumerate(REFUSED, start=1)]
    refused += [f"| {what} | {why} | {MATRIX}::{test}` |" for what, why, test in ORDERS]
    return TEMPLATE.format(begin=BEGIN, end=END, matrix=MATRIX, cases=len(cover(every)), product=len(every),
                           pairs=len(all_pairs()) - len(REFUSED), axes="\n".join(axes), table="\n".join(_pairs()),
                           refused="\n".join(refused))


def merged(text: str) -> str:
    """The page with its generated part in place; what stands around it is written by hand."""
    if BEGIN not in text:
        return text.rstrip("\n") + "\n\n" + render() + "\n"
    before, _, rest = text.partition(BEGIN)
    return before + render() + rest.partition(END)[2]
