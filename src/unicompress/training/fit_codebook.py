"""Fits the codebooks of a `continuous` tokenizer to a stream of images; minutes, no gradients.

The images go through the encoder once. Coordinates and codebooks come from `product_code.py`;
with the metric `pixels` an error counts as much as the decoder shows it: the metric is the mean of
J^T J, J the decoder's Jacobian, estimated by sending random pictures backwards through it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.codebook import code_usage
from unicompress.data.images import to_tensor
from unicompress.data.streams import ImageStream, StreamOptions
from unicompress.errors import InputError
from unicompress.evals.image_metrics import psnr
from unicompress.evals.result import Progress
from unicompress.requantize import quiet
from unicompress.tokenizers.continuous import Continuous
from unicompress.tokenizers.product_code import (
    Books,
    Rounds,
    balanced_basis,
    fit_books,
    refine_basis,
)
from unicompress.training.feed import seed_of
from unicompress.training.samples import SceneSource

METRICS = ("pixels", "latent")
SCENES = "scenes"  # in place of a path: the built-in ones
SHUFFLE = 1000  # images mixed at a time, since folders are often sorted by class


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How much is looked at, and how long."""

    images: int = 1000  # at most; a tenth of what is found is held out
    tokens: int = 131_072  # drawn from them, at most: k-means holds them in memory
    rounds: int = 12  # of k-means
    refinements: int = 3  # turns of the coordinates, each followed by a third of the rounds
    metric: str = "pixels"  # or latent: all channels of the latents count alike
    metric_images: int = 24  # whose gradients are looked at
    decoded_images: int = 8  # held-out ones that are decoded for the report
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        for name in ("images", "tokens", "rounds", "metric_images", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class FitReport:
    """How well the codebooks serve images, those fitted and others."""

    images: int
    held_out: int
    tokens: int  # that k-means saw
    relative_error: float  # of quantisation: squared error / variance, in the fitted coordinates
    relative_error_held_out: float
    usage: float  # share of the rows that the held-out images use
    perplexity: float
    revived: int  # rows that were set anew because no token was theirs
    psnr_continuous: float  # dB on held-out images, without codebooks: the ceiling
    psnr: float  # with them


def fit_codebook(
    tokenizer: Continuous,
    pictures: Iterable[Float[Tensor, "3 h w"]],
    options: FitOptions,
    progress: Progress | None = None,
) -> FitReport:
    """Set the tokenizer's coordinates and codebooks from pictures in [-1, 1].

    Equal pictures and seeds give equal codebooks. Raises InputError for too few pictures.
    """
    pixels, patches = _gather(tokenizer, pictures, options, progress)
    held_out = max(1, len(patches) // 10)
    draw = torch.Generator().manual_seed(seed_of(options.seed, 4))
    tokens = patches[:-held_out].flatten(0, 1)
    tokens = tokens[torch.randperm(len(tokens), generator=draw)[: options.tokens]]
    metric = None
    if options.metric == "pixels":
        metric = pixel_metric(tokenizer, patches[:-held_out], options, draw, progress)
    basis = balanced_basis(tokens, tokenizer.codes_per_token, metric)
    books: Books | None = None
    revived = 0
    for turn in range(options.refinements + 1):
        if books is not None:
            basis = refine_basis(tokens, basis, books)
        label = f"k-means {turn + 1}/{options.refinements + 1}"
        books = fit_books(
            (tokens - basis.mean) @ basis.into,
            chunks=tokenizer.codes_per_token,
            size=tokenizer.codebook_size,
            rounds=options.rounds if books is None else -(-options.rounds // 3),
            generator=draw,
            start=None if books is None else books.rows,
            progress=None if progress is None else _labelled(progress, label),
        )
        revived += books.revived
    assert books is not None  # at least one turn
    tokenizer.set_codebooks(basis, books)
    return _report(tokenizer, tokens, patches[-held_out:], pixels, revived, len(patches), options)


def pixel_metric(
    tokenizer: Continuous,
    patches: Float[Tensor, "i t d"],
    options: FitOptions,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Float[Tensor, "d d"]:
    """E[J^T J] of a token: how much a small change of its patch changes the decoded pixels.

    With white noise v in pixel space, the gradient g of <v, decode(patches)> has E[g g^T] = J^T J.
    Effects between neighboring tokens are left out.
    """
    chosen = torch.linspace(0, len(patches) - 1, min(options.metric_images, len(patches)))
    total = torch.zeros(patches.shape[-1], patches.shape[-1], dtype=torch.float64)
    with quiet(tokenizer):
        for done, index in enumerate(chosen.long().tolist()):
            inputs = patches[index : index + 1].to(tokenizer.device).requires_grad_()
            decoded = tokenizer.pixels_of_patches(inputs)
            noise = torch.randn(decoded.shape, generator=generator).to(decoded)
            (gradient,) = torch.autograd.grad((decoded * noise).sum(), inputs)
            rows = gradient[0].double().cpu()
            total += rows.T @ rows
            if progress is not None:
                progress("measuring the decoder", done + 1, len(chosen))
    return total / (len(chosen) * patches.shape[1])


def pictures_from(
    path: str, *, size: int, seed: int = 0, column: str = "image"
) -> Iterator[Tensor]:
    """The pictures of a folder, parquet file, tar or hub dataset, once, mixed; [3, size, size].

    `scenes` are the built-in ones, without end. Raises InputError for what cannot be opened.
    """
    return _scenes(size) if path == SCENES else _stream(path, size, seed, column)


def _stream(path: str, size: int, seed: int, column: str) -> Iterator[Tensor]:
    stream = ImageStream(
        StreamOptions(path=path, format=_format(path), image=column, shuffle=SHUFFLE),
        size=size,
        seed=seed,
    )
    for sample in stream:
        if stream.state()["epoch"]:
            return
        yield to_tensor(sample.pixels)


def _scenes(size: int) -> Iterator[Tensor]:
    source = SceneSource(size=size)
    return (to_tensor(source.at(index).pixels) for index in count())


def _format(path: str) -> str:
    """By the ending; what cannot be a hub id (owner/name) must be a folder."""
    endings = {".parquet": "parquet", ".tar": "webdataset"}
    local = Path(path).is_dir() or path.count("/") > 1 or path.startswith((".", "/", "~"))
    return endings.get(Path(path).suffix, "folder" if local else "hub")


@torch.no_grad()
def _gather(
    tokenizer: Continuous,
    pictures: Iterable[Tensor],
    options: FitOptions,
    progress: Progress | None,
) -> tuple[Float[Tensor, "m 3 h w"], Float[Tensor, "i t d"]]:
    """Patches of all pictures, and the pixels of the last ones, which the report decodes."""
    tokenizer.eval()
    stream = islice(pictures, options.images)
    found, kept = [], torch.empty(0)
    done = 0
    while batch := list(islice(stream, options.batch)):
        pixels = torch.stack(batch)
        found.append(tokenizer.patches(pixels.to(tokenizer.device)).cpu())
        kept = torch.cat([kept, pixels])[-options.decoded_images :] if done else pixels
        done += len(batch)
        if progress is not None:
            progress("encoding", done, options.images)
    if done < 2:
        raise InputError(f"fitting needs at least 2 images, found {done}: check the path")
    return kept[-options.decoded_images :], torch.cat(found)


@torch.no_grad()
def _report(
    tokenizer: Continuous,
    tokens: Float[Tensor, "n d"],
    held_out: Float[Tensor, "i t d"],
    pixels: Float[Tensor, "m 3 h w"],
    revived: int,
    images: int,
    options: FitOptions,
) -> FitReport:
    dense = (held_out.to(tokenizer.device) - tokenizer.mean) @ tokenizer.into
    codes, rows = tokenizer.quantize(dense)
    used = code_usage(codes, tokenizer.codebook_size)
    shown = min(len(pixels), len(dense))
    originals = pixels[-shown:]
    continuous, discrete = (
        torch.cat([psnr(tokenizer.decode(one[None]).cpu(), o[None]) for one, o in pairs])
        for pairs in (zip(field[-shown:], originals, strict=True) for field in (dense, rows))
    )
    fitted = (tokens.to(tokenizer.device) - tokenizer.mean) @ tokenizer.into
    return FitReport(
        images=images - len(held_out),
        held_out=len(held_out),
        tokens=len(tokens),
        relative_error=_relative(tokenizer, fitted[None]),
        relative_error_held_out=_relative(tokenizer, dense),
        usage=used.usage,
        perplexity=used.perplexity,
        revived=revived,
        psnr_continuous=float(continuous.mean()),
        psnr=float(discrete.mean()),
    )


def _relative(tokenizer: Continuous, dense: Float[Tensor, "b n d"]) -> float:
    """Squared error of quantisation / variance of the tokens."""
    error = (tokenizer.quantize(dense)[1] - dense).square().sum()
    center = dense.mean(dim=(0, 1))
    return float(error / (dense - center).square().sum())


def _labelled(progress: Progress, label: str) -> Rounds:
    return lambda done, total: progress(label, done, total)
