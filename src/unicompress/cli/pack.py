"""`pack`: encode a recipe's images once."""

from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import TRAIN, Device, Json, device_named
from unicompress.console import progress_bar, write_values


@app.command(rich_help_panel=TRAIN)
def pack(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Of stage two.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Replace recipe values.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder.")] = (
        Path("packed")
    ),
    count: Annotated[int, typer.Option(help="Samples of each entry of data.")] = 10_000,
    shard: Annotated[int, typer.Option(help="Samples in a file.")] = 1024,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Encode the images of a stage-two recipe once; the same command goes on after a break.

    Train on the result with data of `kind: packed` and the folder as `path`.
    """
    from unicompress.training.pack import pack as write
    from unicompress.training.recipe import StageTwoRecipe, load_recipe
    from unicompress.training.stage_two import build_model

    given = load_recipe(StageTwoRecipe, recipe, overrides or ())
    model = build_model(given).to(device_named(device)).eval()
    with progress_bar() as progress:
        folders = write(given, model, output, count=count, shard=shard, progress=progress)
    for packed in folders:
        typer.echo(
            f"{packed.count} samples in {packed.folder} ({packed.written} new, "
            f"{packed.bytes / packed.count / 1024:.1f} KiB each)"
        )
    values = [
        {"folder": str(p.folder), "count": p.count, "written": p.written, "bytes": p.bytes}
        for p in folders
    ]
    write_values(json, {"recipe": str(recipe), "packs": values})
