"""`bench`: what a model costs, dense against compressed in one process."""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicompress.cli.app import app
from unicompress.cli.bench_tables import print_bench
from unicompress.cli.options import (
    MEASURE,
    Dense,
    Device,
    Json,
    ProcessorTime,
    check_png,
    codec_of,
    device_named,
    fast_type,
    load_model,
    timing,
)
from unicompress.console import command_line, write_result
from unicompress.errors import InputError
from unicompress.evals.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from unicompress.codec import CodecSpec, ImageCodec
    from unicompress.evals.cost import Effort, Pair
    from unicompress.evals.result import Progress, Result
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
HOST_HELP = "With --lm: host with random weights, such as 'janus_vq(image_size=256)', or a folder."
Stride = Annotated[int | None, typer.Option(help="s of a random plug-in (with --lm).")]
Globals = Annotated[int | None, typer.Option(help="N_g of a random plug-in (with --lm).")]
Order = Annotated[str | None, typer.Option(help="raster, block or parallel (with --lm).")]
Head = Annotated[str | None, typer.Option(help="codes or regression (with --lm).")]
Precision = Annotated[
    Type, typer.Option(help="Of random weights; auto: bfloat16 where it is fast, for the LM alone.")
]


MORE = " Repeat it to see how cost grows."
Lms = Annotated[list[str] | None, typer.Option("--lm", metavar="NAME", help=LM_HELP + MORE)]
Hosts = Annotated[
    list[str] | None, typer.Option("--tokenizer", metavar="SPEC", help=HOST_HELP + MORE)
]
Batches = Annotated[
    list[int] | None, typer.Option("--batch", help="Pictures at once, 8 if not given." + MORE)
]
COMPRESSED_HELP = (
    "The compressed model. For the decompressor repeat it with models or plug-ins trained in "
    "other orders: their quality is compared on batch x repeats pictures."
)
Trained = Annotated[
    list[str] | None, typer.Option("--compressed", metavar="MODEL", help=COMPRESSED_HELP)
]


@app.command(rich_help_panel=MEASURE)
def bench(
    what: Annotated[Cost, typer.Argument(metavar="WHAT", help=", ".join(Cost))],
    lm: Lms = None,
    tokenizer: Hosts = None,
    stride: Stride = None,
    global_count: Globals = None,
    order: Order = None,
    head: Head = None,
    dense: Dense = "dense",
    compressed: Trained = None,
    batch: Batches = None,
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
    processor_time: ProcessorTime = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also draw where the time goes, or grows.")
    ] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """What a model costs, dense against compressed in one process: medians and their ratio.

    --lm, --tokenizer and --batch may be given several times: every combination is measured.
    """
    from unicompress.engine import use_engine
    from unicompress.evals.bench_plot import save_plot
    from unicompress.evals.cost import BENCHES, Effort
    from unicompress.evals.generation import DEFAULT_SAMPLING

    efforts = [Effort(batch=size, repeats=repeats, flops=counts) for size in batch or [8]]
    models = compressed or ["compressed"]
    options: dict[str, Any] = {}
    if what is Cost.generation:
        options = {"sampling": replace(DEFAULT_SAMPLING, cfg=cfg), "baseline": janus}
    check_png(plot)
    timed = timing(processor_time, device)
    if len(models) > 1 and (what is not Cost.decompressor or lm):
        raise InputError("several --compressed are for bench decompressor, and not with --lm")
    changes = {"stride": stride, "global_count": global_count, "order": order, "head": head}

    def make(name: str | None, host: str | None) -> "Pair":
        return _pair(name, host, changes, (dense, models[0]), dtype, device)

    def measure(pair: "Pair", effort: "Effort", progress: "Progress") -> "Result":
        if what is Cost.decompressor:
            return _decompressor(
                pair, {} if lm else dict.fromkeys(models), device, effort, progress
            )
        return BENCHES[what.value](pair, effort, progress=progress, **options)

    with use_engine(engine), timed, progress_bar() as progress:
        result = _measured(
            what.value, lm, tokenizer, efforts, make, lambda pair, e: measure(pair, e, progress)
        )
    clock = "processor" if processor_time else "wall"
    measured = {**result.details[what.value], "clock": clock}
    result = replace(result, command=command_line(), details={what.value: measured})
    print_bench(what.value, result)
    if plot is not None:
        save_plot(result, plot)
    write_result(json, result)


def _measured(
    what: str,
    lms: list[str] | None,
    hosts: list[str] | None,
    efforts: "list[Effort]",
    make: "Callable[[str | None, str | None], Pair]",
    measure: "Callable[[Pair, Effort], Result]",
) -> "Result":
    """One measurement, or all combinations of several shapes as one result."""
    from unicompress.evals.bench_growth import Shape, growth

    found = []
    names: list[str | None] = [*lms] if lms else [None]
    specs: list[str | None] = [*hosts] if hosts else [None]
    for name in names:
        for host in specs:
            pair = make(name, host)
            for effort in efforts:
                shape = Shape(batch=effort.batch, lm=name, tokenizer=host)
                found.append((shape, measure(pair, effort)))
            del pair  # before the next language model is made
    return found[0][1] if len(found) == 1 else growth(what, found)


def _decompressor(
    pair: "Pair",
    names: dict[str, None],
    device: str,
    effort: "Effort",
    progress: "Progress",
) -> "Result":
    """Time of all orders, and quality of the decompressors that are named."""
    from unicompress.evals.bench_orders import bench_orders

    first = pair.compressed
    trained: dict[str, ImageCodec] = {}
    for name in names:
        if not trained and first is not None and first.codec is not None:
            trained[name] = first.codec
        elif trained:
            trained[name] = _trained(name, next(iter(trained.values())), device)
    return bench_orders(pair, trained, effort, progress=progress)


def _trained(name: str, like: "ImageCodec", device: str) -> "ImageCodec":
    """A plug-in by its own folder, around the host of another one, or that of a whole model."""
    from unicompress.checkpoint import read_json
    from unicompress.codec import CONFIG, FORMAT, ImageCodec

    config = Path(name) / CONFIG
    if config.is_file() and read_json(config).get("format") == FORMAT:
        return ImageCodec.from_pretrained(name, like.tokenizer).to(like.tokenizer.device).eval()
    codec = codec_of(load_model(name, device))
    if codec.decompressor is None:
        raise InputError(f"{name} is a dense model: it has no decompressor to compare")
    return codec


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
