"""Rows of a layer's attention, recomputed from its input, so that fused attention can stay on."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 64  # queries whose rows are held at once


@dataclass(frozen=True)
class LayerView:
    """A layer of a language model about to read `hidden`."""

    layer: Any  # decoder layer with input_layernorm and self_attn
    hidden: Float[Tensor, "b l d"]
    cosines: Float[Tensor, "#b l r"]
    sines: Float[Tensor, "#b l r"]

    def normed(self) -> Float[Tensor, "b l d"]:
        """What the attention module reads."""
        return self.layer.input_layernorm(self.hidden)

    def heads(self, normed: Float[Tensor, "b l d"], which: str) -> Float[Tensor, "b p l r"]:
        """Queries and keys (`q`, `k`, both turned by their positions) or values (`v`) by head."""
        return self._heads(normed, which, self.cosines, self.sines)

    def rows(
        self, slots: Int[Tensor, "b q"], visible: Bool[Tensor, "b q l"]
    ) -> Float[Tensor, "b p q l"]:
        """Attention of the queries at `slots` to everything that is visible to them."""
        normed = self.normed()
        picked = [
            table.expand(len(slots), -1, -1).gather(
                1, slots[..., None].expand(-1, -1, table.shape[-1])
            )
            for table in (normed, self.cosines, self.sines)
        ]
        queries = self._heads(picked[0], "q", picked[1], picked[2])
        keys = self.heads(normed, "k")
        return softmax_rows(queries, keys, visible, self.layer.self_attn.scaling)

    def _heads(self, normed: Tensor, which: str, cosines: Tensor, sines: Tensor) -> Tensor:
        module = self.layer.self_attn
        states = getattr(module, f"{which}_proj")(normed)
        states = states.unflatten(-1, (-1, module.head_dim))  # [b, l, p, r]
        norm = getattr(module, f"{which}_norm", None)
        states = (states if norm is None else norm(states)).transpose(1, 2)
        if which == "v":
            return states
        # The model's own function: families differ in how they pair channels.
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        return rotate(states, states, cosines, sines)[0]


def softmax_rows(
    queries: Float[Tensor, "b p q r"],
    keys: Float[Tensor, "b s l r"],
    visible: Bool[Tensor, "b q l"],
    scale: float,
) -> Float[Tensor, "b p q l"]:
    """Attention in float32; keys may be shared by groups of heads (s divides p)."""
    shared = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.float() @ shared.float().transpose(2, 3) * scale
    return scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min).softmax(dim=-1)


def received(
    queries: Float[Tensor, "b p n r"],
    keys: Float[Tensor, "b s n r"],
    scale: float,
    *,
    causal: bool = False,
) -> Float[Tensor, "b n"]:
    """Mean attention that each token gets from all of its field, a few queries at a time."""
    b, _, n, _ = queries.shape
    total = torch.zeros(b, n, device=queries.device)
    order = torch.arange(n, device=queries.device)
    for start in range(0, n, CHUNK):
        part = queries[:, :, start : start + CHUNK]
        asking = order[start : start + CHUNK, None]
        visible = (order <= asking if causal else (order >= 0) & (asking >= 0)).expand(b, -1, -1)
        total += softmax_rows(part, keys, visible, scale).mean(dim=1).sum(dim=1)
    return total / n
