"""Janus and Janus-Pro: a Llama with a table, an MLP and a head of its own for generated codes.

Read from transformers' `modeling_janus.py`; the names of the parts follow the paper (2410.13848):
codes enter through `generation_embeddings` (not the tokenizer's codebook) and an aligner, and leave
through a two-layer head. The delimiters are the released rows of <begin_of_image> and
<end_of_image>, SEP starts as their mean.
"""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from unicompress.backbones.base import CodeSpace, Prompts, backbones
from unicompress.backbones.coded import CodedLM, SingleHead
from unicompress.backbones.projectors import MLPProjector, Projector


class AlignedTable(nn.Module):
    """One narrow entry per code, widened by an MLP."""

    def __init__(self, *, size: int, code_dim: int, hidden: int, depth: int):
        super().__init__()
        self.entries = nn.Embedding(size, code_dim)
        self.aligner = MLPProjector(dim=code_dim, hidden=hidden, depth=depth)

    def forward(self, codes: Int[Tensor, "*b 1"]) -> Float[Tensor, "*b h"]:
        """Codes to embeddings of the language model's width."""
        return self.aligner.each(self.entries(codes[..., 0]))


class GenerationHead(SingleHead):
    """Two linear maps with GELU between them."""

    def __init__(self, *, size: int, hidden: int):
        super().__init__()
        self.enter = nn.Linear(hidden, hidden)
        self.leave = nn.Linear(hidden, size)

    def scores(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """Through both."""
        return self.leave(F.gelu(self.enter(hidden)))


@backbones.register("janus")
class Janus(CodedLM):
    """`code_dim` and `depth` are those of the released generation embeddings and aligner."""

    prompts: ClassVar[Prompts] = Prompts(
        opening="<|User|>: ",
        question=("\n{}\n\n<|Assistant|>:",),
        answer=" {}",
        caption="<|User|>: {}\n\n<|Assistant|>:",
        unconditional=None,
    )

    def __init__(
        self,
        lm: PreTrainedModel,
        space: CodeSpace,
        projector: Projector,
        *,
        code_dim: int = 8,
        depth: int = 2,
    ):
        super().__init__(lm, space, projector)
        self.code_dim = code_dim
        self.depth = depth
        for stream, size in self.codebooks():
            self.tables[stream] = AlignedTable(
                size=size, code_dim=code_dim, hidden=self.hidden_size, depth=depth
            )
            self.heads[stream] = GenerationHead(size=size, hidden=self.hidden_size)
