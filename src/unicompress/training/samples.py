"""Samples of all the data a recipe names, as one sequence mixed by weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unicompress.data.scenes import Scenes, phrases
from unicompress.errors import RecipeError
from unicompress.training.feed import Place, seed_of
from unicompress.training.outside import EasyVQASource, StreamSource
from unicompress.training.packed import PackedSample, PackedSource
from unicompress.training.recipe import Data, EasyVQAData, PackedData, SceneData
from unicompress.training.sample import Sample, Source

SMALLEST = 32  # pixels a scene can be drawn with; toy hosts get it shrunk


class SceneSource(Source):
    """The generated scenes."""

    captioned = questioned = True

    def __init__(self, *, size: int, seed: int = 0, questions: int = 0, split: str = "train"):
        self.size = size
        rendered = max(size, SMALLEST)
        self.scenes = Scenes(split, seed=seed, size=rendered, questions_per_image=questions)

    def at(self, index: int) -> Sample:
        sample = self.scenes[index]
        return Sample(
            pixels=_shrunk(sample.pixels, self.size),
            caption=sample.caption,
            phrases=tuple(phrases(sample.scene)),
            questions=tuple((question.text, question.answer) for question in sample.questions),
        )


def _shrunk(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if len(pixels) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


class Mixture:
    """Sources mixed by weight; which one serves a place depends on (seed, place) alone."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], *, seed: int):
        self.sources = list(sources)
        self.limits = np.cumsum(weights) / np.sum(weights)
        self.seed = seed

    def at(self, index: int) -> Sample:
        """The sample of a place."""
        if len(self.sources) == 1:
            return self.sources[0].at(index)
        draw = np.random.default_rng(seed_of(self.seed, index)).random()
        return self.sources[int(np.searchsorted(self.limits, draw, side="right"))].at(index)

    def state(self) -> dict[str, Any]:
        """The places in the streams; empty where there are none."""
        states = [source.state() for source in self.sources]
        return {"sources": states} if any(states) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the places that `state` described."""
        for source, place in zip(self.sources, state["sources"], strict=True):
            if place:
                source.restore(place)

    def skipped(self) -> list[str]:
        """What could not be read since the last call, by name and reason."""
        return [line for source in self.sources for line in source.skipped()]


def mixture(
    data: Sequence[Data],
    *,
    size: int,
    seed: int,
    place: Place,
    questions: int = 0,
    need: str | None = None,
) -> Mixture:
    """Build the sources of a recipe for images of `size` pixels.

    `need` keeps only sources with "captions", "questions" or "texts" (either); RecipeError where
    none has them.
    """
    kept, weights = [], []
    for entry in data:
        source = _source(entry, size=size, seed=seed, place=place, questions=questions)
        has = {"captions": source.captioned, "questions": source.questioned}
        has["texts"] = any(has.values())
        if need is None or has[need]:
            kept.append(source)
            weights.append(entry.weight)
    if not kept:
        raise RecipeError(f"no entry of data has {need}: add one, or name their columns")
    return Mixture(kept, weights, seed=seed)


def _source(entry: Data, *, size: int, seed: int, place: Place, questions: int) -> Source:
    if isinstance(entry, SceneData):
        return SceneSource(
            size=size, seed=entry.seed + seed, questions=questions, split=entry.split
        )
    if isinstance(entry, EasyVQAData):
        return EasyVQASource(size=size, seed=seed, questions=questions)
    if isinstance(entry, PackedData):
        return PackedSource(entry.path, questions=questions)
    return StreamSource(entry, size=size, seed=seed, place=place, questions=questions)


def to_pixels(samples: Sequence[Sample]) -> Float[Tensor, "b 3 h w"]:
    """The samples' images in [-1, 1]; RecipeError for packed ones, which have no pixels."""
    if any(isinstance(sample, PackedSample) for sample in samples):
        raise RecipeError("packed data hold no pixels: only stage two can train on them")
    images = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def scene_images(count: int, *, size: int, split: str = "val") -> Float[Tensor, "b 3 h w"]:
    """The first images of a split of the scenes, in [-1, 1]."""
    source = SceneSource(size=size, split=split)
    return to_pixels([source.at(index) for index in range(count)])
