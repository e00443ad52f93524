"""Local tokens: the field pooled over cells (eq. 3), and the variants of the paper's Table 4."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.layers import GridMixer, cell_mask, check_field, to_cells, to_image
from unicompress.registry import Family, Member
from unicompress.tokens import Grid


class Compressor(nn.Module, Member, ABC):
    """Turns X into one token per cell; the identity at stride 1, cells at odd edges are smaller.

    A subclass writes `pool`, which only sees strides above 1. Learned ones start as the mean.
    """

    def __init__(self, *, dim: int, stride: int):
        super().__init__()
        if stride < 1:
            raise InputError(f"stride must be at least 1, got {stride}")
        self.dim = dim
        self.stride = stride

    def forward(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """X to X^, m = grid.pooled(stride).length; InputError if tokens and grid disagree."""
        check_field(dense, grid)
        if dense.shape[-1] != self.dim:
            raise InputError(
                f"this compressor was built for tokens of width {self.dim}, got {dense.shape[-1]}"
            )
        return dense if self.stride == 1 else self.pool(dense, grid)

    @abstractmethod
    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """One token per cell, cells in raster order."""


compressors: Family[Compressor] = Family("compressor", home="unicompress.compressors")


def mean_of_cells(dense: Float[Tensor, "b t d"], grid: Grid, stride: int) -> Float[Tensor, "b m d"]:
    """Average over each cell; edge cells average over what is there."""
    pooled = F.avg_pool2d(to_image(dense, grid), stride, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)


@compressors.register("average")
class Average(Compressor):
    """Average pooling (eq. 3), the paper's default."""

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """Mean per cell and channel."""
        return mean_of_cells(dense, grid, self.stride)


@compressors.register("max")
class Max(Compressor):
    """Max pooling."""

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """Maximum per cell and channel."""
        pooled = F.max_pool2d(to_image(dense, grid), self.stride, ceil_mode=True)
        return pooled.flatten(2).transpose(1, 2)


@compressors.register("strided_conv")
class StridedConv(Compressor):
    """A convolution whose kernel is one cell; starts as the mean."""

    def __init__(self, *, dim: int, stride: int):
        super().__init__(dim=dim, stride=stride)
        children = stride**2
        kernel = torch.eye(dim).repeat(1, children) / children
        self.kernel = nn.Parameter(kernel)  # [d, children * d]
        self.bias = nn.Parameter(torch.zeros(dim))

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """Edge cells are scaled by the share of the cell that is there (partial convolution)."""
        cells = to_cells(dense, grid, self.stride).flatten(2)
        present = cell_mask(grid, self.stride).to(dense).mean(-1, keepdim=True)  # [m, 1]
        return F.linear(cells, self.kernel) / present + self.bias


@compressors.register("top_k")
class TopK(Compressor):
    """Keeps one token per cell, the one with the largest norm; same budget and order as pooling.

    The paper does not say how its top-k selects. A choice per cell keeps the grid, which the
    decompressor needs.
    """

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """The kept tokens as they are; the first wins a tie."""
        cells = to_cells(dense, grid, self.stride)  # [b, m, children, d]
        missing = ~cell_mask(grid, self.stride).to(dense.device)
        score = cells.norm(dim=-1).masked_fill(missing, -1.0)
        best = score.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, dense.shape[-1])
        return cells.gather(2, best).squeeze(2)


@compressors.register("gated")
class Gated(Compressor):
    """Weighted mean with learned weights (softmax within the cell); starts as the mean."""

    def __init__(self, *, dim: int, stride: int):
        super().__init__(dim=dim, stride=stride)
        width = 4 * max(dim, 8)
        self.inner = nn.Linear(dim, width)
        self.gate = nn.Linear(width, 1, bias=False)  # softmax would cancel a bias
        nn.init.zeros_(self.gate.weight)

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """Weights depend on the token alone and sum to one over the children that are there."""
        missing = ~cell_mask(grid, self.stride).to(dense.device)
        gates = to_cells(self.gate(F.gelu(self.inner(dense))), grid, self.stride)
        weights = gates.masked_fill(missing[..., None], -torch.inf).softmax(dim=2)
        return (weights * to_cells(dense, grid, self.stride)).sum(dim=2)


@compressors.register("mixer")
class Mixer(Compressor):
    """Average plus a learned residual that sees the 3x3 cells around; not in the paper.

    Starts as the mean. Averages lose shape; the residual can write it back into the token.
    """

    def __init__(self, *, dim: int, stride: int, width: int = 128):
        super().__init__(dim=dim, stride=stride)
        self.width = width
        self.inner = nn.Linear(stride**2 * dim, width)
        self.mixer = GridMixer(width, 1)
        self.outer = nn.Linear(width, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def pool(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b m d"]:
        """Mean of the cell + residual of all its children and of its neighbor cells."""
        cells = self.inner(to_cells(dense, grid, self.stride).flatten(2))
        mixed = self.mixer(cells, grid.pooled(self.stride))
        return mean_of_cells(dense, grid, self.stride) + self.outer(F.gelu(mixed))
