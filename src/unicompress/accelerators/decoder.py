"""The walk through a Llama-type decoder in which layers may treat image tokens differently."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from unicompress.accelerators.base import TEXT, Accelerator, Mode, Task
from unicompress.errors import InputError

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NEEDED = {"full": PROJECTIONS, "keys": PROJECTIONS[1:], "text": ()}


@dataclass(frozen=True)
class Columns:
    """Indices of text and image among the tokens of a call, and of text among its keys."""

    text: Int[Tensor, " t"]
    image: Int[Tensor, " m"]
    order: Int[Tensor, " l"]  # from [text, image] to the order of the sequence
    text_keys: Int[Tensor, " k"]

    @classmethod
    def of(cls, keys: Bool[Tensor, " k"], length: int, device: torch.device) -> "Columns":
        """From the marks of all keys, of which the last `length` are the tokens of the call."""
        here = keys[len(keys) - length :]
        text, image = (~here).nonzero()[:, 0], here.nonzero()[:, 0]
        order = torch.cat([text, image]).argsort()
        found = (text, image, order, (~keys).nonzero()[:, 0])
        return cls(*(indices.to(device, non_blocking=True) for indices in found))


def needed_projections(
    plans: Sequence[tuple[Mode, ...]],
) -> list[list[str]]:
    """The projections that each layer's image tokens go through under any of the plans."""
    return [
        [name for name in PROJECTIONS if any(name in NEEDED[mode] for mode in modes)]
        for modes in zip(*plans, strict=True)
    ]


def image_projections(
    lm: PreTrainedModel, members: Mapping[Task, Accelerator]
) -> dict[str, nn.ModuleList]:
    """A set of projections for every name that the accelerators give, copied from the text's.

    Because they are copies, the first step is that of the language model without them.
    """
    trunk: Any = lm.base_model
    count = len(trunk.layers)
    sets = {}
    for name in dict.fromkeys(m.projections for m in members.values() if m.projections != TEXT):
        plans = [m.plan(count) for m in members.values() if m.projections == name]
        sets[name] = nn.ModuleList(
            nn.ModuleDict({p: copy.deepcopy(getattr(layer.self_attn, p)) for p in wanted})
            for layer, wanted in zip(trunk.layers, needed_projections(plans), strict=True)
        ).requires_grad_(True)
    return sets


@torch.no_grad()
def check_decoder(lm: PreTrainedModel) -> None:
    """Raise InputError for a language model whose layers are not those of Llama and Qwen2.

    Its parts must have their names, and walking through them must give its own states.
    """
    trunk: Any = lm.base_model
    layers: Any = getattr(trunk, "layers", None)
    fits = hasattr(trunk, "rotary_emb") and hasattr(trunk, "norm") and layers is not None
    if fits and all(_is_llama_layer(layer) for layer in layers):
        training = lm.training
        lm.eval()
        ids = torch.arange(4, device=lm.device)[None]
        plain = trunk(ids).last_hidden_state
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=lm.device).tril()
        marks = torch.tensor([False, True, True, False])
        full: Mode = "full"
        plan = (full,) * len(layers)
        embeds = lm.get_input_embeddings()(ids)
        walked = walk(lm, plan, None, embeds, mask, ids, marks)
        lm.train(training)
        if torch.allclose(plain, walked, rtol=1e-3, atol=1e-3):
            return
    raise InputError(
        f"accelerators need a language model with the layers of Llama or Qwen2, "
        f"{type(lm).__name__} has others: leave accelerators out"
    )


def _is_llama_layer(layer: nn.Module) -> bool:
    """Whether a layer has the parts that `walk` uses and no others."""
    parts = dict(layer.named_children())
    return parts.keys() == LAYER and {name for name, _ in parts["self_attn"].named_children()} == {
        *PROJECTIONS,
        "o_proj",
    }


def walk(
    lm: PreTrainedModel,
    plan: Sequence[Mode],
    own: nn.ModuleList | None,
    embeds: Float[Tensor, "b l h"],
    mask: Bool[Tensor, "b 1 l k"] | None,
    positions: Int[Tensor, "b l"],
    keys: Bool[Tensor, " k"],
    cache: Cache | None = None,
) -> Float[Tensor, "b l h"]:
    """Hidden states after the last norm, every layer in its mode.

    `own` are the image's projections (None: the text's), `keys` marks image tokens among all keys,
    cached ones first; `mask` None means plainly causal. Under `keys` modes the rows of image
    tokens mean nothing: they hold the normed embeddings.
    """
    trunk: Any = lm.base_model
    columns = Columns.of(keys, embeds.shape[1], embeds.device)
    if mask is None:
        ones = torch.ones(embeds.shape[1], len(keys), dtype=torch.bool, device=embeds.device)
        mask = ones.tril(len(keys) - embeds.shape[1])[None, None]
    rope = trunk.rotary_emb(embeds, position_ids=positions)
    text_rows = mask[:, :, columns.text]
    masks = {"full": mask, "keys": text_rows, "text": text_rows[..., columns.text_keys]}
    masks = {mode: _for_attention(masks[mode], trunk, embeds) for mode in set(plan)}
    hidden = embeds
    for number, (layer, mode) in enumerate(zip(trunk.layers, plan, strict=True)):
        projections: Any = {} if own is None else own[number]
        step = _Step(layer, projections, columns, rope, masks[mode], embeds, cache)
        if layer.gradient_checkpointing and layer.training and cache is None:
            hidden = checkpoint(getattr(step, mode), hidden, use_reentrant=False)
        else:
            hidden = getattr(step, mode)(hidden)
    return trunk.norm(hidden)


