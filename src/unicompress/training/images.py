"""Batches of images alone, for the tokenizer and stage one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unicompress.training.feed import Batch, Batches, Place, shares
from unicompress.training.recipe import LoopRecipe
from unicompress.training.samples import mixture, to_pixels


@dataclass(frozen=True, kw_only=True)
class ImageBatch(Batch):
    """Images, and the phrases that hold for each."""

    pixels: Tensor  # [b, 3, h, w] in [-1, 1]
    phrases: list[list[str]]

    def to(self, device: torch.device) -> "ImageBatch":
        return replace(self, pixels=self.pixels.to(device))


class ImageBatches(Batches[ImageBatch]):
    """The images of a recipe's data, `batch` per step."""

    def __init__(self, recipe: LoopRecipe, size: int, place: Place):
        self.recipe = recipe
        self.place = place
        self.samples = mixture(recipe.data, size=size, seed=recipe.seed, place=place)

    def at(self, step: int) -> list[ImageBatch]:
        batch = self.recipe.batch
        parts = shares(batch, accumulate=self.recipe.accumulate, place=self.place)
        found = [[self.samples.at(step * batch + i) for i in part] for part in parts]
        return [
            ImageBatch(step=step, pixels=to_pixels(own), phrases=[list(s.phrases) for s in own])
            for own in found
        ]

    def some(self, count: int, *, start: int) -> Tensor:
        """Images from elsewhere in the data, in [-1, 1]."""
        return to_pixels([self.samples.at(start + i) for i in range(count)])

    def state(self) -> dict[str, Any]:
        return self.samples.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.samples.restore(state)

    def skipped(self) -> list[str]:
        return self.samples.skipped()
