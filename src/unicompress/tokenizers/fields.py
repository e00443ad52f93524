"""What hosts with square pictures share: sizes checked, raster sequences and fields exchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.tokens import Grid


def square_grid(image_size: int, patch: int) -> Grid:
    """The grid of a square picture; InputError where the patch does not divide its side."""
    if image_size < patch or image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        raise InputError(f"image_size must be a multiple of {patch}, got {image_size}: use {near}")
    return Grid(image_size // patch, image_size // patch)


def check_pixels(pixels: Float[Tensor, "b 3 h w"], size: int) -> None:
    """Raise InputError unless the pictures are size x size."""
    if tuple(pixels.shape[-2:]) != (size, size):
        raise InputError(
            f"this tokenizer reads {size}x{size} pictures, got "
            f"{pixels.shape[-2]}x{pixels.shape[-1]}: resize them first"
        )


def check_dense(dense: Float[Tensor, "b t e"], grid: Grid) -> None:
    """Raise InputError unless there is one token for each place of the grid."""
    if dense.shape[1] != grid.length:
        raise InputError(
            f"the decoder takes {grid.length} dense tokens ({grid.rows}x{grid.columns}), "
            f"got {dense.shape[1]}"
        )


def to_sequence(field: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b t d"]:
    """A field as a sequence, row by row."""
    return rearrange(field, "b d rows columns -> b (rows columns) d")


def to_field(dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b d rows columns"]:
    """A raster sequence as a field; raises InputError where it does not fill the grid."""
    check_dense(dense, grid)
    return rearrange(dense, "b (rows columns) d -> b d rows columns", rows=grid.rows)


def resized(
    field: Float[Tensor, "b d rows columns"], grid: Grid, mode: str
) -> Float[Tensor, "b d h w"]:
    """A field on another grid, by `area`, `bicubic` or `nearest`; itself where nothing changes."""
    if tuple(field.shape[-2:]) == tuple(grid):
        return field
    return F.interpolate(field, size=tuple(grid), mode=mode)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Within the block torch draws what follows from the seed; outside nothing changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
