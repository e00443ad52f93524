"""SparseVLM (arXiv 2410.04417) and SparseVLM+: text raters choose, the best of the rest recycle.

Raters are the text tokens to which the image attends more than average: softmax(V T^T) over the
text, mean over the image. A token's score is the raters' attention to it, mean over heads. Version
`v1`: the best 30 % of the dropped tokens are clustered (DPC-KNN) into a tenth of their number + 1,
which take part as means of their clusters. Version `plus`: only the heads with the most attention
from text to image count (14 of 32), nothing is recycled, and positions are kept.

Cuts are before layers 2, 6 and 15 of 32 (scaled to the depth) with 300, 200 and 110 tokens for an
average of 192 in the official code; ours keeps these proportions of `keep`. There recycled tokens
come on top; here they are part of the budget. Raters are chosen from the states at each cut, in the
official code once. The plus version's division of logits by a RoPE term is not done here, since it
needs logits before the softmax.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    Step,
    check_positions,
    reducers,
    scaled,
)
from unicompress.reducers.clustering import density_peaks
from unicompress.reducers.selection import at, chosen, kept, top, weighted_mean
from unicompress.tokens import Grid

CUTS = (2 / 32, 6 / 32, 15 / 32)
SHARES = (300 / 192, 200 / 192, 110 / 192)
RECYCLED = 0.3
HEADS = 14 / 32


@reducers.register("sparsevlm")
class SparseVLM(Reducer):
    """`keep` is the average that the schedule aims at. tokens [b, n, d] -> [b, k, d]."""

    needs = ("text_attention", "text", "text_valid")
    source = "previous"

    def __init__(self, *, keep: Keep = 1 / 3, version: str = "v1", positions: str = ""):
        if version not in ("v1", "plus"):
            raise InputError(f"version must be v1 or plus, got {version!r}")
        self.keep = keep
        self.version = version
        # As the version has it, unless said otherwise.
        self.positions = check_positions(positions or ("reindex" if version == "v1" else "keep"))

    def steps(self, depth: int) -> tuple[Step, ...]:
        cuts = {max(1, int(cut * depth)): share for cut, share in zip(CUTS, SHARES, strict=True)}
        return tuple(Step(layer, self, scaled(self.keep, share)) for layer, share in cuts.items())

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        attention, text, there = signals.text_attention, signals.text, signals.text_valid
        assert attention is not None
        assert text is not None
        assert there is not None
        raters = text_raters(tokens, text, there)
        if self.version == "plus":
            attention = self._heads(attention, there)
        weights = raters.to(attention)[:, None, :, None]
        score = (attention * weights).sum(dim=2) / weights.sum(dim=2)
        score = score.mean(dim=1)
        clusters = clusters_for(tokens.shape[1], count) if self.version == "v1" else 0
        best = top(score, count - clusters)
        if not clusters:
            return kept(tokens, best, self.positions)
        return self._recycle(tokens, score, best, clusters)

    @staticmethod
    def _heads(
        attention: Float[Tensor, "b p t n"], there: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b q t n"]:
        """The heads with the most attention from text to image."""
        mass = (attention * there[:, None, :, None]).sum(dim=(2, 3))
        heads = top(mass, max(1, round(HEADS * attention.shape[1])))
        return attention.gather(1, heads[:, :, None, None].expand(-1, -1, *attention.shape[2:]))

    def _recycle(
        self,
        tokens: Float[Tensor, "b n d"],
        score: Float[Tensor, "b n"],
        best: Tensor,
        clusters: int,
    ) -> Reduction:
        """Cluster the best of the dropped tokens; each cluster is its mean, at its center."""
        b, n, _ = tokens.shape
        dropped = n - best.shape[1]
        size = max(clusters, int(RECYCLED * dropped))
        pool = top(score.masked_fill(chosen(best, n), -torch.inf), size)
        centers, cluster = density_peaks(at(tokens, pool), clusters)
        places = pool.gather(1, centers)
        indices = torch.cat([best, places], dim=1).sort(dim=1).values
        assignment = torch.full((b, n), -1, device=tokens.device)
        owner = torch.searchsorted(indices, places).gather(1, cluster)
        assignment = assignment.scatter(1, pool, owner)
        numbers = torch.searchsorted(indices, best)
        assignment = assignment.scatter(1, best, numbers)
        values = weighted_mean(tokens, assignment, indices.shape[1])
        return Reduction(indices, values, assignment, self.positions)


def text_raters(
    tokens: Float[Tensor, "b n d"], text: Float[Tensor, "b t d"], there: Bool[Tensor, "b t"]
) -> Bool[Tensor, "b t"]:
    """Text tokens to which the image attends at least as much as to the average one."""
    scores = tokens.float() @ text.float().transpose(1, 2)  # [b, n, t]
    share = scores.masked_fill(~there[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
    average = 1 / there.sum(dim=1, keepdim=True)
    raters = (share >= average) & there
    # Equal shares may all round to just below the average: then every text token rates.
    return torch.where(raters.any(dim=1, keepdim=True), raters, there)


def clusters_for(total: int, count: int) -> int:
    """How many of `count` tokens are recycled: a tenth of 30 % of the dropped ones, plus one."""
    for clusters in range(1, count):
        dropped = total - (count - clusters)
        if clusters >= int(RECYCLED * dropped) // 10 + 1:
            return clusters
    return 0
