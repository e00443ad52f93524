"""A separate understanding encoder pooled to G and X^ (eq. 1-3), with an extractor of its own.

Nothing is decoded from this field, so stage one cannot train it: pooler and extractor learn with
the language model in stage two. At stride 1 without globals the field passes through unchanged.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unicompress.compressors import compressors
from unicompress.feature_taps import FeatureTap
from unicompress.global_tokens import GlobalTokens, global_tokens


class PooledTap(nn.Module):
    """A frozen tap, the pooler of its field, and the extractor of its global tokens."""

    def __init__(
        self,
        tap: FeatureTap,
        *,
        stride: int = 1,
        global_count: int = 0,
        compressor: str = "average",
        global_kind: str = "meta",
    ):
        super().__init__()
        self.tap = tap.requires_grad_(False).eval()
        self.stride = stride
        self.global_count = global_count
        dim = tap.spec.dim
        self.compressor = compressors.build(compressor, dim=dim, stride=stride)
        self.global_tokens: GlobalTokens | None = None
        if global_count:
            self.global_tokens = global_tokens.build(global_kind, dim=dim, count=global_count)

    def forward(self, field: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """{G, X^}, globals first."""
        grid = self.tap.spec.grid
        locals_ = self.compressor(field, grid)
        if self.global_tokens is None:
            return locals_
        return torch.cat([self.global_tokens(field, grid), locals_], dim=1)

    @torch.no_grad()
    def calibrate(self, pixels: Float[Tensor, "b 3 h w"]) -> None:
        """Set the globals' starting point from images (64 or more), once, before training."""
        if self.global_tokens is not None:
            self.global_tokens.calibrate(self.tap.encode(pixels), self.tap.spec.grid)

    def train(self, mode: bool = True) -> "PooledTap":
        """Switch pooler and extractor; the tap stays in evaluation mode."""
        super().train(mode)
        self.tap.eval()
        return self
