"""`train`: the tokenizer, the plug-in, the language model."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import TRAIN, Json
from unicompress.console import write_values

if TYPE_CHECKING:
    from rich.table import Table

    from unicompress.training.dry_run import Plan, StagePlan


class Stage(str, Enum):
    """What can be trained."""

    tokenizer = "tokenizer"
    stage_one = "stage-one"
    stage_two = "stage-two"


@app.command(rich_help_panel=TRAIN)
def train(
    stage: Annotated[Stage, typer.Argument(help="What to train.", metavar="STAGE")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Replace recipe values.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Two steps of each stage at toy size, and the costs.")
    ] = False,
    json: Json = None,
) -> None:
    """Train a part: STAGE is tokenizer, stage-one or stage-two; the result is in OUT/final."""
    if dry_run:
        from unicompress.training.dry_run import dry_run as plan_of

        plan = plan_of(stage.value, recipe, overrides or ())
        print_plan(plan)
        return write_values(json, plan.to_dict())
    from unicompress.training.run import ending, exit_code
    from unicompress.training.run import train as run

    result = run(stage.value, recipe, overrides or (), resume=resume)
    if result.main_process:
        typer.echo(ending(result))
        values = {"status": result.status, "step": result.step, "seconds": result.seconds}
        write_values(json, {"stage": stage.value, "recipe": str(recipe), **values})
    raise typer.Exit(exit_code(result))


def print_plan(plan: "Plan") -> None:
    """One table for each stage, then what the figures rest on."""
    from rich.console import Console

    console = Console()
    for stage in plan.stages:
        console.print(stage_table(stage))
    for name, formula in plan.formulas.items():
        console.print(f"{name}: {formula}", style="dim", highlight=False)


def stage_table(stage: "StagePlan") -> "Table":
    """Dense beside compressed."""
    from rich.table import Table

    toy = " -> ".join(f"{loss:.3f}" for loss in stage.toy_losses)
    table = Table(
        "",
        "dense",
        "compressed",
        title=f"{stage.stage}: {stage.samples:,} samples, toy loss {toy}",
        title_justify="left",
    )
    sides = (stage.dense, stage.compressed)
    for name, form, scale in (
        ("image_tokens", "{:,.0f}", 1.0),
        ("positions", "{:,.0f}", 1.0),
        ("flops", "{:,.2f} TFLOP a sample", 1e-12),
        ("gpu_hours", "{:,.1f}", 1.0),
        ("memory_bytes", "{:,.1f} GB a GPU", 1e-9),
    ):
        cells = ["-" if s is None else form.format(scale * getattr(s, name)) for s in sides]
        table.add_row(name.replace("_", " "), *cells)
    trained, frozen = (
        f"{n / 1e6:,.1f} M" for n in (stage.trained_parameters, stage.frozen_parameters)
    )
    table.caption = f"{trained} parameters trained, {frozen} frozen"
    return table
