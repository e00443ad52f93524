"""`demo`: dense against compressed at a glance."""

from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import START, Compressed, Dense, Device, Json, load_model
from unicompress.console import command_line, print_result, write_result
from unicompress.evals.progress import progress_bar


@app.command(rich_help_panel=START)
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for report and pictures.")
    ] = Path("demo"),
    dense: Dense = "dense",
    compressed: Compressed = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Unseen pictures and prompts through the dense and the compressed model, side by side."""
    from unicompress import reference
    from unicompress.evals.demo import run_demo

    pair = load_model(dense, device), load_model(compressed, device)
    about = reference.ABOUT if (dense, compressed) == ("dense", "compressed") else ()
    command = command_line()
    with progress_bar() as progress:
        result = run_demo(*pair, out, about=about, command=command, progress=progress)
    print_result(result)
    typer.echo(f"report: {out / 'report.html'}")
    write_result(json, result)
