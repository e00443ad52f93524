"""The only transformer code of our own: attention, blocks, and the geometry of a token grid."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.tokens import Grid

KeysValues = tuple[Tensor, Tensor]  # each [batch, heads, length, head width]


class Attention(nn.Module):
    """Multi-head attention: `forward` is self-attention, `attend` reads another sequence.

    One fused projection, because a decoding step is bound by the number of calls.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise InputError(
                f"width {width} is not a multiple of heads {heads}: change one of them"
            )
        self.width = width
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)  # queries, keys, values
        self.out = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "b n w"], *, causal: bool = False
    ) -> Float[Tensor, "b n w"]:
        """Self-attention; `StepDecoder` gives the causal one a position at a time."""
        queries, keys, values = (
            self._split(part) for part in self.project(tokens).chunk(3, dim=-1)
        )
        return self._mix(queries, keys, values, causal)

    def keys_values(self, memory: Float[Tensor, "b m w"]) -> KeysValues:
        """Keys and values of the sequence that `attend` reads; computed once per image."""
        weight, bias = self.project.weight[self.width :], self.project.bias[self.width :]
        keys, values = F.linear(memory, weight, bias).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def attend(
        self, tokens: Float[Tensor, "b n w"], keys_values: KeysValues
    ) -> Float[Tensor, "b n w"]:
        """Cross-attention to what `keys_values` prepared."""
        weight, bias = self.project.weight[: self.width], self.project.bias[: self.width]
        return self._mix(self._split(F.linear(tokens, weight, bias)), *keys_values, causal=False)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, expansion: int = 4):
        super().__init__()
        self.inner = nn.Linear(width, expansion * width)
        self.out = nn.Linear(expansion * width, width)

    def forward(self, tokens: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """Applied to every token alone."""
        return self.out(F.gelu(self.inner(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention if `cross`, MLP."""

    def __init__(self, width: int, heads: int, *, cross: bool = False, expansion: int = 4):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        if cross:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, expansion)

    def forward(
        self,
        tokens: Float[Tensor, "b n w"],
        *,
        memory: KeysValues | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b n w"]:
        """`memory` is `self.cross_attention.keys_values(...)`; needed exactly if `cross`."""
        tokens = tokens + self.self_attention(self.self_norm(tokens), causal=causal)
        if memory is not None:
            tokens = tokens + self.cross_attention.attend(self.cross_norm(tokens), memory)
        return tokens + self.mlp(self.mlp_norm(tokens))


class CrossStack(nn.Module):
    """Blocks that all read one memory, whose keys and values are computed once."""

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        blocks = [Block(width, heads, cross=True) for _ in range(depth)]
        for block in blocks:  # the usual scaling of what is added to the residual stream
            for out in (block.self_attention.out, block.cross_attention.out, block.mlp.out):
                nn.init.normal_(out.weight, std=(3 * depth * out.in_features) ** -0.5)
                nn.init.zeros_(out.bias)
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, tokens: Float[Tensor, "b n w"], memory: list[KeysValues], *, causal: bool
    ) -> Float[Tensor, "b n w"]:
        """Through all blocks; `decoder` gives the same for one position at a time."""
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, memory=memory[layer], causal=causal)
        return tokens

    def keys_values(self, memory: Float[Tensor, "b m w"]) -> list[KeysValues]:
        """What each layer reads of the memory."""
        return [cast(Block, block).cross_attention.keys_values(memory) for block in self.blocks]

    def decoder(
        self,
        memory: list[KeysValues],
        like: Float[Tensor, "b n w"],
        length: int,
        *,
        fixed: bool = False,
    ) -> "StepDecoder":
        """The same blocks for one position after the other, up to `length` of them."""
        blocks = [cast(Block, block) for block in self.blocks]
        return StepDecoder(blocks, memory, like, length, fixed=fixed)


class StepDecoder:
    """Causal blocks fed one position per call: what `Block.forward` gives, at the least cost.

    A step is bound by the number of calls, not by arithmetic. So weights are looked up once, keys
    and values of a position enter the cache in one copy, and positions are rows of a matrix.

    `fixed` keeps every shape the same at every step (attention reads the whole cache under a mask)
    and takes the place as a tensor, as CUDA graphs and compilers need; it is slower without them.
    """

    def __init__(
        self,
        blocks: Sequence["Block"],
        memory: Sequence[KeysValues] | None,
        like: Float[Tensor, "b n w"],
        length: int,
        *,
        fixed: bool = False,
    ):
        first = blocks[0].self_attention
        self.batch, self.width = like.shape[0], first.width
        self.heads, self.length = first.heads, length
        shape = (2, self.batch, self.heads, length, self.width // self.heads)
        # Zeros where all places are read: a masked NaN would still spoil the sum of values.
        make = like.new_zeros if fixed else like.new_empty
        self.layers = [
            _LayerWeights(block, make(shape), memory[number] if memory is not None else None)
            for number, block in enumerate(blocks)
        ]
        self.places = torch.arange(length, device=like.device) if fixed else None

    def step(
        self, tokens: Float[Tensor, "b 1 w"], place: int | Int[Tensor, "1"]
    ) -> Float[Tensor, "b 1 w"]:
        """The newest position, `place` = 0, 1, ...: an int, or if `fixed` a tensor of one place.

        Raises InputError for an int beyond the length.
        """
        if isinstance(place, int) and place >= self.length:
            raise InputError(f"the cache holds {self.length} positions, {place + 1} are needed")
        rows = tokens[:, 0]
        for layer in self.layers:
            normed = F.layer_norm(rows, *layer.self_norm)
            projected = F.linear(normed, *layer.project)
            rows = rows + F.linear(self._read_past(projected, layer.cache, place), *layer.out)
            if layer.memory is not None:
                queries = F.linear(F.layer_norm(rows, *layer.cross_norm), *layer.query)
                mixed = F.scaled_dot_product_attention(self._heads(queries), *layer.memory)
                rows = rows + F.linear(mixed.reshape(self.batch, -1), *layer.cross_out)
            inner = F.gelu(F.linear(F.layer_norm(rows, *layer.mlp_norm), *layer.inner))
            rows = rows + F.linear(inner, *layer.mlp_out)
        return rows[:, None]

    def _heads(self, rows: Float[Tensor, "b w"]) -> Float[Tensor, "b heads 1 d"]:
        return rows.view(self.batch, self.heads, 1, -1)

    def _read_past(
        self,
        projected: Float[Tensor, "b p"],
        cache: Float[Tensor, "2 b heads length d"],
        place: int | Tensor,
    ) -> Float[Tensor, "b w"]:
        """Store the newest keys and values, and let its queries read all so far."""
        queries = self._heads(projected[:, : self.width])
        newest = projected[:, self.width :].view(self.batch, 2, self.heads, 1, -1).transpose(0, 1)
        mask = None
        if isinstance(place, int):
            cache[:, :, :, place : place + 1] = newest
            cache = cache[:, :, :, : place + 1]
        else:
            assert self.places is not None  # a tensor is for fixed shapes only
            cache.index_copy_(3, place, newest.to(cache.dtype))
            mask = (self.places <= place)[None, None, None]
        mixed = F.scaled_dot_product_attention(queries, cache[0], cache[1], attn_mask=mask)
        return mixed.reshape(self.batch, -1)


class _LayerWeights:
    """What `StepDecoder` needs of one block, as the arguments of plain functions."""

    def __init__(self, block: "Block", cache: Tensor, memory: KeysValues | None):
        own, mlp = block.self_attention, block.mlp
        self.cache, self.memory = cache, memory
        self.self_norm = _norm(block.self_norm)
        self.project = (own.project.weight, own.project.bias)
        self.out = (own.out.weight, own.out.bias)
        if memory is not None:
            cross = block.cross_attention
            self.cross_norm = _norm(block.cross_norm)
            self.query = (
                cross.project.weight[: cross.width],
                cross.project.bias[: cross.width],
            )
            self.cross_out = (cross.out.weight, cross.out.bias)
        self.mlp_norm = _norm(block.mlp_norm)
        self.inner = (mlp.inner.weight, mlp.inner.bias)
        self.mlp_out = (mlp.out.weight, mlp.out.bias)


def _norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


class GridMixer(nn.Module):
    """Residual 3x3 convolutions on a token grid; starts as the identity.

    Probes read shapes off pooled tokens from far fewer samples once neighbors were mixed first.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        outer = [nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)]
        for convolution in outer:
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(cast(Tensor, convolution.bias))
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.outer = nn.ModuleList(outer)

    def forward(self, tokens: Float[Tensor, "b n w"], grid: Grid) -> Float[Tensor, "b n w"]:
        """Mix each token with its neighbors on the grid."""
        field = to_image(tokens, grid)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            field = field + outer(F.gelu(inner(F.gelu(field))))
        return field.flatten(2).transpose(1, 2)


def check_field(field: Tensor, grid: Grid) -> None:
    """Raise InputError unless the field [b t d] has one token per place of the grid."""
    if field.ndim != 3 or field.shape[1] != grid.length:
        raise InputError(
            f"a {grid.rows}x{grid.columns} grid needs tokens of shape "
            f"[batch, {grid.length}, width], got {list(field.shape)}: "
            "pass the grid that belongs to these tokens"
        )


def to_image(field: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b d rows columns"]:
    """Raster sequence to the image layout that convolutions and pools want."""
    check_field(field, grid)
    return field.transpose(1, 2).unflatten(-1, (grid.rows, grid.columns))


def to_cells(field: Float[Tensor, "b t d"], grid: Grid, stride: int) -> Float[Tensor, "b m k d"]:
    """Cut into stride x stride cells, k = stride^2 children each, zeros beyond an odd edge."""
    check_field(field, grid)
    if stride == 1:
        return field.unsqueeze(2)
    cells = grid.pooled(stride)
    image = field.unflatten(1, (grid.rows, grid.columns))
    edge = (0, 0, 0, cells.columns * stride - grid.columns, 0, cells.rows * stride - grid.rows)
    return rearrange(F.pad(image, edge), "b (r i) (c j) d -> b (r c) (i j) d", i=stride, j=stride)


def from_cells(
    cells: Shaped[Tensor, "b m k *d"], grid: Grid, stride: int
) -> Shaped[Tensor, "b t *d"]:
    """Inverse of `to_cells`; also for children with more than one trailing axis."""
    if stride == 1:
        return cells.squeeze(2)
    pooled = grid.pooled(stride)
    image = rearrange(
        cells, "b (r c) (i j) ... -> b (r i) (c j) ...", r=pooled.rows, i=stride, j=stride
    )
    return image[:, : grid.rows, : grid.columns].flatten(1, 2)


def cell_mask(grid: Grid, stride: int) -> Bool[Tensor, "m k"]:
    """Which children of each cell lie on the grid (all of them unless an edge is odd)."""
    return to_cells(torch.ones(1, grid.length, 1), grid, stride)[0, :, :, 0] > 0


def parent_index(grid: Grid, stride: int) -> Int[Tensor, " t"]:
    """For every place of the dense grid in raster order, the cell it lies in."""
    rows = torch.arange(grid.rows) // stride
    columns = torch.arange(grid.columns) // stride
    return (rows[:, None] * grid.pooled(stride).columns + columns).flatten()


def grid_coordinates(grid: Grid, stride: int = 1) -> Float[Tensor, "m 2"]:
    """Row and column of the cell centers, in units of the dense grid.

    One unit for all strides lets one module serve several of them.
    """
    cells = grid.pooled(stride)
    rows = (torch.arange(cells.rows) + 0.5) * stride - 0.5
    columns = (torch.arange(cells.columns) + 0.5) * stride - 0.5
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def position_features(
    coordinates: Float[Tensor, "n 2"], width: int, longest: float = 100.0
) -> Float[Tensor, "n w"]:
    """Sine and cosine of both coordinates: half of the width for rows, half for columns.

    Wavelengths go geometrically from 2 pi to 2 pi * `longest` cells; odd widths end in zeros.
    """
    count = width // 4
    frequencies = longest ** -(torch.arange(count) / max(count, 1))
    angles = coordinates.unsqueeze(-1) * frequencies.to(coordinates)  # [n, 2, count]
    features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(features, (0, width - 4 * count)) * math.sqrt(2)  # unit variance
