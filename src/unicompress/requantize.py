"""Eq. 4 and 6 for both streams: the host's own quantiser, or a separate codebook per stream."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.codebook import Codebook, straight_through
from unicompress.codec_spec import CodecSpec
from unicompress.errors import InputError
from unicompress.tokenizers.base import ImageTokenizer


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in evaluation mode and its weights take no gradient.

    Everything is put back as it was; gradients still flow through the module to its inputs.
    """
    training = [part for part in module.modules() if part.training]
    learning = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for part in training:
            part.training = False
        for weight in learning:
            weight.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for weight in learning:
            weight.requires_grad_(True)


def exact(device: torch.device) -> torch.autocast:
    """Block without autocast: in bfloat16 the nearest row is often another one."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Requantized:
    """One stream after eq. 4 and 6."""

    tokens: Float[Tensor, "b n e"]  # in code space, before the lookup
    codes: Int[Tensor, "b n c"]
    rows: Float[Tensor, "b n e"]  # looked up; gradients go straight through to `tokens`
    commitment: Float[Tensor, ""]  # distance of the tokens to their rows


class Requantizer(nn.Module):
    """Codes and rows of the streams `global` and `local`.

    Works in code space, on the host's manifold, where rows and tokens can be compared. The host
    is held in a tuple so that torch does not register it as a submodule.
    """

    def __init__(self, tokenizer: ImageTokenizer, spec: CodecSpec):
        super().__init__()
        self._host = (tokenizer,)
        host = tokenizer.spec
        self.codebooks = nn.ModuleDict()
        for stream, kind, size in (
            ("global", spec.global_codebook, spec.global_codebook_size),
            ("local", spec.local_codebook, spec.local_codebook_size),
        ):
            used = not spec.identity and (stream == "local" or spec.global_count > 0)
            if kind == "separate" and used:
                self.codebooks[stream] = Codebook(
                    size=size or host.codebook_size,
                    dim=host.code_dim,
                    chunks=host.codes_per_token,
                    metric="l2" if host.manifold == "none" else "cosine",
                )

    def codebook_size(self, stream: str) -> int:
        """Entries that a code of the stream chooses from: K_g or K_x."""
        if stream in self.codebooks:
            return self._book(stream).size
        return self._host[0].spec.codebook_size

    def code_space(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Tokens as the host's quantiser and pixel decoder see them, continuous."""
        host = self._host[0]
        return host.on_manifold(host.dense_target(tokens))

    def forward(self, tokens: Float[Tensor, "b n d"], stream: str, *, plain: bool) -> Requantized:
        """Quantise and look up, straight-through; `plain` insists on the host's own quantiser."""
        with exact(tokens.device):
            return self._forward(tokens.to(self.code_dtype), stream, plain)

    @property
    def code_dtype(self) -> torch.dtype:
        """The precision of the host, in which codes are found."""
        return next(self._host[0].parameters()).dtype

    def _forward(self, tokens: Tensor, stream: str, plain: bool) -> Requantized:
        soft = self.code_space(tokens)
        nothing = soft.new_zeros(())
        if tokens.shape[1] == 0:
            shape = (*tokens.shape[:2], self._host[0].spec.codes_per_token)
            return Requantized(soft, tokens.new_zeros(shape, dtype=torch.long), soft, nothing)
        if stream in self.codebooks and not plain:
            own = self._book(stream)(soft)
            return Requantized(soft, own.codes, own.embeds, own.loss)
        codes, rows = self._host[0].quantize(tokens)
        if not soft.requires_grad:
            return Requantized(soft, codes, rows, nothing)
        commitment = F.mse_loss(soft, rows.detach())
        return Requantized(soft, codes, straight_through(soft, rows), commitment)

    def embed(
        self, codes: Int[Tensor, "b n c"], stream: str, *, plain: bool
    ) -> Float[Tensor, "b n e"]:
        """Codes of one stream to rows; raises InputError for codes out of range."""
        self.check(codes, stream, plain=plain)
        own = stream in self.codebooks and not plain
        return self._book(stream).embed(codes) if own else self._host[0].embed(codes)

    def check(self, codes: Int[Tensor, "b n c"], stream: str, *, plain: bool) -> None:
        """Raise InputError unless every code of the stream is an entry of its codebook."""
        size = self._host[0].spec.codebook_size if plain else self.codebook_size(stream)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise InputError(
                f"{stream} codes must lie from 0 to {size - 1}, got {int(codes.min())} to "
                f"{int(codes.max())}: they belong to another codebook"
            )

    def initialize(
        self, tokens: Float[Tensor, "b n d"], stream: str, generator: torch.Generator
    ) -> None:
        """Set the rows of a separate codebook from a batch; nothing to do for a shared one."""
        if stream in self.codebooks:
            self._book(stream).initialize(self.code_space(tokens), generator)

    def update(self, streams: dict[str, Requantized], generator: torch.Generator) -> int:
        """Move separate codebooks towards the tokens of a step; returns how many rows revived."""
        revived = 0
        for stream in self.codebooks:
            if streams[stream].codes.shape[1]:
                tokens = streams[stream].tokens.detach()
                revived += self._book(stream).update(tokens, streams[stream].codes, generator)
        return revived

    def _book(self, stream: str) -> Codebook:
        return cast(Codebook, self.codebooks[stream])
