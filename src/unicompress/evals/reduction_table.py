"""Every reducer at the same budgets on one model and one set of questions, beside the controls.

python -m unicompress.evals.reduction_table --json docs/results/reduction.json

A method beats a control only where the interval of their paired difference leaves out zero. Budgets
are what the first cut keeps; methods that cut inside the language model compute all tokens before
that, and some cut again later, so the average over layers and the saving of the prompt stand beside
each accuracy. `stand_in` marks methods that ask for the attention or keys of a vision encoder: the
reference model has none, and its language model's first layer answers instead.
"""

import argparse
import inspect
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicompress import reference
from unicompress.errors import UnicompressError
from unicompress.evals.cost import medians, take_turns
from unicompress.evals.language_models import random_lm
from unicompress.evals.result import Figures, Progress, Result, hardware
from unicompress.evals.statistics import Interval, PairedDifference, paired_difference
from unicompress.evals.understanding import (
    Accuracies,
    QuestionSet,
    UnderstandingScore,
    evaluate_understanding,
)
from unicompress.reducers.base import Keep, Reducer, Signals, reducers
from unicompress.reducers.cost import Decoder, average_kept, image_tokens, saving
from unicompress.reducers.g2tr import G2TR
from unicompress.reducers.hosts.tracker import from_encoder
from unicompress.reducers.hosts.unified import Unified
from unicompress.tokens import Grid
from unicompress.unified import UnifiedModel

MODULE = "unicompress.evals.reduction_table"
KEEPS = (0.5, 0.25, 0.125)
CONTROLS = ("average_pool", "random", "uniform", "window_top_k")
DEPTHS = {"fastv": 2, "window_fastv": 2, "dart": 5}  # layers of the official cuts
TEXT = 16  # tokens of a question, for the counted prompt


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
    correct: str  # per question, 0 or 1


class PerQuestion:
    """A model that gets each question with its own copy of the picture, as text-led methods ask."""

    def __init__(self, model: UnifiedModel):
        self.model = model

    def answer(self, images: Tensor, questions: list[list[str]]) -> list[list[str]]:
        """Answers in the shape of the questions."""
        sizes = torch.tensor([len(asked) for asked in questions], device=images.device)
        flat = [question for asked in questions for question in asked]
        answers = iter(self.model.answer(images.repeat_interleave(sizes, dim=0), flat))
        return [[str(next(answers)) for _ in asked] for asked in questions]


