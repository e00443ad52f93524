"""SparseVLM (arXiv 2410.04417) and SparseVLM+: text raters choose, the best of the rest recycle.

Raters are the text tokens to which the image attends more than average: softmax(V T^T) over the
text, mean over the image. A token's score is the raters' attention to it, mean over heads.

Version `v1` (the code's 1.0 and 1.5): the best 30 % of the dropped tokens are clustered (DPC-KNN)
into a tenth of their number + 1, which take part as means of their clusters; what is left is
renumbered. Version `plus` (the code's 2.0, SparseVLM+) differs in five ways:

- Position correction. RoPE alone makes near tokens look important: an all-one query at p and an
  all-one key at q, both turned, have the product w(p, q) = sum_i cos((p - q) theta_i), which falls
  with distance. Attention, after the softmax as in the code, is divided by w(p, q) / w(p, p).
- Only the heads with the most corrected attention from raters to image count: 14 of 32.
- Nothing is recycled.
- Kept tokens keep their positions, which the correction of later cuts relies on.
- The last cut leaves 118 tokens instead of 110, in place of the recycled ones.

Official code: `score.py` and `modelling_sparse_llama.py`; where ours differs:

- It computes layers 2, 6 and 15 of 32 in full and cuts behind them, by their own attention. So does
  `plus` here (before layers 3, 7 and 16, scaled to the depth); `v1` cuts one layer earlier, by the
  attention of the layer before.
- Its counts for an average of 192 are 300, 200 and 110 (118); ours keeps these proportions of
  `keep` at every budget, where it has other lists for 128, 96 and 64.
- Recycled tokens come on top there; here they are part of the budget.
- Raters are chosen from the states at each cut, there once from the embeddings.
- w crosses zero far away (beyond 1,500 places with 128 channels and base 10,000, at once in narrow
  heads), where a quotient means nothing: ours takes w / w(p, p) for 0.1 at least.
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
from unicompress.reducers.selection import at, chosen, cosine, kept, top, weighted_mean
from unicompress.tokens import Grid

CUTS = {"v1": (2, 6, 15), "plus": (3, 7, 16)}  # before which of 32 layers
LEFT = {"v1": (300, 200, 110), "plus": (300, 200, 118)}  # tokens behind each cut for 192
RECYCLED = 0.3
HEADS = 14 / 32
FLOOR = 0.1  # of the correction; 0.105 is the least within 700 places of LLaVA-1.5


@reducers.register("sparsevlm")
class SparseVLM(Reducer):
    """`keep` is the average that the schedule aims at. tokens [b, n, d] -> [b, k, d]."""

    needs: tuple[str, ...] = ("text_attention", "text", "text_valid")
    source = "previous"

    def __init__(self, *, keep: Keep = 1 / 3, version: str = "v1", positions: str = ""):
        if version not in CUTS:
            raise InputError(f"version must be v1 or plus, got {version!r}")
        self.keep = keep
        self.version = version
        # As the version has it, unless said otherwise.
        self.positions = check_positions(positions or ("reindex" if version == "v1" else "keep"))
        if version == "plus":
            self.needs = (*self.needs, "cosines", "sines", "text_cosines", "text_sines")

    def steps(self, depth: int) -> tuple[Step, ...]:
        pairs = zip(CUTS[self.version], LEFT[self.version], strict=True)
        cuts = {max(1, cut * depth // 32): left / 192 for cut, left in pairs}
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
            attention = busiest(attention / nearness(signals)[:, None], raters)
        weights = raters.to(attention)[:, None, :, None]
        score = (attention * weights).sum(dim=2) / weights.sum(dim=2)
        score = score.mean(dim=1)
        clusters = clusters_for(tokens.shape[1], count) if self.version == "v1" else 0
        best = top(score, count - clusters)
        if not clusters:
            return kept(tokens, best, self.positions)
        return self._recycle(tokens, score, best, clusters)

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


def nearness(signals: Signals) -> Float[Tensor, "b t n"]:
    """What RoPE alone makes of each pair's distance: w(p, q) / w(p, p), 0.1 at least.

    The product of two turned all-one vectors is that of their rows of the RoPE table, cosines and
    sines side by side, whichever way a model pairs channels.
    """
    image, text = (signals.cosines, signals.sines), (signals.text_cosines, signals.text_sines)
    rows = [torch.cat([t.float() for t in pair if t is not None], dim=-1) for pair in (text, image)]
    return cosine(*rows).clamp(min=FLOOR)


def busiest(
    attention: Float[Tensor, "b p t n"], raters: Bool[Tensor, "b t"]
) -> Float[Tensor, "b q t n"]:
    """The heads with the most attention from raters to image."""
    mass = (attention * raters[:, None, :, None]).sum(dim=(2, 3))
    heads = top(mass, max(1, round(HEADS * attention.shape[1])))
    return attention.gather(1, heads[:, :, None, None].expand(-1, -1, *attention.shape[2:]))


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
