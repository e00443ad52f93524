"""The bar that long measurements show, whoever starts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicompress.evals.result import Progress


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """A bar on stderr that is told what goes on, how much is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    told = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*told, Elapsed(), TextColumn("left"), Remaining())
    console = Console(stderr=True)
    quiet = not console.is_terminal  # in a log or a pipe a bar is noise
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(
            task, description=label, completed=done, total=total
        )