def fitted(name: str, keep: Keep, depth: int) -> Reducer:
    """A reducer with its defaults, its cut moved up where the language model is too shallow."""
    member = reducers.get(name)
    options: dict[str, Any] = {"keep": keep}
    if name in DEPTHS and "layer" in inspect.signature(member.__init__).parameters:
        options["layer"] = max(1, min(DEPTHS[name], depth // 2))
    return member(**options)


def table(
    model: UnifiedModel,
    tests: QuestionSet,
    *,
    keeps: Sequence[float] = KEEPS,
    methods: Sequence[str] | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[UnderstandingScore, list[Row]]:
    """The unreduced score, and a row for each method and budget, controls first."""
    names = list(dict.fromkeys([*CONTROLS, *(methods or reducers.names())]))
    everything = _score(model, None, tests, batch, seed, progress)
    rows = []
    for keep in keeps:
        members = {name: fitted(name, keep, _decoder(model).layers) for name in names}
        scores = {
            name: _score(model, reducer, tests, batch, seed, progress)
            for name, reducer in members.items()
        }
        rows += [
            _row(model, name, keep, reducer, scores, everything, seed)
            for name, reducer in members.items()
        ]
    return everything, rows


def _score(
    model: UnifiedModel,
    reducer: Reducer | None,
    tests: QuestionSet,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> UnderstandingScore:
    options: Any = {"batch": batch, "baselines": False, "seed": seed, "progress": progress}
    if reducer is None:
        return evaluate_understanding(model, tests, **options)
    asked: Any = model
    if Unified.reads_text(reducer, _decoder(model).layers):
        asked = PerQuestion(model)
    with reducer.on(model):
        return evaluate_understanding(asked, tests, **options)


def _row(
    model: UnifiedModel,
    name: str,
    keep: float,
    reducer: Reducer,
    scores: dict[str, UnderstandingScore],
    everything: UnderstandingScore,
    seed: int,
) -> Row:
    score, decoder = scores[name], _decoder(model)
    total = model.understanding_layout.local_count
    others = model.interface_tokens - total + TEXT
    found: Accuracies = score.accuracy

    def against(other: UnderstandingScore) -> PairedDifference:
        return paired_difference(other.correct, score.correct, groups=score.owners, seed=seed)

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
        against={c: against(scores[c]) for c in CONTROLS if c in scores and c != name},
        correct="".join(str(int(right)) for right in score.correct),
    )


def _decoder(model: UnifiedModel) -> Decoder:
    config = model.backbone.inner.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Decoder(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads * width
    )


# What a reducer itself costs


@torch.no_grad()
def overhead(lm: str, *, side: int = 24, text: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Seconds of reducers against those of the prompt they shorten, at a real shape.

    One picture of side^2 tokens and random weights, half of the tokens kept. Only methods that need
    no attention are timed; G2TR without the encoder of its latents.
    """
    model = random_lm(lm)
    width, count = model.config.hidden_size, side**2
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, count, width, generator=draws)
    grid, anchor_grid = Grid(side, side), Grid(side, side).pooled(2)
    signals = Signals(
        anchors=torch.randn(1, anchor_grid.length, 64, generator=draws),
        anchor_tokens=torch.randn(1, anchor_grid.length, width, generator=draws),
        anchor_grid=anchor_grid,
    )
    members: dict[str, Reducer] = {
        "g2tr": G2TR(keep=0.5),
        "g2tr(score='relational')": G2TR(keep=0.5, score="relational"),
        **{name: fitted(name, 0.5, 2) for name in ("average_pool", "tome", "divprune")},
    }
    trunk: Any = model.base_model
    prompt = torch.randn(1, count + text, width, generator=draws)
    tasks: dict[str, Any] = {
        "prefill": lambda: trunk(inputs_embeds=prompt, use_cache=False),
        "prefill_reduced": lambda: trunk(
            inputs_embeds=prompt[:, : count // 2 + text], use_cache=False
        ),
    }
    for name, member in members.items():
        tasks[name] = lambda member=member: member(tokens, grid, signals)
    found = medians(take_turns(tasks, repeats=repeats, label="overhead"))
    saved = found["prefill"] - found["prefill_reduced"]
    return {
        "lm": lm,
        "tokens": count,
        "text": text,
        "seconds": found,
        "share_of_prefill": {name: found[name] / found["prefill"] for name in members},
        "share_of_saving": {name: found[name] / saved for name in members},
    }


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, and give the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dense", help="dense, compressed, folder or hub id")
    parser.add_argument("--task", default="scenes", choices=["scenes", "easy-vqa"])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--methods", nargs="+", help="all, where not given; controls always")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time")
    parser.add_argument("--overhead", metavar="LM", help="also time reducers at this shape")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        words = sys.argv[1:] if arguments is None else arguments
        result = run(given, shlex.join(["python", "-m", MODULE, *words]))
    except UnicompressError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    result.write(given.json)
    return 0


def run(given: argparse.Namespace, command: str) -> Result:
    """The table and, where asked for, the overhead, as one result."""
    model = _load(given.model)
    size = model.tokenizer.spec.image_size
    if given.task == "scenes":
        tests = QuestionSet.scenes(given.questions, size=size)
    else:
        tests = QuestionSet.easy_vqa(given.questions, size=size)
    for name in given.methods or ():
        reducers.get(name)  # a misspelt name should not wait for the others
    everything, rows = table(
        model,
        tests,
        keeps=given.keep,
        methods=given.methods,
        batch=given.batch,
        progress=_say,
    )
    spent = overhead(given.overhead) if given.overhead else None
    return Result(
        command=command,
        dense=Figures(
            tokens_per_image=model.tokens_per_image,
            interface_tokens=model.interface_tokens,
            understanding_accuracy=everything.accuracy.overall.mean,
        ),
        hardware=hardware(model.device),
        details={
            "reduction": {
                "model": given.model,
                "task": given.task,
                "questions": len(everything.correct),
                "all_tokens": everything.summary(),
                "rows": rows,
                "overhead": spent,
            },
            "tables": shown(rows, spent),
        },
    )


def shown(rows: Sequence[Row], spent: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The tables of the results page: accuracies by budget, and what reducers cost themselves."""
    keeps = list(dict.fromkeys(row.keep for row in rows))
    lines: dict[str, list[Any]] = {}
    for row in rows:
        name = row.method.partition("(")[0] + (" *" if row.stand_in else "")
        lines.setdefault(name, [name]).extend([row.accuracy, row.prefill_ratio])
    columns = [column for keep in keeps for column in (f"keep {keep:g}", "prompt cheaper by")]
    tables = [
        {
            "title": "Reducers without training",
            "note": "`*`: the first layer of the language model stands in for an encoder.",
            "columns": ["method", *columns],
            "rows": list(lines.values()),
        }
    ]
    if spent is not None:
        tables.append(
            {
                "title": f"What a reducer costs, as a share of the prefill ({spent['lm']})",
                "note": f"{spent['tokens']} image tokens and {spent['text']} of text, half kept.",
                "columns": ["method", "share of prefill", "share of what it saves"],
                "rows": [
                    [name, share, spent["share_of_saving"][name]]
                    for name, share in spent["share_of_prefill"].items()
                ],
            }
        )
    return tables


def _load(name: str) -> UnifiedModel:
    if name in reference.NAMES and not Path(name).is_dir():
        return reference.load(name)  # type: ignore[arg-type]
    return UnifiedModel.from_pretrained(name).eval()


def _say(label: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{label} {done}/{total}  ")


if __name__ == "__main__":
    sys.exit(main())
