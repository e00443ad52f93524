"""`hosts`: which image models can be compressed, and what is known about each."""

from unicompress.cli.app import app
from unicompress.cli.options import LOOK, Json
from unicompress.console import write_values


@app.command(rich_help_panel=LOOK)
def hosts(json: Json = None) -> None:
    """List every host: what works with it, its licence, and how it was verified."""
    from rich.console import Console
    from rich.table import Table

    from unicompress.hosts import WHAT, list_hosts

    lines = list_hosts()
    titles = ("host", "kind", *(what.replace("_", " ") for what in WHAT), "licence", "verified")
    table = Table(*titles, show_lines=True)
    for line in lines:
        cells = [line.name, line.kind, *(getattr(line, what) for what in WHAT)]
        notes = line.verified + (f"; {line.limits}" if line.limits else "")
        table.add_row(*cells, line.licence or "-", notes)
    Console().print(table)
    write_values(json, {"hosts": [line.to_dict() for line in lines]})
