"""A plug-in on photographs, which have no captions to check: every way of reconstructing them.

    python -m unicompress.evals.photographs TOKENIZER PLUG_IN IMAGES --json PATH

Beside the host (dense) and the plug-in (compressed) stand the controls without training: average
pooling over the same cells, expanded to the nearest and bilinearly, with and without the host's
codebook. The first row is the ceiling, the host's decoder on tokens that were never quantised.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unicompress.codec import ImageCodec
from unicompress.compressors import mean_of_cells
from unicompress.data.images import load_image, save_png, to_tensor, to_uint8
from unicompress.errors import InputError, UnicompressError
from unicompress.evals.image_metrics import psnr, ssim
from unicompress.evals.reconstruction import nearest_expansion
from unicompress.evals.result import Figures, Progress, Result, module_command
from unicompress.evals.statistics import Interval, bootstrap_mean
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokenizers.io import load_tokenizer
from unicompress.tokens import Grid

MODULE = "unicompress.evals.photographs"
UNQUANTIZED = "not quantised"
DENSE = "dense codes"
COMPRESSED = "compressed"
REPEATED = "its tokens, repeated"
SHUFFLED = "with another picture's globals"
AVERAGE = "average"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PhotographScore:
    """One way of reconstructing, against the originals; means over pictures."""

    psnr: Interval  # dB
    ssim: Interval
    sharpness: float  # energy of the pixel gradients, as a share of the dense reconstruction's


@torch.no_grad()
def evaluate_photographs(
    tokenizer: ImageTokenizer,
    codec: ImageCodec,
    pixels: Float[Tensor, "n 3 h w"],
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> tuple[dict[str, PhotographScore], dict[str, Float[Tensor, "n 3 h w"]]]:
    """Scores and reconstructions of every way, on the CPU; pixels in [-1, 1]."""
    if len(pixels) < 2:
        raise InputError(f"at least 2 pictures are needed, got {len(pixels)}")
    made: dict[str, list[Tensor]] = {}
    for start in range(0, len(pixels), batch):
        part = pixels[start : start + batch].to(tokenizer.device)
        for name, dense in _ways(tokenizer, codec, part):
            made.setdefault(name, []).append(tokenizer.decode(dense).float().cpu())
        if progress is not None:
            progress("reconstructing", min(start + batch, len(pixels)), len(pixels))
    pictures = {name: torch.cat(parts) for name, parts in made.items()}
    energy = _gradient_energy(pictures[DENSE])
    scores = {
        name: PhotographScore(
            psnr=bootstrap_mean(psnr(found, pixels).numpy()),
            ssim=bootstrap_mean(ssim(found, pixels).numpy()),
            sharpness=_gradient_energy(found) / energy,
        )
        for name, found in pictures.items()
    }
    return scores, pictures


def photograph_result(
    codec: ImageCodec, scores: dict[str, PhotographScore], *, command: str, title: str, note: str
) -> Result:
    """The scores in the shape that all results share."""
    host = codec.tokenizer.spec
    return Result(
        command=command,
        dense=Figures(
            tokens_per_image=host.grid.length,
            interface_tokens=host.grid.length + 2,
            psnr=scores[DENSE].psnr.mean,
        ),
        compressed=Figures(
            tokens_per_image=codec.tokens_per_image(),
            interface_tokens=codec.interface_tokens(),
            psnr=scores[COMPRESSED].psnr.mean,
        ),
        details={
            "title": title,
            "note": note,
            "codec": codec.spec.to_dict(),
            "host": {"name": codec.tokenizer.name, "codes_per_token": host.codes_per_token}
            | {"codebook_size": host.codebook_size, "image_size": host.image_size},
            "photographs": scores,
            "tables": [
                {
                    "title": "Ways of reconstructing",
                    "note": f"{scores[DENSE].psnr.count} pictures.",
                    "columns": ["", "PSNR (dB)", "SSIM", "sharpness (dense = 1)"],
                    "rows": [
                        [name, str(score.psnr), str(score.ssim), f"{score.sharpness:.2f}"]
                        for name, score in scores.items()
                    ],
                }
            ],
        },
    )


def _ways(
    tokenizer: ImageTokenizer, codec: ImageCodec, pixels: Float[Tensor, "b 3 h w"]
) -> Iterator[tuple[str, Float[Tensor, "b t e"]]]:
    """Name and dense tokens of every way."""
    grid, stride = tokenizer.spec.grid, codec.spec.stride
    dense = tokenizer.encode(pixels)
    yield UNQUANTIZED, tokenizer.dense_target(dense)
    yield DENSE, tokenizer.quantize(dense)[1]
    tokens = codec.compress(dense)
    yield COMPRESSED, codec.decompress(tokens)
    count = tokens.global_tokens.shape[1]
    if count and len(pixels) > 1:
        codes, _ = codec.quantize(tokens)
        codes[:, :count] = codes[:, :count].roll(1, dims=0)
        yield f"{COMPRESSED}, {SHUFFLED}", codec.decompress(codes)
    yield f"{COMPRESSED}: {REPEATED}", nearest_expansion(codec, tokens)
    pooled = mean_of_cells(dense, grid, stride)
    rows = tokenizer.quantize(pooled)[1]
    yield f"{AVERAGE}, nearest", _expanded(rows, grid, stride, "nearest")
    yield f"{AVERAGE}, bilinear", _expanded(rows, grid, stride, "bilinear")
    soft = _expanded(tokenizer.dense_target(pooled), grid, stride, "bilinear")
    yield f"{AVERAGE}, bilinear, {UNQUANTIZED}", soft


def _expanded(
    tokens: Float[Tensor, "b m e"], grid: Grid, stride: int, mode: str
) -> Float[Tensor, "b t e"]:
    """Local tokens spread over the dense grid; smaller cells at odd edges are cut off."""
    field = rearrange(tokens, "b (r c) e -> b e r c", r=grid.pooled(stride).rows)
    field = F.interpolate(field, scale_factor=stride, mode=mode)[..., : grid.rows, : grid.columns]
    return rearrange(field, "b e r c -> b (r c) e")


def _gradient_energy(pixels: Float[Tensor, "b 3 h w"]) -> float:
    """Mean square of the differences between neighboring pixels."""
    return float(pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean())


def contact_sheet(
    originals: Float[Tensor, "n 3 h w"], pictures: dict[str, Float[Tensor, "n 3 h w"]], count: int
) -> Float[Tensor, "3 y x"]:
    """The first `count` pictures, one row each: original, then every way in order."""
    columns = [originals[:count], *(found[:count] for found in pictures.values())]
    return rearrange(torch.stack(columns), "k n c h w -> c (n h) (k w)")


def read_folder(folder: Path | str, size: int) -> Float[Tensor, "n 3 h w"]:
    """All pictures of a folder in the order of their names, in [-1, 1]; raises InputError."""
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"there is no folder {folder}: check the path")
    paths = sorted(path for path in place.iterdir() if path.suffix.lower() in ENDINGS)
    if not paths:
        raise InputError(f"{folder} holds no {', '.join(ENDINGS)} files: check the path")
    return torch.stack([to_tensor(load_image(path, size)) for path in paths])


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a plug-in on a folder of pictures; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("codec", metavar="PLUG_IN")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("--json", metavar="PATH", required=True)
    parser.add_argument("--sheet", metavar="PNG", help="also draw 8 pictures by every way")
    parser.add_argument("--title", default="Photographs")
    parser.add_argument("--note", default="")
    given = parser.parse_args(arguments)
    command = module_command(MODULE, arguments)
    try:
        host = load_tokenizer(given.tokenizer)
        codec = ImageCodec.from_pretrained(given.codec, host)
        pixels = read_folder(given.images, host.spec.image_size)
        scores, pictures = evaluate_photographs(host, codec, pixels)
        result = photograph_result(
            codec, scores, command=command, title=given.title, note=given.note
        )
        result.write(given.json)
        if given.sheet:
            save_png(to_uint8(contact_sheet(pixels, pictures, 8)), given.sheet)
    except UnicompressError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for way, score in scores.items():
        line = f"{way}: {score.psnr} dB, SSIM {score.ssim}, sharpness {score.sharpness:.2f}"
        print(line)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
