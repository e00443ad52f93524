"""Any Hugging Face causal language model as a backbone."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from unicompress.accelerators.base import (
    TEXT,
    Accelerator,
    ImageColumns,
    Mode,
    Task,
    build_accelerators,
)
from unicompress.accelerators.decoder import (
    additive,
    check_decoder,
    image_projections,
    is_eager,
    walk,
)
from unicompress.backbones.base import Backbone, Choose, CodeSpace, Stream, backbones
from unicompress.backbones.projectors import Projector
from unicompress.errors import InputError
from unicompress.layers import Block, StepDecoder
from unicompress.tokens import Grid

STREAMS: tuple[Stream, Stream] = ("global", "local")


def run_trunk(
    lm: PreTrainedModel,
    embeds: Float[Tensor, "b l h"],
    mask: Bool[Tensor, "b 1 l k"] | None,
    positions: Int[Tensor, "b l"],
    cache: Cache | None = None,
) -> Float[Tensor, "b l h"]:
    """Everything of a language model but its head, under a mask of ours."""
    trunk: Any = lm.base_model
    if mask is not None and is_eager(trunk):
        mask = additive(mask, embeds, trunk.dtype)
    return trunk(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


@torch.no_grad()
def check_causal_lm(lm: PreTrainedModel) -> None:
    """Raise InputError for a language model that cannot serve, found out on three tokens.

    Its head must be applied to its hidden states and nothing else, and its attention must obey a
    mask of ours: the third token must not notice the second.
    """
    training = lm.training
    lm.eval()
    ids = torch.tensor([[0, 1, 2], [0, 3, 2]], device=lm.device)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=lm.device).tril()
    mask[..., 2, 1] = False
    positions = torch.tensor([[0, 1, 1]], device=lm.device).expand(2, -1)
    states = run_trunk(lm, lm.get_input_embeddings()(ids), mask, positions)
    plain = lm.base_model(ids).last_hidden_state
    own, theirs = lm.get_output_embeddings()(plain), lm(ids).logits
    lm.train(training)
    kind = type(lm).__name__
    if not torch.allclose(states[0, 2], states[1, 2], rtol=1e-3, atol=1e-3):
        raise InputError(f"the attention of {kind} ignores the mask that keeps questions apart")
    if not torch.allclose(own, theirs, rtol=1e-3, atol=1e-3):
        raise InputError(f"{kind} changes its logits after its head, which is not supported")


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in memory reserved once, so that a step copies only itself."""

    keys: Tensor
    values: Tensor

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.filled = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and return all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = self._reserve(key_states)
            self.values = self._reserve(value_states)
        stop = self.filled + key_states.shape[-2]
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[:, :, self.filled : stop] = new
        self.filled = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def _reserve(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self.length, like.shape[-1])

    def get_seq_length(self) -> int:
        """Positions filled."""
        return self.filled


def vocabulary(lm: PreTrainedModel) -> Float[Tensor, "v h"]:
    """The weights of the input embedding."""
    weight = lm.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


class CodeTable(nn.Module):
    """Embeddings of tokens with several codes: the sum of one entry per code."""

    def __init__(self, *, codes: int, size: int, width: int):
        super().__init__()
        self.size = size
        self.entries = nn.Embedding(codes * size, width)
        nn.init.normal_(self.entries.weight, std=0.02)

    def forward(self, codes: Int[Tensor, "*b c"]) -> Float[Tensor, "*b h"]:
        """Sum over the codes of a token."""
        return self.each(codes).sum(dim=-2)

    def each(self, codes: Int[Tensor, "*b c"]) -> Float[Tensor, "*b c h"]:
        """The entry of every code; later codes of the token may be missing."""
        first = torch.arange(codes.shape[-1], device=codes.device) * self.size
        return self.entries(codes + first)


