"""The easy-VQA questions (Victor Zhou, MIT; PyPI package `easy-vqa`): an outside check.

One coloured circle, rectangle or triangle per 64 x 64 picture; 38,575 questions about 4,000
training pictures, 9,673 about 1,000 test pictures. The pictures come with the package.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unicompress.data.scene_questions import Question
from unicompress.errors import InputError
from unicompress.registry import require

SPLITS = ("train", "test")
EASY_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EASY_SHAPES = ("circle", "rectangle", "triangle")

# The closed set of answers of every kind of question.
EASY_ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": EASY_COLOURS,
    "shape": EASY_SHAPES,
    "yes-no": ("yes", "no"),
}
EASY_KINDS = tuple(EASY_ANSWERS)


@dataclass(frozen=True, eq=False)
class EasyVQASample:
    """One picture (uint8 [size, size, 3]) with all its questions."""

    pixels: NDArray[np.uint8]
    questions: tuple[Question, ...]


class EasyVQA:
    """The pictures of a split in the order of their numbers: `EasyVQA("test")[i]`, `len(...)`.

    Raises InputError for an unknown split and MissingDependencyError where easy-vqa is missing;
    IndexError behind the last picture, so that iteration ends.
    """

    def __init__(self, split: str = "test", size: int = 64):
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r} of easy-vqa: use one of {', '.join(SPLITS)}")
        if size < 1:
            raise InputError(f"pictures need at least one pixel per side, got size {size}")
        package = require("easy_vqa", extra="demo")
        self.split = split
        self.size = size
        asked: dict[int, list[Question]] = defaultdict(list)
        for text, answer, number in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
            asked[number].append(Question(_kind(answer), text, answer))
        paths = getattr(package, f"get_{split}_image_paths")()
        self._pictures = [(paths[number], tuple(asked[number])) for number in sorted(asked)]

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> EasyVQASample:
        path, questions = self._pictures[index]
        with Image.open(path) as image:
            picture = image.convert("RGB")
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return EasyVQASample(np.array(picture, dtype=np.uint8), questions)

    @property
    def question_count(self) -> int:
        """Questions of the whole split."""
        return sum(len(questions) for _, questions in self._pictures)


def _kind(answer: str) -> str:
    for kind, answers in EASY_ANSWERS.items():
        if answer in answers:
            return kind
    raise InputError(
        f"easy-vqa answers {answer!r}, which is new: install the easy-vqa of the demo extra"
    )
