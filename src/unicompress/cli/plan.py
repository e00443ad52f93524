"""`plan`: what compression would save, before anybody trains."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.bench import (
    HOST_HELP,
    LM_HELP,
    Head,
    Order,
    Precision,
    Type,
    parts,
    torch_type,
)
from unicompress.cli.options import (
    MEASURE,
    Device,
    Json,
    Model,
    ProcessorTime,
    device_named,
    timing,
)
from unicompress.console import write_values
from unicompress.errors import InputError

if TYPE_CHECKING:
    from unicompress.evals.plan import Plan


@app.command(rich_help_panel=MEASURE)
def plan(
    lm: Annotated[str, typer.Option(metavar="NAME", help=LM_HELP)],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="SPEC", help=HOST_HELP.removeprefix("With --lm: "))
    ] = None,
    model: Model = "compressed",
    stride: Annotated[int | None, typer.Option("--stride", "--s", help="s.")] = None,
    global_count: Annotated[
        int | None, typer.Option("--global-count", "--n-global", help="N_g.")
    ] = None,
    order: Order = None,
    head: Head = None,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 1,
    cfg: Annotated[float, typer.Option(help="Guidance of the drawing; 1 is none.")] = 2.0,
    dtype: Precision = Type.auto,
    processor_time: ProcessorTime = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Predict the speed-up of drawing, and what the decompressor may cost, from a calibration.

    Takes about half a minute; random weights, so nothing has to be trained. Host and plug-in are
    those of --model unless --tokenizer names another host.
    """
    from unicompress.evals.plan import make_plan

    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    clock = timing(processor_time, device)
    changes = {"stride": stride, "global_count": global_count, "order": order, "head": head}
    given = {name: value for name, value in changes.items() if value is not None}
    host, spec = parts(tokenizer, given, model, device)
    precision = torch_type(dtype, device_named(device))
    if dtype is not Type.auto:
        host.to(precision)
    with clock:
        found = make_plan(lm, tokenizer=host, spec=spec, batch=batch, cfg=cfg, dtype=precision)
    for line in _lines(found):
        typer.echo(line)
    values = {**asdict(found), "lm": lm, "batch": batch, "cfg": cfg, "ratio": found.ratio}
    ends = {"limit": found.limit, "break_even_seconds": found.break_even, "step": found.step}
    rates = {
        "decompressor_in_steps": found.in_steps(found.costs.decompressor),
        "break_even_in_steps": found.in_steps(found.break_even),
    }
    write_values(json, {**values, **ends, **rates})


def _lines(plan: "Plan") -> list[str]:
    """What people want to know, one sentence a line."""
    now, most = (plan.in_steps(s) for s in (plan.costs.decompressor, plan.break_even))
    share = plan.costs.decompressor / plan.compressed_seconds
    lines = [
        f"{plan.dense_tokens} dense tokens become {plan.compressed_tokens}",
        f"predicted generation time, compressed / dense: {plan.ratio:.3f} "
        f"({1 / plan.ratio:.2f} times as fast); with a free decompressor {plan.limit:.3f}",
        f"the decompressor takes {share:.1%} of it: {now:.3f} language model steps per dense token",
        f"it breaks even at {most:.2f} steps per dense token",
        f"timed with {' and '.join(map(str, plan.layers_timed))} of {plan.layers} layers",
    ]
    if plan.ratio >= 1:
        lines.append("do not bother: nothing is gained")
    return lines
