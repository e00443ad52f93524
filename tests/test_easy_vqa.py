"""The wrapper of the easy-vqa package."""

import sys

import numpy as np
import pytest

from unicompress.data.easy_vqa import EASY_ANSWERS, EasyVQA
from unicompress.errors import InputError, MissingDependencyError


@pytest.fixture(scope="module")
def test_split() -> EasyVQA:
    pytest.importorskip("easy_vqa")
    return EasyVQA("test")


def test_every_test_question_is_there_with_the_kind_of_its_answer(test_split: EasyVQA) -> None:
    kinds = [q.kind for _, questions in test_split._pictures for q in questions]
    assert len(test_split) == 1000
    assert test_split.question_count == len(kinds) == 9673
    assert {kind: kinds.count(kind) for kind in EASY_ANSWERS} == {
        "colour": 1280,
        "shape": 1257,
        "yes-no": 7136,
    }


def test_questions_stay_with_their_picture(test_split: EasyVQA) -> None:
    sample = test_split[0]
    assert sample.pixels.shape == (64, 64, 3)
    assert sample.pixels.dtype == np.uint8
    asked = {q.text: q.answer for q in sample.questions}
    assert asked["what is the red shape?"] == "triangle"
    assert asked["what is the color of the triangle?"] == "red"
    red, green, blue = sample.pixels.reshape(-1, 3).astype(int).T
    assert ((red - green > 60) & (red - blue > 60)).sum() > 50  # the red triangle is in the picture


def test_the_same_picture_twice_and_at_another_size(test_split: EasyVQA) -> None:
    np.testing.assert_array_equal(test_split[7].pixels, test_split[7].pixels)
    larger = EasyVQA("test", size=96)[7]
    assert larger.pixels.shape == (96, 96, 3)
    assert larger.questions == test_split[7].questions
    middle = larger.pixels.mean() - test_split[7].pixels.mean()
    assert abs(middle) < 2


def test_iteration_ends(test_split: EasyVQA) -> None:
    with pytest.raises(IndexError):
        test_split[len(test_split)]


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="unknown split 'val' of easy-vqa: use one of train, test"):
        EasyVQA("val")
    with pytest.raises(InputError, match="at least one pixel per side, got size 0"):
        EasyVQA("test", size=0)


def test_a_missing_package_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'unicompress\[demo\]'"):
        EasyVQA("test")
