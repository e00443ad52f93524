"""VisionZip (arXiv 2412.04467): dominant tokens by the encoder's attention, the rest summed up.

Dominant: highest attention of the class token in the encoder's last layer but one. Of the rest,
tokens at even distances are contextual targets; every other one joins its most similar target
(cosine of keys) and contextual = target + mean of those that joined. That is a sum of two, so its
norm grows, as in the official code; `merge='mean'` gives the mean of all instead. The default split
is that of 64 tokens, 54 + 10. The official code counts the class token among the dominant ones and
puts contextual tokens last; ours has no class token and raster order.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import at, cosine, top, weighted_mean
from unicompress.tokens import Grid

MERGES = ("sum", "mean")


def zipped(
    tokens: Float[Tensor, "b n d"],
    scores: Float[Tensor, "b n"],
    keys: Float[Tensor, "b n c"],
    count: int,
    *,
    contextual: float,
    merge: str,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k d"], Int[Tensor, "b n"]]:
    """Indices, tokens and assignment of `count` dominant and contextual tokens."""
    b, n, _ = tokens.shape
    targets = min(int(contextual * count), n - count)
    dominant = top(scores, count - targets)
    mask = torch.ones(b, n, dtype=torch.bool, device=tokens.device)
    mask.scatter_(1, dominant, torch.zeros_like(dominant, dtype=torch.bool))
    rest = mask.nonzero()[:, 1].view(b, -1)
    spread = torch.arange(targets, device=tokens.device) * rest.shape[1] // max(targets, 1)
    places = rest[:, spread]
    indices = torch.cat([dominant, places], dim=1).sort(dim=1).values
    numbers = torch.arange(count, device=tokens.device).expand(b, -1)
    assignment = torch.full((b, n), -1, device=tokens.device)
    if targets:
        near = cosine(keys.float(), at(keys, places).float()).argmax(dim=-1)  # [b, n]
        owner = torch.searchsorted(indices, places).gather(1, near)
        assignment = torch.where(mask, owner, assignment)
    assignment = assignment.scatter(1, indices, numbers.contiguous())
    if merge == "mean":
        return indices, weighted_mean(tokens, assignment, count), assignment
    joined = assignment.scatter(1, indices, torch.full_like(indices, -1))
    return indices, at(tokens, indices) + weighted_mean(tokens, joined, count), assignment


@reducers.register("visionzip")
class VisionZip(Reducer):
    """`contextual` is the share of the budget for contextual tokens. [b, n, d] -> [b, k, d]."""

    needs = ("attention", "keys")
    scored_by: ClassVar[str] = "attention"  # the signal that makes a token dominant
    content_only = False  # targets stand at even distances

    def __init__(
        self,
        *,
        keep: Keep = 0.25,
        contextual: float = 10 / 64,
        merge: str = "sum",
        positions: str = "reindex",
    ):
        if not 0 <= contextual < 1:
            raise InputError(f"contextual must lie in [0, 1), got {contextual}")
        if merge not in MERGES:
            raise InputError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        self.keep = keep
        self.contextual = contextual
        self.merge = merge
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.keys is not None
        indices, values, assignment = zipped(
            tokens,
            getattr(signals, self.scored_by),
            signals.keys,
            count,
            contextual=self.contextual,
            merge=self.merge,
        )
        return Reduction(indices, values, assignment, self.positions)
