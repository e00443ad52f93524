"""The application that every command registers with, and its entry point."""

import os
from typing import Annotated, Any

import typer

from unicompress import __version__
from unicompress.cli.options import PANELS
from unicompress.console import Commands


class InPanels(Commands):
    """Lists the commands panel by panel; within a panel, module by module."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of `PANELS`; what has none of them comes last."""
        places = {panel: place for place, panel in enumerate(PANELS)}
        commands: Any = self.commands
        return sorted(
            super().list_commands(ctx),
            key=lambda name: places.get(commands[name].rich_help_panel, len(places)),
        )


app = typer.Typer(
    cls=InPanels,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fewer image tokens for unified vision-language models.",
    epilog="--debug, anywhere, shows the traceback of an error.",
)


def main() -> None:
    """Entry point of the installed command."""
    # Libraries below us report loading and deprecations; one line of error is easier to find alone.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"unicompress {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fewer image tokens for unified vision-language models: understanding and drawing alike."""
