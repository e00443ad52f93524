"""Pictures through the host alone, through the plug-in, and through its control."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from unicompress.codec import ImageCodec
from unicompress.data.scenes import SceneSample
from unicompress.evals.generation import attribute_accuracies, judge, real_pictures
from unicompress.evals.image_metrics import FID_PROTOCOL, fid, psnr, ssim
from unicompress.evals.result import Progress
from unicompress.evals.statistics import Interval, bootstrap_mean
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokens import CompressedTokens

HOST = "host"  # the tokenizer's own reconstruction from dense codes: the ceiling
DECOMPRESSED = "decompressed"
NEAREST = "nearest_expansion"  # every local code repeated s x s times: the control


@dataclass(frozen=True)
class ReconstructionScore:
    """Quality of one way of reconstructing, against the original pictures."""

    psnr: Interval  # dB, mean over pictures
    ssim: Interval | None  # None where it was not asked for
    fid: float | None  # under `FID_PROTOCOL`, against the originals themselves
    token_accuracy: float | None  # share of dense tokens equal to the host's own codes
    whole: Interval | None  # the checker reads the whole caption off the reconstruction
    attributes: dict[str, Interval]

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return {
            "psnr": self.psnr,
            "ssim": self.ssim,
            FID_PROTOCOL: self.fid,
            "token_accuracy": self.token_accuracy,
            "whole": self.whole,
            "attributes": self.attributes,
        }


@dataclass(frozen=True)
class Reconstructions:
    """The same pictures by every way, [n, 3, h, w] in [-1, 1] on the CPU."""

    originals: Float[Tensor, "n 3 h w"]
    pictures: dict[str, Float[Tensor, "n 3 h w"]]
    token_accuracy: dict[str, float | None]


@torch.no_grad()
def reconstruct(
    tokenizer: ImageTokenizer,
    codec: ImageCodec | None,
    pixels: Float[Tensor, "n 3 h w"],
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> Reconstructions:
    """Reconstruct by the host and, with a codec, by the decompressor and the control."""
    pictures: dict[str, list[Tensor]] = {}
    hits: dict[str, list[Tensor]] = {}
    for start in range(0, len(pixels), batch):
        part = pixels[start : start + batch].to(tokenizer.device)
        for name, dense, hit in _ways(tokenizer, codec, part):
            pictures.setdefault(name, []).append(tokenizer.decode(dense).float().cpu())
            hits.setdefault(name, []).append(hit.cpu())
        if progress:
            progress("reconstructing", min(start + batch, len(pixels)), len(pixels))
    return Reconstructions(
        originals=pixels.float().cpu(),
        pictures={name: torch.cat(parts) for name, parts in pictures.items()},
        token_accuracy={
            name: float(torch.cat(parts).float().mean()) for name, parts in hits.items()
        },
    )


def _ways(
    tokenizer: ImageTokenizer, codec: ImageCodec | None, pixels: Float[Tensor, "b 3 h w"]
) -> Iterator[tuple[str, Float[Tensor, "b t e"], Bool[Tensor, "b t"]]]:
    """Name, dense tokens, and which of them equal the host's own, for every way."""
    dense = tokenizer.encode(pixels)
    codes, rows = tokenizer.quantize(dense)
    yield HOST, rows, torch.ones_like(codes[..., 0], dtype=torch.bool)
    if codec is None:
        return
    grid = codec.grid_of(pixels)
    tokens = codec.compress(dense, grid=grid)
    expanded = codec.expand(tokens)
    # A regression never equals a codebook row, so its tokens are compared after snapping.
    yield DECOMPRESSED, expanded.dense, _equal(tokenizer, expanded.dense, rows)
    nearest = nearest_expansion(codec, tokens)
    yield NEAREST, nearest, _equal(tokenizer, nearest, rows)


def _equal(
    tokenizer: ImageTokenizer, dense: Float[Tensor, "b t e"], rows: Float[Tensor, "b t e"]
) -> Bool[Tensor, "b t"]:
    """Whether the true row is the closest row of this batch to each token.

    The rows that occur in the batch stand for the codebook, which no host has to show.
    """
    candidates = torch.unique(rows.flatten(0, 1), dim=0)
    placed = tokenizer.on_manifold(dense)
    found = torch.cdist(placed.flatten(0, 1), candidates).argmin(dim=-1)
    return (candidates[found].view_as(rows) == rows).all(dim=-1)


def nearest_expansion(codec: ImageCodec, tokens: CompressedTokens) -> Float[Tensor, "b t e"]:
    """Dense tokens by repeating every quantised local token over its s x s cell."""
    _, rows = codec.quantize(tokens)
    locals_ = rows[:, tokens.global_tokens.shape[1] :]
    field = rearrange(locals_, "b (r c) e -> b r c e", r=tokens.grid.rows)
    field = repeat(field, "b r c e -> b (r s) (c z) e", s=tokens.stride, z=tokens.stride)
    rows_, columns = tokens.dense_grid
    return field[:, :rows_, :columns].flatten(1, 2)


def evaluate_reconstruction(
    tokenizer: ImageTokenizer,
    codec: ImageCodec | None,
    samples: Sequence[SceneSample],
    *,
    batch: int = 64,
    similarity: bool = True,
    progress: Progress | None = None,
) -> dict[str, ReconstructionScore]:
    """Scores of `HOST` and, with a codec, of `DECOMPRESSED` and `NEAREST`."""
    made = reconstruct(tokenizer, codec, real_pictures(samples), batch=batch, progress=progress)
    return score_reconstructions(made, samples, similarity=similarity)


def score_reconstructions(
    made: Reconstructions, samples: Sequence[SceneSample], *, similarity: bool = True
) -> dict[str, ReconstructionScore]:
    """Compare every way with the originals; `similarity` needs torchmetrics."""
    scores = {}
    for name, pictures in made.pictures.items():
        verdicts = judge(pictures, samples)
        similar = ssim(pictures, made.originals) if similarity else None
        scores[name] = ReconstructionScore(
            psnr=bootstrap_mean(psnr(pictures, made.originals).numpy()),
            ssim=None if similar is None else bootstrap_mean(similar.numpy()),
            fid=fid(pictures, made.originals) if len(samples) > 1 else None,
            token_accuracy=made.token_accuracy[name],
            whole=bootstrap_mean([verdict.whole for verdict in verdicts]),
            attributes=attribute_accuracies(verdicts),
        )
    return scores
