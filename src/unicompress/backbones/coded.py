"""What released unified models share: codes and delimiters stand beside the vocabulary."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.backbones.base import Choose, CodeSpace, Stream
from unicompress.backbones.causal_lm import STREAMS, CausalLM
from unicompress.backbones.projectors import Projector
from unicompress.errors import InputError


class RowTable(nn.Module):
    """The codes' own embedding as a table: a token is the sum of one fixed row per code.

    That is possible for residual codes, and for codes of chunks that stand side by side.
    """

    rows: Float[Tensor, "c v e"]

    def __init__(self, *, codes: int, size: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.randn(codes, size, width) * width**-0.5)

    def forward(self, codes: Int[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """The embedding of tokens."""
        return self.each(codes).sum(dim=-2)

    def each(self, codes: Int[Tensor, "*b k"]) -> Float[Tensor, "*b k e"]:
        """The row of every code; later codes of the token may be missing."""
        places = torch.arange(codes.shape[-1], device=codes.device)
        return self.rows[places, codes]

    @torch.no_grad()
    def take(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Find the rows of an embedding of codes that is such a sum.

        They are known up to what moves from one code of a token to another: what codes that are all
        zero give is split evenly. InputError where it is no sum.
        """
        count, size, width = self.rows.shape
        every = torch.zeros(count, size, count, dtype=torch.long, device=self.rows.device)
        for place in range(count):
            every[place, :, place] = torch.arange(size)
        found = torch.stack([embed(codes[None])[0] for codes in every])  # others are code 0
        if found.shape != self.rows.shape:
            raise InputError(
                f"the tokenizer's rows are {found.shape[-1]} wide, the backbone was built for "
                f"{width}: set its code_dim"
            )
        zero = found[0, 0]
        rows = found - zero + zero / count
        probe = every[0].new_tensor([[[size - 1] * count]])
        self.rows.copy_(rows)
        if not torch.allclose(self(probe), embed(probe), rtol=1e-3, atol=1e-4):
            raise InputError(
                "this backbone needs a tokenizer whose embedding is a sum over the codes of a token"
            )


class SingleHead(nn.Module, ABC):
    """A head of tokens with one code, before which there is none: a subclass writes `scores`."""

    @abstractmethod
    def scores(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """Scores of the one code."""

    def forward(
        self, hidden: Float[Tensor, "n h"], codes: Int[Tensor, "n 1"]
    ) -> Float[Tensor, "n 1 v"]:
        """Scores; the true codes tell nothing."""
        return self.scores(hidden)[:, None]

    def sample(self, hidden: Float[Tensor, "n h"], choose: Choose) -> Int[Tensor, "n 1"]:
        """The code of one token."""
        return choose(self.scores(hidden), 0)[:, None]


class CodedLM(CausalLM):
    """A causal LM whose vocabulary stays as released.

    BOS, SEP and EOS are learned input embeddings. A subclass fills `tables` (codes [b n c] to
    embeddings) and `heads` (`forward` and `sample` as in `DepthHead`), one entry per codebook.
    """

    codes_in_vocabulary: ClassVar[bool] = False

    def __init__(self, lm: PreTrainedModel, space: CodeSpace, projector: Projector):
        super().__init__(lm, space, projector)
        self.special = nn.Parameter(torch.randn(3, self.hidden_size) * 0.02)

    def codebooks(self) -> list[tuple[Stream, int]]:
        """The streams that have a codebook of their own, with its size."""
        streams: Any = STREAMS if self.space.global_size else STREAMS[1:]
        return [(stream, self.space.size(stream)) for stream in streams]

    def take_codes(self, embed: Callable[[Tensor, Stream], Tensor]) -> None:
        """Copy the rows of the codebooks that codes are read with, where the model reads rows."""
        for stream, _ in self.codebooks():
            table = self._table(stream)
            if isinstance(table, RowTable):
                table.take(lambda codes, stream=stream: embed(codes, stream))  # type: ignore[misc]

    def delimiters(self) -> Float[Tensor, "k h"]:
        """Learned embeddings of BOS, SEP and EOS, and of the end of a row if there is one."""
        return self.special
