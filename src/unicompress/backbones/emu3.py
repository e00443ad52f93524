"""Emu3: a Llama whose vocabulary holds the codes, read and written as words in rows of a picture.

Emu3 (arXiv 2409.18869) has no features and no projector: a picture that is read is the sequence
of its codes, as it is when drawn. The released form, which the dense model has,

    <|image start|> H*W <|image token|> row EOL row EOL ... row EOL EOF <|image end|>

keeps its words for the compressed one, whose grid is the pooled one:

    <|image start|> h*w <|image token|> G SEP row EOL ... row EOL EOF <|image end|>

so that X^ looks like a smaller picture, at h end-of-line tokens beside its h*w codes, and the
globals like one more row before it: SEP starts as a copy of EOL. <|image token|> is our BOS and EOF
our EOS. In drawing, lines end where they must and nothing but codes is chosen, which is what the
official `prefix_allowed_tokens_fn` comes to; guidance contrasts with an empty prompt, as the
official training does (the negative prompt of its example is a user's choice).
Source: emu3/mllm/{processing,utils}_emu3.py and emu3/train/datasets.py of baaivision/Emu3.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.backbones.base import Choose, CodeSpace, Prompts, Stream, backbones
from unicompress.backbones.causal_lm import CodeTable
from unicompress.backbones.coded import CodedLM
from unicompress.backbones.projectors import Projector
from unicompress.errors import InputError
from unicompress.tokens import Grid


class LinearHead(nn.Module):
    """Scores of the one code of a token by one linear map, as the released head's."""

    def __init__(self, *, size: int, hidden: int):
        super().__init__()
        self.leave = nn.Linear(hidden, size, bias=False)

    def forward(
        self, hidden: Float[Tensor, "n h"], codes: Int[Tensor, "n 1"]
    ) -> Float[Tensor, "n 1 v"]:
        """Scores; the one code has none before it."""
        return self.leave(hidden)[:, None]

    def sample(self, hidden: Float[Tensor, "n h"], choose: Choose) -> Int[Tensor, "n 1"]:
        """The code of one token."""
        return choose(self.leave(hidden), 0)[:, None]


@backbones.register("emu3")
class Emu3LM(CodedLM):
    """`first_code` is the vocabulary entry of code 0; the other `codes` - 1 follow in order.

    Local codes are these entries, also where the plug-in has a codebook of its own of that size.
    A codebook of another size, and any of the globals alone, gets a new table and a new head.
    """

    reads_codes: ClassVar[bool] = True
    row_ends: ClassVar[bool] = True
    prompts: ClassVar[Prompts] = Prompts(
        opening="You are a helpful assistant. USER: ",
        question=("<|image end|>{}. ASSISTANT:",),
        answer=" {}",
        caption="{}",
        unconditional="",
        image="<|image start|>{rows}*{columns}",
    )

    def __init__(
        self,
        lm: PreTrainedModel,
        space: CodeSpace,
        projector: Projector,
        *,
        first_code: int = 151854,
        codes: int = 32768,
    ):
        super().__init__(lm, space, projector)
        del self.projector  # there are no features to project
        if space.codes_per_token != 1 or first_code + codes > space.text_size:
            raise InputError(
                f"emu3 needs one code per token ({space.codes_per_token} here) and codes among its "
                f"{space.text_size} vocabulary entries ({first_code} to {first_code + codes - 1})"
            )
        self.first_code = first_code
        self.codes = codes
        self.special = nn.Parameter(torch.randn(4, self.hidden_size) * 0.02)
        for stream, size in self.codebooks():
            if stream == "global" or size != codes:
                self.tables[stream] = CodeTable(codes=1, size=size, width=self.hidden_size)
                self.heads[stream] = LinearHead(size=size, hidden=self.hidden_size)

    def take_codes(self, embed: Callable[[Tensor, Stream], Tensor]) -> None:
        """Nothing: codes are read by entries of the language model, not by the tokenizer's rows."""

    def embed_features(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """InputError: this model reads codes."""
        raise InputError("emu3 reads codes, not features: use embed_codes")

    def embed_codes(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n h"]:
        """Codes as the vocabulary entries they are, or entries of a table of their own."""
        if self._codebook(stream) in self.tables:
            return self._table(stream)(codes)
        return self.embed_text(codes[..., 0] + self.first_code)

    def code_logits(
        self, hidden: Float[Tensor, "*b h"], codes: Int[Tensor, "*b c"], stream: Stream
    ) -> Float[Tensor, "*b c v"]:
        """Scores of every code."""
        if self._codebook(stream) in self.tables:
            return super().code_logits(hidden, codes, stream)
        return self._single_logits(hidden, stream)[..., None, :]

    def sample_codes(
        self, hidden: Float[Tensor, "b h"], stream: Stream, choose: Choose
    ) -> Int[Tensor, "b c"]:
        """The code of one token."""
        if self._codebook(stream) in self.tables:
            return super().sample_codes(hidden, stream, choose)
        return choose(self._single_logits(hidden, stream), 0)[:, None]

    def _single_logits(
        self, hidden: Float[Tensor, "*b h"], stream: Stream
    ) -> Float[Tensor, "*b v"]:
        return self.vocabulary_logits(hidden, self.first_code, self.first_code + self.codes)
