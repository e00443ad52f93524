"""Samples from elsewhere: easy-vqa, and the user's own images."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from unicompress.data.easy_vqa import EasyVQA
from unicompress.data.streams import ImageStream, StreamOptions
from unicompress.training.feed import Place, seed_of
from unicompress.training.recipe import StreamData
from unicompress.training.sample import Sample, Source


class EasyVQASource(Source):
    """The training pictures of easy-vqa, again and again, each time with other questions."""

    captioned = False
    questioned = True

    def __init__(self, *, size: int, seed: int, questions: int):
        self.pictures = EasyVQA("train", size=size)
        self.seed = seed
        self.questions = questions

    def at(self, index: int) -> Sample:
        draw = np.random.default_rng(seed_of(self.seed, index, 5))
        sample = self.pictures[int(draw.integers(len(self.pictures)))]
        asked = draw.permutation(len(sample.questions))[: self.questions]
        pairs = tuple((sample.questions[i].text, sample.questions[i].answer) for i in asked)
        return Sample(pixels=sample.pixels, questions=pairs)


class StreamSource(Source):
    """A stream of the user's images; it has an order of its own, so places are not asked for."""

    kind: ClassVar[type[ImageStream]] = ImageStream

    def __init__(self, entry: StreamData, *, size: int, seed: int, place: Place, questions: int):
        given = entry.model_dump(exclude={"kind", "weight"})
        options = StreamOptions(**given)
        self.stream = self.kind(options, size, seed=seed, rank=place.rank, count=place.count)
        self.captioned = entry.caption is not None
        self.questioned = entry.question is not None
        self.seed = seed
        self.questions = questions

    def at(self, index: int) -> Sample:
        found = next(self.stream)
        draw = np.random.default_rng(seed_of(self.seed, index, 6))
        caption = None
        if found.captions:
            caption = found.captions[int(draw.integers(len(found.captions)))]
        asked = draw.permutation(len(found.questions))[: self.questions]
        return Sample(
            pixels=found.pixels,
            caption=caption,
            phrases=() if caption is None else (caption,),
            questions=tuple(found.questions[i] for i in asked),
        )

    def state(self) -> dict[str, Any]:
        return self.stream.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state)

    def skipped(self) -> list[str]:
        lines, self.stream.skipped = self.stream.skipped, []
        return lines
