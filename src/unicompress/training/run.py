"""Starting a stage by name: what `unicompress train` and `python -m unicompress.training` call."""

from collections.abc import Sequence
from pathlib import Path

from unicompress.errors import InputError
from unicompress.training.loop import LoopResult
from unicompress.training.recipe import StageOneRecipe, StageTwoRecipe, TokenizerRecipe, load_recipe

STAGES = ("tokenizer", "stage-one", "stage-two")


def train(
    stage: str, path: Path | str, overrides: Sequence[str] = (), *, resume: bool = False
) -> LoopResult:
    """Run a stage from a recipe file and `key=value` overrides.

    Raises InputError for an unknown stage and RecipeError for a recipe that cannot be used.
    """
    if stage == "tokenizer":
        from unicompress.training.tokenizer import train_tokenizer

        return train_tokenizer(load_recipe(TokenizerRecipe, path, overrides), resume=resume)
    if stage == "stage-one":
        from unicompress.training.stage_one import train_stage_one

        return train_stage_one(
            load_recipe(StageOneRecipe, path, overrides, section=stage), resume=resume
        )
    if stage == "stage-two":
        from unicompress.training.stage_two import train_stage_two

        return train_stage_two(
            load_recipe(StageTwoRecipe, path, overrides, section=stage), resume=resume
        )
    raise InputError(f"unknown stage {stage!r}: use one of {', '.join(STAGES)}")


def ending(result: LoopResult) -> str:
    """One sentence on how a run ended and what to do next."""
    minutes = f"after {result.step} steps, {result.seconds / 60:.1f} minutes"
    if result.status == "done":
        return f"finished {minutes}"
    return f"{result.status} {minutes}; the same command with --resume goes on from here"


def exit_code(result: LoopResult) -> int:
    """130 where the user interrupted the run, as shells have it; otherwise 0."""
    return 130 if result.status == "interrupted" else 0
