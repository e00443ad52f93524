"""Generated scenes: the law they are drawn from, their pictures, their captions."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from unicompress.data.scene_captions import MAX_OBJECTS
from unicompress.data.scene_render import (
    COLOURS,
    GREY,
    HELD_OUT,
    NOISE,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURE,
    TINT,
    Background,
    coverage,
    relation_between,
)
from unicompress.data.scenes import (
    GAP,
    SPLITS,
    Attributes,
    ParsedCaption,
    Relation,
    Scene,
    SceneObject,
    Scenes,
    caption,
    parse_caption,
    phrases,
    render,
    sample_scene,
    split_of,
)
from unicompress.errors import InputError

COUNT = 300


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Scene]]:
    return {split: [sample_scene(split, 0, i) for i in range(COUNT)] for split in SPLITS}


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.shape, thing.colour) for thing in scene.objects}


# --- the law ---


def test_a_sample_depends_on_seed_split_and_index_alone() -> None:
    first = Scenes("train", seed=3)
    forwards = [first[i] for i in range(4)]
    backwards = [Scenes("train", seed=3)[i] for i in reversed(range(4))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert (one.scene, one.caption, one.questions) == (
            other.scene,
            other.caption,
            other.questions,
        )
    for changed in (Scenes("train", seed=4)[0], Scenes("val", seed=3)[0], first[1]):
        assert changed.scene != forwards[0].scene


def test_a_scene_is_the_same_on_every_machine() -> None:
    assert Scenes("test")[1].caption == "a small cyan square"
    assert phrases(sample_scene("train", 7, 123456)) == ["small purple cross"]


def test_the_number_of_questions_changes_no_picture() -> None:
    few, many = Scenes("val", questions_per_image=0)[2], Scenes("val", questions_per_image=6)[2]
    assert few.questions == ()
    np.testing.assert_array_equal(few.pixels, many.pixels)


def test_the_splits_share_no_layout(drawn: dict[str, list[Scene]]) -> None:
    layouts = {
        split: {frozenset(scene.objects) for scene in scenes} for split, scenes in drawn.items()
    }
    for one, other in combinations(SPLITS, 2):
        assert not layouts[one] & layouts[other]
    # Not by luck: a layout belongs to one split under every seed and in every order of its objects.
    for split, scenes in drawn.items():
        assert {split_of(scene) for scene in scenes} == {split}
    turned = replace(drawn["val"][0], objects=drawn["val"][0].objects[::-1])
    assert split_of(turned) == split_of(sample_scene("val", 99, 0)) == "val"


def test_training_never_shows_a_held_out_pair(drawn: dict[str, list[Scene]]) -> None:
    shown = set().union(*(pairs(scene) for scene in drawn["train"]))
    assert shown == set(product(SHAPES, COLOURS)) - HELD_OUT


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_quarter_of_val_and_test_has_a_held_out_pair(
    split: str, drawn: dict[str, list[Scene]]
) -> None:
    with_pair = [bool(pairs(scene) & HELD_OUT) for scene in drawn[split]]
    assert with_pair == [scene.has_held_out for scene in drawn[split]]
    assert sum(with_pair) == COUNT / 4
    assert set().union(*(pairs(scene) for scene in drawn[split])) >= HELD_OUT


def test_numbers_and_attributes_are_balanced(drawn: dict[str, list[Scene]]) -> None:
    scenes = [*drawn["train"], *drawn["val"], *drawn["test"]]
    things = [thing for scene in scenes for thing in scene.objects]
    told = [scene.relation.word for scene in scenes if scene.relation]
    for values, seen in (
        (range(1, MAX_OBJECTS + 1), [len(scene.objects) for scene in scenes]),
        (COLOURS, [thing.colour for thing in things]),
        (SHAPES, [thing.shape for thing in things]),
        (SIZES, [thing.size for thing in things]),
        (RELATIONS, told),
    ):
        share = 1 / len(values)
        error = (share * (1 - share) / len(seen)) ** 0.5
        for value in values:
            assert abs(Counter(seen)[value] / len(seen) - share) < 5 * error, value


def test_objects_are_inside_apart_and_of_distinct_colours(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["train"]:
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            for place in (thing.x, thing.y):
                assert thing.extent / 2 < place < 1 - thing.extent / 2
        for one, other in combinations(scene.objects, 2):
            wide = max(abs(one.x - other.x), abs(one.y - other.y))
            assert wide >= (one.extent + other.extent) / 2 + GAP


def test_every_scene_with_company_tells_a_true_relation(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["val"]:
        if len(scene.objects) == 1:
            assert scene.relation is None
            continue
        assert scene.relation is not None
        first, second = (scene.objects[i] for i in (scene.relation.first, scene.relation.second))
        assert relation_between(first, second) == scene.relation.word


@pytest.mark.parametrize(
    ("dx", "dy", "word"),
    [
        (-0.4, 0.1, "left of"),
        (0.4, 0.1, "right of"),
        (0.1, -0.4, "above"),
        (0.1, 0.4, "below"),
        (0.3, 0.3, None),
        (0.3, -0.2, None),
    ],
)
def test_a_relation_is_named_only_where_it_is_clear(dx: float, dy: float, word: str | None) -> None:
    here = SceneObject("red", "circle", "small", 0.5, 0.5, 0.25)
    assert relation_between(replace(here, x=0.5 + dx, y=0.5 + dy), here) == word


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="unknown split 'dev' of scenes: use one of train, val"):
        Scenes("dev")
    with pytest.raises(InputError, match="numbered from 0, got -1"):
        Scenes("train")[-1]
    with pytest.raises(InputError, match="at least 0, got -2 and 6"):
        Scenes("train", seed=-2)
    with pytest.raises(InputError, match="at least 32 pixels per side, got 16"):
        Scenes("train", size=16)[0]


# --- the pictures ---

PLAIN = Background("gradient", (120.0, 120.0, 120.0), 0.0, (1.0, 1.0), 0.0)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_a_square_covers_its_pixels_and_no_other(size: int) -> None:
    red = SceneObject("red", "square", "large", 0.5, 0.5, 0.5)
    picture = render(Scene((red,), None, PLAIN, noise_seed=1), size).astype(int)
    assert picture.shape == (size, size, 3)
    inside = np.zeros((size, size), bool)
    inside[size // 4 : size - size // 4, size // 4 : size - size // 4] = True
    assert np.abs(picture[inside] - PALETTE["red"]).max() <= NOISE + 1
    assert np.abs(picture[~inside] - 120).max() <= NOISE + 1


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", np.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 0.4375)],
)
@pytest.mark.parametrize("extent", [16.0, 26.0])
def test_coverage_has_the_area_of_the_shape(shape: str, area: float, extent: float) -> None:
    axis = np.arange(40) - 19.3
    cover = coverage(shape, axis[None, :], axis[:, None], extent)
    assert cover.sum() == pytest.approx(area * extent**2, rel=0.03)
    rows, columns = np.nonzero(cover > 0.5)
    assert extent - 2 <= np.ptp(rows) + 1 <= extent + 1
    assert extent - 2 <= np.ptp(columns) + 1 <= extent + 1


def test_a_larger_picture_shows_the_same_scene() -> None:
    small, large = Scenes("val", size=64)[1], Scenes("val", size=128)[1]
    assert small.scene == large.scene
    halved = large.pixels.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small.pixels).mean() < 4


def test_no_value_can_leave_the_range_of_a_byte() -> None:
    greys = (GREY[0] - TINT - TEXTURE[1], GREY[1] + TINT + TEXTURE[1])
    values = [value for colour in PALETTE.values() for value in colour]
    assert min(*greys, *values) - NOISE >= 0
    assert max(*greys, *values) + NOISE <= 255


# --- captions ---


def test_captions_are_short_and_parse_back(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["test"]:
        text = caption(scene)
        assert text == text.lower()
        assert len(text.split()) <= 22
        parsed = parse_caption(text)
        assert [thing.phrase for thing in parsed.objects] == phrases(scene)
        assert parsed.relation == scene.relation
        assert caption(parsed) == text


def test_the_three_forms_of_a_caption() -> None:
    things = (
        Attributes("red", "circle", "large"),
        Attributes("blue", "square", "small"),
        Attributes("green", "cross", "large"),
    )
    assert caption(ParsedCaption(things[:1], None)) == "a large red circle"
    assert caption(ParsedCaption(things[:2], Relation(1, "above", 0))) == (
        "a large red circle and a small blue square; the blue square is above the red circle"
    )
    assert caption(ParsedCaption(things, Relation(0, "left of", 1))) == (
        "a large red circle, a small blue square and a large green cross; "
        "the red circle is left of the blue square"
    )
    assert phrases(ParsedCaption(things, None)) == [
        "large red circle",
        "small blue square",
        "large green cross",
    ]


def test_case_spacing_and_a_full_stop_do_not_matter() -> None:
    loose = parse_caption("  A large RED circle and a small blue square .")
    assert loose == parse_caption("a large red circle and a small blue square")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a large pink circle", "found 'pink' where red or yellow or green"),
        ("a huge red circle", "found 'huge' where small or large was expected"),
        ("the large red circle", "found 'the' where a was expected"),
        ("a large red", "found the end where circle or square or triangle or cross"),
        ("", "found the end where a was expected"),
        ("a large red circle on a table", "found 'on' where the end was expected"),
        (
            "a large red circle and a small blue square; the red circle is near the blue square",
            "found 'near' where left or right or above or below was expected",
        ),
        (
            "a large red circle; the red circle is above the blue square",
            "speaks of the blue square, which is not among its objects",
        ),
        (
            "a large red circle; the red circle is above the red circle",
            "compares the red circle with itself",
        ),
        ("a large red circle and a small red square", "share a colour"),
        (
            "a large red circle, a small blue square, a small green cross and a small cyan cross",
            "cannot draw 4 objects",
        ),
    ],
)
def test_text_outside_the_grammar_names_its_word(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_caption(text)
