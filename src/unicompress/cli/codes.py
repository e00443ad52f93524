"""`encode`, `decode` and `export`: files that go in and out of a model."""

from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    FILES,
    Device,
    Json,
    Model,
    about,
    codec_of,
    load_model,
    read_picture,
)
from unicompress.console import write_values

BATCH = 16  # pictures that go through a tokenizer at once


@app.command(rich_help_panel=FILES)
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

    loaded = load_model(model, device)
    codec = codec_of(loaded)
    pictures = [read_picture(path, loaded) for path in images]  # all, before anything is written
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


@app.command(rich_help_panel=FILES)
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

    loaded = load_model(model, device)
    codec = codec_of(loaded)
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


@app.command(rich_help_panel=FILES)
def export(
    output: Annotated[Path, typer.Argument(metavar="DIR")],
    model: Model = "compressed",
    json: Json = None,
) -> None:
    """Write a plain causal LM whose vocabulary contains the image codes, for any LM server."""
    loaded = load_model(model, "cpu")
    loaded.export_causal_lm(output)
    typer.echo(f"plain language model in {output}")
    write_values(json, {**about(model, loaded), "folder": str(output)})
