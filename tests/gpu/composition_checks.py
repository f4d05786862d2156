"""What composition needs a GPU for: code made by inductor, real offloading with streams, 8-bit products in hardware.

    python tests/gpu/run.py --out DIR --only checks --kernel composition

The tiny pipelines of tests/composition on the device; Diffusers, transformers, accelerate and peft are needed, and
without them there is no check. A composed run is compared with the plain one on the same device: nothing compiled or
offloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

NEEDED = ("diffusers", "transformers", "accelerate", "peft", "tokenizers")
# Few, as inductor takes seconds for each: every value of every axis, and each kind of offloading with each of the rest.
CASES = (
    ("radial", "none", "compiled", "no LoRA", "separate", "no offload", "bf16"),
    ("svg", "none", "compiled", "LoRA", "batched", "group", "bf16"),
    ("sol", "first_block", "compiled", "no LoRA", "separate", "no offload", "fp8"),
    ("auto", "teacache", "eager", "LoRA", "separate", "sequential", "bf16"),
    ("svg", "pab", "eager", "no LoRA", "separate", "group", "fp8"),
    ("sol", "taylorseer", "eager", "LoRA", "batched", "sequential", "fp8"),
    ("radial", "fastercache", "eager", "no LoRA", "batched", "group", "bf16"),
    ("auto", "magcache", "eager", "no LoRA", "batched", "no offload", "fp8"),
)
LARGEST = 0.1  # of the plain run's error against float32, relative: 8-bit layers make .02
Outcome = tuple[str, dict[str, Any]]


def composed(values: tuple[str, ...], device: str = "cuda", backend: str = "inductor") -> Outcome:
    """A composed run against the plain one, with its own masks and with the plain one's.

    Args:
        values: one of every axis.
        device: where.
        backend: for torch.compile.

    Returns:
        What is wrong, "" when nothing is; and how far the runs are apart.
    """
    import torch._dynamo

    from dit_sparse.replay import overlap
    from tests.composition import compare, hosts
    from tests.composition.cases import Case

    torch._dynamo.reset()
    case = Case(*values)
    want = compare.plain(case, device)
    pipe = hosts.compose(case, backend=backend, device=device)
    live = compare.ran(pipe, case.guidance)
    again = compare.replayed(pipe, case.guidance, want.masks)
    exact = compare.truth(case, want.masks, device)
    own = compare.difference(want.out, exact)
    numbers = {"overlap": round(overlap(want.masks, live.masks).share, 4),
               "live": round(compare.difference(live.out, want.out), 5),
               "replayed": round(compare.difference(again, want.out), 5),
               "error": round(compare.difference(again, exact), 5), "plain_error": round(own, 5)}
    # Where 8-bit rounding turns on a last bit, two right runs are as far apart as each is from the exact one.
    most = max(compare.DIFFERENCE, own) if (case.run, case.linear) == ("compiled", "fp8") else compare.DIFFERENCE
    if own > LARGEST:
        return f"the plain run is {own:.2f} from the same in float32: nothing can be told from that", numbers
    return (compare.problem_live(live, want, most) or compare.problem_replayed(case, again, want, device)), numbers


def all_checks() -> dict[str, Callable[[], Outcome]]:
    """Every check by name; none where a package is missing, and 8-bit ones only where the GPU has them."""
    from dit_sparse.linear8 import missing

    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return {}
    left_out = "fp8" if missing("cuda") else None
    return {", ".join(values): partial(composed, values) for values in CASES if left_out not in values}
