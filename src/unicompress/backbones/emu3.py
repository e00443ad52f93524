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
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.backbones.base import CodeSpace, Prompts, Stream, backbones
from unicompress.backbones.causal_lm import CodeTable
from unicompress.backbones.coded import CodedLM, SingleHead
from unicompress.backbones.projectors import Projector
from unicompress.errors import InputError
from unicompress.tokens import Grid


class LinearHead(SingleHead):
    """One linear map, as the released head is."""

    def __init__(self, *, size: int, hidden: int):
        super().__init__()
        self.leave = nn.Linear(hidden, size, bias=False)

    def scores(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """Without a bias."""
        return self.leave(hidden)


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

    def _entries(self, stream: Stream) -> tuple[int, int] | None:
        """Codes are words of the released vocabulary, unless they have a table of their own."""
        if self._codebook(stream) in self.tables:
            return None
        return self.first_code, self.first_code + self.codes
