"""Attention and keys of a vision encoder, recomputed from what its attention modules read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.reducers.hosts.attention import received, softmax_rows

SHALLOW = 5  # VScan's early layer


@dataclass
class EncoderProbe:
    """Listens to two layers of an encoder: the last but one, and an early one.

    Attention is the row of the class token where there is one, and the mean over all queries
    elsewhere; mean over heads. `pool` joins pool x pool patches where the model does so afterwards.
    """

    attentions: list[Any]  # attention modules in order
    class_token: bool
    pool: int = 1
    _read: dict[int, Tensor] = field(default_factory=dict)

    @property
    def late(self) -> int:
        """The last layer but one."""
        return max(0, len(self.attentions) - 2)

    @property
    def early(self) -> int:
        """Layer 5, or the last of a shorter encoder."""
        return min(SHALLOW, len(self.attentions) - 1)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember what the two layers read."""
        self._read = {}

        def listener(index: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._read[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        with ExitStack() as stack:
            for index in {self.late, self.early}:
                handle = self.attentions[index].register_forward_pre_hook(
                    listener(index), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def heard(self, wanted: set[str]) -> dict[str, Any]:
        """The wanted ones of attention [b, n], shallow_attention [b, n] and keys [b, n, k]."""
        found: dict[str, Any] = {}
        if "attention" in wanted:
            found["attention"] = self._attention(self.late)
        if "shallow_attention" in wanted:
            found["shallow_attention"] = self._attention(self.early)
        if "keys" in wanted:
            module, hidden = self.attentions[self.late], self._read[self.late]
            keys = _heads(module, hidden, "k").mean(dim=1)
            found["keys"] = self._pooled(keys[:, 1:] if self.class_token else keys)
        self._read = {}
        return found

    def _attention(self, index: int) -> Float[Tensor, "b n"]:
        module, hidden = self.attentions[index], self._read[index]
        queries, keys = (_heads(module, hidden, which) for which in "qk")
        if not self.class_token:
            weights = received(queries, keys, module.scale)
        else:
            visible = torch.ones(
                len(hidden), 1, hidden.shape[1], dtype=torch.bool, device=hidden.device
            )
            rows = softmax_rows(queries[:, :, :1], keys, visible, module.scale)
            weights = rows.mean(dim=1)[:, 0, 1:]
        return self._pooled(weights[..., None])[..., 0]

    def _pooled(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        if self.pool == 1:
            return tokens
        side = round(tokens.shape[1] ** 0.5)
        field_ = tokens.transpose(1, 2).unflatten(-1, (side, side))
        return F.avg_pool2d(field_, self.pool).flatten(2).transpose(1, 2)


def _heads(module: Any, hidden: Float[Tensor, "b l d"], which: str) -> Float[Tensor, "b p l r"]:
    """Queries or keys by head."""
    return split_heads(module, getattr(module, f"{which}_proj")(hidden), which)


def split_heads(
    module: Any, states: Float[Tensor, "b l d"], which: str
) -> Float[Tensor, "b p l r"]:
    """What `q_proj` or `k_proj` gave, by head; some encoders normalise it, by head or in full."""
    norm = getattr(module, f"{which}_norm", None)
    split = (module.num_heads, module.head_dim)
    if norm is not None:
        weight = getattr(norm, "weight", None)
        by_head = weight is not None and weight.shape[0] == module.head_dim
        states = norm(states.unflatten(-1, split)).flatten(2) if by_head else norm(states)
    return states.unflatten(-1, split).transpose(1, 2)
