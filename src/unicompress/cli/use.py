"""`ask`, `describe` and `draw`: the three uses of a model."""

import time
from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    USE,
    Device,
    Json,
    Model,
    about,
    check_png,
    load_model,
    read_picture,
)
from unicompress.console import write_values
from unicompress.errors import InputError


@app.command(rich_help_panel=USE)
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
    loaded = load_model(model, device)
    pixels = read_picture(image, loaded)[None]
    start = time.perf_counter()
    (answer,) = loaded.answer(pixels, [question])
    seconds = time.perf_counter() - start
    typer.echo(answer)
    values = {"image": str(image), "question": question, "answer": answer}
    write_values(json, {**values, **about(model, loaded), "seconds": seconds})


@app.command(rich_help_panel=USE)
def describe(
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    model: Model = "compressed",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Describe an image."""
    loaded = load_model(model, device)
    pixels = read_picture(image, loaded)[None]
    start = time.perf_counter()
    (text,) = loaded.describe(pixels)
    seconds = time.perf_counter() - start
    typer.echo(text)
    values = {"image": str(image), "description": text}
    write_values(json, {**values, **about(model, loaded), "seconds": seconds})


@app.command(rich_help_panel=USE)
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
    check_png(output)
    loaded = load_model(model, device)
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
    write_values(json, {**values, **seeds, **about(model, loaded), "seconds": seconds})


def _numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.stem}-{index}{path.suffix}")
