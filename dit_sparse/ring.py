"""Ring parallelism: every rank holds some tokens of all heads, and computes some rows of the whole attention.

Diffusers' ring does not tell its attention which part of the sequence it holds, so a layout of the whole sequence, such
as tiles, cannot be followed inside of it. Here the ranks gather queries, keys and values, as Diffusers' ring gathers
keys and values; every rank makes the masks of the whole sequence from the same numbers, as one GPU does; of the query
blocks each computes every world-th, in whatever order the method has them, and the rows go back to the ranks whose
tokens they are. A row is computed by one rank over all of its keys: nothing is left to merge, and the result is that of
one GPU. Dense calls need no queries of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import all_gather
from .operators import Attend, Drop, Operator, Soft, ZeroHeads
from .runtime import SDPA, find, own_dense

if TYPE_CHECKING:
    from .blockmask import BlockMask
    from .methods.base import Call, Method

__all__ = ["Share", "against", "attend", "mixed", "ring_attention", "share_of"]

ROW_BY_ROW = (Drop, ZeroHeads, Soft)  # operators that compute a row of queries from its own list


@dataclass(frozen=True)
class Share:
    """The part of the rows of one attention call that this rank computes.

    Args:
        rank, world: which of how many.
        group: process group of the ranks.
    """

    rank: int
    world: int
    group: Any = None

    def refusal(self, operator: Operator) -> str:
        """Why an operator's rows cannot be computed on different ranks, or an empty text."""
        if type(operator) in ROW_BY_ROW:
            return ""
        return f"ring parallelism: operator {operator.name!r} needs more than its own rows; use ulysses_degree"

    def blocks(self, mask: BlockMask) -> BlockMask:
        """The mask with the lists of other ranks' query blocks emptied."""
        return mask.without_rows(~self._mine(mask))

    def _mine(self, mask: BlockMask) -> Tensor:
        # Neighbours have about equally long lists: taking turns spreads the work.
        return torch.arange(mask.query.blocks, device=mask.device) % self.world == self.rank

    def run(self, call: Call, operator: Operator, mask: BlockMask, attend: Attend) -> Tensor:
        """(B, L, H, Dv): this rank's rows of what the operator computes; the others are 0."""
        out, _ = operator.run(call, self.blocks(mask), attend)
        if isinstance(operator, Soft):  # its entries that stand for blocks reach rows without a list too
            block = mask.query.slot_of_token // mask.query.block_size
            mine = self._mine(mask)[block].reshape(*([1] * (3 - block.dim())), *block.shape)
            out = out.masked_fill(~mine.transpose(1, 2)[..., None], 0)
        return out

    def dense(self, query: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
        """(B, L, H, Dv) of dense attention: this rank's rows, the others 0.

        Args:
            query: (B, L, H, D).
            compute: rows -> their output.
        """
        length = query.shape[1]
        rows = slice(self.rank * length // self.world, (self.rank + 1) * length // self.world)
        part = compute(rows)
        out = part.new_zeros(part.shape[0], length, *part.shape[2:])
        out[:, rows] = part
        return out

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The pieces of all ranks, one after the other along a dimension."""
        sent = x.contiguous().to(torch.uint8) if x.dtype == torch.bool else x.contiguous()
        found = sent.new_empty(self.world, *sent.shape)
        all_gather(found.flatten(0, 1), sent, self.group)
        return found.movedim(0, dim).flatten(dim, dim + 1).to(x.dtype)

    def collect(self, rows: Tensor) -> Tensor:
        """(B, L / world, H, Dv): this rank's tokens, from the rows (B, L, H, Dv) that the ranks computed."""
        pieces = rows.unflatten(1, (self.world, -1)).transpose(0, 1).contiguous()
        found = torch.empty_like(pieces)
        dist.all_to_all_single(found, pieces, group=self.group)
        return found.sum(0)  # of each row one rank's is not 0

    def own(self, whole: Tensor) -> Tensor:
        """This rank's tokens of (B, L, H, D)."""
        return whole.unflatten(1, (self.world, -1))[:, self.rank]


def mixed(ranks: Any) -> bool:
    """Whether Diffusers' ContextParallelConfig joins its ring with Ulysses or unequal pieces, which ours cannot."""
    return bool(ranks.ring_degree > 1 and (ranks.ulysses_degree > 1 or ranks.ring_anything))


def against(method: Method, parallel: Any, step_cache: Any = None) -> str:
    """Why a method, with a step cache, cannot run under Diffusers' ParallelConfig (or None), or an empty text."""
    ranks = getattr(parallel, "context_parallel_config", None)
    if ranks is None:
        return ""
    from .stepcache.refusals import against_ranks

    if reason := against_ranks(step_cache):
        return reason
    if mixed(ranks):
        return ("ring parallelism is sparse by itself and with pieces of equal length; leave ulysses_degree and "
                "ring_anything out")
    if ranks.ring_degree > 1 and method.observes:
        return f"ring parallelism: method {method.name} looks at whole dense calls; use ulysses_degree"
    return method.against_ranks() if ranks.ulysses_degree > 1 else ""


def share_of(parallel: Any) -> Share | None:
    """This rank's share, from Diffusers' ParallelConfig; None without ring parallelism."""
    ranks = getattr(parallel, "context_parallel_config", None)
    if ranks is None or ranks.ring_degree < 2:
        return None
    group = ranks._ring_mesh.get_group()
    return Share(dist.get_rank(group), int(ranks.ring_degree), group)


def attend(runtime: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
           dense: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
    """One call between ranks; all of them make it, and exchange the same pieces whatever they decide.

    Args:
        runtime: of the bound transformer, see `runtime.Runtime`.
        layer: index of the layer.
        query, key, value: (B, L / world, H, D), this rank's tokens.
        mask: the model's, of this rank's keys or of all, or None.
        scale: softmax scale.
        dense: attention of any rows over any keys, for calls that cannot go to the session.

    Returns:
        (B, L / world, H, Dv).
    """
    share = share_of(runtime.info.parallel)
    assert share is not None  # else the call would not have come here
    keys, values = share.gather(key), share.gather(value)
    if mask is not None and mask.shape[-1] == key.shape[1]:
        mask = share.gather(mask, mask.dim() - 1)
    session = runtime.session
    reason = runtime.refusal(keys.shape[1], share.world)
    if reason:
        session.fallback(layer, reason)
        return dense(query, keys, values, mask)
    if not hasattr(session, "share"):  # a session of another kind computes everything
        return share.own(runtime.attend(layer, share.gather(query), keys, values, mask, scale, share.world))
    if session._planned_dense(layer):
        out: Tensor = session.attention(layer, query, keys, values, mask, scale)
        return out
    session.share = share
    try:
        rows = runtime.attend(layer, share.gather(query), keys, values, mask, scale, share.world)
    finally:
        session.share = None
    return share.collect(rows)


@torch.library.custom_op("dit_sparse::ring_attention", mutates_args=())
def ring_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
                    scale: float, handle: torch.Tensor) -> torch.Tensor:
    """`attend` as an operator, so that compiled graphs hold it.

    Args:
        query, key, value, mask, scale: see `attend`.
        handle: see `runtime.find`.

    Returns:
        (B, L / world, H, Dv).

    Raises:
        RuntimeError: the transformer was unbound since; ranks cannot go on alone.
    """
    runtime, layer = find(handle)
    if runtime is None:
        raise RuntimeError("ring parallelism: sparse attention was disabled after compiling; compile the model again")

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return own_dense(query, key, value, mask, scale, SDPA)

    return attend(runtime, layer, query, key, value, mask, scale, dense).contiguous()


@ring_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
      handle: torch.Tensor) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
