"""ToMe (arXiv 2210.09461): bipartite matching merges the most similar pairs of tokens.

Tokens alternate between two sets A and B. Each token of A proposes its most similar token of B
(cosine of the keys); the r best proposals are carried out as means weighted by size. One round can
halve the tokens at most, so smaller budgets take several rounds.

The paper merges r tokens in every layer of a ViT, between attention and MLP, and adds log(size) to
the attention of merged tokens. Ours merges once, after the encoder, in as many rounds as the budget
needs: the encoder stays as it is, so its cost does not fall, and the language model, which was not
trained with sizes, gets no log(size). The official output has another order; ours is raster.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import ranking
from unicompress.tokens import Grid


@reducers.register("tome")
class ToMe(Reducer):
    """Merges tokens [b, n, d] -> [b, k, d]; the position of a group is that of its B token.

    Similarity uses `signals.keys` where a host gives them and the tokens themselves elsewhere.
    """

    content_only = False  # the two sets are even and odd places
    merges = True

    def __init__(self, *, keep: Keep = 0.5, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        metric = (tokens if signals.keys is None else signals.keys).float()
        b, n, _ = tokens.shape
        owner = torch.arange(n, device=tokens.device).expand(b, -1)  # token -> its representative
        alive = torch.ones_like(owner, dtype=torch.bool)
        sizes = torch.ones_like(owner)
        sums, keys = tokens.clone(), metric.clone()
        left = n
        while left > count:
            merging = min(left - count, left // 2)
            source, target = match(keys / sizes[..., None], alive, merging)
            for field in (sums, keys):
                moved = source[..., None].expand(-1, -1, field.shape[-1])
                into = target[..., None].expand_as(moved)
                field.scatter_add_(1, into, field.gather(1, moved))
            sizes = sizes.scatter_add(1, target, sizes.gather(1, source))
            step = torch.arange(n, device=tokens.device).expand(b, -1).scatter(1, source, target)
            owner = step.gather(1, owner)
            alive = alive.scatter(1, source, torch.zeros_like(source, dtype=torch.bool))
            left -= merging
        indices = alive.nonzero()[:, 1].view(b, count)
        number = torch.zeros_like(owner).scatter(
            1, indices, torch.arange(count, device=tokens.device).expand(b, -1).contiguous()
        )
        means = sums / sizes[..., None]
        values = means.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
        return Reduction(indices, values, number.gather(1, owner), self.positions)


def match(
    keys: Float[Tensor, "b n k"], alive: Bool[Tensor, "b n"], merging: int
) -> tuple[Int[Tensor, "b r"], Int[Tensor, "b r"]]:
    """The `merging` best pairs (source in A, target in B) among the tokens that are left."""
    b = len(keys)
    left = alive.nonzero()[:, 1].view(b, -1)
    first, second = left[:, ::2], left[:, 1::2]
    # With an odd number the last of A has no partner of its own, which is no obstacle.
    unit = F.normalize(keys, dim=-1)
    wide = keys.shape[-1]
    a, c = (unit.gather(1, s[..., None].expand(-1, -1, wide)) for s in (first, second))
    best, partner = (a @ c.transpose(1, 2)).max(dim=-1)
    chosen = ranking(best)[:, :merging]
    return first.gather(1, chosen), second.gather(1, partner.gather(1, chosen))
