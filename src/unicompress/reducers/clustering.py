"""Density-peak clustering with nearest neighbors (DPC-KNN), and merging by it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import merged, places, ranking, top
from unicompress.tokens import Grid

NEIGHBORS = 5


def density_peaks(
    features: Float[Tensor, "b n d"], count: int
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b n"]]:
    """Sorted cluster centers, and the cluster of every token.

    A center is dense and far from anything denser. Density is exp(-mean squared distance to the 5
    nearest); of two equally dense tokens the first counts as denser, so ties are settled.
    """
    features = features.float()
    n = features.shape[1]
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5
    near = distance.topk(min(NEIGHBORS + 1, n), dim=-1, largest=False).values[:, :, 1:]
    near = near if near.shape[-1] else distance
    density = (-near.square().mean(dim=-1)).exp()
    rank = places(ranking(density))  # 0 is the densest
    denser = rank[:, None, :] < rank[:, :, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(dim=-1)
    # Nothing is denser than the densest: its gap is the largest distance there is.
    gap = torch.where(gap.isinf(), distance.flatten(1).amax(dim=1, keepdim=True), gap)
    centers = top(density * gap, count)
    to_centers = distance.gather(2, centers[:, None].expand(-1, n, -1))
    cluster = to_centers.argmin(dim=-1)
    numbers = torch.arange(count, device=centers.device).expand_as(centers)
    return centers, cluster.scatter(1, centers, numbers.contiguous())


@reducers.register("dpc_knn")
class DensityPeaks(Reducer):
    """Every token merges into the center of its DPC-KNN cluster (Du et al., 2016), plain mean.

    The merger under PPE and part of SparseVLM; alone it is a content-only relative of average
    pooling. tokens [b, n, d] -> [b, k, d].
    """

    merges = True

    def __init__(self, *, keep: Keep = 0.25, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        centers, cluster = density_peaks(tokens, count)
        return merged(tokens, centers, cluster, self.positions)
