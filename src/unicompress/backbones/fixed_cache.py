"""Keys and values whose shapes never change, for steps that are compiled or recorded once."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from unicompress.errors import InputError


class FixedLayer(DynamicLayer):
    """One layer of a cache of which attention always reads all `length` places, under a mask.

    `place` says where the next keys go; its owner moves it on, in place.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, length: int, place: Int[Tensor, " n"]):
        super().__init__()
        self.length = length
        self.place = place

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store and return all places, filled or not."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Zeros: a masked place has weight zero, and zero times NaN would be NaN.
            self.keys = self._reserve(key_states)
            self.values = self._reserve(value_states)
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def _reserve(self, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[:2], self.length, like.shape[-1])

    def get_seq_length(self) -> int:
        """Places, filled or not."""
        return self.length


class FixedCache:
    """A language model's cache of fixed shapes, and the place where its next keys go."""

    def __init__(self, plain: object, length: int, device: torch.device):
        if not isinstance(plain, Cache):
            raise InputError("this backbone keeps a cache of its own kind: use the engine eager")
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = [FixedLayer(length, self.place) for _ in plain.layers]
        self.cache = Cache(layers=self.layers)

    def put(self, place: Int[Tensor, " n"]) -> None:
        """Where the next keys go; kept as it is, so that it can be moved on in place."""
        self.place = place
        for layer in self.layers:
            layer.place = place
