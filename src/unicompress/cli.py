"""The command line: reads options and calls the library; nothing heavy is imported before use."""

import os
import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicompress import __version__
from unicompress.console import (
    Commands,
    command_line,
    print_result,
    progress_bar,
    write_result,
    write_values,
)
from unicompress.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unicompress.codec import ImageCodec
    from unicompress.unified import UnifiedModel

BATCH = 16  # pictures that go through a tokenizer at once


app = typer.Typer(
    cls=Commands,
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


class Stage(str, Enum):
    """What can be trained."""

    tokenizer = "tokenizer"
    stage_one = "stage-one"
    stage_two = "stage-two"


class Cost(str, Enum):
    """What can be timed."""

    generation = "generation"
    understanding = "understanding"
    training = "training"
    decompressor = "decompressor"


class Task(str, Enum):
    """What can be evaluated."""

    all = "all"
    understanding = "understanding"
    generation = "generation"
    reconstruction = "reconstruction"
    easy_vqa = "easy-vqa"


Json = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the result as JSON.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
]
MODEL_HELP = "Folder or hub id; compressed and dense are the two models that ship."
Model = Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)]
Dense = Annotated[str, typer.Option(metavar="MODEL", help="The dense model.")]
Compressed = Annotated[str, typer.Option(metavar="MODEL", help="The compressed model.")]


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


@app.command()
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

    pair = _load(dense, device), _load(compressed, device)
    about = reference.ABOUT if (dense, compressed) == ("dense", "compressed") else ()
    command = command_line()
    with progress_bar() as progress:
        result = run_demo(*pair, out, about=about, command=command, progress=progress)
    print_result(result)
    typer.echo(f"report: {out / 'report.html'}")
    write_result(json, result)


