"""Questions about scenes: every one stands alone, has one word as its answer, and is balanced.

Balanced means that the text of a question hardly tells its answer: a model that does not look
scores near `CHANCE`. Training never names a held-out (shape, colour) pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from unicompress.data.scene_render import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Dice,
    Scene,
    relation_between,
    seen_shapes,
)

NUMBERS = ("zero", "one", "two", "three")
YES_NO = ("yes", "no")
PLACES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}

# The closed set of answers of every kind of question.
ANSWERS: dict[str, tuple[str, ...]] = {
    "exists": YES_NO,
    "count": NUMBERS,
    "colour": COLOURS,
    "shape": SHAPES,
    "relation": tuple(PLACES.values()),
    "compare": YES_NO,
}
KINDS = tuple(ANSWERS)

# What the best answer from the text alone reaches, nearly, in the law that scenes are drawn from:
# counts have three equally likely answers; held-out pairs leave some colours 3 shapes, not 4.
CHANCE: dict[str, float] = {
    "exists": 1 / 2,
    "count": 1 / 3,
    "colour": 2 / 9,
    "shape": sum(1 / len(seen_shapes(colour)) for colour in COLOURS) / len(COLOURS),
    "relation": 1 / 4,
    "compare": 1 / 2,
}

# Share of the scenes with k = 0, 1, 2 objects of one size: 1 to 3 objects, sizes independent.
_OF_ONE_SIZE = (7 / 24, 11 / 24, 5 / 24)
_EXISTS_FORMS = (
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour"),
    ("size", "colour", "shape"),
)
_TRIES = 30  # to find another question whose text is new

Wanted = dict[str, str]  # attribute name -> value


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer; `kind` groups questions in reports."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, dice: Dice, count: int) -> tuple[Question, ...]:
    """`count` different questions: each kind that the scene allows once, then more of some kinds.

    Up to 6 only `exists` is asked more often: its answer is drawn before its text, so it stays
    balanced in scenes that allow few kinds. Above 6 every kind but `count` comes again, with other
    words, and there may be fewer questions than asked for.
    """
    asked: dict[str, Question] = {}
    for kind in dice.shuffled(KINDS):
        question = _MAKERS[kind](scene, dice)
        if question is not None and len(asked) < count:
            asked[question.text] = question
    if count > len(KINDS):
        _ask_again(asked, scene, dice, count)
        return tuple(asked.values())
    while len(asked) < count:
        answer = dice.pick(YES_NO)
        for _ in range(_TRIES):
            question = _exists(scene, dice, answer)
            if question.text not in asked:
                break
        else:
            break
        asked[question.text] = question
    return tuple(asked.values())


def _ask_again(asked: dict[str, Question], scene: Scene, dice: Dice, count: int) -> None:
    """Questions of all kinds again, but counts: asked twice, those would favour few objects."""
    for _ in range(_TRIES):
        for kind in dice.shuffled([kind for kind in KINDS if kind != "count"]):
            question = _MAKERS[kind](scene, dice)
            if question is not None and len(asked) < count:
                asked.setdefault(question.text, question)


def _words(wanted: Wanted) -> str:
    """The attributes in speaking order, with `object` where the shape is left open."""
    named = [wanted[name] for name in ("size", "colour") if name in wanted]
    return " ".join([*named, wanted.get("shape", "object")])


def _exists(scene: Scene, dice: Dice, answer: str | None = None) -> Question:
    """`is there a red circle?`; a no differs from an object that is there in one attribute."""
    answer = answer or dice.pick(YES_NO)
    form = dice.pick(_EXISTS_FORMS)
    thing = dice.pick(scene.objects)
    wanted = {name: getattr(thing, name) for name in form}
    if answer == "no":
        unseen = scene.has_held_out and "colour" in form and "shape" in form
        if unseen and dice.roll() < 1 / len(scene.objects):  # as often as a yes names such a pair
            wanted |= _absent_held_out(scene, dice)
        else:
            wanted = _nearly(scene, dice, wanted)
    return Question("exists", f"is there a {_words(wanted)}?", answer)


def _absent_held_out(scene: Scene, dice: Dice) -> Wanted:
    """A held-out pair that is not there, with the colour or shape of an object if there is one."""
    here = {(thing.shape, thing.colour) for thing in scene.objects}
    absent = sorted(HELD_OUT - here)
    near = [pair for pair in absent if any(pair[0] == s or pair[1] == c for s, c in here)]
    shape, colour = dice.pick(near or absent)
    return {"colour": colour, "shape": shape}


def _nearly(scene: Scene, dice: Dice, wanted: Wanted) -> Wanted:
    """The same attributes with one changed so that no object has them; never a held-out pair."""
    here = [vars(thing).items() for thing in scene.objects]
    near: list[Wanted] = []
    for name, values in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)):
        if name not in wanted:
            continue
        changed = [wanted | {name: value} for value in values if value != wanted[name]]
        changed = [
            other
            for other in changed
            if (other.get("shape"), other.get("colour")) not in HELD_OUT
            and not any(other.items() <= thing for thing in here)
        ]
        if changed:
            near.append(_as_often_as_shown(dice, changed))
    return dice.pick(near)


def _as_often_as_shown(dice: Dice, changed: list[Wanted]) -> Wanted:
    """Pick so that a no names (shape, colour) pairs with the frequency of a yes."""
    if "colour" not in changed[0] or "shape" not in changed[0]:
        return dice.pick(changed)
    weights = [1 / len(seen_shapes(other["colour"])) for other in changed]
    point = dice.roll() * sum(weights)
    for other, weight in zip(changed, weights, strict=True):
        point -= weight
        if point < 0:
            return other
    return changed[-1]


def _count(scene: Scene, dice: Dice) -> Question | None:
    """`how many objects are there?`, or of one size; three objects of one size are not asked."""
    if dice.roll() < 1 / 2:
        return Question("count", "how many objects are there?", NUMBERS[len(scene.objects)])
    size = dice.pick(SIZES)
    found = sum(thing.size == size for thing in scene.objects)
    if found > 2 or dice.roll() > min(_OF_ONE_SIZE) / _OF_ONE_SIZE[found]:
        return None
    return Question("count", f"how many {size} objects are there?", NUMBERS[found])


def _colour(scene: Scene, dice: Dice) -> Question | None:
    """`what color is the circle?`, in the spelling of easy-vqa, where that names one object."""
    here = [vars(thing).items() for thing in scene.objects]
    unique: list[tuple[str, str]] = []
    for thing in scene.objects:
        for form in (("shape",), ("size",), ("size", "shape")):
            wanted = {name: getattr(thing, name) for name in form}
            if sum(wanted.items() <= other for other in here) == 1:
                unique.append((_words(wanted), thing.colour))
    if not unique:
        return None
    words, colour = dice.pick(unique)
    return Question("colour", f"what color is the {words}?", colour)


def _shape(scene: Scene, dice: Dice) -> Question:
    """`what shape is the red object?`; colours are distinct within a scene."""
    thing = dice.pick(scene.objects)
    return Question("shape", f"what shape is the {thing.colour} object?", thing.shape)


def _relation(scene: Scene, dice: Dice) -> Question | None:
    """`where is the red object relative to the blue object?`, only for clear relations."""
    told = []
    for first, second in permutations(scene.objects, 2):
        word = relation_between(first, second)
        if word is not None:
            told.append((first.colour, second.colour, PLACES[word]))
    if not told:
        return None
    first_colour, second_colour, place = dice.pick(told)
    text = f"where is the {first_colour} object relative to the {second_colour} object?"
    return Question("relation", text, place)


def _compare(scene: Scene, dice: Dice) -> Question | None:
    """Two objects compared: same size, larger, same shape."""
    pairs = list(permutations(scene.objects, 2))
    if not pairs:
        return None
    first, second = dice.pick(pairs)
    both = f"are the {first.colour} object and the {second.colour} object the same"
    form = dice.pick(("size", "larger", "shape"))
    if form == "size":  # sizes are independent: half of all pairs
        same = first.size == second.size
        return Question("compare", f"{both} size?", "yes" if same else "no")
    if form == "larger":
        if first.size == second.size:
            return None
        text = f"is the {first.colour} object larger than the {second.colour} object?"
        return Question("compare", text, "yes" if first.size == "large" else "no")
    if first.shape == second.shape:
        return Question("compare", f"{both} shape?", "yes")
    ours, theirs = set(seen_shapes(first.colour)), set(seen_shapes(second.colour))
    same_share = len(ours & theirs) / (len(ours) * len(theirs))
    if dice.roll() > same_share / (1 - same_share):  # unequal shapes are more frequent
        return None
    return Question("compare", f"{both} shape?", "no")


_MAKERS: dict[str, Callable[[Scene, Dice], Question | None]] = {
    "exists": _exists,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "relation": _relation,
    "compare": _compare,
}
