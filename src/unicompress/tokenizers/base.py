"""The contract of a host: the only thing that an image model must provide to be compressed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.registry import Family, Member
from unicompress.tokens import TokenSpec


@dataclass(frozen=True)
class HostFacts:
    """What `unicompress hosts` says of a host beyond what it can do; empty: nothing is known."""

    licence: str = ""  # of the released weights
    verified: str = ""  # against what, and how closely
    limits: str = ""  # what does not work, in a few words


class ImageTokenizer(nn.Module, Member, ABC):
    """Maps pixels to dense tokens, quantises tokens, and decodes dense tokens to pixels.

    A subclass registers its name, sets `spec`, and writes the five methods below. `encode` gives
    what the plug-in pools, so it is continuous and in raster order; `quantize` is the host's own
    quantiser and takes any number of tokens of the same width.
    """

    name: ClassVar[str]
    facts: ClassVar[HostFacts] = HostFacts()
    spec: TokenSpec

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        """Pixels in [-1, 1] to X, before quantisation, raster order."""

    @abstractmethod
    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        """Tokens to (codes, looked-up embeddings of width `spec.code_dim`); any n (eq. 4)."""

    @abstractmethod
    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        """Codes to embeddings of width `spec.code_dim` (eq. 6)."""

    def dense_target(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """X in the space that `decode` eats, not quantised; the identity unless overridden."""
        return tokens

    @abstractmethod
    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        """The host's own pixel decoder on tokens that already lie on its manifold."""

    def decode(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        """Dense tokens to pixels in [-1, 1]: the manifold, then the decoder; differentiable."""
        return self.pixels(self.on_manifold(dense))

    def on_manifold(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        """Project onto the domain that the pixel decoder was trained on (`spec.manifold`)."""
        if self.spec.manifold == "l2":
            return F.normalize(dense, dim=-1)
        if self.spec.manifold == "chunk_l2":
            chunks = dense.unflatten(-1, (self.spec.codes_per_token, -1))  # [b, t, D, e / D]
            return F.normalize(chunks, dim=-1).flatten(-2)
        return dense

    @classmethod
    @abstractmethod
    def tiny(cls) -> "ImageTokenizer":
        """The same architecture with small random weights, for tests (under 1 MB)."""

    def freeze(self) -> "ImageTokenizer":
        """Evaluation mode, no gradients to the weights; they still flow through `decode`."""
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


tokenizers: Family[ImageTokenizer] = Family("tokenizer", home="unicompress.tokenizers")
