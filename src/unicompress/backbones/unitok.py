"""UniTok's language model: a Llama with three more Llama layers over the codes of one token.

Read from `eval/liquid/model/arhead.py` of UniTok (arXiv 2502.20321): the head's first position
reads the hidden state, position k the embedding of code k in a table of its own, and one linear
map scores all codes.

The released model embeds a token's eight codes through a projection that attends to the tokens
before it (`UniTokProjector`). It was trained so, for reading and for drawing, and it reads so; but
its published generation scripts feed that projection one token at a time, so that a drawn token
attends to itself alone, and only the first position agrees with training. A choice has to be made,
and here it is that of the published scripts, which the authors evaluate with: an image that is read
is projected as a whole, a drawn token by itself, in training too. Drawing then stays the cheap and
stateless thing that it is in the other models, and what is trained with this class is consistent.

The published prompts end with a zero byte. That is entry 3 of the vocabulary, with which the images
of its training begin; here it is BOS, and no part of the text.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.cache_utils import DynamicCache

from unicompress.backbones.base import Choose, CodeSpace, Prompts, Stream, backbones
from unicompress.backbones.coded import CodedLM, RowTable
from unicompress.backbones.projectors import Projector
from unicompress.backbones.vicuna import vicuna


class LlamaHead(nn.Module):
    """Llama layers over [state, code 1, ...]; transformers' own, without a word embedding."""

    def __init__(
        self,
        *,
        hidden: int,
        codes: int,
        size: int,
        depth: int,
        block_heads: int,
        block_width: int = 0,
        eps: float = 1e-6,
    ):
        super().__init__()
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=hidden,
            intermediate_size=block_width or hidden * 11 // 4 // 16 * 16 or 16,
            num_hidden_layers=depth,
            num_attention_heads=block_heads,
            max_position_embeddings=codes,
            rms_norm_eps=eps,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.trunk = LlamaModel(config)
        self.trunk.set_input_embeddings(None)
        tables = [nn.Embedding(size, hidden) for _ in range(codes - 1)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.entries: Any = nn.ModuleList(tables)
        self.leave = nn.Linear(hidden, size)
        self.codes = codes

    def forward(
        self, hidden: Float[Tensor, "n h"], codes: Int[Tensor, "n c"]
    ) -> Float[Tensor, "n c v"]:
        """Scores of every code given the true codes before it."""
        known = [table(codes[:, k]) for k, table in enumerate(self.entries)]
        states = self.trunk(inputs_embeds=torch.stack([hidden, *known], dim=1), use_cache=False)
        return self.leave(states.last_hidden_state)

    def sample(self, hidden: Float[Tensor, "n h"], choose: Choose) -> Int[Tensor, "n c"]:
        """The codes of one token, chosen one after the other, with a cache."""
        cache, fed, codes = DynamicCache(), hidden, []
        for number in range(self.codes):
            states = self.trunk(inputs_embeds=fed[:, None], past_key_values=cache, use_cache=True)
            codes.append(choose(self.leave(states.last_hidden_state[:, -1]), number))
            if number + 1 < self.codes:
                fed = self.entries[number](codes[-1])
        return torch.stack(codes, dim=1)


@backbones.register("unitok")
class UniTokLM(CodedLM):
    """`depth`, `block_heads`, `block_width`, `eps`: of the head; `code_dim`: of a looked-up token.

    `block_width` is that of its MLPs, 0 for 2.75 times the hidden width; `eps` is of its norms.
    """

    prompts: ClassVar[Prompts] = vicuna(
        caption="{} Generate an image based on this description.",
        unconditional="<unconditional>",
    )

    def __init__(
        self,
        lm: PreTrainedModel,
        space: CodeSpace,
        projector: Projector,
        *,
        code_dim: int = 64,
        depth: int = 3,
        block_heads: int = 32,
        block_width: int = 0,
        eps: float = 1e-6,
    ):
        super().__init__(lm, space, projector)
        self.code_dim = code_dim
        self.depth = depth
        self.block_heads = block_heads
        self.block_width = block_width
        self.eps = eps
        codes = space.codes_per_token
        for stream, size in self.codebooks():
            self.tables[stream] = RowTable(codes=codes, size=size, width=code_dim)
            self.heads[stream] = LlamaHead(
                hidden=self.hidden_size,
                codes=codes,
                size=size,
                depth=depth,
                block_heads=block_heads,
                block_width=block_width,
                eps=eps,
            )

    def embed_codes(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n h"]:
        """The tokenizer's embedding of the codes, through the projector."""
        return self.projector.each(self._table(stream)(codes))
