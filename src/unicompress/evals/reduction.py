"""Reducers at equal budgets on one set of questions: who answers what right, and for how much.

Every method answers the same questions about the same pictures, which are encoded once, so that
each can be compared question by question with the controls at its budget and with the model that
keeps all tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicompress.errors import InputError
from unicompress.evals.result import Progress
from unicompress.evals.statistics import Interval, PairedDifference, paired_difference
from unicompress.evals.understanding import Accuracies, QuestionSet, accuracies, ask_all, marked
from unicompress.reducers.base import Keep, Reducer, reducers
from unicompress.reducers.cost import Decoder, average_kept, image_tokens, saving
from unicompress.reducers.hosts.tracker import from_encoder
from unicompress.reducers.hosts.unified import Unified
from unicompress.unified import UnifiedModel

KEEPS = (0.5, 0.25, 0.125)
CONTROLS = ("average_pool", "random", "uniform", "window_top_k")
DEPTHS = {"fastv": 2, "window_fastv": 2, "dart": 5}  # layers of the official cuts
TEXT = 16  # tokens of a question, for the counted prompt
ALL = "all tokens"  # the sheet of the model without a reducer


@dataclass(frozen=True)
class Sheet:
    """The marked answers of one method at one budget."""

    right: str  # per question, 0 or 1
    commit: str = ""  # of the code that answered, filled in by who keeps the sheet

    @property
    def marks(self) -> NDArray[np.bool_]:
        """Per question, whether it was answered right."""
        return np.array([mark == "1" for mark in self.right])


@dataclass(frozen=True)
class Row:
    """One method at one budget; differences are this method minus the other, paired."""

    method: str
    keep: float
    tokens: int  # after the first cut
    average: float  # share of image tokens over layers
    prefill_ratio: float  # counted; how many times cheaper the prompt is in the language model
    stand_in: bool
    accuracy: Interval
    by_kind: dict[str, Interval]
    against_all: PairedDifference  # the same model with all tokens
    against: dict[str, PairedDifference]  # each control at the same budget


@dataclass(frozen=True)
class Table:
    """One set of questions: a row for each method and complete budget, controls first."""

    questions: int
    pictures: int
    all_tokens: Accuracies  # of the model without a reducer
    rows: tuple[Row, ...]
    sheets: Mapping[str, Sheet]  # by reducer; those of a budget that is not complete, too


class PerQuestion:
    """A model that gets each question with its own copy of the picture, as text-led methods ask."""

    def __init__(self, model: UnifiedModel, batch: int = 32):
        self.model = model
        self.batch = batch  # questions at a time

    def answer(self, images: Tensor, questions: list[list[str]]) -> list[list[str]]:
        """Answers in the shape of the questions."""
        flat = [(owner, text) for owner, asked in enumerate(questions) for text in asked]
        answers: list[list[str]] = [[] for _ in questions]
        for start in range(0, len(flat), self.batch):
            owners, texts = zip(*flat[start : start + self.batch], strict=True)
            said = self.model.answer(images[list(owners)], list(texts))
            for owner, answer in zip(owners, said, strict=True):
                answers[owner].append(str(answer))
        return answers


def fitted(name: str, keep: Keep, depth: int) -> Reducer:
    """A reducer with its defaults, its cut moved up where the language model is too shallow."""
    member = reducers.get(name)
    options: dict[str, Any] = {"keep": keep}
    if name in DEPTHS and "layer" in inspect.signature(member.__init__).parameters:
        options["layer"] = max(1, min(DEPTHS[name], depth // 2))
    return member(**options)


def tables(
    model: UnifiedModel,
    tests: QuestionSet,
    *,
    keeps: Sequence[float] = KEEPS,
    methods: Sequence[str] | None = None,
    known: Mapping[str, Sheet] | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Table]:
    """The table as it grows: once for each method that was asked, and at last complete.

    Sheets that are `known` are not filled in again, but for the one with all tokens: it must come
    out as it was, since only then the others are of this model and these questions. InputError
    where it does not.
    """
    names = list(dict.fromkeys([*CONTROLS, *(methods or reducers.names())]))
    depth = decoder_of(model).layers
    ask = _asker(model, tests, batch, progress)
    sheets = dict(known or {})
    everything = Sheet(ask(None, ALL))
    if sheets and sheets.get(ALL, everything).right != everything.right:
        raise InputError(
            f"the model answers {tests.name} otherwise than when the table was begun: begin a new "
            "one"
        )
    sheets.setdefault(ALL, everything)
    all_tokens = accuracies(tests, everything.marks.tolist(), seed)
    rows: list[Row] = []

    def table() -> Table:
        count = len(tests.questions)
        return Table(count, len(tests.pictures), all_tokens, tuple(rows), dict(sheets))

    for keep in keeps:
        members = {name: fitted(name, keep, depth) for name in names}
        for name, reducer in members.items():
            if str(reducer) not in sheets:
                sheets[str(reducer)] = Sheet(ask(reducer, f"keep {keep:g}, {name}"))
                yield table()
        found = {name: sheets[str(reducer)] for name, reducer in members.items()}
        rows += [
            _row(model, tests, reducer, keep, found, sheets[ALL], seed)
            for reducer in members.values()
        ]
    yield table()


def _asker(
    model: UnifiedModel, tests: QuestionSet, batch: int, progress: Progress | None
) -> Callable[[Reducer | None, str], str]:
    """Puts all questions to the model with a reducer, or without one; answers come marked."""
    pictures = _encoded(model, tests, batch)

    def ask(reducer: Reducer | None, label: str) -> str:
        options: Any = {"pictures": pictures, "batch": batch, "progress": progress}
        options["label"] = f"{tests.name}: {label}"
        if reducer is None:
            answers = ask_all(model, tests, **options)
        else:
            text_led = Unified.reads_text(reducer, decoder_of(model).layers)
            with reducer.on(model):
                asked = PerQuestion(model, batch) if text_led else model
                answers = ask_all(asked, tests, **options)
        return "".join(str(int(right)) for right in marked(tests, answers))

    return ask


@torch.no_grad()
def _encoded(
    model: UnifiedModel, tests: QuestionSet, batch: int
) -> Callable[[list[int]], Tensor] | None:
    """The pictures as X, which a model takes in their place; None for an encoder of its own."""
    if model.understanding is not None:
        return None
    places = range(len(tests.pictures))
    parts = [
        model._dense(tests.pixels(places[start : start + batch])).cpu() for start in places[::batch]
    ]
    dense = torch.cat(parts)
    return lambda indices: dense[indices]


def _row(
    model: UnifiedModel,
    tests: QuestionSet,
    reducer: Reducer,
    keep: float,
    sheets: Mapping[str, Sheet],
    everything: Sheet,
    seed: int,
) -> Row:
    """`sheets` are those of one budget, by name."""
    name, decoder = reducer.name, decoder_of(model)
    own = sheets[name].marks
    total = model.understanding_layout.local_count
    others = model.interface_tokens - total + TEXT
    found = accuracies(tests, own.tolist(), seed)

    def against(other: Sheet) -> PairedDifference:
        return paired_difference(other.marks, own, groups=tests.owners, seed=seed)

    steps = reducer.steps(decoder.layers)
    asked = set().union(*(from_encoder(step.reducer) for step in steps))
    return Row(
        method=str(reducer),
        keep=keep,
        tokens=image_tokens(reducer, total, decoder.layers)[steps[0].layer],
        average=average_kept(reducer, total, decoder.layers),
        prefill_ratio=saving(reducer, decoder, tokens=total, text=others).prefill_ratio,
        stand_in=bool(asked & {"attention", "shallow_attention", "keys"}),
        accuracy=found.overall,
        by_kind=found.by_kind,
        against_all=against(everything),
        against={c: against(sheets[c]) for c in CONTROLS if c != name},
    )


def decoder_of(model: UnifiedModel) -> Decoder:
    """What the cost of a prompt in the model's language model rests on."""
    config = model.backbone.inner.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Decoder(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads * width
    )
