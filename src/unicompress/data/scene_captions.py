"""Captions of scenes in a small fixed grammar, and the parser that reads them back.

caption  = object {", " object} [" and " object] ["; the " name " is " relation " the " name]
object   = "a " size " " colour " " shape
name     = colour " " shape
"""

import re
from dataclasses import dataclass

from unicompress.data.scene_render import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Attributes,
    Relation,
    Scene,
)
from unicompress.errors import InputError

MAX_OBJECTS = 3


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption demands: its objects, and a relation or None."""

    objects: tuple[Attributes, ...]
    relation: Relation | None


def phrases(scene: Scene | ParsedCaption) -> list[str]:
    """The attribute phrase of every object, such as `large red circle`, in the scene's order."""
    return [thing.phrase for thing in scene.objects]


def caption(scene: Scene | ParsedCaption) -> str:
    """The canonical caption: lower case, at most 22 words."""
    names = [f"a {phrase}" for phrase in phrases(scene)]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if scene.relation is None:
        return text
    first, second = (scene.objects[i] for i in (scene.relation.first, scene.relation.second))
    told = scene.relation.word
    return f"{text}; the {first.colour} {first.shape} is {told} the {second.colour} {second.shape}"


class _Words:
    """The words of a text, taken one after the other; each mistake names its word."""

    def __init__(self, text: str):
        self.text = text
        self.left = re.findall(r"[^\s,;.]+|[,;.]", text.lower())

    def fail(self, wanted: str) -> InputError:
        found = repr(self.left[0]) if self.left else "the end"
        return InputError(
            f"cannot read the caption {self.text!r}: found {found} where {wanted} was expected; "
            "write for example 'a large red circle and a small blue square; the red circle is "
            "left of the blue square'"
        )

    def peek(self) -> str | None:
        return self.left[0] if self.left else None

    def take(self, *allowed: str) -> str:
        if not self.left or self.left[0] not in allowed:
            raise self.fail(" or ".join(allowed))
        return self.left.pop(0)


def _object(words: _Words) -> Attributes:
    words.take("a")
    size = words.take(*SIZES)
    colour = words.take(*COLOURS)
    return Attributes(colour=colour, shape=words.take(*SHAPES), size=size)


def _name(words: _Words, objects: list[Attributes]) -> int:
    """Index of the object that `the colour shape` speaks of; it must be one of the caption's."""
    words.take("the")
    colour = words.take(*COLOURS)
    shape = words.take(*SHAPES)
    for index, thing in enumerate(objects):
        if (thing.colour, thing.shape) == (colour, shape):
            return index
    known = ", ".join(f"the {thing.colour} {thing.shape}" for thing in objects)
    raise InputError(
        f"cannot read the caption {words.text!r}: its relation speaks of the {colour} {shape}, "
        f"which is not among its objects ({known})"
    )


def _relation(words: _Words, objects: list[Attributes]) -> Relation:
    first = _name(words, objects)
    words.take("is")
    word = words.take(*(relation.split()[0] for relation in RELATIONS))
    if word in ("left", "right"):
        word = f"{word} {words.take('of')}"
    second = _name(words, objects)
    if first == second:
        raise InputError(
            f"cannot read the caption {words.text!r}: its relation compares the "
            f"{objects[first].colour} {objects[first].shape} with itself; name two objects"
        )
    return Relation(first, word, second)


def parse_caption(text: str) -> ParsedCaption:
    """Read a caption of the grammar; case, spacing and a final full stop do not matter.

    Raises InputError that names the first word outside the grammar.
    """
    words = _Words(text)
    objects = [_object(words)]
    while words.peek() in (",", "and"):
        words.take(",", "and")
        objects.append(_object(words))
    relation = None
    if words.peek() == ";":
        words.take(";")
        relation = _relation(words, objects)
    if words.peek() == ".":
        words.take(".")
    if words.left:
        raise words.fail("the end")
    if len(objects) > MAX_OBJECTS:
        raise InputError(
            f"cannot draw {len(objects)} objects ({text!r}): scenes have at most {MAX_OBJECTS}"
        )
    if len({thing.colour for thing in objects}) < len(objects):
        raise InputError(f"two objects of {text!r} share a colour: give every object its own")
    return ParsedCaption(tuple(objects), relation)
