"""Product quantisation of continuous tokens: balanced coordinates, then k-means per chunk.

Tokens are turned so that equal chunks carry equal shares of what matters, and every chunk gets a
codebook of its own (Jegou et al. 2011, "Product quantization"; Ge et al. 2013, "Optimized product
quantization", eigenvalue allocation). What matters is the variance of the tokens or, with a metric,
the variance that the pixel decoder shows: a token's error e counts as e^T M e.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.errors import InputError

FLOOR = 1e-4  # smallest eigenvalue of a metric, as a share of the mean one
CHUNK = 8192  # tokens compared with a codebook at once
Rounds = Callable[[int, int], None]  # told how many rounds are done, of how many


@dataclass(frozen=True)
class Basis:
    """Balanced coordinates: inward(x) = (x - mean) @ into, back by `@ out + mean`."""

    mean: Float[Tensor, " d"]
    into: Float[Tensor, "d d"]
    out: Float[Tensor, "d d"]  # the inverse of `into`


@dataclass(frozen=True)
class Books:
    """Fitted codebooks, and what is known of the fit."""

    rows: Float[Tensor, "c v e"]
    error: Float[Tensor, " c"]  # mean squared error per chunk, summed over its channels
    revived: int  # rows that had no token and were set anew, over all rounds


def balanced_basis(
    tokens: Float[Tensor, "n d"], chunks: int, metric: Float[Tensor, "d d"] | None = None
) -> Basis:
    """Principal axes dealt out to `chunks` equal chunks so that their variances balance.

    With a metric the axes are those of M^(1/2) x, so that plain distances in the new coordinates
    are distances under M. Axes go, largest first, to the chunk with the smallest product of
    variances that still has room. Raises InputError where the channels cannot be cut evenly.
    """
    dim = tokens.shape[1]
    if dim % chunks:
        raise InputError(f"{dim} channels cannot be cut into {chunks} equal chunks")
    mean = tokens.double().mean(dim=0)
    centered = tokens.double() - mean
    covariance = centered.T @ centered / max(len(tokens) - 1, 1)
    root, unroot = _roots(metric.double()) if metric is not None else (None, None)
    if root is not None:
        covariance = root @ covariance @ root
    values, axes = torch.linalg.eigh(covariance)
    axes = _signed(axes)[:, _deal(values, chunks)]
    into = axes if root is None else root @ axes
    out = axes.T if unroot is None else axes.T @ unroot
    return Basis(mean.float(), into.float(), out.float())


def fit_books(
    tokens: Float[Tensor, "n d"],
    *,
    chunks: int,
    size: int,
    rounds: int,
    generator: torch.Generator,
    start: Float[Tensor, "c v e"] | None = None,
    progress: Rounds | None = None,
) -> Books:
    """k-means in every chunk: from `start` or random tokens, `rounds` of Lloyd's algorithm.

    A row that no token is closest to becomes the token that the others serve worst. Equal tokens
    and generators give equal books. Raises InputError for fewer tokens than rows.
    """
    if len(tokens) < size:
        raise InputError(
            f"{size} codebook rows need at least as many tokens, got {len(tokens)}: "
            "fit on more images, or choose a smaller codebook"
        )
    parts = rearrange(tokens, "n (c e) -> c n e", c=chunks)
    if start is None:
        picks = [torch.randperm(len(tokens), generator=generator)[:size] for _ in range(chunks)]
        rows = torch.stack([part[pick] for part, pick in zip(parts, picks, strict=True)])
    else:
        rows = start.clone()
    revived = 0
    for done in range(rounds):
        for book, part in enumerate(parts):
            rows[book], dead = _lloyd(part, rows[book])
            revived += dead
        if progress is not None:
            progress(done + 1, rounds)
    errors = [nearest(part, table)[1].mean() for part, table in zip(parts, rows, strict=True)]
    return Books(rows, torch.stack(errors), revived)


def nearest(
    tokens: Float[Tensor, "n e"], rows: Float[Tensor, "v e"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Index of the closest row and the squared distance to it."""
    squares = rows.square().sum(dim=-1)
    codes, errors = [], []
    for part in tokens.split(CHUNK):
        score, code = torch.addmm(squares, part, rows.T, alpha=-2).min(dim=-1)
        codes.append(code)
        errors.append((score + part.square().sum(dim=-1)).clamp(min=0))
    return torch.cat(codes), torch.cat(errors)


def refine_basis(tokens: Float[Tensor, "n d"], basis: Basis, books: Books) -> Basis:
    """One step of optimised product quantisation: turn the axes towards the quantised tokens.

    The rotation that brings the tokens closest to their rows (orthogonal Procrustes).
    """
    inward = (tokens - basis.mean) @ basis.into
    rows = look_up(books.rows, encode(inward, books.rows))
    left, _, right = torch.linalg.svd(inward.double().T @ rows.double())
    turn = left @ right
    into, out = basis.into.double() @ turn, turn.T @ basis.out.double()
    return replace(basis, into=into.float(), out=out.float())


def encode(tokens: Float[Tensor, "n d"], rows: Float[Tensor, "c v e"]) -> Int[Tensor, "n c"]:
    """Codes of tokens in balanced coordinates."""
    parts = rearrange(tokens, "n (c e) -> c n e", c=len(rows))
    return torch.stack([nearest(p, table)[0] for p, table in zip(parts, rows, strict=True)], dim=-1)


def look_up(rows: Float[Tensor, "c v e"], codes: Int[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
    """Codes to rows, chunk by chunk."""
    return rows[torch.arange(len(rows), device=codes.device), codes].flatten(-2)


def _lloyd(
    tokens: Float[Tensor, "n e"], rows: Float[Tensor, "v e"]
) -> tuple[Float[Tensor, "v e"], int]:
    """One round: means of the assigned tokens, and how many rows had none and were set anew."""
    codes, errors = nearest(tokens, rows)
    counts = torch.bincount(codes, minlength=len(rows))
    sums = torch.zeros_like(rows, dtype=torch.float64).index_add_(0, codes, tokens.double())
    means = (sums / counts.clamp(min=1)[:, None]).to(rows)
    dead = (counts == 0).nonzero()[:, 0]
    means[dead] = tokens[errors.topk(len(dead)).indices]
    return means, len(dead)


def _deal(values: Float[Tensor, " d"], chunks: int) -> Int[Tensor, " d"]:
    """Order of the axes in which consecutive equal chunks have balanced products of variances."""
    room = len(values) // chunks
    logs = values.clamp(min=values.max() * 1e-12).log()
    logs = logs - logs.min()  # at least 0, so that a fuller chunk never looks emptier
    hands: list[list[int]] = [[] for _ in range(chunks)]
    weight = [0.0] * chunks
    for axis in logs.argsort(descending=True, stable=True).tolist():
        hand = min((c for c in range(chunks) if len(hands[c]) < room), key=lambda c: weight[c])
        hands[hand].append(axis)
        weight[hand] += float(logs[axis])
    return torch.tensor([axis for hand in hands for axis in hand])


def _roots(metric: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """M^(1/2) and its inverse; directions that do not show at all keep a little weight."""
    values, axes = torch.linalg.eigh((metric + metric.T) / 2)
    values = (values / values.mean()).clamp(min=FLOOR)
    return (axes * values.sqrt()) @ axes.T, (axes / values.sqrt()) @ axes.T


def _signed(axes: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Eigenvectors with their largest entry positive: libraries differ in the sign."""
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
