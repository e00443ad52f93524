"""Merging inside a vision encoder: between attention and MLP of its blocks (ToMe)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer
from unicompress.reducers.hosts.encoder import split_heads
from unicompress.reducers.tome import Groups, merge_groups

# Blocks that are x + attention(norm(x)), then x + mlp(norm(x)), and nothing else.
KINDS = {
    "CLIPEncoderLayer": "CLIP",
    "SiglipEncoderLayer": "SigLIP",
    "JanusVisionEncoderLayer": "Janus",
}
BACKENDS = ("sdpa", "eager")


@dataclass
class EncoderBlocks:
    """The blocks that an image's features pass through, in order, while they merge tokens.

    A block adds to the residual stream in two places, so what lies between them cannot be reached
    by hooks: for the length of `merging`, each block's `forward` is replaced by one that is written
    out here, with the block's own modules.
    """

    blocks: list[Any]
    class_token: bool  # stands first, and never merges
    groups: Groups | None = None  # of the images that were encoded last; None: all alone

    def check(self) -> None:
        """Raise InputError for blocks that are not what is written out here."""
        kinds = {type(block).__name__ for block in self.blocks}
        if not kinds or kinds - set(KINDS):
            found = " and ".join(sorted(kinds)) or "no block"
            raise InputError(
                f"tokens merge inside the blocks of {', '.join(KINDS.values())} encoders, and this "
                f"one has {found} before its features: merge behind it with inside=False"
            )
        if any("forward" in vars(block) for block in self.blocks):
            raise InputError(
                "something else, such as a device map, has replaced the forward of this encoder's "
                "blocks: load the model on one device, or use inside=False"
            )
        if any(getattr(b, "gradient_checkpointing", False) and b.training for b in self.blocks):
            raise InputError(
                "what merges inside an encoder cannot be computed twice: turn its gradient "
                "checkpointing off, or use inside=False"
            )
        backend = self.blocks[0].self_attn.config._attn_implementation
        if backend not in BACKENDS:
            raise InputError(
                f"the encoder's attention backend {backend!r} cannot weigh merged tokens by their "
                "size: load the model with attn_implementation='sdpa', or use inside=False"
            )

    @contextmanager
    def merging(self, reducer: Reducer) -> Iterator[None]:
        """Merge as the reducer plans (`merged_by_block`); `groups` tells what became of whom."""
        self.check()
        self.groups = None
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                read = partial(self._read, reducer, index, block, block.forward)
                vars(block)["forward"] = read
                stack.callback(vars(block).pop, "forward")
            yield

    def _read(
        self,
        reducer: Reducer,
        index: int,
        block: Any,
        original: Callable[..., Tensor],
        hidden_states: Float[Tensor, "b l d"],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b k d"]:
        if index == 0:
            self.groups = None
        total = hidden_states.shape[1] - self.class_token
        if self.groups is not None:
            total = self.groups.owner.shape[1]
        away = reducer.merged_by_block(total, len(self.blocks))[index]
        if not away and self.groups is None:
            return original(hidden_states, attention_mask, **kwargs)
        if attention_mask is not None:
            raise InputError(
                "this encoder masks some of its patches, which cannot merge: use inside=False"
            )
        if self.groups is None:
            self.groups = Groups.single(len(hidden_states), total, hidden_states.device)
        hidden, keys = attend(block, hidden_states, self._bias(hidden_states), **kwargs)
        if away:
            hidden = self._merge(hidden, keys, self.groups, away)
        return hidden + block.mlp(block.layer_norm2(hidden))

    def _merge(
        self,
        hidden: Float[Tensor, "b l d"],
        keys: Float[Tensor, "b l r"],
        groups: Groups,
        away: int,
    ) -> Float[Tensor, "b k d"]:
        first = int(self.class_token)
        left = groups.sizes.shape[1] - away
        tokens, self.groups = merge_groups(hidden[:, first:], keys[:, first:], groups, left)
        return torch.cat([hidden[:, :first], tokens], dim=1)

    def _bias(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b 1 1 l"] | None:
        """log(size) of every key: a merged token weighs as much as its members did."""
        assert self.groups is not None
        sizes = self.groups.sizes
        if sizes.shape[1] == self.groups.owner.shape[1]:
            return None
        alone = sizes.new_ones(len(sizes), int(self.class_token))
        return torch.cat([alone, sizes], dim=1).log().to(hidden)[:, None, None]


def attend(
    block: Any, hidden: Float[Tensor, "b l d"], bias: Tensor | None, **kwargs: Any
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l r"]]:
    """The first half of a block, and the keys of its attention, mean over heads."""
    module, heard = block.self_attn, []

    def listen(_: nn.Module, __: Any, output: Tensor) -> None:
        heard.append(output.detach())

    handle = module.k_proj.register_forward_hook(listen)
    try:
        normed = block.layer_norm1(hidden)
        attended = module(hidden_states=normed, attention_mask=bias, **kwargs)[0]
    finally:
        handle.remove()
    return hidden + attended, split_heads(module, heard[0], "k").mean(dim=1)


def spread(
    features: Tensor | list[Tensor], groups: Int[Tensor, "b n"]
) -> Tensor | list[Float[Tensor, "n d"]]:
    """Features of merged tokens at the places of all their members, in the form they came in."""
    dense = [tokens[group] for tokens, group in zip(features, groups, strict=True)]
    return torch.stack(dense) if isinstance(features, Tensor) else dense
