"""`fit-codebook`: a continuous autoencoder becomes a tokenizer with codes."""

from pathlib import Path
from typing import Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import TRAIN, Device, Json, device_named
from unicompress.console import write_values
from unicompress.evals.progress import progress_bar


@app.command(rich_help_panel=TRAIN)
def fit_codebook(
    autoencoder: Annotated[
        str,
        typer.Argument(
            metavar="AUTOENCODER",
            help="Folder or hub id of diffusers, or a folder with a TAESD-type pair of files.",
        ),
    ],
    images: Annotated[
        str,
        typer.Option(metavar="PATH", help="Folder, parquet, tar, hub dataset, or scenes."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The tokenizer.")],
    codes_per_token: Annotated[int, typer.Option(help="D, the number of codebooks.")] = 8,
    codebook_size: Annotated[int, typer.Option(help="K, rows of each codebook.")] = 1024,
    image_size: Annotated[int, typer.Option(help="Pixels per side.")] = 256,
    patch: Annotated[int, typer.Option(help="Latent places per token and side.")] = 2,
    limit: Annotated[int, typer.Option(help="At most so many images.")] = 1000,
    metric: Annotated[
        str, typer.Option(help="pixels: errors count as the decoder shows them; or latent.")
    ] = "pixels",
    seed: Annotated[int, typer.Option(help="Of k-means and of the order of the images.")] = 0,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Fit codebooks to a continuous autoencoder; DIR is then a tokenizer for all other commands."""
    from dataclasses import asdict

    from unicompress.checkpoint import fingerprint
    from unicompress.tokenizers.continuous import from_autoencoder
    from unicompress.tokenizers.io import save_tokenizer
    from unicompress.training.fit_codebook import FitOptions, pictures_from
    from unicompress.training.fit_codebook import fit_codebook as fit

    options = FitOptions(images=limit, metric=metric, seed=seed)
    place = device_named(device)
    tokenizer = from_autoencoder(
        autoencoder,
        image_size=image_size,
        patch=patch,
        codes_per_token=codes_per_token,
        codebook_size=codebook_size,
    ).to(place)
    pictures = pictures_from(images, size=image_size, seed=seed)
    with progress_bar() as progress:
        report = fit(tokenizer, pictures, options, progress)
    save_tokenizer(tokenizer.cpu(), output)
    spec = tokenizer.spec
    typer.echo(
        f"{output}: {spec.grid.length} tokens of {codes_per_token} codes out of {codebook_size}; "
        f"held-out PSNR {report.psnr:.2f} dB (not quantised {report.psnr_continuous:.2f}), "
        f"relative error {report.relative_error_held_out:.3f}"
    )
    write_values(
        json,
        {
            "autoencoder": autoencoder,
            "images": images,
            "folder": str(output),
            "fingerprint": fingerprint(tokenizer),
            "options": asdict(options),
            "fit": asdict(report),
        },
    )
