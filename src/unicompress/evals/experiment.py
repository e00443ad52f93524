"""One model, or a dense and a compressed one, on one evaluation task or all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unicompress.errors import InputError
from unicompress.evals.cost import Pair, kv_cache_bytes
from unicompress.evals.generation import DEFAULT_SAMPLING, evaluate_generation, unseen_scenes
from unicompress.evals.reconstruction import (
    DECOMPRESSED,
    HOST,
    ReconstructionScore,
    evaluate_reconstruction,
)
from unicompress.evals.result import Figures, Progress, Result, hardware
from unicompress.evals.results_page import write_results_page
from unicompress.evals.understanding import QuestionSet, evaluate_understanding
from unicompress.generate import Sampling
from unicompress.registry import require
from unicompress.unified import UnifiedModel

__all__ = ["ALL", "TASKS", "Amount", "evaluate_model", "write_results_page"]

ALL = "all"
OTHERS = 1_000_000  # index of the first real scene that gives the floor of the FID


@dataclass(frozen=True)
class Amount:
    """How much is evaluated, and how."""

    questions: int = 2000
    easy_vqa: int | None = None  # None is all 9,673
    prompts: int = 500
    pictures: int = 500
    batch: int = 32
    baselines: bool = True
    similarity: bool = True  # SSIM, which needs torchmetrics
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0  # of the drawings; the questions and prompts are always the same


@dataclass(frozen=True)
class Outcome:
    """What one task adds to a result."""

    figures: dict[str, dict[str, Any]]  # side -> fixed key -> value
    details: dict[str, Any]


def evaluate_model(
    model: UnifiedModel,
    task: str = ALL,
    *,
    against: UnifiedModel | None = None,
    amount: Amount | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Evaluate a model, and with `against` the dense one on the same questions and prompts.

    A model without a codec and without `against` fills the dense side of the result. Raises
    InputError for an unknown task.
    """
    known = (*TASKS, ALL)
    if task not in known:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(known)}")
    amount, names = amount or Amount(), tuple(TASKS) if task == ALL else (task,)
    _check_packages(names, amount)
    alone = against is None and model.codec is None
    pair = Pair(dense=model, compressed=None) if alone else Pair(dense=against, compressed=model)
    sides = {side: _known(model) for side, model in pair}
    details: dict[str, Any] = {"amount": amount}
    for name in names:
        outcome = TASKS[name](pair, amount, progress)
        sides = {
            side: replace(figures, **outcome.figures.get(side, {}))
            for side, figures in sides.items()
        }
        details[name] = outcome.details
    return Result(
        command=command or f"unicompress evaluate --task {task}",
        dense=sides.get("dense", Figures()),
        compressed=sides.get("compressed", Figures()),
        seeds=(amount.seed,),
        hardware=hardware(pair.any.device),
        details=details,
    )


def _check_packages(tasks: Sequence[str], amount: Amount) -> None:
    """Fail before the work rather than in the middle of it."""
    if "reconstruction" in tasks and amount.similarity:
        require("torchmetrics", extra="eval-light")
    if "easy-vqa" in tasks:
        require("easy_vqa", extra="eval-light")


def _known(model: UnifiedModel) -> Figures:
    return Figures(
        tokens_per_image=model.tokens_per_image,
        interface_tokens=model.interface_tokens,
        kv_cache_bytes=kv_cache_bytes(model),
    )


def _labelled(progress: Progress | None, side: str) -> Progress | None:
    """The same progress, with the model's side before what is going on."""
    if progress is None:
        return None
    return lambda label, done, total: progress(f"{side}: {label}", done, total)


def _questions(pair: Pair, amount: Amount, progress: Progress | None) -> Outcome:
    size = pair.any.tokenizer.spec.image_size
    tests = QuestionSet.scenes(amount.questions, size=size)
    outcome = _ask(pair, tests, amount, progress)
    figures = {
        side: {"understanding_accuracy": details["accuracy"].overall.mean}
        for side, details in outcome.items()
        if side != "difference"
    }
    return Outcome(figures, outcome)


def _easy_vqa(pair: Pair, amount: Amount, progress: Progress | None) -> Outcome:
    """An outside check, so it does not fill the fixed figure of the built-in task."""
    size = pair.any.tokenizer.spec.image_size
    return Outcome(
        {}, _ask(pair, QuestionSet.easy_vqa(amount.easy_vqa, size=size), amount, progress)
    )


def _ask(
    pair: Pair, tests: QuestionSet, amount: Amount, progress: Progress | None
) -> dict[str, Any]:
    scores = {
        side: evaluate_understanding(
            model,
            tests,
            batch=amount.batch,
            baselines=amount.baselines,
            progress=_labelled(progress, side),
        )
        for side, model in pair
    }
    details: dict[str, Any] = {side: score.summary() for side, score in scores.items()}
    if len(scores) == 2:
        details["difference"] = scores["compressed"].compared_with(scores["dense"])
    return details


def _drawings(pair: Pair, amount: Amount, progress: Progress | None) -> Outcome:
    size = pair.any.tokenizer.spec.image_size
    samples = unseen_scenes(amount.prompts, size=size)
    others = unseen_scenes(amount.prompts, size=size, first=OTHERS)
    scores = {
        side: evaluate_generation(
            model,
            samples,
            others=others,
            sampling=amount.sampling,
            seed=amount.seed,
            batch=amount.batch,
            progress=_labelled(progress, side),
        )
        for side, model in pair
    }
    details: dict[str, Any] = {side: score.summary() for side, score in scores.items()}
    if len(scores) == 2:
        details["difference"] = scores["compressed"].compared_with(scores["dense"])
    figures = {side: {"generation_accuracy": score.whole.mean} for side, score in scores.items()}
    return Outcome(figures, details)


def _pictures(pair: Pair, amount: Amount, progress: Progress | None) -> Outcome:
    samples = unseen_scenes(amount.pictures, size=pair.any.tokenizer.spec.image_size)
    figures: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    for side, model in pair:
        scores: dict[str, ReconstructionScore] = evaluate_reconstruction(
            model.tokenizer,
            model.codec,
            samples,
            batch=amount.batch,
            similarity=amount.similarity,
            progress=_labelled(progress, side),
        )
        final = scores.get(DECOMPRESSED, scores[HOST])
        figures[side] = {"psnr": final.psnr.mean}
        details[side] = {name: score.summary() for name, score in scores.items()}
    return Outcome(figures, details)


TASKS: dict[str, Callable[[Pair, Amount, Progress | None], Outcome]] = {
    "understanding": _questions,
    "generation": _drawings,
    "reconstruction": _pictures,
    "easy-vqa": _easy_vqa,
}