def _for_attention(mask: Tensor, trunk: Any, embeds: Tensor) -> Tensor:
    """Eager attention adds its mask, others take a boolean one."""
    return additive(mask, embeds, trunk.dtype) if is_eager(trunk) else mask


def is_eager(trunk: Any) -> bool:
    """Whether a model's attention adds its mask."""
    return trunk.config._attn_implementation == "eager"


def additive(
    mask: Bool[Tensor, "b 1 l k"], embeds: Tensor, dtype: torch.dtype
) -> Float[Tensor, "b 1 l k"]:
    """Zero where a key is seen, the least number elsewhere."""
    # Under autocast the scores have autocast's type, and a wider mask would widen them.
    kind = embeds.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    zeros = torch.zeros_like(mask, dtype=dtype)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Step:
    """One layer in one call; a method per mode."""

    layer: Any
    own: Any  # ModuleDict: projections of image tokens in this layer; empty: the text's
    columns: Columns
    rope: tuple[Tensor, Tensor]  # cosines and sines of all positions, [b, l, head width]
    mask: Tensor
    embeds: Float[Tensor, "b l h"]  # what entered the first layer
    cache: Cache | None

    def full(self, hidden: Float[Tensor, "b l h"]) -> Float[Tensor, "b l h"]:
        """Everything is computed; image tokens go through projections of their own, if any."""
        normed = self.layer.input_layernorm(hidden)
        if self.own and len(self.columns.image):
            text, image = normed[:, self.columns.text], normed[:, self.columns.image]
            q, k, v = (self._joined(name, text, image) for name in PROJECTIONS)
        else:
            q, k, v = (getattr(self.layer.self_attn, name)(normed) for name in PROJECTIONS)
        rotated, keys = self._rotated(q), self._rotated(k)
        return self._finish(hidden, self._attend(rotated, keys, self._split(v)))

    def keys(self, hidden: Float[Tensor, "b l h"]) -> Float[Tensor, "b l h"]:
        """Text asks; the image's first embeddings are keys and values, their rows stay."""
        columns, norm = self.columns, self.layer.input_layernorm
        rest = hidden[:, columns.text]
        text, image = norm(rest), norm(self.embeds[:, columns.image])
        k, v = (self._joined(name, text, image) for name in PROJECTIONS[1:])
        keys, values = self._remember(self._rotated(k), self._split(v))
        if not len(columns.text):
            return hidden
        queries = self._rotated(self.layer.self_attn.q_proj(text), columns.text)
        done = self._finish(rest, self._weigh(queries, keys, values))
        return hidden.index_copy(1, columns.text, done.to(hidden))

    def text(self, hidden: Float[Tensor, "b l h"]) -> Float[Tensor, "b l h"]:
        """Text among itself; the image's rows stay, and leave no keys and values."""
        columns = self.columns
        if not len(columns.text):
            return hidden
        rest = hidden[:, columns.text]
        normed = self.layer.input_layernorm(rest)
        q, k, v = (getattr(self.layer.self_attn, name)(normed) for name in PROJECTIONS)
        rotated, keys = self._rotated(q, columns.text), self._rotated(k, columns.text)
        done = self._finish(rest, self._attend(rotated, keys, self._split(v)))
        return hidden.index_copy(1, columns.text, done.to(hidden))

    def _joined(
        self, name: str, text: Float[Tensor, "b t h"], image: Float[Tensor, "b m h"]
    ) -> Float[Tensor, "b l w"]:
        """Text and image through their projections, in the order of the sequence."""
        theirs = getattr(self.layer.self_attn, name)
        own = self.own[name] if self.own else theirs
        return torch.cat([theirs(text), own(image)], dim=1)[:, self.columns.order]

    def _split(self, flat: Float[Tensor, "b l w"]) -> Float[Tensor, "b n l d"]:
        return flat.unflatten(-1, (-1, self.layer.self_attn.head_dim)).transpose(1, 2)

    def _rotated(
        self, flat: Float[Tensor, "b l w"], rows: Int[Tensor, " l"] | None = None
    ) -> Float[Tensor, "b n l d"]:
        """Split into heads and turned by RoPE, at all positions of the call or at `rows`."""
        cosines, sines = self.rope if rows is None else (part[:, rows] for part in self.rope)
        heads = self._split(flat)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return heads * cosines[:, None] + turned * sines[:, None]

    def _remember(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """With what the cache holds of this layer before them."""
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, self.layer.self_attn.layer_idx)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "b l w"]:
        return self._weigh(queries, *self._remember(keys, values))

    def _weigh(self, queries: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "b l w"]:
        """The model's own attention function."""
        attention = self.layer.self_attn
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        dropout = attention.attention_dropout if attention.training else 0.0
        scaling = attention.scaling
        out, _ = function(
            attention, queries, keys, values, self.mask, dropout=dropout, scaling=scaling
        )
        return attention.o_proj(out.flatten(2))

    def _finish(
        self, hidden: Float[Tensor, "b l h"], attended: Float[Tensor, "b l h"]
    ) -> Float[Tensor, "b l h"]:
        """Residual connections around attention and feed-forward network."""
        hidden = hidden + attended
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
