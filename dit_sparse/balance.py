"""Ulysses parallelism with heads spread by their cost: every rank has about the same to compute in every layer.

After Diffusers' exchange each rank holds whole sequences of H / world heads. Where heads keep different shares of their
pairs, a rank with the heavy ones keeps the others waiting. So the heads are put in another order before the exchange,
and back after it: which rank computes a head changes, what is computed for it does not.

The costs are the pairs that the lists of the last step keep. Every `EVERY` sparse steps the ranks gather them, a few
numbers for each layer, and work out the same order, on the device: nothing waits but the gathering itself. What a layer
remembers between steps belongs to the heads that a rank holds, so a layer that remembers anything keeps its order until
the run is over; the next run begins with the order that the last one asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import find

if TYPE_CHECKING:
    from .blockmask import BlockMask

__all__ = ["EVERY", "HeadBalance", "all_gather", "place_heads", "spread_heads", "ulysses_degree"]

EVERY = 4  # sparse steps from one exchange of costs to the next


def all_gather(found: Tensor, mine: Tensor, group: Any) -> None:
    """The tensors of all ranks into one, one after the other along the first dimension."""
    # PyTorch 2.13 gave it another name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(found, mine, group=group)


def ulysses_degree(parallel: Any) -> int:
    """Ranks that share the heads, from Diffusers' ParallelConfig or None; 1 where they do not share them equally."""
    ranks = getattr(parallel, "context_parallel_config", None)
    if ranks is None or ranks.ring_degree > 1 or getattr(ranks, "ulysses_anything", False):
        return 1
    return int(ranks.ulysses_degree)


