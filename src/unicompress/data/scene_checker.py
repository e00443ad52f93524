"""Reads a picture back into objects by colour, area and shape: no learned weights, no randomness.

Pixels are compared with the palette by hue, so texture and brightness hardly matter. Connected
parts of one hue are objects; each pixel of an object is covered to some share, between the object's
own colour and the grey around it. The shape is the one whose ideal picture of the same area and
centroid, sharp or blurred, overlaps best with these shares: blur changes neither area nor centroid.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unicompress.data.scene_captions import ParsedCaption
from unicompress.data.scene_render import (
    CLEAR,
    COLOURS,
    CROSS_ARM,
    EXTENTS,
    PALETTE,
    SHAPES,
    Pixels,
    Relation,
    Scene,
    SceneObject,
    coverage,
)
from unicompress.errors import InputError

COVERED = 0.4  # a pixel is coloured from this strength of its palette colour on: colours may fade
FAINT = 0.15  # weaker pixels are background: its tint, texture and noise stay under 0.1
SPECK = 0.4  # of the area of the smallest shape; what is smaller is no object
BLURS = (0.0, 1.0, 2.0)  # pixels at 64; a shape may be drawn as softly as this
POOR_FIT = 0.6  # below this overlap with every shape the shape is called UNKNOWN
UNKNOWN = "unknown"

# Area over squared extent, and how far the centroid lies under the centre in extents.
_AREA = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": 1 - (1 - CROSS_ARM) ** 2,
}
_SINK = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
_SIZE_BORDER = (EXTENTS["small"] * EXTENTS["large"]) ** 0.5

# The plane of all colours without their grey, spanned by two unit vectors.
_PLANE = np.asarray([[2, -1, -1], [0, 1, -1]], np.float32) / np.sqrt([[6], [2]]).astype(np.float32)
_CHROMA = np.asarray([PALETTE[colour] for colour in COLOURS], np.float32) @ _PLANE.T
_STRENGTH = np.linalg.norm(_CHROMA, axis=1)
_TOWARDS = _CHROMA / _STRENGTH[:, None]


@dataclass(frozen=True)
class FoundObject(SceneObject):
    """An object read off a picture; `fit` is its overlap, 0 to 1, with the ideal shape."""

    fit: float


@dataclass(frozen=True)
class SceneScore:
    """How a picture meets a wish. Objects are matched by their colour.

    `colour`, `shape` and `size` are shares of the wanted objects, 0 to 1.
    """

    colour: float
    shape: float
    size: float
    count: bool
    relation: bool | None  # None where none was asked for
    whole: bool  # exactly the wanted objects, and the relation holds


def read_scene(pixels: NDArray[Any]) -> tuple[FoundObject, ...]:
    """The objects of a picture (uint8 [height, width, 3], square or nearly), from left to right."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"the scene checker reads uint8 [height, width, 3], got {pixels.dtype} "
            f"{list(pixels.shape)}: convert the picture first"
        )
    side = float(np.sqrt(pixels.shape[0] * pixels.shape[1]))
    speck = SPECK * min(_AREA.values()) * (min(EXTENTS.values()) * side) ** 2
    hue, strength = _hues(pixels)
    # Every part of one hue gets its number: 0 is background, specks go back to it.
    parts = np.zeros(hue.shape, np.int32)
    owners: list[str] = []
    for index, colour in enumerate(COLOURS):
        mine = (strength >= COVERED) & (hue == index)
        if np.count_nonzero(mine) < speck:
            continue
        labels, _ = ndimage.label(mine)
        for label, area in enumerate(np.bincount(labels.ravel())[1:], start=1):
            if area >= speck:
                owners.append(colour)
                parts[labels == label] = len(owners)
    found: list[FoundObject] = []
    for number, window in enumerate(ndimage.find_objects(parts), start=1):
        border = max(3, round(side * 3 / 64))  # blur carries colour over the edge
        rows, columns = (slice(max(0, axis.start - border), axis.stop + border) for axis in window)
        share = _shares(
            pixels[rows, columns], strength[rows, columns], parts[rows, columns], number
        )
        corner = (columns.start, rows.start)
        found.append(_recognise(share, corner, owners[number - 1], pixels.shape))
    return tuple(sorted(found, key=lambda thing: thing.x))


def _hues(pixels: Pixels) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Nearest palette hue of each pixel, and how strongly it has it: 1 is the palette's colour."""
    chroma = pixels.reshape(-1, 3).astype(np.float32) @ _PLANE.T
    along = chroma @ _TOWARDS.T
    hue = along.argmax(axis=1)
    strength = along.max(axis=1) / _STRENGTH[hue]
    return hue.reshape(pixels.shape[:2]), strength.reshape(pixels.shape[:2])


