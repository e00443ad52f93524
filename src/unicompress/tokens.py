"""The typed values that flow between the stages (docs/notation.md has the symbols)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.errors import InputError

MANIFOLDS = ("none", "l2", "chunk_l2")


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a token field in raster order."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise InputError(
                "a token grid needs at least one row and one column, "
                f"got {self.rows}x{self.columns}"
            )

    def __iter__(self) -> Iterator[int]:
        return iter((self.rows, self.columns))

    @property
    def length(self) -> int:
        """Number of tokens, T = H * W."""
        return self.rows * self.columns

    def pooled(self, stride: int) -> "Grid":
        """Grid of the stride x stride cells; odd edges keep a smaller cell (ceil)."""
        if stride < 1:
            raise InputError(f"stride must be at least 1, got {stride}")
        return Grid(-(-self.rows // stride), -(-self.columns // stride))


@dataclass(frozen=True)
class TokenSpec:
    """What a host promises about its tokens.

    `manifold` is the domain its pixel decoder was trained on: `none`, unit vectors (`l2`), or one
    unit vector per code (`chunk_l2`).
    """

    grid: Grid
    dim: int  # d, channels of X
    code_dim: int  # channels of a looked-up token, the space that `decode` eats
    codes_per_token: int  # D
    codebook_size: int  # K
    image_size: int  # pixels per side
    manifold: str = "none"

    def __post_init__(self) -> None:
        if self.manifold not in MANIFOLDS:
            known = ", ".join(MANIFOLDS)
            raise InputError(f"manifold must be one of {known}, got {self.manifold!r}")


@dataclass(frozen=True)
class CompressedTokens:
    """G and X^ of the paper: what the language model sees in place of X."""

    global_tokens: Float[Tensor, "b g d"]
    local_tokens: Float[Tensor, "b m d"]
    grid: Grid  # of the local tokens
    dense_grid: Grid  # of the tokens they stand for
    stride: int

    @property
    def length(self) -> int:
        """Tokens per image without the three delimiters: N_g + T / s^2."""
        return self.global_tokens.shape[1] + self.local_tokens.shape[1]

    @property
    def sequence(self) -> Float[Tensor, "b n d"]:
        """Globals first, then locals in raster order (eq. 5 without its delimiters)."""
        return torch.cat([self.global_tokens, self.local_tokens], dim=1)


@dataclass(frozen=True)
class EncodedImages:
    """What a tokenizer stack made of images: what understanding reads, what generation writes."""

    features: Float[Tensor, "b n d"]
    codes: Int[Tensor, "b n c"]

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device) -> "EncodedImages":
        """The same on a device."""
        return EncodedImages(self.features.to(device), self.codes.to(device))
