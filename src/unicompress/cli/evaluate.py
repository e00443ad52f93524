"""`evaluate`: accuracy and picture quality, dense against compressed."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    MEASURE,
    MODEL_HELP,
    Device,
    Json,
    load_model,
)
from unicompress.console import command_line, print_result, write_result
from unicompress.errors import InputError
from unicompress.evals.progress import progress_bar


class Task(str, Enum):
    """What can be evaluated."""

    all = "all"
    understanding = "understanding"
    generation = "generation"
    reconstruction = "reconstruction"
    easy_vqa = "easy-vqa"


@app.command(rich_help_panel=MEASURE)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    task: Annotated[Task, typer.Option(metavar="NAME", help=", ".join(Task))] = Task.all,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with it; for compressed the dense that ships."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions, prompts and pictures each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawings.")] = 0,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Accuracy and picture quality of a model, dense against compressed."""
    from unicompress.evals.experiment import Amount, evaluate_model

    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    loaded = load_model(model, device)
    if dense is None and model == "compressed" and not Path(model).is_dir():
        dense = "dense"
    against = load_model(dense, device) if dense else None
    if against is not None and (against.codec is not None or loaded.codec is None):
        raise InputError("--dense needs a model without a codec, and MODEL one with it")
    amount = Amount(seed=seed)
    if limit is not None:
        amount = replace(amount, questions=limit, easy_vqa=limit, prompts=limit, pictures=limit)
    with progress_bar() as progress:
        result = evaluate_model(
            loaded,
            task.value,
            against=against,
            amount=amount,
            command=command_line(),
            progress=progress,
        )
    print_result(result)
    write_result(json, result)
