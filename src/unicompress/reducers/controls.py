"""Controls at the same budget: average pooling, random, uniform, and best-of-window choices."""

import torch
from jaxtyping import Float
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
from unicompress.reducers.selection import (
    cells,
    centers,
    kept,
    merged,
    top_by_window,
    windows,
)
from unicompress.tokens import Grid


@reducers.register("average_pool")
class AveragePool(Reducer):
    """Mean over nearly square cells, exactly as many as the budget.

    The pooling of UniCompress (eq. 3) and of M3 (arXiv 2405.17430), whose scales of a 24 x 24 grid
    (576, 144, 36, 9, 1) are keep = 1, 1/4, 1/16, 1/64 and 1/576. Where the grid divides, cells
    are s x s; elsewhere they are bands of rows cut into columns, sizes differing by one at most,
    so that any budget is met. tokens [b, n, d] -> [b, k, d].
    """

    content_only = False
    merges = True

    def __init__(self, *, keep: Keep = 0.25, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        cell = cells(grid, count)
        middle = centers(grid, cell, count)
        indices, order = middle.sort()
        # Cells are numbered along their bands; kept tokens are numbered by their representative.
        number = torch.empty_like(order)
        number[order] = torch.arange(count)
        b = len(tokens)
        place = number[cell].to(tokens.device).expand(b, -1)
        return merged(tokens, indices.to(tokens.device).expand(b, -1), place, self.positions)


@reducers.register("random")
class Random(Reducer):
    """A random choice, the same for every image of a seed; drawn on the CPU."""

    content_only = False

    def __init__(self, *, keep: Keep = 0.5, seed: int = 0, positions: str = "reindex"):
        self.keep = keep
        self.seed = seed
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        # One draw for all images of a batch, or a picture would depend on its neighbors.
        draw = torch.randperm(grid.length, generator=torch.Generator().manual_seed(self.seed))
        indices = draw[:count].sort().values.to(tokens.device)
        return kept(tokens, indices.expand(len(tokens), -1), self.positions)


@reducers.register("uniform")
class Uniform(Reducer):
    """Tokens at even distances in two dimensions: the middles of the cells of average pooling."""

    content_only = False

    def __init__(self, *, keep: Keep = 0.5, positions: str = "reindex"):
        self.keep = keep
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        indices = centers(grid, cells(grid, count), count).sort().values.to(tokens.device)
        return kept(tokens, indices.expand(len(tokens), -1), self.positions)


@reducers.register("window_top_k")
class WindowTopK(Reducer):
    """The largest tokens (norm) of every window, windows keeping equally many.

    Shows what even coverage alone brings; `window_fastv` is the same with attention as the score.
    """

    content_only = False

    def __init__(self, *, keep: Keep = 0.5, window: int = 4, positions: str = "reindex"):
        if window < 1:
            raise InputError(f"window must be at least 1, got {window}")
        self.keep = keep
        self.window = window
        self.positions = check_positions(positions)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        scores = tokens.float().norm(dim=-1)
        indices = top_by_window(scores, windows(grid, self.window), count)
        return kept(tokens, indices, self.positions)
