"""One of two processes that share a sequence; started by test_ulysses.py with its rank and the meeting place."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from dit_sparse import bridge
from tests.bridge.hosts import HOSTS, call
from tests.bridge.sessions import Recorder


def check(name: str, rank: int, world: int) -> None:
    host = next(h for h in HOSTS if h.name == name)
    model, inputs = host.build(), host.inputs(1)
    untouched = call(model, inputs)
    alone, shared = Recorder(), Recorder()
    bridge.bind(model, alone)
    call(model, inputs)
    bridge.bind(model, shared)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    torch.testing.assert_close(call(model, inputs), untouched, atol=1e-5, rtol=1e-5)
    assert len(shared.calls) == len(alone.calls) == host.layers and not shared.fallbacks
    assert shared.infos[0].grid.sizes == host.grid, "the hook on the root sees the whole latent"
    for one, part in zip(alone.calls, shared.calls, strict=True):
        heads = slice(rank * one.query.shape[2] // world, (rank + 1) * one.query.shape[2] // world)
        for which in ("query", "key", "value"):
            torch.testing.assert_close(getattr(part, which), getattr(one, which)[:, :, heads], atol=1e-5, rtol=1e-5)
        assert (one.mask is None) == (part.mask is None)
        assert one.mask is None or torch.equal(one.mask, part.mask)
    sharp = Recorder(scale=3.0)
    bridge.bind(model, sharp)
    assert (call(model, inputs) - untouched).abs().max() > 1e-4
    bridge.binding_of(model).unbind()
    torch.testing.assert_close(call(model, inputs), untouched, atol=1e-5, rtol=1e-5)


def main(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator, and Diffusers divides by it
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    for name in ("wan-t2v", "flux", "qwen"):
        check(name, rank, 2)
        print(f"{name}: ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
