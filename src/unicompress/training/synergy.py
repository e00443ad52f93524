"""Does training both tasks together help, and does acceleration take that help away?

`python -m unicompress.training.synergy recipes/reference/synergy.yaml [key=value ...]` trains the
runs of a recipe for several seeds, one result file each in `<results>/synergy/`, and writes their
comparison to `<results>/synergy.json`, anew whenever a seed is complete. A run whose file exists is
left alone and one that was interrupted goes on where it stopped. The experiment of arXiv
2606.01503, section 6, with the controls that it lacks; the report says whatever sign is found.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from tqdm import tqdm

from unicompress.errors import RecipeError, UnicompressError
from unicompress.evals.generation import evaluate_generation, unseen_scenes
from unicompress.evals.meter import flop_counter
from unicompress.evals.result import Figures, Result
from unicompress.evals.understanding import QuestionSet, evaluate_understanding
from unicompress.limits.gradients import Loss, compare_tasks
from unicompress.training.experiment import plain_name, read_command
from unicompress.training.feed import Place
from unicompress.training.recipe import StageTwoRecipe, parse_recipe
from unicompress.training.stage_two import (
    FINAL,
    StageTwo,
    UnifiedBatch,
    UnifiedBatches,
    build_model,
    held_out_recipe,
    train_stage_two,
)
from unicompress.training.synergy_report import Runs, tables
from unicompress.unified import UnifiedModel

SPLIT = "val"
MODULE = "unicompress.training.synergy"


class Comparison(BaseModel):
    """A run on both tasks, and the runs on one of them that it is measured against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    joint: str
    understanding: str
    generation: str


class SynergyRecipe(BaseModel):
    """What is trained, what is compared, and how much is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage_two: dict[str, Any]  # a stage-two recipe; every run changes some of its keys
    runs: dict[str, dict[str, Any]]  # `times` multiplies the steps, all else is stage two's
    comparisons: dict[str, Comparison]
    baseline: str  # the comparison whose synergy the others are held against
    seeds: tuple[int, ...] = (0, 1, 2)
    questions: int = Field(default=600, gt=0)
    drawings: int = Field(default=200, gt=1)
    gradient_images: int = Field(default=64, gt=3)  # of each task
    results: str = "docs/results"

    @model_validator(mode="after")
    def _names_are_known(self) -> "SynergyRecipe":
        for name, comparison in self.comparisons.items():
            for run in comparison.model_dump().values():
                if run not in self.runs:
                    raise ValueError(f"the comparison {name!r} names an unknown run {run!r}")
        if self.baseline not in self.comparisons:
            raise ValueError(f"baseline {self.baseline!r} is none of the comparisons")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be at least one number, each once")
        return self


def run_synergy(recipe: SynergyRecipe, source: str, command: str) -> list[Path]:
    """Train and measure all runs, then compare them; returns the files, old ones included.

    The comparison is written whenever a seed is complete, from the seeds that are.
    """
    folder, report = Path(recipe.results) / "synergy", Path(recipe.results) / "synergy.json"
    stages = {
        seed: {
            name: _stage(recipe, name, changes, seed, source)
            for name, changes in recipe.runs.items()
        }
        for seed in recipe.seeds
    }
    paths = {
        s.out: folder / f"{Path(s.out).name}.json" for r in stages.values() for s in r.values()
    }
    runs: dict[str, dict[int, Result]] = {name: {} for name in recipe.runs}
    with tqdm(total=len(paths), unit="run") as bar:
        for seed, own in stages.items():  # a whole comparison with one seed comes first
            for name, stage in own.items():
                path = paths[stage.out]
                if not path.exists():
                    _run(stage, recipe, name, command).write(path)
                runs[name][seed] = Result.load(path)
                bar.update()
            compare(recipe, runs, command).write(report)
    return [*paths.values(), report]


def _stage(
    recipe: SynergyRecipe, name: str, changes: dict[str, Any], seed: int, source: str
) -> StageTwoRecipe:
    values = {**recipe.stage_two, **changes, "seed": seed}
    times = values.pop("times", 1)
    if isinstance(times, int) and isinstance(values.get("steps"), int):
        values["steps"] *= times
    else:
        raise RecipeError(f"{source}, run {name}: steps and times must be whole numbers")
    values["out"] = str(Path(values["out"]) / f"{plain_name(name)}-seed{seed}")
    return parse_recipe(StageTwoRecipe, values, f"{source}, run {name}")


def _run(stage: StageTwoRecipe, recipe: SynergyRecipe, name: str, command: str) -> Result:
    """Train one run, or go on with it, and measure it."""
    joint = 0 < stage.understanding_share < 1
    start = None
    if joint:  # before the training, since the start's gradients need the start's weights
        start = _gradients(_placed(build_model(stage), stage), stage, recipe.gradient_images)
    result = train_stage_two(stage, resume=True)
    if result.status != "done":
        raise UnicompressError(
            f"{name}, seed {stage.seed}, was interrupted at step {result.step} of {stage.steps}: "
            "the same command goes on from there"
        )
    model = _placed(UnifiedModel.from_pretrained(Path(stage.out) / FINAL), stage)
    figures, known = measure(model, stage, recipe)
    if joint:
        end = _gradients(model, stage, recipe.gradient_images)
        known["gradients"] = {"start": start, "end": end}
    known |= {
        "run": name,
        "accelerators": list(stage.accelerators),
        "tokens_per_image": model.tokens_per_image,
        "steps": stage.steps,
        "batch": stage.batch,
        "training_seconds": result.seconds,
        "recipe": stage.model_dump(mode="json"),
    }
    side = "dense" if model.codec is None else "compressed"
    sides: dict[str, Any] = {side: figures}
    return Result(command=command, seeds=(stage.seed,), details={"synergy": known}, **sides)


def _placed(model: UnifiedModel, stage: StageTwoRecipe) -> UnifiedModel:
    """The model where its training runs."""
    return model.to("cuda" if torch.cuda.is_available() and not stage.cpu else "cpu")


def measure(
    model: UnifiedModel, stage: StageTwoRecipe, recipe: SynergyRecipe
) -> tuple[Figures, dict[str, Any]]:
    """What a trained run answers and draws on validation scenes, and its held-out losses."""
    model.eval()
    size = model.tokenizer.spec.image_size
    with torch.no_grad():
        # Half and half for every run, so that all see the same pictures.
        losses = StageTwo(model, stage.model_copy(update={"understanding_share": 0.5})).validate()
    known: dict[str, Any] = {"gigaflops": forward_gigaflops(model, stage)}
    accuracy = whole = None
    if stage.understanding_share > 0:
        asked = QuestionSet.scenes(recipe.questions, split=SPLIT, size=size)
        answered = evaluate_understanding(model, asked)
        accuracy = answered.accuracy.overall.mean
        known["understanding"] = {
            "accuracy": accuracy,
            "loss": losses["understanding/loss"],
            "score": answered.summary(),
        }
    if stage.understanding_share < 1:
        drawn = evaluate_generation(model, unseen_scenes(recipe.drawings, split=SPLIT, size=size))
        whole = drawn.whole.mean
        known["generation"] = {
            "whole": whole,
            "loss": losses["generation/loss"],
            "code_accuracy": losses["generation/accuracy"],
            "score": drawn.summary(),
        }
    figures = Figures(
        tokens_per_image=model.tokens_per_image,
        interface_tokens=model.interface_tokens,
        understanding_accuracy=accuracy,
        generation_accuracy=whole,
    )
    return figures, known


def _held_out(model: UnifiedModel, stage: StageTwoRecipe, batch: int) -> UnifiedBatches:
    size = model.tokenizer.spec.image_size
    return UnifiedBatches(held_out_recipe(stage, batch=batch), size, Place())


@torch.no_grad()
def forward_gigaflops(model: UnifiedModel, stage: StageTwoRecipe) -> dict[str, float]:
    """Arithmetic of the language model's layers, forward and per image, by task."""
    batch = _held_out(model, stage, 8).at(0)[0].to(model.device)
    found = {}
    for task, (count, loss) in _losses(model, batch).items():
        with flop_counter() as counter:
            loss()
        layers = counter.get_flop_counts()[type(model.backbone).__name__]
        found[task] = sum(layers.values()) / count / 1e9
    return found


