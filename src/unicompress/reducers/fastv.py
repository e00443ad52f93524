"""FastV (arXiv 2403.06764) and Window-FastV: what the last token attends to, after layer K.

Score of an image token: attention of the last token of the prompt to it in the layer before the
cut, mean over heads. The best are kept from layer K on; the cache of earlier layers stays full.
Ours follows the official code: `layer` = K = 2 (its Hugging Face demo has K = 3), positions kept.
The paper's accuracy tables use a variant that only masks; ours drops. Where the official code runs
a layer with full attention maps, ours recomputes the one row, so fused attention stays on.
Rounding is `count_kept`'s (the official code rounds to the nearest).
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
from unicompress.reducers.selection import kept, top, top_by_window, windows
from unicompress.tokens import Grid


@reducers.register("fastv")
class FastV(Reducer):
    """Top attention of the last token; acts before layer `layer` of the language model."""

    needs = ("attention",)
    source = "previous"

    def __init__(self, *, keep: Keep = 0.5, layer: int = 2, positions: str = "keep"):
        if layer < 1:
            raise InputError(f"layer must be at least 1 (a layer must run before it), got {layer}")
        self.keep = keep
        self.layer = layer
        self.positions = check_positions(positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        return (Step(self.layer, self, self.keep),)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        return kept(tokens, top(signals.attention, count), self.positions)


@reducers.register("window_fastv")
class WindowFastV(FastV):
    """The same score, but every window keeps equally many (Wen et al., ACL Findings 2025).

    No official code was read; the window side is ours.
    """

    content_only = False

    def __init__(
        self, *, keep: Keep = 0.5, layer: int = 2, window: int = 4, positions: str = "keep"
    ):
        super().__init__(keep=keep, layer=layer, positions=positions)
        if window < 1:
            raise InputError(f"window must be at least 1, got {window}")
        self.window = window

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        indices = top_by_window(signals.attention, windows(grid, self.window), count)
        return kept(tokens, indices, self.positions)
