"""Questions about scenes: true, unambiguous, and hard to answer without looking."""

from collections import Counter, defaultdict

import pytest

from unicompress.data.scene_questions import ANSWERS, CHANCE, KINDS, NUMBERS, Question, ask
from unicompress.data.scene_render import (
    HELD_OUT,
    Background,
    Dice,
    Scene,
    SceneObject,
    relation_between,
)
from unicompress.data.scenes import Scenes, sample_scene

COUNT = 500
PLACES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

Asked = list[tuple[Scene, tuple[Question, ...]]]


def collect(split: str) -> Asked:
    scenes = [sample_scene(split, 0, i) for i in range(COUNT)]
    return [(scene, ask(scene, Dice(1, i), 6)) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def train() -> Asked:
    return collect("train")


@pytest.fixture(scope="module")
def test() -> Asked:
    return collect("test")


def matching(scene: Scene, words: str) -> list[SceneObject]:
    """The objects that a phrase such as `large red object` fits; a reader of its own."""
    wanted = [word for word in words.split() if word not in ("object", "objects")]
    return [o for o in scene.objects if all(w in (o.colour, o.shape, o.size) for w in wanted)]


def the_one(scene: Scene, words: str) -> SceneObject:
    (thing,) = matching(scene, words)
    return thing


def between(text: str, before: str, after: str) -> str:
    start = text.index(before) + len(before)
    return text[start : text.index(after, start)]


def truth(scene: Scene, question: Question) -> str:
    """The answer, worked out from the words of the question alone."""
    text = question.text
    if text.startswith("is there a "):
        return "yes" if matching(scene, between(text, "is there a ", "?")) else "no"
    if text.startswith("how many "):
        return NUMBERS[len(matching(scene, between(text, "how many ", " are there?")))]
    if text.startswith("what color is the "):
        return the_one(scene, between(text, "what color is the ", "?")).colour
    if text.startswith("what shape is the "):
        return the_one(scene, between(text, "what shape is the ", "?")).shape
    if text.startswith("where is the "):
        first = the_one(scene, between(text, "where is the ", " relative to the "))
        second = the_one(scene, between(text, " relative to the ", "?"))
        (place,) = [p for p, word in PLACES.items() if relation_between(first, second) == word]
        return place
    if text.startswith("is the "):
        first = the_one(scene, between(text, "is the ", " larger than the "))
        second = the_one(scene, between(text, " larger than the ", "?"))
        return "yes" if first.extent > second.extent else "no"
    first = the_one(scene, between(text, "are the ", " and the "))
    second = the_one(scene, between(text, " and the ", " the same "))
    attribute = between(text, " the same ", "?")
    return "yes" if getattr(first, attribute) == getattr(second, attribute) else "no"


def test_every_answer_is_true_and_of_the_closed_set(train: Asked, test: Asked) -> None:
    for scene, questions in [*train, *test]:
        for question in questions:
            assert question.answer == truth(scene, question), question
            assert question.answer in ANSWERS[question.kind]


def test_every_kind_and_every_answer_occurs(train: Asked) -> None:
    seen = {(q.kind, q.answer) for _, questions in train for q in questions}
    assert seen == {(kind, answer) for kind in KINDS for answer in ANSWERS[kind]}


def test_questions_of_a_picture_differ_and_are_as_many_as_asked_for(train: Asked) -> None:
    for _, questions in train:
        assert len({q.text for q in questions}) == len(questions) == 6
    few = Scenes("train", questions_per_image=2)
    assert {len(few[i].questions) for i in range(30)} == {2}


def test_more_questions_than_a_scene_allows_end() -> None:
    lonely = SceneObject("red", "circle", "small", 0.5, 0.5, 0.25)
    scene = Scene(
        (lonely,), None, Background("checks", (120.0, 120.0, 120.0), 5.0, (3.0, 3.0), 0.0), 0
    )
    kinds = set()
    for seed in range(8):
        questions = ask(scene, Dice(seed), 500)
        assert 6 < len(questions) < 100
        kinds |= {q.kind for q in questions}
    assert kinds == {"exists", "count", "colour", "shape"}


def blind_accuracy(asked: Asked) -> dict[str, tuple[float, int]]:
    """Per kind: what the most frequent answer to each text in one half reaches on the other."""
    half = len(asked) // 2
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in asked[:half]:
        for q in questions:
            known[q.text][q.answer] += 1
            known[q.kind][q.answer] += 1  # for texts that the first half lacks
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _, questions in asked[half:]:
        for q in questions:
            guess = known[q.text if q.text in known else q.kind].most_common(1)[0][0]
            right[q.kind] += guess == q.answer
            total[q.kind] += 1
    return {kind: (right[kind] / total[kind], total[kind]) for kind in KINDS}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_text_alone_hardly_tells_the_answer(split: str, request: pytest.FixtureRequest) -> None:
    for kind, (accuracy, total) in blind_accuracy(request.getfixturevalue(split)).items():
        error = (CHANCE[kind] * (1 - CHANCE[kind]) / total) ** 0.5
        assert accuracy < CHANCE[kind] + 0.02 + 3 * error, kind


@pytest.mark.parametrize("kind", ["exists", "compare", "relation", "shape", "colour"])
def test_answers_are_balanced(kind: str, train: Asked, test: Asked) -> None:
    answers = Counter(q.answer for _, qs in [*train, *test] for q in qs if q.kind == kind)
    total, share = sum(answers.values()), 1 / len(ANSWERS[kind])
    error = (share * (1 - share) / total) ** 0.5
    for answer in ANSWERS[kind]:
        assert abs(answers[answer] / total - share) < 0.02 + 3 * error, answer


def test_each_form_of_a_count_is_balanced(train: Asked, test: Asked) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in [*train, *test]:
        for q in questions:
            if q.kind == "count":
                answers[q.text][q.answer] += 1
    for text, counts in answers.items():
        assert len(counts) == 3, text
        error = (2 / 9 / counts.total()) ** 0.5
        for count in counts.values():
            assert abs(count / counts.total() - 1 / 3) < 4 * error, text


def test_a_no_differs_from_an_object_in_one_attribute(train: Asked) -> None:
    for scene, questions in train:
        for q in questions:
            if q.kind == "exists" and q.answer == "no":
                wanted = set(between(q.text, "is there a ", "?").split()) - {"object"}
                kept = max(len(wanted & {o.colour, o.shape, o.size}) for o in scene.objects)
                assert kept == len(wanted) - 1


def names_held_out(question: Question) -> bool:
    words = question.text.rstrip("?").split()
    return any(shape in words and colour in words for shape, colour in HELD_OUT)


def test_training_questions_never_name_a_held_out_pair(train: Asked, test: Asked) -> None:
    assert not any(names_held_out(q) for _, questions in train for q in questions)
    named = Counter(q.answer for _, questions in test for q in questions if names_held_out(q))
    assert named.total() > 30
    assert abs(named["yes"] / named.total() - 0.5) < 0.25  # neither answer gives it away
