"""PyramidDrop (arXiv 2410.17247): fewer image tokens in every quarter of the language model.

At each cut the last token of the prompt is the only query: its attention, recomputed with the
weights of the layer that follows, softmax over its causal row, mean over heads, ranks the tokens.
Ours follows the official code: cuts at 1/4, 1/2 and 3/4 of the depth (8, 16, 24 of 32), keeping
0.5, 0.25 and 0.125 of the original tokens, positions renumbered. In training the official code
ranks by the token before each answer; ours is for inference.
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
    scaled,
)
from unicompress.reducers.selection import kept, top
from unicompress.tokens import Grid


@reducers.register("pyramid_drop")
class PyramidDrop(Reducer):
    """`keep` is what the first cut leaves; each further cut leaves the same share of the rest.

    `layers` are the cuts, () for quarters of the depth. Called as a function it is one cut.
    """

    needs = ("attention",)
    source = "next"

    def __init__(
        self, *, keep: Keep = 0.5, layers: tuple[int, ...] = (), positions: str = "reindex"
    ):
        if any(a >= b for a, b in zip((0, *layers), layers, strict=False)):
            raise InputError(f"layers must be positive and rise, got {layers}")
        self.keep = keep
        self.layers = tuple(layers)
        self.positions = check_positions(positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        cuts = self.layers or tuple(sorted({max(1, depth * part // 4) for part in (1, 2, 3)}))
        # A count is halved at each further cut, as the default ratio is.
        share = self.keep if isinstance(self.keep, float) else 0.5
        return tuple(
            Step(layer, self, scaled(self.keep, share**number)) for number, layer in enumerate(cuts)
        )

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        return kept(tokens, top(signals.attention, count), self.positions)