@app.command()
def train(
    stage: Annotated[Stage, typer.Argument(help="What to train.", metavar="STAGE")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Replace recipe values.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    json: Json = None,
) -> None:
    """Train a part: STAGE is tokenizer, stage-one or stage-two; the result is in OUT/final."""
    from unicompress.training.run import ending, exit_code
    from unicompress.training.run import train as run

    result = run(stage.value, recipe, overrides or (), resume=resume)
    if result.main_process:
        typer.echo(ending(result))
        values = {"status": result.status, "step": result.step, "seconds": result.seconds}
        write_values(json, {"stage": stage.value, "recipe": str(recipe), **values})
    raise typer.Exit(exit_code(result))


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Code file.")],
    model: Model = "compressed",
    stride: Annotated[
        int | None, typer.Option(help="s, one of those the model was trained for.")
    ] = None,
    global_count: Annotated[
        int | None, typer.Option(help="How many global tokens to keep.")
    ] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Images to a file of compressed tokens."""
    import torch

    from unicompress.data.code_file import CodeFile, save_codes, unique_names

    loaded = _load(model, device)
    codec = _codec(loaded)
    pictures = [_picture(path, loaded) for path in images]  # all, before anything is written
    codes = torch.cat(
        [
            codec.encode(batch, stride=stride, global_count=global_count).cpu()
            for batch in torch.stack(pictures).split(BATCH)
        ]
    )
    content = CodeFile(
        names=tuple(unique_names(images)),
        codes=codes,
        stride=codec.spec.stride if stride is None else stride,
        global_count=codec.spec.global_count if global_count is None else global_count,
        grid=loaded.tokenizer.spec.grid,
    )
    save_codes(content, output, codec)
    tokens, dense = codes.shape[1], content.grid.length
    typer.echo(f"{len(images)} images of {tokens} tokens (dense: {dense}) in {output}")
    write_values(
        json,
        {
            "model": model,
            "file": str(output),
            "bytes": output.stat().st_size,
            "images": [str(path) for path in images],
            "names": list(content.names),
            "tokens_per_image": tokens,
            "dense_tokens_per_image": dense,
            "stride": content.stride,
            "global_count": content.global_count,
            "codes": codes.tolist(),
        },
    )


@app.command()
def decode(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the images.")],
    model: Model = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """A file of compressed tokens back to PNG images."""
    from unicompress.data.code_file import load_codes, output_path
    from unicompress.data.images import save_png, to_uint8

    loaded = _load(model, device)
    codec = _codec(loaded)
    content = load_codes(file, codec)
    paths = [output_path(output, name) for name in content.names]
    written: list[str] = []
    for codes in content.codes.split(BATCH):
        pixels = codec.decode(
            codes.to(loaded.device),
            stride=content.stride,
            global_count=content.global_count,
            grid=content.grid,
        )
        for picture in to_uint8(pixels):
            path = paths[len(written)]
            save_png(picture, path)
            written.append(str(path))
    typer.echo(f"{len(written)} images in {output}")
    write_values(json, {"model": model, "file": str(file), "images": written})


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    model: Model = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Answer a question about an image."""
    if not question.strip():
        raise InputError("the question is empty: ask something")
    loaded = _load(model, device)
    pixels = _picture(image, loaded)[None]
    start = time.perf_counter()
    (answer,) = loaded.answer(pixels, [question])
    seconds = time.perf_counter() - start
    typer.echo(answer)
    values = {"image": str(image), "question": question, "answer": answer}
    write_values(json, {**values, **_about(model, loaded), "seconds": seconds})


@app.command()
def describe(
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    model: Model = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Describe an image."""
    loaded = _load(model, device)
    pixels = _picture(image, loaded)[None]
    start = time.perf_counter()
    (text,) = loaded.describe(pixels)
    seconds = time.perf_counter() - start
    typer.echo(text)
    values = {"image": str(image), "description": text}
    write_values(json, {**values, **_about(model, loaded), "seconds": seconds})


@app.command()
def draw(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="PNG; several are numbered.")
    ] = Path("drawing.png"),
    cfg: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 2.0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely codes.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely codes; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Picture i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    model: Model = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Draw a prompt."""
    from unicompress.data.images import save_png, to_uint8

    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if output.suffix.lower() != ".png":
        raise InputError(f"{output} must end in .png: that is the format written")
    loaded = _load(model, device)
    start = time.perf_counter()
    pixels = loaded.draw(
        [prompt] * count, cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    seconds = time.perf_counter() - start
    paths = [output] if count == 1 else [_numbered(output, i) for i in range(count)]
    for path, picture in zip(paths, to_uint8(pixels), strict=True):
        save_png(picture, path)
        typer.echo(str(path))
    options = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    values = {"prompt": prompt, "images": [str(path) for path in paths], **options}
    seeds = {"seeds": [seed + i for i in range(count)]}
    write_values(json, {**values, **seeds, **_about(model, loaded), "seconds": seconds})


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    task: Annotated[Task, typer.Option(metavar="NAME", help=", ".join(Task))] = Task.all,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with it; for compressed the dense that ships."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions, prompts and pictures each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawings.")] = 0,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Accuracy and picture quality of a model, dense against compressed."""
    from unicompress.evals.experiment import Amount, evaluate_model

    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    loaded = _load(model, device)
    if dense is None and model == "compressed" and not Path(model).is_dir():
        dense = "dense"
    against = _load(dense, device) if dense else None
    if against is not None and (against.codec is not None or loaded.codec is None):
        raise InputError("--dense needs a model without a codec, and MODEL one with it")
    amount = Amount(seed=seed)
    if limit is not None:
        amount = replace(amount, questions=limit, easy_vqa=limit, prompts=limit, pictures=limit)
    with progress_bar() as progress:
        result = evaluate_model(
            loaded,
            task.value,
            against=against,
            amount=amount,
            command=command_line(),
            progress=progress,
        )
    print_result(result)
    write_result(json, result)


@app.command()
def bench(
    what: Annotated[Cost, typer.Argument(metavar="WHAT", help=", ".join(Cost))],
    lm: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A known shape, random weights, such as llama-3.2-1b."),
    ] = None,
    dense: Dense = "dense",
    compressed: Compressed = "compressed",
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed runs of each model.")] = 5,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """What a model costs, dense against compressed in one process: medians and their ratio."""
    from unicompress.evals.cost import BENCHES, Effort, Pair
    from unicompress.evals.language_models import random_pair

    effort = Effort(batch=batch, repeats=repeats)
    with_codec = _load(compressed, device)
    if lm is None:
        pair = Pair(dense=_load(dense, device), compressed=with_codec)
    else:
        pair = random_pair(
            lm,
            tokenizer=with_codec.tokenizer,
            codec=_codec(with_codec),
            dtype=_fast_type(with_codec.device),
        )
    with progress_bar() as progress:
        result = BENCHES[what.value](pair, effort, progress=progress).with_command(command_line())
    print_result(result)
    write_result(json, result)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(metavar="DIR")],
    model: Model = "compressed",
    json: Json = None,
) -> None:
    """Write a plain causal LM whose vocabulary contains the image codes, for any LM server."""
    loaded = _load(model, "cpu")
    loaded.export_causal_lm(output)
    typer.echo(f"plain language model in {output}")
    write_values(json, {**_about(model, loaded), "folder": str(output)})


# What the commands share


def _device(name: str) -> "torch.device":
    """`auto`, or what torch understands and this machine has."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the device {name!r} cannot be used ({reason}): try cpu") from error
    return device


def _load(name: str, device: str) -> "UnifiedModel":
    """A model that ships, by name, unless a folder has that name; otherwise a folder or hub id."""
    from unicompress import reference
    from unicompress.unified import UnifiedModel

    place = _device(device)
    if name in reference.NAMES and not Path(name).is_dir():
        return reference.load(name, device=place)  # type: ignore[arg-type]
    model: UnifiedModel = UnifiedModel.from_pretrained(name)
    return model.to(place).eval()


def _codec(model: "UnifiedModel") -> "ImageCodec":
    """The model's codec; for a dense model the identity, which keeps the host's own codes."""
    from unicompress.codec import CodecSpec, ImageCodec

    if model.codec is not None:
        return model.codec
    return ImageCodec(model.tokenizer, CodecSpec(stride=1, global_count=0)).eval()


def _picture(path: Path, model: "UnifiedModel") -> "Tensor":
    """An image file, cropped and resized for the model: [3, h, w] in [-1, 1]."""
    from unicompress.data.images import load_image, to_tensor

    return to_tensor(load_image(path, model.tokenizer.spec.image_size)).to(model.device)


def _fast_type(device: "torch.device") -> "torch.dtype":
    """Of large random language models: bf16 where the hardware multiplies it fast."""
    import torch

    from unicompress.training.progress import bf16_is_fast

    return torch.bfloat16 if bf16_is_fast(device) else torch.float32


def _numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.stem}-{index}{path.suffix}")


def _about(name: str, model: "UnifiedModel") -> dict[str, Any]:
    return {
        "model": name,
        "tokens_per_image": model.tokens_per_image,
        "interface_tokens": model.interface_tokens,
    }
