"""DivPrune (arXiv 2503.02175): the subset whose closest pair is as far apart as possible.

Greedy max-min diversity under cosine distance: the first token is the one whose nearest neighbor is
farthest, then always the one farthest from all chosen. The official default keeps 0.098. It rounds
to the nearest count and indexes position ids in a way that fails for two-dimensional ones; ours
rounds down and renumbers. tokens [b, n, d] -> [b, k, d].
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


def isolated(distance: Float[Tensor, "b n n"]) -> Int[Tensor, " b"]:
    """The token whose nearest neighbor is farthest; the first of equal ones."""
    own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    return distance.masked_fill(own, torch.inf).amin(dim=-1).argmax(dim=-1)


def farthest(
    distance: Float[Tensor, "b n n"], first: Int[Tensor, " b"], count: int, *, total: bool = False
) -> Int[Tensor, "b k"]:
    """Greedy choice by the smallest distance to those chosen (or the `total` of distances)."""
    rows = torch.arange(len(distance), device=distance.device)
    score = distance[rows, first].clone()
    taken = torch.zeros_like(score, dtype=torch.bool)
    taken[rows, first] = True
    order = [first]
    for _ in range(count - 1):
        best = score.masked_fill(taken, -torch.inf).argmax(dim=-1)
        taken[rows, best] = True
        order.append(best)
        new = distance[rows, best]
        score = score + new if total else torch.minimum(score, new)
    return torch.stack(order, dim=1).sort(dim=1).values


@reducers.register("divprune")
class DivPrune(Reducer):
    """Max-min diversity, before the language model; looks at nothing but the tokens."""

    def __init__(self, *, keep: Keep = 0.098, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        distance = 1 - cosine(tokens.float(), tokens.float())
        indices = farthest(distance, isolated(distance), count)
        return kept(tokens, indices, self.positions)
