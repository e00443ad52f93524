"""Image quality without downloads: PSNR, SSIM, and FID on the features of a fixed random network.

The FID here is labelled `FID_PROTOCOL` everywhere. Its network was never trained, so its values
rank models on the same pictures and mean nothing beside a published FID (Inception-v3).
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.registry import require

FID_PROTOCOL = "fid_random_conv_seed0"
WIDTHS = (32, 48, 64, 96)  # of the four convolutions
BATCH = 128


def psnr(
    pixels: Float[Tensor, "b 3 h w"], reference: Float[Tensor, "n 3 y x"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture in dB; pixels in [-1, 1]; infinite where equal."""
    _same_shape(pixels, reference)
    error = (_displayed(pixels) - _displayed(reference)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4.0 / error)  # the range of values is 2, its square 4


def ssim(
    pixels: Float[Tensor, "b 3 h w"], reference: Float[Tensor, "n 3 y x"]
) -> Float[Tensor, " b"]:
    """Structural similarity of each picture (torchmetrics, 11x11 Gaussian window), at most 1."""
    _same_shape(pixels, reference)
    metric = require("torchmetrics.functional.image", extra="eval-light")
    similarity: Tensor = metric.structural_similarity_index_measure(
        _displayed(pixels), _displayed(reference), data_range=(-1.0, 1.0), reduction="none"
    )
    return similarity.reshape(-1)


def _displayed(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """What a viewer would see: nothing beyond black and white."""
    return pixels.float().clamp(-1, 1)


def _same_shape(pixels: Tensor, reference: Tensor) -> None:
    if pixels.shape != reference.shape:
        raise InputError(
            f"pictures of shape {tuple(pixels.shape)} cannot be compared with "
            f"{tuple(reference.shape)}: resize one side"
        )


class RandomConvFeatures(nn.Module):
    """Four random convolutions, never trained; the same weights on every machine and version.

    Features are the means of the last two layers and the spatial deviation of the last one, so that
    both colour and texture count: [b, 3, h, w] in [-1, 1] to [b, `width`], float32.
    """

    width = WIDTHS[-2] + 2 * WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        # RandomState's stream is frozen by numpy's compatibility promise; torch makes none.
        draws = np.random.RandomState(0)
        channels = (3, *WIDTHS)
        self.kernels = nn.ParameterList()
        for inputs, outputs in pairwise(channels):
            kernel = draws.standard_normal((outputs, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
            self.kernels.append(
                nn.Parameter(torch.from_numpy(kernel.astype(np.float32)), requires_grad=False)
            )

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """Features of pictures in [-1, 1], at least 16 pixels per side."""
        maps, levels = _displayed(pixels), []
        for kernel in self.kernels:
            maps = F.leaky_relu(F.conv2d(maps, kernel, stride=2, padding=1), 0.1)
            levels.append(maps.flatten(2))
        return torch.cat([levels[-2].mean(-1), levels[-1].mean(-1), levels[-1].std(-1)], dim=1)


@torch.no_grad()
def features(
    pixels: Float[Tensor, "b 3 h w"], network: nn.Module | None = None
) -> NDArray[np.float64]:
    """Features [b, f] of the fixed network in float64, computed in batches."""
    network = network if network is not None else RandomConvFeatures()
    network = network.to(pixels.device)
    rows = [network(part).double().cpu().numpy() for part in pixels.split(BATCH)]
    return np.concatenate(rows)


def fid(generated: Float[Tensor, "b 3 h w"], real: Float[Tensor, "n 3 h w"]) -> float:
    """Frechet distance between two sets of pictures under `FID_PROTOCOL`; 0 is best.

    Biased upwards for few pictures, so compare only sets of equal size. Needs two of each.
    """
    return frechet_distance(features(generated), features(real))


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features [n, f], in float64."""
    for rows in (first, second):
        if rows.ndim != 2 or rows.shape[0] < 2:
            raise InputError(f"FID needs at least two pictures on each side, got {rows.shape[0]}")
    means = first.mean(axis=0) - second.mean(axis=0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): symmetric roots
    # keep this real and stable where a general matrix square root is not.
    cross = np.linalg.svd(_root(one) @ _root(two), compute_uv=False).sum()
    distance = means @ means + np.trace(one) + np.trace(two) - 2 * cross
    return float(max(distance, 0.0))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root; tiny negative eigenvalues are rounding and become zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
