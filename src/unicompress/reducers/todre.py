"""ToDRE (arXiv 2505.18757): a diverse tenth after the encoder, and none at all in late layers.

Stage one is a greedy diversity choice: `max_min` (the k-center of the paper's first version) or
`max_sum` (max-sum diversification of its second). Stage two drops every image token that is left
once information has moved to the text. The paper decides the layer by a threshold on cross-modal
attention that it does not state; ours takes a fixed share of the depth, `exit` (1: never). No
official code was read. tokens [b, n, d] -> [b, k, d].
"""

from jaxtyping import Float
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
)
from unicompress.reducers.divprune import farthest, isolated
from unicompress.reducers.selection import cosine, kept
from unicompress.tokens import Grid


@reducers.register("todre")
class ToDRE(Reducer):
    """Diversity before the language model; from `exit` of its depth on, text alone."""

    def __init__(
        self,
        *,
        keep: Keep = 0.1,
        variant: str = "max_min",
        exit: float = 0.75,
        positions: str = "reindex",
    ):
        if variant not in ("max_min", "max_sum"):
            raise InputError(f"variant must be max_min or max_sum, got {variant!r}")
        if not 0 < exit <= 1:
            raise InputError(f"exit must lie in (0, 1], got {exit}")
        self.keep = keep
        self.variant = variant
        self.exit = exit
        self.positions = check_positions(positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        first = Step(0, self, self.keep)
        layer = max(1, int(self.exit * depth))
        if self.exit == 1 or self.keep == 1 or layer >= depth:
            return (first,)
        return first, Step(layer, self, 0)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        distance = 1 - cosine(tokens.float(), tokens.float())
        indices = farthest(distance, isolated(distance), count, total=self.variant == "max_sum")
        return kept(tokens, indices, self.positions)
