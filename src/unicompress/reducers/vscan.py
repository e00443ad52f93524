"""VScan (arXiv 2505.22654): two looks by the encoder, one by the language model.

Before the language model, half of the budget goes to the local scan (attention of an early layer
of the encoder, best of every window), half to the global scan (attention of the last layer but one,
over the rest); every dropped token is merged into its most similar kept one, plain mean. In the
middle of the language model the last token's attention, as in PyramidDrop, leaves a third.

Follows the official code: encoder layer 5 and the last but one, windows of 6 x 6 tokens, 96 tokens
and then 32 at layer 16 of 32, positions renumbered for LLaVA (kept for Qwen). It asks for a 24 x 24
grid and loses tokens where the local half is no multiple of 16; ours takes any grid and keeps the
budget. Where the encoder has no class token, attention is what a token receives on average.
"""

import torch
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
from unicompress.reducers.pyramid_drop import PyramidDrop
from unicompress.reducers.selection import (
    chosen,
    kept,
    merged,
    nearest,
    top,
    top_by_window,
    windows,
)
from unicompress.tokens import Grid


@reducers.register("vscan")
class VScan(Reducer):
    """`keep` before the language model, then `late` of that from the middle of its depth on."""

    needs = ("attention", "shallow_attention")
    content_only = False

    def __init__(
        self,
        *,
        keep: Keep = 0.5,
        late: float = 1 / 3,
        window: int = 6,
        merge: bool = True,
        positions: str = "reindex",
    ):
        if not 0 < late <= 1:
            raise InputError(f"late must lie in (0, 1], got {late}")
        if window < 1:
            raise InputError(f"window must be at least 1, got {window}")
        self.keep = keep
        self.late = late
        self.window = window
        self.merge = merge
        self.positions = check_positions(positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        first = Step(0, self, self.keep)
        if self.late == 1 or depth < 2:
            return (first,)
        second = PyramidDrop(keep=self.keep, positions=self.positions)
        return first, Step(depth // 2, second, scaled(self.keep, self.late))

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        assert signals.attention is not None
        assert signals.shallow_attention is not None
        near = count // 2
        local = top_by_window(signals.shallow_attention, windows(grid, self.window), near)
        taken = chosen(local, grid.length)
        rest = top(signals.attention.masked_fill(taken, -torch.inf), count - near)
        indices = torch.cat([local, rest], dim=1).sort(dim=1).values
        if not self.merge:
            return kept(tokens, indices, self.positions)
        assignment = nearest(tokens.float(), indices)
        return merged(tokens, indices, assignment, self.positions)
