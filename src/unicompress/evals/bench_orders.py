"""What the order of a decompressor costs: time at equal size, and quality of trained ones.

Time needs no training, so every order is timed with random weights of the same size. Quality does:
it is measured on the decompressors that are given, on the validation split of the scenes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unicompress.checkpoint import fingerprint
from unicompress.codec import ImageCodec
from unicompress.errors import InputError
from unicompress.evals.cost import BENCHES, Effort, Pair, decompressor_size, medians, take_turns
from unicompress.evals.generation import judge, real_pictures, unseen_scenes
from unicompress.evals.image_metrics import psnr
from unicompress.evals.result import Progress, Result, ratio
from unicompress.evals.statistics import bootstrap_mean, paired_difference

RASTER = "raster"  # the paper's order, which the others are compared with


@dataclass(frozen=True)
class Quality:
    """Of one trained decompressor, picture by picture."""

    psnr: NDArray[np.float64]  # dB
    whole: NDArray[np.float64]  # 1 where the checker reads the whole caption off the picture


def bench_orders(
    pair: Pair,
    trained: Mapping[str, ImageCodec] | None = None,
    effort: Effort | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """The decompressor bench, with every order's time against raster and the quality of `trained`.

    Quality is that of `batch` * `repeats` pictures. Where one of `trained` goes in raster order,
    the others are compared with it picture by picture. Raises InputError where they belong to
    different hosts or make different numbers of tokens.
    """
    effort, trained = effort or Effort(), trained or {}
    _check_comparable(trained)
    result = BENCHES["decompressor"](pair, effort, progress=progress)
    details = dict(result.details["decompressor"])
    details["orders"] = _against_raster(details["medians"], details.pop("parameters"))
    if not trained:
        return replace(result, details={"decompressor": details})
    count = effort.batch * effort.repeats
    found = {
        name: _quality(codec, name, count, effort.batch, progress)
        for name, codec in trained.items()
    }
    seconds = _seconds(trained, effort, progress)
    details["pictures"] = count
    details["trained"] = {
        name: {
            "order": codec.spec.order,
            "head": codec.spec.head,
            "parameters": decompressor_size(codec),
            "seconds": seconds[name],
            "psnr": bootstrap_mean(found[name].psnr),
            "whole": bootstrap_mean(found[name].whole),
        }
        for name, codec in trained.items()
    }
    details["against"], details["differences"] = _differences(trained, found, seconds)
    first = found[next(iter(trained))]
    figures = replace(result.compressed, psnr=float(first.psnr.mean()))
    return replace(result, compressed=figures, details={"decompressor": details})


def _check_comparable(trained: Mapping[str, ImageCodec]) -> None:
    codecs = list(trained.items())
    for name, codec in codecs[1:]:
        one, other = codecs[0][1], codec
        if fingerprint(one.tokenizer) != fingerprint(other.tokenizer):
            raise InputError(f"{name} has another host than {codecs[0][0]}: compare within one")
        rates = [(c.spec.stride, c.spec.global_count) for c in (one, other)]
        if rates[0] != rates[1]:
            raise InputError(
                f"{name} has stride {rates[1][0]} and {rates[1][1]} globals, {codecs[0][0]} has "
                f"{rates[0][0]} and {rates[0][1]}: compare orders at one rate"
            )


def _against_raster(found: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Every order's time over that of raster with the same head, at (nearly) the same size."""
    table = {}
    for name, parameters in sizes.items():
        head = name.rpartition("/")[2]
        table[name] = {
            "seconds": found[name],
            "against_raster": ratio(found[name], found[f"{RASTER}/{head}"]),
            "parameters": parameters,
        }
    return table


@torch.no_grad()
def _quality(
    codec: ImageCodec, name: str, count: int, batch: int, progress: Progress | None
) -> Quality:
    host = codec.tokenizer
    samples = unseen_scenes(count, split="val", size=host.spec.image_size)
    pixels = real_pictures(samples)
    parts = []
    for start in range(0, count, batch):
        given = pixels[start : start + batch].to(host.device)
        parts.append(codec.decode(codec.encode(given)).float().cpu())
        if progress:
            progress(f"reconstructing with {name}", min(start + batch, count), count)
    made = torch.cat(parts)
    verdicts = judge(made, samples)
    return Quality(
        psnr=psnr(made, pixels).double().numpy(),
        whole=np.array([verdict.whole for verdict in verdicts], dtype=np.float64),
    )


@torch.no_grad()
def _seconds(
    trained: Mapping[str, ImageCodec], effort: Effort, progress: Progress | None
) -> dict[str, float]:
    """Medians of the decompressors alone, taking turns."""
    tasks = {}
    for name, codec in trained.items():
        samples = unseen_scenes(effort.batch, split="val", size=codec.tokenizer.spec.image_size)
        codes = codec.encode(real_pictures(samples).to(codec.tokenizer.device))
        tasks[name] = partial(codec.decompress, codes)
    return medians(
        take_turns(
            tasks,
            repeats=effort.repeats,
            warmup=effort.warmup,
            label="trained decompressors",
            progress=progress,
        )
    )


def _differences(
    trained: Mapping[str, ImageCodec],
    found: Mapping[str, Quality],
    seconds: Mapping[str, float],
) -> tuple[str | None, dict[str, Any] | None]:
    """The first one in raster order, and every other one minus it on the same pictures."""
    base = next((name for name, codec in trained.items() if codec.spec.order == RASTER), None)
    if base is None or len(trained) == 1:
        return None, None
    return base, {
        name: {
            "psnr": paired_difference(found[base].psnr, found[name].psnr),
            "whole": paired_difference(found[base].whole, found[name].whole),
            "seconds": ratio(seconds[name], seconds[base]),
        }
        for name in trained
        if name != base
    }
