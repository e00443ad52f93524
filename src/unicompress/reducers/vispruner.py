"""VisPruner (arXiv 2412.01818v2): half by the encoder's attention, half by not being duplicates.

`important` of the budget goes to the highest attention. Among the rest, tokens alternate between
two sets; each of the first set is as redundant as its most similar token of the second (cosine),
and the up to 8 most redundant are removed; again, until the budget is met. Follows the official
defaults (0.5, 8 a round, positions kept). tokens [b, n, d] -> [b, k, d].
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import chosen, kept, ranking, top
from unicompress.tokens import Grid


@reducers.register("vispruner")
class VisPruner(Reducer):
    """Important and diverse tokens, before the language model."""

    needs = ("attention",)
    content_only = False  # the two sets are even and odd places

    def __init__(
        self,
        *,
        keep: Keep = 0.222,
        important: float = 0.5,
        step: int = 8,
        positions: str = "keep",
    ):
        if not 0 <= important <= 1 or step < 1:
            raise InputError(
                f"important must lie in [0, 1] and step be at least 1, got {important} and {step}"
            )
        self.keep = keep
        self.important = important
        self.step = step
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        b, n, _ = tokens.shape
        best = top(signals.attention, int(self.important * count))
        left = (~chosen(best, n)).nonzero()[:, 1].view(b, -1)
        unit = F.normalize(tokens.float(), dim=-1)
        while left.shape[1] > count - best.shape[1]:
            removing = min(
                self.step, left.shape[1] - (count - best.shape[1]), (left.shape[1] + 1) // 2
            )
            first, second = left[:, ::2], left[:, 1::2]
            if second.shape[1] == 0:
                left = left[:, :0]
                break
            wide = tokens.shape[-1]
            one, two = (
                unit.gather(1, half[..., None].expand(-1, -1, wide)) for half in (first, second)
            )
            double = (one @ two.transpose(1, 2)).amax(dim=-1)
            gone = first.gather(1, ranking(double)[:, :removing])
            mask = chosen(left, n) & ~chosen(gone, n)
            left = mask.nonzero()[:, 1].view(b, -1)
        indices = torch.cat([best, left], dim=1).sort(dim=1).values
        return kept(tokens, indices, self.positions)
