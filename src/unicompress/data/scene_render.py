"""Scenes as values, and their pictures: up to three coloured shapes on a grey texture.

Geometry is in fractions of the picture side, so one scene renders at any size; the pixel counts in
the comments are for 64 pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from unicompress.errors import InputError

# Six hues far apart and saturated, so that a reconstruction that loses texture still keeps them.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "yellow": (240, 210, 30),
    "green": (35, 165, 50),
    "cyan": (40, 205, 220),
    "blue": (45, 70, 225),
    "purple": (190, 50, 205),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")
# 16 and 24 pixels: the small one still covers 2 x 2 cells of 8 pixels, which is what one pooled
# token stands for, three large ones still fit, and edges fall on the grid of 4 pixels.
EXTENTS = {"small": 16 / 64, "large": 24 / 64}
SIZES = tuple(EXTENTS)
RELATIONS = ("left of", "right of", "above", "below")
# Never in training; every shape and four colours are concerned once, so shapes stay balanced.
HELD_OUT = frozenset(
    {("circle", "yellow"), ("square", "purple"), ("triangle", "cyan"), ("cross", "red")}
)

CROSS_ARM = 0.25  # half-width of an arm over half the extent: 4 pixels wide in a small cross
CLEAR = 8 / 64  # one displacement must exceed the other by this before a relation is named

# The tokenizer must spend its codes on the objects: backgrounds are grey, and texture and noise
# are far weaker than the contrast of any object.
GREY = (120.0, 150.0)  # range of the mean level
TINT = 2.0  # largest deviation of one channel from grey
TEXTURE = (2.0, 5.0)  # range of the amplitude
NOISE = 2.0  # uniform in [-2, 2], standard deviation 1.2, which bounds PSNR by 47 dB
TEXTURES = ("gradient", "stripes", "checks")

Pixels = NDArray[np.uint8]
T = TypeVar("T")


class Dice:
    """Uniform draws from a counter-based generator, fetched in blocks for speed.

    The same whole numbers in `key` give the same draws on every machine.
    """

    BLOCK = 64

    def __init__(self, *key: int):
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        blocks = iter(lambda: self.generator.random(self.BLOCK).tolist(), None)
        self.roll: Callable[[], float] = chain.from_iterable(blocks).__next__  # one, in [0, 1)

    def between(self, low: float, high: float) -> float:
        """One draw in [low, high)."""
        return low + (high - low) * self.roll()

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, all equally likely."""
        return choices[int(self.roll() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        roll = self.roll
        return sorted(items, key=lambda _: roll())


@dataclass(frozen=True)
class Attributes:
    """What a caption says about one object."""

    colour: str
    shape: str
    size: str

    @property
    def phrase(self) -> str:
        """For example `large red circle`."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class SceneObject(Attributes):
    """One object with its centre and extent as fractions of the picture side, y downwards."""

    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Relation:
    """`objects[first]` is `word` (one of RELATIONS) `objects[second]`."""

    first: int
    word: str
    second: int


@dataclass(frozen=True)
class Background:
    """A grey level with a tint, and one soft texture over it."""

    texture: str
    level: tuple[float, float, float]  # mean of each channel, 0 to 255
    amplitude: float
    wave: tuple[float, float]  # cycles per picture along x and y
    phase: float


@dataclass(frozen=True)
class Scene:
    """A picture as a value: `render` draws it, the caption and the questions speak of it."""

    objects: tuple[SceneObject, ...]
    relation: Relation | None  # the one that the caption tells
    background: Background
    noise_seed: int
    has_held_out: bool = False  # has a (shape, colour) pair that training never shows


def seen_shapes(colour: str) -> tuple[str, ...]:
    """The shapes that training shows in this colour."""
    return tuple(shape for shape in SHAPES if (shape, colour) not in HELD_OUT)


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """The word for `first` relative to `second`, or None where neither axis clearly dominates."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) - abs(dy) >= CLEAR:
        return "left of" if dx < 0 else "right of"
    if abs(dy) - abs(dx) >= CLEAR:
        return "above" if dy < 0 else "below"
    return None


def _circle(x: NDArray, y: NDArray, r: float) -> NDArray:
    return np.sqrt(x * x + y * y) - r


def _square(x: NDArray, y: NDArray, r: float) -> NDArray:
    return np.maximum(np.abs(x), np.abs(y)) - r


def _triangle(x: NDArray, y: NDArray, r: float) -> NDArray:
    # Apex at (0, -r), base from (-r, r) to (r, r); both slanted edges at once through |x|.
    return np.maximum(y - r, (2 * np.abs(x) - y - r) / np.sqrt(5.0))


def _cross(x: NDArray, y: NDArray, r: float) -> NDArray:
    x, y, arm = np.abs(x), np.abs(y), CROSS_ARM * r
    return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


_DISTANCE: dict[str, Callable[[NDArray, NDArray, float], NDArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def coverage(shape: str, dx: NDArray, dy: NDArray, extent: float) -> NDArray[np.float32]:
    """Share of each pixel, 0 to 1, that the shape covers, with edges one pixel soft.

    `dx` and `dy` are pixel centres relative to the shape's centre, and they broadcast; `extent` is
    the side of its bounding box in pixels.
    """
    distance = _DISTANCE[shape](dx, dy, extent / 2)
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def _texture(background: Background, size: int) -> NDArray[np.float32]:
    """The texture's values in [-1, 1], [size, size]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    along_x, along_y = background.wave[0] * axis, background.wave[1] * axis
    if background.texture == "gradient":  # half a wave over the picture
        length = abs(background.wave[0]) + abs(background.wave[1])
        ramp = (along_x - along_x.mean())[None, :] + (along_y - along_y.mean())[:, None]
        return ramp * np.float32(2 / length)
    angle_x = (2 * np.pi * along_x + background.phase).astype(np.float32)
    angle_y = (2 * np.pi * along_y).astype(np.float32)
    if background.texture == "stripes":  # sin(a + b) from the sines of the two axes
        return (
            np.sin(angle_x)[None, :] * np.cos(angle_y)[:, None]
            + np.cos(angle_x)[None, :] * np.sin(angle_y)[:, None]
        )
    return np.sin(angle_x)[None, :] * np.sin(angle_y)[:, None]


def render(scene: Scene, size: int = 64) -> Pixels:
    """Draw the scene, uint8 [size, size, 3]; sides below 32 are refused, shapes would vanish."""
    if size < 32:
        raise InputError(f"scenes need at least 32 pixels per side, got {size}: take a larger size")
    background = scene.background
    picture = (_texture(background, size) * np.float32(background.amplitude))[..., None]
    picture = picture + np.asarray(background.level, np.float32)
    for thing in scene.objects:
        _paint(picture, thing, size)
    rng = np.random.Generator(np.random.Philox(key=scene.noise_seed))
    noise = np.frombuffer(rng.bytes(picture.size), np.uint8).reshape(picture.shape)
    picture += noise * np.float32(2 * NOISE / 255)
    # The half rounds. No clipping: palette and greys stay further than the noise from 0 and 255.
    picture += np.float32(0.5 - NOISE)
    return picture.astype(np.uint8)


def _paint(picture: NDArray[np.float32], thing: SceneObject, size: int) -> None:
    """Blend one object into the picture, looking only at its own patch."""
    x, y, extent = thing.x * size, thing.y * size, thing.extent * size
    reach = extent / 2 + 1
    left, right = max(0, int(x - reach)), min(size, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 1)
    dx = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    cover = coverage(thing.shape, dx, dy, extent)[..., None]
    patch = picture[top:bottom, left:right]
    patch += cover * (np.asarray(PALETTE[thing.colour], np.float32) - patch)
