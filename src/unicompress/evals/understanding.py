"""Questions about pictures: accuracy by kind, beside what a model reaches without looking."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.data.easy_vqa import EasyVQA
from unicompress.data.images import to_tensor
from unicompress.data.scene_questions import CHANCE, Question
from unicompress.data.scene_render import Pixels
from unicompress.data.scenes import Scenes
from unicompress.errors import InputError
from unicompress.evals.result import Progress
from unicompress.evals.statistics import (
    Interval,
    PairedDifference,
    bootstrap_mean,
    paired_difference,
)


@runtime_checkable
class Answerer(Protocol):
    """Anything that answers lists of questions about pictures, `UnifiedModel` first of all."""

    def answer(self, images: Tensor, questions: list[list[str]]) -> Any:
        """A list of answers for each picture's list of questions, none of which sees another."""


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Pictures, and questions that each belong to one of them."""

    name: str
    pictures: tuple[Pixels, ...]  # uint8 [h, w, 3], all of one size
    held_out: tuple[bool, ...]  # per picture: shows attributes that training never combined
    questions: tuple[Question, ...]
    owners: tuple[int, ...]  # the picture of each question

    def __post_init__(self) -> None:
        if not self.questions:
            raise InputError(f"no questions in {self.name}: ask for at least one")

    @classmethod
    def collect(
        cls,
        name: str,
        items: Iterable[tuple[Pixels, Sequence[Question], bool]],
        count: int | None = None,
    ) -> "QuestionSet":
        """The first `count` questions (all by default) of (pixels, questions, held out) items."""
        pictures: list[Pixels] = []
        held_out: list[bool] = []
        questions: list[Question] = []
        owners: list[int] = []
        for pixels, asked, unseen in items:
            left = len(asked) if count is None else count - len(questions)
            if left <= 0:
                break
            questions += asked[:left]
            owners += [len(pictures)] * len(asked[:left])
            pictures.append(pixels)
            held_out.append(unseen)
        return cls(name, tuple(pictures), tuple(held_out), tuple(questions), tuple(owners))

    @classmethod
    def scenes(
        cls, count: int = 2000, *, split: str = "test", seed: int = 0, size: int = 64
    ) -> "QuestionSet":
        """`count` questions about scenes of a split, six to a picture; every fourth is held out."""
        data = Scenes(split, seed=seed, size=size)
        samples = (data[index] for index in numbers())
        items = ((s.pixels, s.questions, s.scene.has_held_out) for s in samples)
        return cls.collect("scenes", items, count)

    @classmethod
    def easy_vqa(
        cls, count: int | None = None, *, split: str = "test", size: int = 64
    ) -> "QuestionSet":
        """The questions of the easy-vqa package, 9,673 in its test split."""
        data = EasyVQA(split, size=size)
        samples = (data[index] for index in range(len(data)))
        return cls.collect("easy-vqa", ((s.pixels, s.questions, False) for s in samples), count)

    def pixels(self, indices: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        """The numbered pictures in [-1, 1]."""
        return torch.stack([to_tensor(self.pictures[index]) for index in indices])


@dataclass(frozen=True)
class Accuracies:
    """Shares of right answers with their intervals, pictures resampled."""

    overall: Interval
    by_kind: dict[str, Interval]


@dataclass(frozen=True)
class UnderstandingScore:
    """What one model answered to one set of questions."""

    name: str
    accuracy: Accuracies
    question_only: Accuracies | None  # the same questions about a grey picture
    shuffled_image: Accuracies | None  # the same questions, each about another picture
    seen: Interval | None  # pictures whose attributes all occur together in training
    held_out: Interval | None
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    owners: tuple[int, ...]

    def compared_with(self, dense: "UnderstandingScore", *, seed: int = 0) -> PairedDifference:
        """This model's accuracy minus the dense model's on the same questions."""
        if self.owners != dense.owners or self.name != dense.name:
            raise InputError("a paired comparison needs both models to answer the same questions")
        return paired_difference(dense.correct, self.correct, groups=self.owners, seed=seed)

    def summary(self) -> dict[str, object]:
        """For JSON; per-question correctness is one string of 0 and 1."""
        kinds = self.accuracy.by_kind if self.name == "scenes" else ()
        return {
            "questions": len(self.correct),
            "pictures": len(set(self.owners)),
            "accuracy": self.accuracy,
            "question_only": self.question_only,
            "shuffled_image": self.shuffled_image,
            "best_without_looking": {kind: CHANCE[kind] for kind in kinds if kind in CHANCE},
            "seen": self.seen,
            "held_out": self.held_out,
            "correct": "".join(str(int(right)) for right in self.correct),
        }


def evaluate_understanding(
    model: Answerer,
    tests: QuestionSet,
    *,
    batch: int = 32,
    baselines: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> UnderstandingScore:
    """Ask everything, greedily; with `baselines`, again without the right picture."""
    answers = ask_all(model, tests, batch=batch, progress=progress)
    correct = marked(tests, answers)
    blind = shuffled = None
    if baselines:
        blind = _baseline(model, tests, None, "question-only baseline", batch, seed, progress)
    if baselines and len(tests.pictures) > 1:
        # Half a turn round the list: everybody gets another picture, and the same one each time.
        shift = len(tests.pictures) // 2
        shuffled = _baseline(model, tests, shift, "shuffled-image baseline", batch, seed, progress)
    unseen = np.asarray(tests.held_out)[list(tests.owners)]
    right, owners = np.asarray(correct), np.asarray(tests.owners)
    return UnderstandingScore(
        name=tests.name,
        accuracy=accuracies(tests, correct, seed),
        question_only=blind,
        shuffled_image=shuffled,
        seen=_part(right, owners, ~unseen, seed) if unseen.any() else None,
        held_out=_part(right, owners, unseen, seed) if unseen.any() else None,
        answers=tuple(answers),
        correct=tuple(correct),
        owners=tests.owners,
    )


def ask_all(
    model: Answerer,
    tests: QuestionSet,
    *,
    pictures: Callable[[list[int]], Tensor] | None = None,
    batch: int = 32,
    label: str = "questions",
    progress: Progress | None = None,
) -> list[str]:
    """The model's answers in the order of the questions; every question stands alone.

    `pictures` may hand over other pictures than the right ones; a batch counts pictures.
    """
    pictures = pictures or tests.pixels
    asked: list[list[str]] = [[] for _ in tests.pictures]
    for owner, question in zip(tests.owners, tests.questions, strict=True):
        asked[owner].append(question.text)
    said: list[list[str]] = []
    for start in range(0, len(asked), batch):
        part = list(range(start, min(start + batch, len(asked))))
        said += model.answer(pictures(part), [asked[index] for index in part])
        if progress:
            progress(label, len(said), len(asked))
    left = [iter(answers) for answers in said]
    return [next(left[owner]) for owner in tests.owners]


def accuracies(tests: QuestionSet, correct: Sequence[bool], seed: int = 0) -> Accuracies:
    """Overall and by kind, kinds in order of their name."""
    right, owners = np.asarray(correct), np.asarray(tests.owners)
    kinds = np.asarray([question.kind for question in tests.questions])
    return Accuracies(
        overall=bootstrap_mean(right, groups=owners, seed=seed),
        by_kind={
            str(kind): bootstrap_mean(right[kinds == kind], groups=owners[kinds == kind], seed=seed)
            for kind in sorted(set(kinds.tolist()))
        },
    )


def marked(tests: QuestionSet, answers: Sequence[str]) -> list[bool]:
    """Which answers are right, without regard to case and spaces around."""
    return [
        said.strip().lower() == question.answer.strip().lower()
        for said, question in zip(answers, tests.questions, strict=True)
    ]


def _part(right: np.ndarray, owners: np.ndarray, mask: np.ndarray, seed: int) -> Interval | None:
    if not mask.any():
        return None
    return bootstrap_mean(right[mask], groups=owners[mask], seed=seed)


def _baseline(
    model: Answerer,
    tests: QuestionSet,
    shift: int | None,
    label: str,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> Accuracies:
    """Accuracy with a grey picture (`shift` None) or the one `shift` places further on."""

    def pictures(owners: list[int]) -> Tensor:
        if shift is None:
            return torch.zeros_like(tests.pixels(owners[:1])).expand(len(owners), -1, -1, -1)
        return tests.pixels([(owner + shift) % len(tests.pictures) for owner in owners])

    answers = ask_all(model, tests, pictures=pictures, batch=batch, label=label, progress=progress)
    return accuracies(tests, marked(tests, answers), seed)
