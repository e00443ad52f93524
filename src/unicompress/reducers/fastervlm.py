"""FasterVLM (arXiv 2412.01818): the tokens that the encoder's class token attends to.

Attention of the class token in the encoder's last layer but one, mean over heads; what a token
receives on average where there is no class token. The official default prunes 0.778.
"""

from jaxtyping import Float
from torch import Tensor

from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import kept, top
from unicompress.tokens import Grid


@reducers.register("fastervlm")
class FasterVLM(Reducer):
    """Top attention, before the language model. tokens [b, n, d] -> [b, k, d]."""

    needs = ("attention",)

    def __init__(self, *, keep: Keep = 0.222, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        return kept(tokens, top(signals.attention, count), self.positions)
