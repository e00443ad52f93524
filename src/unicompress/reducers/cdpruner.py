"""CDPruner (arXiv 2506.10967): a determinantal process of diversity, conditioned on the question.

Kernel L = diag(r) S diag(r) with S the cosine of tokens and r the min-max of the relevance to the
question; the greedy MAP subset of the process (Chen et al., 2018: Cholesky updates). Officially r
is the min-max of the *negated* similarity of CLIP's image and text embeddings, taken over the whole
batch, so that pictures influence each other; ours takes it per image. Models here carry no CLIP
text encoder: hosts give the cosine of each image token with the mean of the question's embeddings
in the language model, which is another signal; pass `Signals.relevance` to use your own, and
`negated=False` where higher means more relevant. tokens [b, n, d] -> [b, k, d].
"""

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
from unicompress.reducers.selection import cosine, kept
from unicompress.tokens import Grid

SMALL = 1e-6


def greedy_map(kernel: Float[Tensor, "b n n"], count: int) -> Int[Tensor, "b k"]:
    """Greedy maximum a posteriori subset of a determinantal process; sorted."""
    b, n, _ = kernel.shape
    rows = torch.arange(b, device=kernel.device)
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(b, count, n)
    taken = torch.zeros(b, n, dtype=torch.bool, device=kernel.device)
    order = []
    for step in range(count):
        best = gains.masked_fill(taken, -torch.inf).argmax(dim=-1)
        taken[rows, best] = True
        order.append(best)
        known = factors[:, :step]
        dot = (known[rows, :, best][:, :, None] * known).sum(dim=1)
        # Beyond the rank of the kernel there is nothing left to gain; the order is then by index.
        root = gains[rows, best].clamp(min=SMALL).sqrt()[:, None]
        factor = (kernel[rows, best] - dot) / root
        factors[:, step] = factor
        gains = (gains - factor.square()).clamp(min=0)
    return torch.stack(order, dim=1).sort(dim=1).values


@reducers.register("cdpruner")
class CDPruner(Reducer):
    """Conditional diversity, before the language model."""

    needs = ("relevance",)

    def __init__(self, *, keep: Keep = 0.25, negated: bool = True, positions: str = "reindex"):
        self.keep = keep
        self.negated = negated
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.relevance is not None
        relevance = signals.relevance.double() * (-1 if self.negated else 1)
        low, high = relevance.aminmax(dim=1, keepdim=True)
        # The least relevant token would otherwise have weight zero, and never a chance.
        weight = (relevance - low + SMALL) / (high - low + SMALL)
        kernel = cosine(tokens.double(), tokens.double())
        kernel = weight[:, :, None] * kernel * weight[:, None, :]
        return kept(tokens, greedy_map(kernel, count), self.positions)
