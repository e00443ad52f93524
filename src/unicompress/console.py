"""Speaking to people: errors in one line, tables, and the JSON beside them."""

import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from unicompress.errors import UnicompressError

if TYPE_CHECKING:
    from unicompress.evals.result import Result

SCHEMA = 1
USAGE, INTERRUPTED = 2, 130  # exit codes
# The parent of typer's usage errors; newer versions of typer no longer depend on click for it.
ClickException: Any = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """Turns what a user can cause into one line and an exit code; a bug keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Run a command line and exit: 0 on success, 2 for mistakes, 130 where interrupted."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given  # anywhere, since nobody types it before the first failure
        given = [word for word in given if word != "--debug"]
        options["standalone_mode"] = False
        try:
            sys.exit(super().main(args=given or ["--help"], **options) or 0)
        except ClickException as error:
            place = error.ctx.command_path if getattr(error, "ctx", None) else "unicompress"
            _fail(f"{error.format_message()} (see {place} --help)", debug)
        except UnicompressError as error:
            _fail(str(error), debug)
        except OSError as error:
            _fail(f"{error.strerror or error}: {error.filename or 'no file name known'}", debug)
        except typer.Abort:
            _fail("interrupted", debug, code=INTERRUPTED)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; typer's own handling of Ctrl-C depends on its version."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Abort from error


def _fail(message: str, debug: bool, code: int = USAGE) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def command_line() -> str:
    """What was typed, for the record in a result."""
    return shlex.join(["unicompress", *sys.argv[1:]])


def write_values(path: Path | None, values: Mapping[str, Any]) -> None:
    """The JSON of a command that measures nothing."""
    if path is not None:
        from unicompress.checkpoint import write_json

        write_json({"schema": SCHEMA, "command": command_line(), **values}, path)


def write_result(path: Path | None, result: "Result") -> None:
    """The JSON of a command that measures, in the shape that all of them share."""
    if path is not None:
        result.write(path)


def print_result(result: "Result") -> None:
    """The fixed figures, dense beside compressed."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    dense, compressed = asdict(result.dense), asdict(result.compressed)
    ratios = {**result.ratio, "tokens_per_image": result.ratio["tokens"]}
    table = Table("", "dense", "compressed", "ratio")
    for name in dense:
        if dense[name] is not None or compressed[name] is not None:
            row = (dense[name], compressed[name], ratios.get(name))
            table.add_row(name.replace("_", " "), *map(_number, row))
    Console().print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
