"""One of two processes that share a sequence with sparse attention; started by test_parallel.py."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

import dit_sparse
from dit_sparse.bridge import binding_of
from dit_sparse.methods.tuned import Tuned
from dit_sparse.patterns import heads_of
from dit_sparse.replay import Place, record, replay
from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.headplan import HeadPlan

STEPS = 5
HEADS = 4


def build() -> torch.nn.Module:
    """A Wan whose first two heads look around far and wide and whose last two are sharp: unequal costs."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=24, in_channels=4, out_channels=4,
                                  text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32).eval()
    sharp = torch.tensor([0.3, 0.4, 6.0, 8.0]).repeat_interleave(24)
    for block in model.blocks:
        block.attn1.norm_q.weight.data *= sharp
        block.scale_shift_table.data[:, [2, 5]] += 1.0  # gates: attention must reach the output
    return model.requires_grad_(False)


def run(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """The outputs of one run, (STEPS, B, C, F, H, W)."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 4, 5, 14, 12, generator=gen)  # 5 x 7 x 6 = 210 tokens
    text = torch.randn(1, 6, 16, generator=gen)
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            time = torch.tensor([900.0 - 100 * step])
            outputs.append(model(hidden + 0.1 * step, time, text, return_dict=False)[0])
    return torch.stack(outputs)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def sparse(method: str, **options: Any) -> Any:
    return dit_sparse.SparseProc(method, dense_steps=1, dense_layers=0, num_steps=STEPS, strict=True, **options)


def preset() -> Any:
    """A plan of three layers with four heads each: the first layer's heavy heads come first."""
    candidates = (DENSE, Candidate("drop", "tile", 0.25), Candidate("soft", "tile", 0.25))
    choices = np.array([[[0, 0, 1, 2], [1, 1, 1, 1], [2, 0, 1, 2]]], dtype=np.uint8)
    return sparse(Tuned(HeadPlan(candidates, (0, STEPS), choices)))  # type: ignore[arg-type]


CASES: dict[str, dict[str, Any]] = {
    "twilight": {"p": 0.5, "candidates": None, "inner": "draft", "block_size": 16},
    "draft": {"density": 0.4, "block_size": 16},
    "svg": {"density": 0.5, "block_size": 16},
    "sol": {"density": 0.4, "block_size": 16},
    "svg2": {"block_size": 16},  # remembers centroids from step to step
    "gna": {"tile_windows": ((1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3)), "block_size": 16},
}


def equals_one_process(title: str, model: torch.nn.Module, shared: torch.nn.Module, name: str, proc: Any) -> Any:
    """Live and replayed masks, two runs one after the other; returns the shared run's session."""
    dit_sparse.enable(model, proc)
    with record(model) as one:
        expected = run(model)
    twice = name in ("twilight", "svg2")  # the second run begins with the order that the first one asked for
    again = run(model, 1) if twice else None
    dit_sparse.enable(shared, proc)
    session = binding_of(shared).session
    both = either = 0

    def compared(call: Any, make: Any) -> Any:
        nonlocal both, either
        plan, reused = make()
        kept = one[Place("transformer", call.layer, call.step, call.branch)].plan.mask
        kept = kept if call.heads is None else heads_of(kept, call.heads)
        if name not in ("svg2", "preset"):  # blocks of clusters hold other tokens; a preset has several masks
            mine, theirs = plan.mask.to_dense(), kept.to_dense()
            both, either = both + int((mine & theirs).sum()), either + int((mine | theirs).sum())
            assert plan.mask.query.index is None or torch.equal(plan.mask.query.index, kept.query.index)
        return plan, reused

    session.plans = compared
    assert difference(run(shared), expected) < 0.02, title
    assert both >= 0.98 * either, (title, both, either)
    session.plans = None
    if again is not None:
        assert difference(run(shared, 1), again) < 0.02, title
    report = dit_sparse.summary(shared)
    assert not report.fallbacks and report.sparse_calls == (STEPS - 1) * 3, (title, report.fallbacks)
    if name == "preset":  # its masks are in the operator, for all heads
        return session
    with replay(shared, one):
        # Not exact: products of half the tokens round differently.
        torch.testing.assert_close(run(shared), expected, atol=2e-4, rtol=2e-4)
    return session


def ulysses(rank: int) -> None:
    alone, shared = build(), build()
    shared.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for name, options in CASES.items():
        if name == "draft":  # nothing that the others lack
            continue
        session = equals_one_process(f"ulysses {name}", alone, shared, name, sparse(name, **options))
        balance = session.balance
        note, = balance.notes()
        if name == "twilight":
            mine = {tuple(sorted(balance.heads(layer, 2, torch.device("cpu")).tolist())) for layer in range(3)}
            assert mine != {(2 * rank, 2 * rank + 1)}, "the heavy heads are not all on one rank"
            own, ours = (float(x.amax(-1).sum() / x.mean(-1).sum()) for x in balance._loads)
            assert ours < own - 0.1 and "busiest rank" in note, (own, ours)
        dit_sparse.disable(shared)  # a new session begins with the model's own order
        print(f"ulysses {name}: {note}", flush=True)
    session = equals_one_process("ulysses preset", alone, shared, "preset", preset())
    assert session.balance.host_heads(0) == ((0, 2), (1, 3))[rank], "the two dense heads are apart"
    dit_sparse.disable(shared)
    dit_sparse.disable(alone)
    torch.testing.assert_close(run(shared), run(alone), atol=1e-5, rtol=1e-5)
    refused(shared, "adaspa", "head_adaptive")
    refused(shared, "skip_softmax", "target")
    print("ulysses: ok", flush=True)


def ring() -> None:
    alone, shared = build(), build()
    shared.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    for name in ("draft", "svg", "sol"):
        equals_one_process(f"ring {name}", alone, shared, name, sparse(name, **CASES[name]))
    # A reason that all ranks find: dense, and counted.
    refused(shared, "adaspa", "looks at whole dense calls")
    proc = dit_sparse.SparseProc("rectified", dense_steps=0, dense_layers=0, num_steps=STEPS, block_size=16)
    dit_sparse.enable(shared, proc)
    dit_sparse.disable(alone)
    torch.testing.assert_close(run(shared), run(alone), atol=1e-4, rtol=1e-4)
    (reason, count), = dit_sparse.summary(shared).fallbacks.items()
    assert "needs more than its own rows" in reason and count == STEPS * 3
    print("ring: ok", flush=True)


def refused(model: torch.nn.Module, method: str, why: str) -> None:
    before = copy.copy(binding_of(model))
    try:
        dit_sparse.enable(model, method)
    except ValueError as error:
        assert why in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"{method} was not refused")
    assert (binding_of(model) is None) == (before is None)


def main(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator, and Diffusers divides by it
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    if not sys.argv[3:]:
        ulysses(rank)
    ring()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
