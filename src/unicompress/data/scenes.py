"""The built-in data: generated scenes with captions and questions, the same for the same index.

A scene is 1 to 3 objects of distinct colours (`scene_render`), told by a caption (`scene_captions`)
and asked about (`scene_questions`). Nothing is downloaded or stored.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from unicompress.data.scene_captions import (
    MAX_OBJECTS,
    ParsedCaption,
    caption,
    parse_caption,
    phrases,
)
from unicompress.data.scene_questions import Question, ask
from unicompress.data.scene_render import (
    CLEAR,
    COLOURS,
    EXTENTS,
    GREY,
    HELD_OUT,
    SHAPES,
    SIZES,
    TEXTURE,
    TEXTURES,
    TINT,
    Attributes,
    Background,
    Dice,
    Pixels,
    Relation,
    Scene,
    SceneObject,
    relation_between,
    render,
    seen_shapes,
)
from unicompress.errors import InputError

__all__ = [
    "Attributes",
    "ParsedCaption",
    "Question",
    "Relation",
    "Scene",
    "SceneObject",
    "SceneSample",
    "Scenes",
    "caption",
    "parse_caption",
    "phrases",
    "render",
    "sample_scene",
    "split_of",
]

# Of 16 equal parts of all possible layouts val and test own one each, so that no picture of theirs
# differs from a training picture by its background alone.
PARTS = 16
SPLITS = {"train": tuple(range(2, PARTS)), "val": (0,), "test": (1,)}
HELD_OUT_EVERY = 4  # in val and test, every fourth scene has a held-out (shape, colour) pair

CELLS = 16  # centres lie on this lattice, 4 pixels at 64: small models learn edges sooner
GAP = 1 / 64  # between bounding boxes
MARGIN = 0.5 / 64  # to the picture's edge
TRIES = {1: 16, 2: 64, 3: 256}  # layouts drawn at once, by number of objects


@dataclass(frozen=True, eq=False)
class SceneSample:
    """One picture (uint8 [size, size, 3]) with everything said and asked about it."""

    pixels: Pixels
    scene: Scene
    caption: str
    questions: tuple[Question, ...]


class Scenes:
    """Endless, random-access scenes: `Scenes("train")[i]` for every i >= 0.

    The sample is a function of (seed, split, i) alone. The splits share no layout under any seed.
    Raises InputError for an unknown split or a negative index.
    """

    def __init__(self, split: str, seed: int = 0, size: int = 64, questions_per_image: int = 6):
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r} of scenes: use one of {', '.join(SPLITS)}")
        if seed < 0 or questions_per_image < 0:
            raise InputError(
                "seed and questions_per_image must be at least 0, "
                f"got {seed} and {questions_per_image}"
            )
        self.split = split
        self.seed = seed
        self.size = size
        self.questions_per_image = questions_per_image

    def __getitem__(self, index: int) -> SceneSample:
        scene, dice = _sample(self.split, self.seed, index)
        return SceneSample(
            pixels=render(scene, self.size),
            scene=scene,
            caption=caption(scene),
            questions=ask(scene, dice, self.questions_per_image),
        )

    def scene(self, index: int) -> Scene:
        """The scene alone, without drawing it."""
        return _sample(self.split, self.seed, index)[0]


def sample_scene(split: str, seed: int, index: int) -> Scene:
    """The scene of `Scenes(split, seed)[index]`."""
    return Scenes(split, seed).scene(index)


def split_of(scene: Scene) -> str:
    """The only split that may contain this scene, by its objects and their places."""
    cells = np.asarray([[round(o.x * CELLS), round(o.y * CELLS)] for o in scene.objects])
    part = int(_part(cells[None], _codes(scene.objects))[0])
    return next(split for split, parts in SPLITS.items() if part in parts)


def _codes(things: tuple[Attributes, ...] | list[Attributes]) -> NDArray[np.int64]:
    """One number per object for its colour, shape and size."""
    return np.asarray(
        [
            (COLOURS.index(o.colour) * len(SHAPES) + SHAPES.index(o.shape)) * 2
            + SIZES.index(o.size)
            for o in things
        ]
    )


def _part(cells: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the PARTS the layouts [l, objects, 2] belong to; the objects' order is no matter."""
    values = ((codes * (CELLS + 1) + cells[..., 0]) * (CELLS + 1) + cells[..., 1]).astype(np.uint64)
    mixed = (values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.sum(axis=-1) % np.uint64(PARTS)).astype(np.int64)


