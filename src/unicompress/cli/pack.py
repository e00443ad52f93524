"""`pack`: encode a recipe's images once, on one process or on many."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import TRAIN, Device, Json, device_named
from unicompress.console import write_values
from unicompress.evals.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from unicompress.training.feed import Place
    from unicompress.training.pack import Packed
    from unicompress.unified import UnifiedModel


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

    Train on the result with data of `kind: packed` and the folder as `path`. Several processes
    share the work under a launcher: `accelerate launch -m unicompress pack ...` on GPUs, `torchrun
    --nproc-per-node 4 -m unicompress pack ...` anywhere. The files are those of one process; the
    last process to end writes the JSON.
    """
    from unicompress.training.pack import pack as write
    from unicompress.training.pack import process_place
    from unicompress.training.recipe import StageTwoRecipe, load_recipe
    from unicompress.training.stage_two import build_model

    place = process_place(os.environ)
    given = load_recipe(StageTwoRecipe, recipe, overrides or (), section="stage-two")
    model = encoding_on(device_named(own_device(device, place)), build_model(given).eval())
    with progress_bar() as progress:
        packs = write(
            given, model, output, count=count, shard=shard, place=place, progress=progress
        )
    for packed in packs:
        typer.echo(sentence(packed, place))
    if all(packed.complete for packed in packs):
        values = [
            {
                "folder": str(p.folder),
                "count": p.count,
                "unreadable": p.unreadable,
                "written": p.written,
                "bytes": p.bytes,
            }
            for p in packs
        ]
        write_values(json, {"recipe": str(recipe), "processes": place.count, "packs": values})


def own_device(name: str, place: "Place") -> str:
    """`auto` under a launcher is the GPU that it gives this process."""
    import torch

    if name != "auto" or place.count == 1 or not torch.cuda.is_available():
        return name
    local = int(os.environ.get("LOCAL_RANK", place.rank))
    return f"cuda:{local % torch.cuda.device_count()}"


def encoding_on(device: "torch.device", model: "UnifiedModel") -> "UnifiedModel":
    """Move what encodes; the language model, which has nothing to do, stays where it is."""
    for name, part in model.named_children():
        if name != "backbone":
            part.to(device)
    return model


def sentence(packed: "Packed", place: "Place") -> str:
    """What became of one folder, as far as this process can see."""
    if not packed.complete:
        return (
            f"process {place.rank + 1} of {place.count} is done: {packed.written} new samples in "
            f"{packed.folder}"
        )
    left_out = f", {packed.unreadable} images could not be read" if packed.unreadable else ""
    return (
        f"{packed.count} samples in {packed.folder} ({packed.written} new, "
        f"{packed.bytes / packed.count / 1024:.1f} KiB each{left_out})"
    )
