"""The reader of pictures: right on true pictures, and strict where something is missing."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from unicompress.data.scene_checker import UNKNOWN, SceneScore, mean_scores, read_scene, score
from unicompress.data.scenes import Scene, SceneObject, Scenes, caption, parse_caption, render
from unicompress.errors import InputError

Pixels = NDArray[np.uint8]
COUNT = 100  # of val and of test each; every fourth has a held-out pair


@pytest.fixture(scope="module")
def truths() -> list[tuple[Scene, Pixels]]:
    samples = [Scenes(s, questions_per_image=0)[i] for s in ("val", "test") for i in range(COUNT)]
    return [(sample.scene, sample.pixels) for sample in samples]


def blurred(pixels: Pixels) -> Pixels:
    return ndimage.gaussian_filter(pixels, (1.2, 1.2, 0))


def compressed(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def noisy(pixels: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 15, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def faded(pixels: Pixels) -> Pixels:
    grey = pixels.mean(axis=-1, keepdims=True)
    return (grey + 0.75 * (pixels - grey)).astype(np.uint8)


def test_true_pictures_are_read_whole(truths: list[tuple[Scene, Pixels]]) -> None:
    means = mean_scores([score(pixels, scene) for scene, pixels in truths])
    assert means["whole"] >= 0.995
    assert min(means.values()) >= 0.995


@pytest.mark.parametrize("damage", [blurred, compressed, noisy, faded])
def test_mildly_damaged_pictures_are_read_too(
    damage: Callable[[Pixels], Pixels], truths: list[tuple[Scene, Pixels]]
) -> None:
    means = mean_scores([score(damage(pixels), scene) for scene, pixels in truths[::4]])
    assert means["whole"] >= 0.97


@pytest.mark.parametrize("size", [32, 96, 160])
def test_pictures_of_other_sizes_are_read(size: int) -> None:
    data = Scenes("test", size=size, questions_per_image=0)
    assert all(score(s.pixels, s.scene).whole for s in (data[i] for i in range(25)))


def test_places_and_extents_are_found(truths: list[tuple[Scene, Pixels]]) -> None:
    for scene, pixels in truths[:60]:
        found = {thing.colour: thing for thing in read_scene(pixels)}
        for thing in scene.objects:
            seen = found[thing.colour]
            assert abs(seen.x - thing.x) * 64 < 0.5
            assert abs(seen.y - thing.y) * 64 < 0.7
            assert abs(seen.extent - thing.extent) * 64 < 1.5
            assert seen.fit > 0.9


def test_an_empty_picture_has_no_objects(truths: list[tuple[Scene, Pixels]]) -> None:
    scene, _ = truths[0]
    assert read_scene(render(replace(scene, objects=()))) == ()
    assert read_scene(np.zeros((64, 64, 3), np.uint8)) == ()
    assert score(np.full((64, 64, 3), 255, np.uint8), replace(scene, relation=None)) == SceneScore(
        colour=0.0, shape=0.0, size=0.0, count=False, relation=None, whole=False
    )


def test_a_shapeless_blob_has_no_shape() -> None:
    pixels = np.full((64, 64, 3), 130, np.uint8)
    pixels[10:14, 4:60] = pixels[10:50, 4:8] = (225, 35, 35)
    (blob,) = read_scene(pixels)
    assert (blob.colour, blob.shape) == ("red", UNKNOWN)


# --- one mistake at a time ---


@pytest.fixture
def pair() -> Scene:
    """A large red circle left of a small blue square."""
    red = SceneObject("red", "circle", "large", 0.3, 0.5, 26 / 64)
    blue = SceneObject("blue", "square", "small", 0.75, 0.5, 16 / 64)
    return replace(Scenes("val").scene(1), objects=(red, blue), relation=None)


WISH = "a large red circle and a small blue square; the red circle is left of the blue square"


def changed(pair: Scene, **changes: object) -> Pixels:
    """The picture of the pair with its blue square changed."""
    return render(replace(pair, objects=(pair.objects[0], replace(pair.objects[1], **changes))))


def test_what_was_asked_for(pair: Scene) -> None:
    assert score(render(pair), parse_caption(WISH)) == SceneScore(1.0, 1.0, 1.0, True, True, True)
    assert caption(pair) == WISH.split(";")[0]


def test_a_wrong_shape(pair: Scene) -> None:
    found = score(changed(pair, shape="triangle"), parse_caption(WISH))
    assert found == SceneScore(1.0, 0.5, 1.0, True, True, False)


def test_a_wrong_size(pair: Scene) -> None:
    found = score(changed(pair, extent=26 / 64), parse_caption(WISH))
    assert found == SceneScore(1.0, 1.0, 0.5, True, True, False)


def test_a_wrong_colour_counts_against_its_shape_and_relation_too(pair: Scene) -> None:
    found = score(changed(pair, colour="green"), parse_caption(WISH))
    assert found == SceneScore(0.5, 0.5, 0.5, True, False, False)


def test_a_wrong_place_breaks_only_the_relation(pair: Scene) -> None:
    above = score(changed(pair, x=0.3, y=0.15), parse_caption(WISH))
    assert above == SceneScore(1.0, 1.0, 1.0, True, False, False)
    swapped = WISH.replace("left of", "right of")
    assert score(render(pair), parse_caption(swapped)).relation is False


def test_a_missing_and_a_surplus_object(pair: Scene) -> None:
    missing = score(render(replace(pair, objects=pair.objects[:1])), parse_caption(WISH))
    assert missing == SceneScore(0.5, 0.5, 0.5, False, False, False)
    twin = replace(pair.objects[1], y=0.15)
    surplus = score(render(replace(pair, objects=(*pair.objects, twin))), parse_caption(WISH))
    assert (surplus.count, surplus.whole) == (False, False)


@pytest.mark.parametrize(
    ("word", "places"),
    [
        ("left of", ((0.3, 0.5), (0.75, 0.5))),
        ("right of", ((0.75, 0.5), (0.3, 0.5))),
        ("above", ((0.5, 0.25), (0.5, 0.75))),
        ("below", ((0.5, 0.75), (0.5, 0.25))),
    ],
)
def test_all_four_relations(
    word: str, places: tuple[tuple[float, float], ...], pair: Scene
) -> None:
    objects = tuple(replace(o, x=x, y=y) for o, (x, y) in zip(pair.objects, places, strict=True))
    pixels = render(replace(pair, objects=objects))
    for told in ("left of", "right of", "above", "below"):
        wish = parse_caption(WISH.replace("left of", told))
        assert score(pixels, wish).relation is (told == word)


def test_means_leave_out_relations_nobody_asked_for() -> None:
    told = SceneScore(1.0, 1.0, 0.5, True, False, False)
    untold = SceneScore(1.0, 0.0, 0.5, True, None, False)
    assert mean_scores([told, untold, untold])["relation"] == 0.0
    assert "relation" not in mean_scores([untold])
    assert mean_scores([told, untold])["shape"] == 0.5
    with pytest.raises(InputError, match="no scores to average"):
        mean_scores([])


def test_other_arrays_are_refused() -> None:
    with pytest.raises(InputError, match=r"got float32 \[64, 64, 3\]: convert the picture"):
        read_scene(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(InputError, match=r"got uint8 \[3, 64, 64\]"):
        read_scene(np.zeros((3, 64, 64), np.uint8))
