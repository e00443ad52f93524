"""VILA-U: a Llama whose head is a small transformer over the residual codes of one token.

Read from `rqtransformer/modeling_rqtransformer.py` of VILA-U (arXiv 2409.04429). Codes enter as
the tokenizer's own embedding of them, through the projector that images are read with; inside the
head, code k is predicted from the sum of the rows of the codes before it. All depths share one
classifier. Sampling is ours: the released scripts fix guidance 3, top-k 900 and top-p 0.96.

The prompts are those of its `tokenize_conversation`. Guidance's unconditional prompt is a request
that was left blank: the official template then drops the space after the role, and so do we.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.backbones.base import Choose, CodeSpace, Prompts, Stream, backbones
from unicompress.backbones.coded import CodedLM, RowTable
from unicompress.backbones.projectors import Projector
from unicompress.backbones.vicuna import SYSTEM, vicuna
from unicompress.layers import Block


class ResidualHead(nn.Module):
    """Causal transformer over the codes of one token; what it reads is summed up code by code."""

    def __init__(
        self,
        *,
        hidden: int,
        code_dim: int,
        codes: int,
        size: int,
        width: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        self.enter = nn.Linear(hidden, width)
        self.context = nn.Linear(code_dim, width)
        self.positions = nn.Parameter(torch.randn(codes, width) * 0.02)
        self.blocks: Any = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, size)

    def forward(
        self, hidden: Float[Tensor, "n h"], rows: Float[Tensor, "n k e"]
    ) -> Float[Tensor, "n c v"]:
        """Scores of the first k + 1 codes, given the rows of the first k."""
        known = self.context(rows.cumsum(dim=1))
        tokens = torch.cat([self.enter(hidden)[:, None], known], dim=1)
        tokens = tokens + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, causal=True)
        return self.leave(self.norm(tokens))


@backbones.register("vila_u")
class VilaU(CodedLM):
    """`width`, `depth`, `block_heads`: of the depth transformer; `code_dim`: of a codebook row."""

    prompts: ClassVar[Prompts] = vicuna(
        caption=f"{SYSTEM} USER: {{}} ASSISTANT: ",
        unconditional=f"{SYSTEM} USER:ASSISTANT: ",
    )

    def __init__(
        self,
        lm: PreTrainedModel,
        space: CodeSpace,
        projector: Projector,
        *,
        code_dim: int = 1024,
        width: int = 2560,
        depth: int = 6,
        block_heads: int = 40,
    ):
        super().__init__(lm, space, projector)
        self.code_dim = code_dim
        self.width, self.depth, self.block_heads = width, depth, block_heads
        for stream, size in self.codebooks():
            self.tables[stream] = RowTable(codes=space.codes_per_token, size=size, width=code_dim)
            self.heads[stream] = ResidualHead(
                hidden=self.hidden_size,
                code_dim=code_dim,
                codes=space.codes_per_token,
                size=size,
                width=width,
                depth=depth,
                heads=block_heads,
            )

    def embed_codes(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n h"]:
        """The tokenizer's embedding of the codes, through the projector."""
        return self.projector.each(self._table(stream)(codes))

    def code_logits(
        self, hidden: Float[Tensor, "*b h"], codes: Int[Tensor, "*b c"], stream: Stream
    ) -> Float[Tensor, "*b c v"]:
        """Scores of every code of a token, each given the true codes before it in the token."""
        rows = self._table(stream).each(codes[..., :-1])
        scores = self._head(stream)(hidden.flatten(0, -2), rows.flatten(0, -3))
        return scores.unflatten(0, hidden.shape[:-1])

    def sample_codes(
        self, hidden: Float[Tensor, "b h"], stream: Stream, choose: Choose
    ) -> Int[Tensor, "b c"]:
        """The codes of one token; the few positions are read anew for each, as officially."""
        codes = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
        for number in range(self.space.codes_per_token):
            rows = self._table(stream).each(codes)
            scores = self._head(stream)(hidden, rows)[:, -1]
            codes = torch.cat([codes, choose(scores, number)[:, None]], dim=1)
        return codes
