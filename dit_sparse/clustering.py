"""k-means on the tokens of a call, for all heads at once, and what clusters of tokens mean for blocks.

A kernel wants blocks whose lengths are the same for all heads; clusters have the length they have. So the tokens of
every head are sorted by cluster and cut into blocks, and a pair of blocks is kept when any pair of clusters that it
touches is. Nothing here waits for the device, and a map of tokens by clusters is there for a chunk of tokens only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .grid import TokenGrid
from .order import video_blocks
from .scoring import head_chunks

__all__ = ["Clusters", "block_scores", "kmeans", "pair_shares", "reordered", "seeds", "touches"]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Tokens in clusters, per batch element and head.

    Args:
        centroids: float32 (B, H, K, D); an empty cluster keeps the one it had.
        labels: int64 (B, H, L), the cluster of every token.
        sizes: float32 (B, H, K), real tokens of every cluster.
    """

    centroids: Tensor
    labels: Tensor
    sizes: Tensor


def seeds(
    x: Tensor, clusters: int, *, generator: torch.Generator | None = None, mask: Tensor | None = None
) -> Tensor:
    """Random tokens as first centroids: the same places in all heads, no place twice.

    Args:
        x: (B, L, H, D).
        clusters: number of centroids; at most one for every token.
        generator: where the numbers come from; None: always the same ones.
        mask: bool (B, L), True where the token is real: others come last, as zeros.

    Returns:
        float32 (B, H, K, D).
    """
    batch, tokens, heads, dim = x.shape
    generator = generator or torch.Generator().manual_seed(0)
    draw = torch.rand(1, tokens, generator=generator, device=generator.device).to(x.device, non_blocking=True)
    if mask is not None:
        draw = torch.where(mask, draw, -1.0)
    token = draw.topk(min(clusters, tokens), dim=-1).indices.expand(batch, -1)
    found = x.gather(1, token[..., None, None].expand(-1, -1, heads, dim)).to(torch.float32)
    if mask is not None:
        found = found.masked_fill(~mask.gather(1, token)[..., None, None], 0)
    return found.transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (B, H, ., .), summed and returned in float32; in half precision on a GPU by its matrix units."""
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        found = torch.bmm(a.flatten(0, 1), b.to(a.dtype).flatten(0, 1), out_dtype=torch.float32)
        return found.unflatten(0, a.shape[:2])
    return a.to(torch.float32) @ b.to(torch.float32)


def _step(x: Tensor, centroids: Tensor, mask: Tensor | None) -> Clusters:
    """Every token to its nearest centroid, and the means of what came together."""
    batch, tokens, heads, dim = x.shape
    count = centroids.shape[2]
    near = centroids.to(x.dtype)  # what the product sees, so that the norms belong to it
    half_norm = near.to(torch.float32).square().sum(-1)[..., None, :] / 2
    cluster = torch.arange(count, device=x.device)
    sums, sizes = torch.zeros_like(centroids), torch.zeros_like(half_norm[..., 0, :])
    labels = []
    for part in head_chunks(tokens, 2 * batch * heads * count):
        piece = x[:, part].transpose(1, 2)
        if mask is not None:
            piece = piece.masked_fill(~mask[:, None, part, None], 0)
        # |x - c|^2 is least where x.c - |c|^2 / 2 is greatest; of equal ones the lower cluster wins.
        label = (_product(piece, near.mT) - half_norm).argmax(-1)
        member = label[..., None] == cluster
        if mask is not None:
            member &= mask[:, None, part, None]
        sums += _product(member.to(x.dtype).mT, piece)
        sizes += member.sum(-2, dtype=torch.float32)
        labels.append(label)
    means = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), centroids)
    return Clusters(means, torch.cat(labels, dim=-1), sizes)


def kmeans(x: Tensor, centroids: Tensor, iterations: int, *, mask: Tensor | None = None) -> Clusters:
    """Lloyd's iterations by Euclidean distance, of every batch element and head by itself.

    There is no early stop, which would wait for the device. In half precision on a GPU distances are those to the
    centroids rounded to the activations' dtype; sums are float32 everywhere.

    Args:
        x: (B, L, H, D).
        centroids: (B, H, K, D), where to begin.
        iterations: at least 1.
        mask: bool (B, L), True where the token is real: others get a label, but move no centroid.

    Returns:
        The labels of the last iteration and the means of their tokens.
    """
    centroids = centroids.to(torch.float32)
    for _ in range(iterations):
        found = _step(x, centroids, mask)
        centroids = found.centroids
    return found


def pair_shares(query: Clusters, key: Clusters, scale: float) -> Tensor:
    """Share of its softmax that a query centroid gives to each key cluster, as if all of its keys were its centroid.

    Source: SVG2, arXiv 2505.18875: softmax of the centroids' products, weighted by the sizes of the key clusters.

    Returns:
        float32 (B, H, Kq, Kk); rows add up to 1, empty clusters get 0.
    """
    logits = query.centroids @ key.centroids.mT * scale + key.sizes[..., None, :].log()
    return logits.softmax(-1).nan_to_num(0)


def reordered(plain: BlockLayout, grid: TokenGrid, order: Tensor) -> BlockLayout:
    """A layout of `order.layout` with its video tokens in other orders; the blocks keep their lengths.

    Args:
        plain: video blocks and text blocks behind them.
        grid: the tokens.
        order: int64 (B, H, video), the video token at each place.
    """
    video = video_blocks(plain, grid) * plain.block_size
    places = torch.nn.functional.pad(order + grid.video_start, (0, video - grid.video), value=-1)
    text = plain.token_of_slot[video:].expand(*order.shape[:2], -1)
    return dataclasses.replace(plain, index=torch.cat((places, text), dim=-1), box=None)


def touches(labels: Tensor, clusters: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Which clusters each block of the sorted tokens holds tokens of, as pairs, some of them more than once.

    A cluster's tokens follow each other, so it meets a block first where the block begins or where the cluster does.

    Args:
        labels: int64 (B, H, L), sorted.
        clusters: their number, empty ones included.
        block_size: tokens of a block.

    Returns:
        Blocks and clusters, int64 (B, H, blocks + clusters) each.
    """
    tokens, device = labels.shape[-1], labels.device
    blocks = torch.arange(0, tokens, block_size, device=device)
    wanted = torch.arange(clusters, device=device).expand(*labels.shape[:2], -1)
    starts = torch.searchsorted(labels, wanted.contiguous()).clamp(max=tokens - 1)
    place = torch.cat((blocks.expand(*labels.shape[:2], -1), starts), dim=-1)
    return torch.div(place, block_size, rounding_mode="floor"), labels.gather(-1, place)