def _shares(
    patch: Pixels, strength: NDArray[np.float32], parts: NDArray[np.int32], number: int
) -> NDArray[np.float32]:
    """Share of each pixel that part `number` covers, between its own colour and the grey around.

    The two colours come from the picture itself, so that faded colours do not look like small
    objects, and brightness helps where colour is blurred more, as in JPEG.
    """
    mine = parts == number
    strong = mine & (strength >= strength[mine].mean())
    behind = (parts == 0) & (strength < FAINT)
    inside = patch[strong].mean(axis=0, dtype=np.float32)
    outside = patch[behind].mean(axis=0, dtype=np.float32) if behind.any() else inside.mean()
    line = inside - outside
    share = np.clip((patch - outside) @ line / float(line @ line), 0, 1)
    share[share < FAINT] = 0
    others = (parts != 0) & ~mine
    if others.any():
        share[ndimage.binary_dilation(others) & ~mine] = 0  # with their edges
    return share


def _recognise(
    share: NDArray[np.float32], corner: tuple[int, int], colour: str, picture: tuple[int, ...]
) -> FoundObject:
    """Name shape and size from the shares in a patch whose upper left pixel is `corner` (x, y)."""
    side = float(np.sqrt(picture[0] * picture[1]))
    rows = np.arange(share.shape[0], dtype=np.float32)[:, None]
    columns = np.arange(share.shape[1], dtype=np.float32)[None, :]
    area = float(share.sum())
    y, x = float((share * rows).sum()) / area, float((share * columns).sum()) / area
    extents = {shape: (area / _AREA[shape]) ** 0.5 for shape in SHAPES}
    sharp = np.stack(
        [
            coverage(shape, columns - x, rows - y + _SINK[shape] * extent, extent)
            for shape, extent in extents.items()
        ]
    )
    overlaps = np.zeros(len(SHAPES))
    for blur in BLURS:
        down, across = (_blur(length, blur * side / 64) for length in share.shape)
        ideal = down @ sharp @ across.T
        overlap = np.minimum(share, ideal).sum((1, 2)) / np.maximum(share, ideal).sum((1, 2))
        overlaps = np.maximum(overlaps, overlap)
    shape, fit = SHAPES[int(overlaps.argmax())], float(overlaps.max())
    extent = extents[shape]
    return FoundObject(
        colour=colour,
        shape=shape if fit >= POOR_FIT else UNKNOWN,
        size="small" if extent < _SIZE_BORDER * side else "large",
        x=(corner[0] + x + 0.5) / picture[1],
        y=(corner[1] + y + 0.5 - _SINK[shape] * extent) / picture[0],
        extent=extent / side,
        fit=fit,
    )


@lru_cache(maxsize=512)
def _blur(length: int, sigma: float) -> NDArray[np.float32]:
    """Matrix [length, length] that blurs a line of pixels with a Gaussian; nothing lies outside."""
    if sigma == 0:
        return np.eye(length, dtype=np.float32)
    apart = np.subtract.outer(np.arange(length), np.arange(length))
    weights = np.exp(-(apart**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    return weights.astype(np.float32)


def score(pixels: NDArray[Any], wanted: Scene | ParsedCaption) -> SceneScore:
    """Compare a picture with a scene, or with what a caption demands."""
    found = read_scene(pixels)
    best = {thing.colour: thing for thing in sorted(found, key=lambda thing: thing.extent)}
    pairs = [(thing, best[thing.colour]) for thing in wanted.objects if thing.colour in best]
    total = len(wanted.objects)
    shape = sum(thing.shape == seen.shape for thing, seen in pairs)
    size = sum(thing.size == seen.size for thing, seen in pairs)
    exact = sum(thing.phrase == seen.phrase for thing, seen in pairs)
    relation = None if wanted.relation is None else _holds(wanted.relation, wanted, best)
    return SceneScore(
        colour=len(pairs) / total,
        shape=shape / total,
        size=size / total,
        count=len(found) == total,
        relation=relation,
        whole=len(found) == total == exact and relation is not False,
    )


def _holds(
    relation: Relation, wanted: Scene | ParsedCaption, found: dict[str, FoundObject]
) -> bool:
    """Whether the displacement along the named axis clearly exceeds the one across it.

    Half the margin of the captions, for a picture need not meet the lattice of the scenes.
    """
    names = (wanted.objects[relation.first].colour, wanted.objects[relation.second].colour)
    if not all(name in found for name in names):
        return False
    first, second = (found[name] for name in names)
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation.word]
    return along - abs(across) >= CLEAR / 2


def mean_scores(scores: Iterable[SceneScore]) -> dict[str, float]:
    """The mean of every field, 0 to 1; `relation` over the pictures that were asked for one."""
    kept = list(scores)
    if not kept:
        raise InputError("no scores to average: pass at least one")
    means = {
        name: float(np.mean([getattr(one, name) for one in kept]))
        for name in ("colour", "shape", "size", "count", "whole")
    }
    told = [one.relation for one in kept if one.relation is not None]
    if told:
        means["relation"] = float(np.mean(told))
    return means