def _sample(split: str, seed: int, index: int) -> tuple[Scene, Dice]:
    """The scene, and the generator to go on with for its questions."""
    if index < 0:
        raise InputError(f"scenes are numbered from 0, got {index}")
    dice = Dice(seed, list(SPLITS).index(split), index)
    held_out = split != "train" and index % HELD_OUT_EVERY == 0
    things = _attributes(dice, held_out)
    cells = _layout(dice, things, SPLITS[split])
    objects = tuple(
        SceneObject(o.colour, o.shape, o.size, x / CELLS, y / CELLS, EXTENTS[o.size])
        for o, (x, y) in zip(things, cells.tolist(), strict=True)
    )
    scene = Scene(
        objects=objects,
        relation=_relation(dice, objects),
        background=_background(dice),
        noise_seed=int(dice.roll() * 2**53),
        has_held_out=held_out,
    )
    return scene, dice


def _attributes(dice: Dice, held_out: bool) -> list[Attributes]:
    """1 to 3 objects of distinct colours in random order, every attribute balanced."""
    count = dice.pick(range(1, MAX_OBJECTS + 1))
    colours = dice.shuffled(COLOURS)[:count]
    things = []
    if held_out:
        shape, colour = dice.pick(sorted(HELD_OUT))
        colours = [colour, *(other for other in colours if other != colour)][:count]
        things.append(Attributes(colours.pop(0), shape, dice.pick(SIZES)))
    things += [Attributes(c, dice.pick(seen_shapes(c)), dice.pick(SIZES)) for c in colours]
    return dice.shuffled(things)


def _layout(dice: Dice, things: list[Attributes], parts: tuple[int, ...]) -> NDArray[np.int64]:
    """Centres on the lattice, [objects, 2]: inside, apart, one clear relation, right split."""
    codes = _codes(things)
    owned = np.isin(np.arange(PARTS), parts)
    half = [EXTENTS[o.size] * CELLS / 2 for o in things]
    low = np.asarray([math.ceil(h + MARGIN * CELLS) for h in half])
    shape = (TRIES[len(things)], len(things), 2)
    while True:
        drawn = dice.generator.random(shape, dtype=np.float32)
        cells = low[:, None] + (drawn * (CELLS - 2 * low + 1)[:, None]).astype(np.int64)
        good = owned[_part(cells, codes)]
        related = len(things) == 1
        for i, j in combinations(range(len(things)), 2):
            apart = np.abs(cells[:, i] - cells[:, j])
            across, down = apart[:, 0], apart[:, 1]
            good &= np.maximum(across, down) >= half[i] + half[j] + GAP * CELLS
            related |= np.abs(across - down) >= CLEAR * CELLS
        good &= related
        if good.any():
            return cells[int(good.argmax())]


def _relation(dice: Dice, objects: tuple[SceneObject, ...]) -> Relation | None:
    """One clear relation at random, both directions alike; None for a single object."""
    told = [
        Relation(i, word, j)
        for i, first in enumerate(objects)
        for j, second in enumerate(objects)
        if i != j and (word := relation_between(first, second))
    ]
    return dice.pick(told) if told else None


def _background(dice: Dice) -> Background:
    texture, grey = dice.pick(TEXTURES), dice.between(*GREY)
    red, green, blue = (grey + dice.between(-TINT, TINT) for _ in range(3))
    angle, waves = dice.between(0.0, 2 * math.pi), dice.between(2.0, 5.0)
    return Background(
        texture=texture,
        level=(red, green, blue),
        amplitude=dice.between(*TEXTURE),
        wave=(waves * math.cos(angle), waves * math.sin(angle)),
        phase=dice.between(0.0, 2 * math.pi),
    )