class DepthHead(nn.Module):
    """A small causal transformer over the codes of one token (UniTok, VILA-U).

    Its first position reads the language model's state and predicts code 1; position k reads
    code k - 1 and predicts code k.
    """

    def __init__(self, *, hidden: int, codes: int, size: int, width: int, depth: int = 2):
        super().__init__()
        self.size = size
        self.enter = nn.Linear(hidden, width)
        self.entries = CodeTable(codes=codes, size=size, width=width)
        self.positions = nn.Parameter(torch.randn(codes, width) * 0.02)
        heads = width // 64 if width % 64 == 0 else 1
        self.blocks: Any = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Parameter(torch.randn(codes, size, width) * 0.02)

    def forward(
        self, hidden: Float[Tensor, "n h"], codes: Int[Tensor, "n c"]
    ) -> Float[Tensor, "n c v"]:
        """Scores of every code given the true codes before it."""
        known = self.entries.each(codes[:, :-1])
        tokens = torch.cat([self.enter(hidden)[:, None], known], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens, causal=True)
        return torch.einsum("ncd,cvd->ncv", self.norm(tokens), self.leave)

    def sample(self, hidden: Float[Tensor, "n h"], choose: Choose) -> Int[Tensor, "n c"]:
        """The codes of one token, chosen one after the other."""
        tokens = self.enter(hidden)[:, None]
        decoder = StepDecoder([*self.blocks], None, tokens, len(self.positions))
        codes = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
        for number, position in enumerate(self.positions):
            state = decoder.step(tokens + position, number)
            scores = F.linear(self.norm(state[:, 0]), self.leave[number])
            codes = torch.cat([codes, choose(scores, number)[:, None]], dim=1)
            tokens = self.entries.each(codes)[:, -1:]
        return codes


