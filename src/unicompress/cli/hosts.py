"""`hosts`: which image models can be compressed, and what is known about each."""

from unicompress.cli.app import app
from unicompress.cli.options import START, Json
from unicompress.console import write_values


@app.command(rich_help_panel=START)
def hosts(json: Json = None) -> None:
    """List every host: what works with it, its licence, and how it was verified."""
    from rich.console import Console
    from rich.table import Table

    from unicompress.hosts import WHAT, list_hosts

    lines = list_hosts()
    table = Table("host", "kind", *(what.replace("_", " ") for what in WHAT), box=None)
    for line in lines:
        table.add_row(line.name, line.kind, *(getattr(line, what) for what in WHAT))
    console = Console()
    console.print(table)
    for line in lines:
        notes = line.verified + (f"; {line.limits}" if line.limits else "")
        console.print(f"\n[bold]{line.name}[/] ({line.kind}), licence: {line.licence or '-'}")
        console.print(f"  verified by {notes}", highlight=False)
    write_values(json, {"hosts": [line.to_dict() for line in lines]})