def _losses(model: UnifiedModel, batch: UnifiedBatch) -> dict[str, tuple[int, Loss]]:
    """Number of images and loss of each task in a batch."""
    found: dict[str, tuple[int, Loss]] = {}
    read, drawn = batch.read, batch.drawn
    if read is not None:
        found["understanding"] = (
            len(read),
            lambda: model.understanding_loss(read, batch.questions, batch.answers).loss,
        )
    if drawn is not None:
        found["generation"] = (
            len(drawn),
            lambda: model.generation_loss(drawn, batch.captions).loss,
        )
    return found


def _gradients(model: UnifiedModel, stage: StageTwoRecipe, images: int) -> dict[str, Any]:
    """Agreement of the tasks on held-out pictures, by layer."""
    model.eval()
    batches = _held_out(model, stage.model_copy(update={"understanding_share": 0.5}), 8)
    halves: dict[str, tuple[list[Loss], list[Loss]]] = {}
    for step in range(max(2, -(-images // 4))):
        batch = batches.at(step)[0].to(model.device)
        for task, (_, loss) in _losses(model, batch).items():
            halves.setdefault(task, ([], []))[step % 2].append(loss)
    module: nn.Module = model.backbone
    found = compare_tasks(module, halves["understanding"], halves["generation"])
    return {group: agreement.summary() for group, agreement in found.items()}


def compare(recipe: SynergyRecipe, runs: Runs, command: str) -> Result:
    """One result file with the tables that the results page shows, of the seeds there are."""
    comparisons = {name: c.model_dump() for name, c in recipe.comparisons.items()}
    seeds = tuple(next(iter(runs.values())))
    few = "" if len(seeds) == len(recipe.seeds) else f", {len(recipe.seeds)} are planned"
    return Result(
        command=command,
        seeds=seeds,
        details={
            "title": "Synergy of understanding and generation, with and without acceleration",
            "note": f"Every task is trained on the same images in all runs of a seed. Seeds: "
            f"{len(seeds)}{few}. Measured on {recipe.questions} questions and {recipe.drawings} "
            "prompts of validation scenes.",
            "tables": tables(runs, comparisons, recipe.baseline),
            "comparisons": comparisons,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment of a recipe; returns the exit code."""
    try:
        for path in run_synergy(*read_command(MODULE, __doc__, SynergyRecipe, arguments)):
            print(path)
    except UnicompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
