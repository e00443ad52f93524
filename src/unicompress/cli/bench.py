"""`bench`: what a model costs, dense against compressed in one process."""

from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    LOOK,
    Compressed,
    Dense,
    Device,
    Json,
    codec_of,
    device_named,
    fast_type,
    load_model,
)
from unicompress.console import command_line, print_result, progress_bar, write_result
from unicompress.errors import InputError

if TYPE_CHECKING:
    import torch

    from unicompress.codec import CodecSpec
    from unicompress.evals.cost import Pair
    from unicompress.evals.result import Result
    from unicompress.tokenizers.base import ImageTokenizer


class Cost(str, Enum):
    """What can be timed."""

    generation = "generation"
    understanding = "understanding"
    training = "training"
    decompressor = "decompressor"


class Type(str, Enum):
    """Precision of random weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


LM_HELP = "Random weights of this shape: llama-3.2-1b, a config.json, a hub id, ..."
Lm = Annotated[str | None, typer.Option(metavar="NAME", help=LM_HELP)]
HOST_HELP = "With --lm: host with random weights, such as 'janus_vq(image_size=256)', or a folder."
Host = Annotated[str | None, typer.Option("--tokenizer", metavar="SPEC", help=HOST_HELP)]
Stride = Annotated[int | None, typer.Option(help="s of a random plug-in (with --lm).")]
Globals = Annotated[int | None, typer.Option(help="N_g of a random plug-in (with --lm).")]
Order = Annotated[str | None, typer.Option(help="raster, block or parallel (with --lm).")]
Head = Annotated[str | None, typer.Option(help="codes or regression (with --lm).")]
Precision = Annotated[
    Type, typer.Option(help="Of random weights; auto: bfloat16 where it is fast, for the LM alone.")
]


@app.command(rich_help_panel=LOOK)
def bench(
    what: Annotated[Cost, typer.Argument(metavar="WHAT", help=", ".join(Cost))],
    lm: Lm = None,
    tokenizer: Host = None,
    stride: Stride = None,
    global_count: Globals = None,
    order: Order = None,
    head: Head = None,
    dense: Dense = "dense",
    compressed: Compressed = "compressed",
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 8,
    cfg: Annotated[float, typer.Option(help="Guidance of the drawing; 1 is none.")] = 2.0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each model.")] = 5,
    dtype: Precision = Type.auto,
    engine: Annotated[
        str, typer.Option(help="How steps run: eager, fixed, compile or graph (CUDA).")
    ] = "eager",
    janus: Annotated[
        bool, typer.Option("--janus", help="Also time transformers' own Janus at this shape.")
    ] = False,
    counts: Annotated[
        bool, typer.Option(help="Count arithmetic and memory in one more run of each.")
    ] = True,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Seconds of the processor: for a busy machine."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also draw where the time goes.")
    ] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """What a model costs, dense against compressed in one process: medians and their ratio."""
    from unicompress import generate as measuring
    from unicompress.engine import use_engine
    from unicompress.evals.bench_plot import save_plot
    from unicompress.evals.cost import BENCHES, Effort
    from unicompress.evals.generation import DEFAULT_SAMPLING

    effort = Effort(batch=batch, repeats=repeats, flops=counts)
    options: dict[str, Any] = {}
    if what is Cost.generation:
        options = {"sampling": replace(DEFAULT_SAMPLING, cfg=cfg), "baseline": janus}
    if processor_time and device_named(device).type != "cpu":
        raise InputError("--processor-time sees nothing of a GPU's work: use it with --device cpu")
    timing = measuring.processor_time() if processor_time else nullcontext()
    changes = {"stride": stride, "global_count": global_count, "order": order, "head": head}
    pair = _pair(lm, tokenizer, changes, (dense, compressed), dtype, device)
    with use_engine(engine), timing, progress_bar() as progress:
        result = BENCHES[what.value](pair, effort, progress=progress, **options)
    clock = "processor" if processor_time else "wall"
    measured = {**result.details[what.value], "clock": clock}
    result = replace(result, command=command_line(), details={what.value: measured})
    _print(what.value, result)
    if plot is not None:
        save_plot(result, plot)
    write_result(json, result)


def _pair(
    lm: str | None,
    host: str | None,
    changes: dict[str, Any],
    names: tuple[str, str],
    dtype: Type,
    device: str,
) -> "Pair":
    """The two models that are asked for: loaded, or with random weights of a shape."""
    from unicompress.evals.cost import Pair
    from unicompress.evals.language_models import random_codec, random_pair

    changes = {name: value for name, value in changes.items() if value is not None}
    if lm is None:
        if host or changes or dtype is not Type.auto:
            raise InputError("--tokenizer, --dtype and the plug-in's options need --lm")
        return Pair(*(load_model(name, device) for name in names))
    if host is None and not changes and dtype is Type.auto:
        model = load_model(names[1], device)
        return random_pair(
            lm, tokenizer=model.tokenizer, codec=codec_of(model), dtype=fast_type(model.device)
        )
    tokenizer, spec = parts(host, changes, names[1], device)
    precision = torch_type(dtype, tokenizer.device)
    if dtype is not Type.auto:
        tokenizer.to(precision)
    return random_pair(
        lm, tokenizer=tokenizer, codec=random_codec(tokenizer, spec), dtype=precision
    )


def parts(
    host: str | None, changes: dict[str, Any], model: str, device: str
) -> "tuple[ImageTokenizer, CodecSpec]":
    """A host, and the options of a plug-in for it: the default ones, or those of a model."""
    from unicompress.codec import PRESETS
    from unicompress.tokenizers.io import load_tokenizer

    if host is not None:
        tokenizer = load_tokenizer(host).freeze().to(device_named(device))
        return tokenizer, replace(PRESETS["default"], **changes)
    loaded = load_model(model, device)
    return loaded.tokenizer, replace(codec_of(loaded).spec, **changes)


def torch_type(dtype: Type, device: "torch.device") -> "torch.dtype":
    """The precision that an option names."""
    import torch

    if dtype is Type.auto:
        return fast_type(device)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype.value]


def _print(what: str, result: "Result") -> None:
    """Ratio first, then the figures, then where the time goes."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from unicompress.evals.result import RATIOS

    console = Console()
    measured = result.details[what]
    for key, value in result.ratio.items():
        if value is not None and key.endswith("seconds"):
            console.print(f"{key.replace('_', ' ')}: compressed / dense = {value:.3f}")
    print_result(result)
    dense, compressed = asdict(result.dense_breakdown), asdict(result.compressed_breakdown)
    table = Table("seconds", "dense", "compressed", "share of compressed")
    total = getattr(result.compressed, RATIOS.get(f"{what}_seconds", ""), None)
    for part, value in compressed.items():
        if value is not None:
            before = "-" if dense[part] is None else f"{dense[part]:.4f}"
            share = "-" if not total else f"{value / total:.1%}"
            table.add_row(part.replace("_", " "), before, f"{value:.4f}", share)
    if table.row_count:
        console.print(table)
    _print_counts(measured)


def _print_counts(measured: Any) -> None:
    """Medians of all that took part, with arithmetic and memory where they were counted."""
    from rich.console import Console
    from rich.table import Table

    flops, peaks = measured.get("flops") or {}, measured.get("peak_bytes") or {}
    table = Table("", "median seconds", "GFLOP", "peak MiB beside the weights")
    for name, seconds in (measured.get("medians") or {}).items():
        gflop = f"{flops[name] / 1e9:.2f}" if name in flops else "-"
        peak = f"{peaks[name] / 2**20:.1f}" if name in peaks else "-"
        table.add_row(name.replace("_", " "), f"{seconds:.4f}", gflop, peak)
    if table.row_count:
        Console().print(table)