def spread_heads(costs: Tensor, world: int) -> Tensor:
    """Deal the heads of every layer out to ranks, equally many each, so that their costs are about equal.

    Heads go from the dearest to the cheapest to the rank with the least so far that has a place left.

    Args:
        costs: float32 (layers, H), at least 0.
        world: number of ranks, a divisor of H.

    Returns:
        int64 (layers, H): the heads of rank 0 in rising order, those of rank 1, and so on. Computed on the device.
    """
    layers, heads = costs.shape
    value, head = costs.sort(dim=1, descending=True, stable=True)
    load, room = costs.new_zeros(layers, world), costs.new_full((layers, world), heads // world)
    owner = torch.zeros_like(head)
    for place in range(heads):
        rank = torch.where(room > 0, load, torch.inf).argmin(1, keepdim=True)
        load = load.scatter_add(1, rank, value[:, place : place + 1])
        room = room.scatter_add(1, rank, torch.full_like(load[:, :1], -1))
        owner = owner.scatter(1, head[:, place : place + 1], rank)
    return owner.argsort(dim=1, stable=True)


def _loads_of(costs: Tensor, order: Tensor, world: int) -> Tensor:
    """float32 (2, layers, world): what the ranks have to do in the model's own order of the heads, and in `order`."""
    return torch.stack([x.unflatten(1, (world, -1)).sum(-1) for x in (costs, costs.gather(1, order))])


class HeadBalance:
    """The order of the heads of one transformer's layers, and the costs that it comes from."""

    def __init__(self) -> None:
        self.world, self.rank = 1, 0
        self._group: Any = None
        self._clear()

    def _clear(self) -> None:
        """Every head in its own place, no costs."""
        self._order: Tensor | None = None  # int64 (layers, H): true head at each place
        self._back: Tensor | None = None
        self._costs: Tensor | None = None  # float32 (layers, H / world), of this rank's places
        self._loads: Tensor | None = None  # float32 (2, layers, world): of the model's own order, of ours
        self._fixed: Tensor | None = None  # the order, on the CPU, where the costs are known beforehand
        self._step, self._sparse_steps = -1, 0

    def begin(self, parallel: Any, step: int, *, new_run: bool, sparse: bool, remembers: Callable[[int], bool],
              known: Callable[[], Tensor | None] = lambda: None) -> None:
        """A forward begins; every few sparse steps the ranks agree on an order.

        All arguments but `remembers` are the same on all ranks: otherwise they would wait for each other.

        Args:
            parallel: Diffusers' ParallelConfig of the transformer, or None.
            step: denoising step.
            new_run: a run begins with this forward.
            sparse: the schedule makes this step sparse.
            remembers: layer -> whether this rank holds anything of the layer from earlier steps.
            known: float32 (layers, H) on the CPU, the costs of a method that knows them; else None.
        """
        world = ulysses_degree(parallel)
        if world != self.world:
            self._clear()
            self.world = world
            self._group = parallel.context_parallel_config._ulysses_mesh.get_group() if world > 1 else None
            self.rank = dist.get_rank(self._group) if world > 1 else 0
            self._fix(known() if world > 1 else None)
        if world == 1:
            return
        if new_run:
            self._step, self._sparse_steps = -1, 0
        if step == self._step:
            return
        self._step = step
        due = new_run or (sparse and self._sparse_steps % EVERY == 1)
        if due and self._fixed is None and self._costs is not None:
            self._agree(remembers)
        if sparse:
            self._sparse_steps += 1
            if self._costs is not None:
                self._costs.zero_()

    def _fix(self, costs: Tensor | None) -> None:
        """Take the order that known costs ask for."""
        if costs is None or costs.shape[1] % self.world:
            return
        self._fixed = spread_heads(costs, self.world)
        self._loads = _loads_of(costs, self._fixed, self.world)

    def _agree(self, remembers: Callable[[int], bool]) -> None:
        """Gather the costs; where there are any and no rank remembers anything of the layer, take the better order."""
        assert self._costs is not None and self._order is not None
        layers = self._costs.shape[0]
        held = torch.tensor([float(remembers(layer)) for layer in range(layers)]).to(self._costs.device)
        mine = torch.cat((self._costs, held[:, None]), dim=1)
        found = mine.new_empty(self.world * layers, mine.shape[1])
        all_gather(found, mine, self._group)
        every = found.unflatten(0, (self.world, layers))
        costs = torch.zeros(self._order.shape, device=mine.device)
        costs.scatter_(1, self._order, every[..., :-1].transpose(0, 1).flatten(1))
        stays = (every[..., -1].amax(0) > 0) | (costs.sum(1) == 0)
        self._order = torch.where(stays[:, None], self._order, spread_heads(costs, self.world))
        self._back = self._order.argsort(dim=1)
        known = costs.sum(1, keepdim=True) > 0
        latest = _loads_of(costs, self._order, self.world)
        self._loads = latest if self._loads is None else torch.where(known, latest, self._loads)

    def place(self, layer: int, x: Tensor, back: bool, layers: int) -> Tensor:
        """(B, S, H, D) with the heads in the order of the ranks, or `back` in the model's own.

        Args:
            layer, layers: which layer, of how many.
            x: the activations, all heads.
            back: the way back.
        """
        if self._order is None or self._order.shape[1] != x.shape[2] or layer >= self._order.shape[0]:
            if self._order is not None or x.shape[2] % self.world or self.world == 1:
                # A layer with other heads than the first one keeps its own order.
                return x.clone(memory_format=torch.contiguous_format)
            with torch.inference_mode(False):  # later runs, in whatever mode, go on with these
                heads = torch.arange(x.shape[2], device=x.device).repeat(max(layers, layer + 1), 1)
                same = self._fixed is not None and self._fixed.shape == heads.shape
                self._order = self._fixed.to(x.device) if self._fixed is not None and same else heads
                self._back = self._order.argsort(dim=1)
                self._costs = torch.zeros(len(self._order), x.shape[2] // self.world, device=x.device)
        table = self._back if back else self._order
        assert table is not None
        return x.index_select(2, table[layer])

    def note(self, layer: int, mask: BlockMask) -> None:
        """Count the pairs that a call of a layer keeps, of this rank's heads."""
        if self._costs is None or layer >= self._costs.shape[0]:
            return
        if mask.pairs.shape[1] in (1, self._costs.shape[1]):
            self._costs[layer] += mask.pairs.to(torch.float32).mean(0)

    def heads(self, layer: int, heads: int, device: torch.device) -> Tensor | None:
        """int64 (heads,): which of the model's heads this rank holds of a layer, or None when it holds all.

        Args:
            layer: which layer.
            heads: how many heads the call has.
            device: of the call.
        """
        if self.world == 1:
            return None
        if self._order is None or layer >= self._order.shape[0] or self._order.shape[1] != heads * self.world:
            start = self.rank * heads
            return torch.arange(start, start + heads, device=device)
        return self._order[layer, self.rank * heads : (self.rank + 1) * heads]

    def host_heads(self, layer: int) -> tuple[int, ...] | None:
        """The heads that this rank holds of a layer, where the order is fixed; else None."""
        if self.world == 1 or self._fixed is None or layer >= len(self._fixed):
            return None
        part = self._fixed.shape[1] // self.world
        return tuple(self._fixed[layer, self.rank * part : (self.rank + 1) * part].tolist())

    def notes(self) -> list[str]:
        """One line about the spread of the work, for the summary; waits for the device."""
        if self.world == 1:
            return []
        if self._loads is None or float(self._loads.sum()) == 0:
            return [f"Ulysses parallelism: heads over {self.world} ranks in the model's order; no costs exchanged yet"]
        # Layers follow one another: the busiest rank of each one counts.
        own, ours = (float(x.amax(-1).sum() / x.mean(-1).sum()) for x in self._loads)
        return [f"Ulysses parallelism: heads over {self.world} ranks by their cost; the busiest rank has {ours:.2f} of "
                f"the mean work ({own:.2f} in the model's order)"]


@torch.library.custom_op("dit_sparse::place_heads", mutates_args=())
def place_heads(x: torch.Tensor, handle: torch.Tensor, back: bool) -> torch.Tensor:
    """Move heads to the ranks that `HeadBalance` gives them, or back; an operator, so that compiled graphs hold it.

    Args:
        x: (B, S / world, H, D).
        handle: see `runtime.find`.
        back: into the model's own order.

    Returns:
        (B, S / world, H, D), fresh memory.
    """
    runtime, layer = find(handle)
    balance = getattr(runtime.session, "balance", None) if runtime is not None else None
    if runtime is None or balance is None:
        return x.clone(memory_format=torch.contiguous_format)
    moved: torch.Tensor = balance.place(layer, x, back, runtime.session.layers)
    return moved


@place_heads.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, back: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