@backbones.register("causal_lm")
class CausalLM(Backbone):
    """Wraps `lm`, whose vocabulary already has the size that `space` asks for.

    With one code per token the codes are entries of that vocabulary; with more they have tables
    and depth heads of their own, one set for each codebook.
    """

    codes_in_vocabulary: ClassVar[bool] = True

    def __init__(self, lm: PreTrainedModel, space: CodeSpace, projector: Projector):
        super().__init__()
        self.lm = lm
        self.space = space
        self.projector = projector
        self.accelerators: dict[Task, Accelerator] = {}
        self.plans: dict[Task, tuple[Mode, ...]] = {}
        self.image_projections = nn.ModuleDict()
        entries = vocabulary(lm)
        self.hidden_size = entries.shape[1]
        self.max_positions = int(getattr(lm.config, "max_position_embeddings", 2**31))
        if len(entries) < space.vocabulary_size:
            raise InputError(
                f"the language model has {len(entries)} vocabulary entries, text and codes need "
                f"{space.vocabulary_size}: call its resize_token_embeddings first"
            )
        self.tables = nn.ModuleDict()
        self.heads: Any = nn.ModuleDict()
        if space.in_vocabulary and space.codes_per_token > 1:
            width = min(self.hidden_size, 512)
            for stream in STREAMS if space.global_size else STREAMS[1:]:
                size = space.size(stream)
                self.tables[stream] = CodeTable(
                    codes=space.codes_per_token, size=size, width=self.hidden_size
                )
                self.heads[stream] = DepthHead(
                    hidden=self.hidden_size, codes=space.codes_per_token, size=size, width=width
                )

    def accelerate(self, specs: Sequence[str]) -> None:
        """Use these accelerators and no others, such as `himix` or `hmgen(count=2)`.

        Projections of their own start as copies of the language model's. Raises InputError for
        two of one task, for too few layers, and for layers of another kind than Llama's.
        """
        members = build_accelerators(specs)
        if members:
            check_decoder(self.inner)
        count = self.inner.config.get_text_config().num_hidden_layers
        self.accelerators = members
        self.plans = {task: member.plan(count) for task, member in members.items()}
        self.image_projections = nn.ModuleDict(image_projections(self.inner, members))

    @property
    def inner(self) -> PreTrainedModel:
        """The language model itself, also where peft has wrapped it."""
        wrapped: Any = getattr(self.lm, "get_base_model", None)
        return wrapped() if wrapped else self.lm

    def embed_text(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l h"]:
        """Embeddings of text tokens."""
        return self.inner.get_input_embeddings()(ids)

    def delimiters(self) -> Float[Tensor, "3 h"]:
        """Learned embeddings of BOS, SEP and EOS."""
        ids = torch.arange(self.space.begin, self.space.begin + 3)
        return self.embed_text(ids.to(self.inner.device)[None])[0]

    def embed_features(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Continuous tokens through the projector, globals first."""
        return self.projector(globals_, locals_, grid)

    def embed_codes(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n h"]:
        """Codes as vocabulary entries, or the sum of table entries."""
        entries = self._entries(stream)
        if entries is None:
            return self._table(stream)(codes)
        return self.embed_text(codes[..., 0] + entries[0])

    def forward(
        self,
        embeds: Float[Tensor, "b l h"],
        mask: Bool[Tensor, "b 1 l k"] | None,
        positions: Int[Tensor, "b l"],
        cache: Any = None,
        image: ImageColumns | None = None,
    ) -> Float[Tensor, "b l h"]:
        """Hidden states after the last norm."""
        if image is None or image.task not in self.accelerators:
            return run_trunk(self.inner, embeds, mask, positions, cache)
        name = self.accelerators[image.task].projections
        own: Any = None if name == TEXT else self.image_projections[name]
        plan = self.plans[image.task]
        return walk(self.inner, plan, own, embeds, mask, positions, image.keys, cache)

    def new_cache(self, length: int) -> Cache:
        """Reserved keys and values of every layer."""
        layers = self.inner.config.get_text_config().num_hidden_layers
        return Cache(layers=[ReservedLayer(length) for _ in range(layers)])

    def text_logits(self, hidden: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        """Scores of the text entries only."""
        return self.vocabulary_logits(hidden, 0, self.space.text_size)

    def vocabulary_logits(
        self, hidden: Float[Tensor, "*b h"], start: int, stop: int
    ) -> Float[Tensor, "*b v"]:
        """Scores of entries start to stop - 1, at the cost of those entries alone."""
        head = self.inner.get_output_embeddings()
        if type(head) is not nn.Linear:  # an adapter may have wrapped it
            return head(hidden)[..., start:stop]
        bias = None if head.bias is None else head.bias[start:stop]
        return F.linear(hidden, head.weight[start:stop], bias)

    def code_logits(
        self, hidden: Float[Tensor, "*b h"], codes: Int[Tensor, "*b c"], stream: Stream
    ) -> Float[Tensor, "*b c v"]:
        """Scores of every code of a token, each given the true codes before it in the token."""
        entries = self._entries(stream)
        if entries is not None:
            return self.vocabulary_logits(hidden, *entries)[..., None, :]
        flat = self._head(stream)(hidden.flatten(0, -2), codes.flatten(0, -2))
        return flat.unflatten(0, hidden.shape[:-1])

    def sample_codes(
        self, hidden: Float[Tensor, "b h"], stream: Stream, choose: Choose
    ) -> Int[Tensor, "b c"]:
        """The codes of one token, chosen one after the other."""
        entries = self._entries(stream)
        if entries is not None:
            return choose(self.vocabulary_logits(hidden, *entries), 0)[:, None]
        return self._head(stream).sample(hidden, choose)

    def _entries(self, stream: Stream) -> tuple[int, int] | None:
        """First entry and end of a stream's codes in the vocabulary; None: they have a table."""
        if self.tables:
            return None
        first = self.space.first(stream)
        return first, first + self.space.size(stream)

    def _codebook(self, stream: Stream) -> str:
        return stream if stream in self.tables else "local"

    def _table(self, stream: Stream) -> Any:
        return self.tables[self._codebook(stream)]

    def _head(self, stream: Stream) -> Any:
        return self.heads[self._codebook(stream)]