def block_scores(
    pairs: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], query_blocks: int, key_blocks: int
) -> Tensor:
    """The best score among the pairs of clusters that a pair of blocks touches.

    Args:
        pairs: float32 (B, h, Kq, Kk), not negative.
        query, key: what `touches` gives for them.
        query_blocks, key_blocks: how many blocks there are.

    Returns:
        float32 (B, h, query_blocks, key_blocks).
    """
    batch, heads, rows, _ = pairs.shape
    # First along the keys, then along the queries: (B, h, Kq, Kk) -> (B, h, Kq, nk) -> (B, h, nq, nk)
    block, cluster = (x[..., None, :].expand(-1, -1, rows, -1) for x in key)
    found = pairs.new_zeros(batch, heads, rows, key_blocks)
    found = found.scatter_reduce(-1, block, pairs.gather(-1, cluster), "amax")
    block, cluster = (x[..., None].expand(-1, -1, -1, key_blocks) for x in query)
    best = pairs.new_zeros(batch, heads, query_blocks, key_blocks)
    return best.scatter_reduce(-2, block, found.gather(-2, cluster), "amax")


def counts_in_blocks(labels: Tensor, clusters: int, block_size: int) -> Tensor:
    """How many tokens of each cluster lie in each block of the sorted tokens.

    Args:
        labels, clusters, block_size: as in `touches`.

    Returns:
        float32 (B, H, blocks, clusters).
    """
    tokens = labels.shape[-1]
    blocks = -(-tokens // block_size)
    place = torch.div(torch.arange(tokens, device=labels.device), block_size, rounding_mode="floor") * clusters + labels
    found = torch.zeros(*labels.shape[:2], blocks * clusters, device=labels.device)
    # Sums of ones are exact in any order.
    found.scatter_add_(-1, place, torch.ones_like(place, dtype=torch.float32))
    return found.unflatten(-1, (blocks, clusters))


def block_shares(shares: Tensor, sizes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The attention that the queries of a block are expected to give to a block of keys, added up.

    A query gives to a cluster of keys what its own cluster gives, and every key of a cluster gets the same.

    Args:
        shares: float32 (B, h, Kq, Kk), as `pair_shares` gives them.
        sizes: float32 (B, h, Kk), tokens of the key clusters.
        query, key: what `counts_in_blocks` gives for them.

    Returns:
        float32 (B, h, query blocks, key blocks).
    """
    return query @ ((shares / sizes.clamp(min=1)[..., None, :]) @ key.mT)
