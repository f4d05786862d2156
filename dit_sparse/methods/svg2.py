"""Sparse VideoGen 2 (arXiv 2505.18875): tokens that mean the same are put side by side, wherever they are in the video.

Queries and keys are clustered by value with k-means, every head by itself. The products of centroids, weighted by the
sizes of the key clusters, say how much of its softmax a query cluster gives to each key cluster; the fewest key
clusters that hold a share `top_p` are computed.

The kernels take blocks of equal length, so the sorted tokens are cut into blocks, and a pair of blocks is computed when
it touches a kept pair of clusters. Every kept pair of tokens is computed, and some more: with V video tokens, blocks of
bq and bk tokens and Kq and Kk clusters, about (1 + bq Kq / V) (1 + bk Kk / V) times as many, where kept clusters do not
lie side by side: 1.7 at 75,600 tokens, 2.0 at 17,408 and 2.2 at 2,304 with the numbers that None chooses. `density`
counts what is computed, so it is not touched by this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..clustering import (
    Clusters,
    block_scores,
    block_shares,
    counts_in_blocks,
    kmeans,
    pair_shares,
    reordered,
    seeds,
    touches,
)
from ..grid import TokenGrid
from ..order import layout, video_blocks
from ..patterns import check_block_size, choose_block_size, key_blocks_kept
from ..routing import lists_by_chunks
from ..selection import Rule, select_top_p
from .base import Call, Method, Plan, check_range

PAPER_TOKENS, PAPER_CLUSTERS = 75_600, (100, 500)  # of the paper's runs, for queries and keys


def cluster_counts(tokens: int, query_block: int, key_block: int) -> tuple[int, int]:
    """Clusters of queries and of keys for a sequence.

    The paper's 100 and 500 at 75,600 tokens, with the square root of the length elsewhere, as the numbers of query
    clusters in the authors' scripts grow (200 at 32,760 tokens, 300 at 75,600, 400 at 118,800), and at least two blocks
    of tokens to a cluster. The two rules are ours. 48 and 136 at 17,408 tokens, 17 and 36 at 2,304.

    Args:
        tokens: video tokens.
        query_block, key_block: tokens of a block.
    """
    return tuple(  # type: ignore[return-value]
        max(1, min(round(most * math.sqrt(tokens / PAPER_TOKENS)), tokens // (2 * size)))
        for most, size in zip(PAPER_CLUSTERS, (query_block, key_block), strict=True)
    )


@dataclass(frozen=True)
class SVG2(Method):
    """Pairs of k-means clusters that hold a share of the attention.

    Args:
        top_p: share of its softmax that the kept key clusters of a query cluster hold; a cluster is kept while those
            before it hold at most so much. 1 keeps everything.
        density: None: `top_p` decides. A number: every query block keeps the key blocks that hold most of its
            expected attention, as many as bring the whole mask within 0.03 of it on 2,000 tokens and more, text
            included; `top_p` and `min_kc_ratio` then have no effect. The last kept cluster may be kept in part. Ours.
        query_clusters, key_clusters: how many; None chooses by the length of the sequence. More than there are tokens
            count as so many.
        min_kc_ratio: fraction of the key clusters that every query cluster keeps in any case.
        iter_init, iter_step: iterations of k-means at a layer's first call, from random tokens, and at later steps,
            from the last step's centroids. All are made: stopping early would wait for the device.
        dense_init: go on with k-means at dense steps too, so that the first sparse step finds good centroids.
        block_size: tokens of a query block; None chooses by the length of the sequence.
        key_block_size: tokens of a key block; None: half of the query block, at least 16.
    """

    top_p: float = 0.9
    density: float | None = None
    query_clusters: int | None = None
    key_clusters: int | None = None
    min_kc_ratio: float = 0.1
    iter_init: int = 50
    iter_step: int = 2
    dense_init: bool = False
    block_size: int | None = None
    key_block_size: int | None = None

    name: ClassVar[str] = "svg2"
    title: ClassVar[str] = "Sparse VideoGen 2"
    arxiv: ClassVar[str | None] = "2505.18875"
    scored: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "by k-means cluster, queries and keys apart, per head",
        "score": "products of centroids, weighted by the key clusters' sizes",
        "select": "top-p per query cluster; text",
        "operate": "drop",
        "remember": "centroids, as the next step's start",
    }
    # Source: the authors' scripts at 720p; at 480p they take 200 query clusters. Their conditional and unconditional
    # branches share the centroids, here each branch has its own. For Cosmos the dense steps are those of SVG's script.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "wan": {"query_clusters": 300, "key_clusters": 1000, "top_p": 0.9, "min_kc_ratio": 0.1, "dense_steps": 0.2,
                "dense_layers": 1},
        "hunyuan": {"query_clusters": 400, "key_clusters": 1000, "top_p": 0.9, "min_kc_ratio": 0.1, "dense_init": True,
                    "dense_steps": 0.1, "dense_layers": 1},
        "cosmos": {"query_clusters": 400, "key_clusters": 1000, "top_p": 0.9, "min_kc_ratio": 0.1, "dense_steps": 0.3,
                   "dense_layers": 1},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "top_p", self.top_p, 0, 1, open_low=True)
        check_range(self.name, "min_kc_ratio", self.min_kc_ratio, 0, 1)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for name in ("query_clusters", "key_clusters", "iter_init", "iter_step"):
            value = getattr(self, name)
            if value is None and name.endswith("clusters"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"svg2: {name}={value!r} is not allowed; use a whole number >= 1")
        if not isinstance(self.dense_init, bool):
            raise ValueError(f"svg2: dense_init={self.dense_init!r} is not allowed; use True or False")
        check_block_size(self.name, self.block_size)
        check_block_size(self.name, self.key_block_size, "key_block_size")

    def layouts(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Blocks of queries and of keys in the model's own order, on the CPU; sorting changes only the order."""
        size = choose_block_size(grid.tokens, self.block_size)
        return layout(grid, None, size), layout(grid, None, self.key_block_size or max(16, size // 2))

    def cluster(self, call: Call) -> tuple[Clusters, Clusters]:
        """The video's queries and keys in clusters; the centroids are kept for the next step."""
        video = call.grid.video_slice
        real = None if call.key_mask is None else call.key_mask[:, video]
        sizes = (x.block_size for x in self.layouts_of(call))
        chosen = cluster_counts(call.grid.video, *sizes)
        counts = self.query_clusters or chosen[0], self.key_clusters or chosen[1]
        kept = call.state.recall("centroids")
        found = []
        for i, (x, mask) in enumerate(((call.query[:, video], None), (call.key[:, video], real))):
            start = seeds(x, counts[i], generator=call.generator, mask=mask) if kept is None else kept[i]
            found.append(kmeans(x, start, self.iter_init if kept is None else self.iter_step, mask=mask))
        call.state.keep("centroids", tuple(x.centroids.to(call.query.dtype) for x in found))
        return found[0], found[1]

    def layouts_of(self, call: Call) -> tuple[BlockLayout, BlockLayout]:
        """`layouts` of a call, made once per shape, on its device."""
        made: tuple[BlockLayout, BlockLayout] = call.cached(
            (self, "layouts"), lambda: tuple(x.to(call.device) for x in self.layouts(call.grid))
        )
        return made

    def observe(self, call: Call, out: Tensor, lse: Tensor | None) -> None:
        """With `dense_init`: cluster a dense step's tokens too."""
        if self.dense_init:
            self.cluster(call)

    def mask(self, call: Call, query: Clusters, key: Clusters) -> BlockMask:
        """The blocks that kept pairs of clusters touch."""
        grid, plain = call.grid, self.layouts_of(call)
        sorted_labels = [torch.sort(x.labels, dim=-1, stable=True) for x in (query, key)]
        layouts = [reordered(x, grid, by.indices) for x, by in zip(plain, sorted_labels, strict=True)]
        blocks = [video_blocks(x, grid) for x in plain]
        shares = pair_shares(query, key, call.scale)
        counts = query.sizes.shape[-1], key.sizes.shape[-1]
        chosen: dict[str, Any] = {"rows": slice(0, blocks[0]), "columns": slice(0, blocks[1])}

        def parts(heads: slice, find: Callable[[Tensor, int, int], Any]) -> list[Any]:
            return [find(by.values[:, heads], n, x.block_size)
                    for x, by, n in zip(plain, sorted_labels, counts, strict=True)]

        if self.density is None:
            least = int(self.min_kc_ratio * shares.shape[-1])
            pairs = select_top_p(shares, self.top_p, least=least).to(torch.float32)
            rule = Rule("threshold", 0.5, **chosen)
        else:
            rule = Rule("top_k", key_blocks_kept(self.density, grid, blocks[1]), **chosen)

        def scores(heads: slice) -> Tensor:
            if self.density is None:
                rows, columns = parts(heads, touches)
                found = block_scores(pairs[:, heads], rows, columns, blocks[0], blocks[1])
            else:
                rows, columns = parts(heads, counts_in_blocks)
                found = block_shares(shares[:, heads], key.sizes[:, heads], rows, columns)
            beyond = [x.blocks - n for x, n in zip(plain, blocks, strict=True)]  # text, which the rule keeps anyway
            return torch.nn.functional.pad(found, (0, beyond[1], 0, beyond[0]))

        return lists_by_chunks(scores, shares.shape[0], shares.shape[1], layouts[0], layouts[1], rule)

    def plan(self, call: Call) -> Plan:
        """Cluster, weigh the pairs of clusters, keep blocks; for every batch element and head."""
        return Plan(self.mask(call, *self.cluster(call)))
