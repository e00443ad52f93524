"""What hosts with one convolutional codebook share: nearest rows, 1x1 maps, sizes of weights."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError

CHUNK = 2**25  # distances held at once: 128 MiB, a whole picture of most hosts


def nearest_row(tokens: Float[Tensor, "b n e"], rows: Float[Tensor, "v e"]) -> Int[Tensor, "b n 1"]:
    """The row with the smallest Euclidean distance to each token.

    Sums |x|^2 + |e|^2 - 2 x e in the order in which the official quantisers do, so that ties which
    rounding decides fall the same way.
    """
    squares = rows.square().sum(dim=1)
    found = [
        ((part.square().sum(dim=1, keepdim=True) + squares) - 2 * (part @ rows.T)).argmin(dim=1)
        for part in tokens.flatten(0, 1).split(max(1, CHUNK // len(rows)))
    ]
    return torch.cat(found).view(*tokens.shape[:2], 1)


def per_token(conv: nn.Conv2d, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
    """A 1x1 convolution on tokens instead of a field."""
    return F.linear(tokens, conv.weight[:, :, 0, 0], conv.bias)


def check_multiple(pixels: Float[Tensor, "b 3 h w"], patch: int) -> None:
    """Raise InputError unless both sides of the pictures are multiples of `patch`."""
    height, width = pixels.shape[-2:]
    if height % patch or width % patch or not height * width:
        raise InputError(
            f"this tokenizer reads pictures whose sides are multiples of {patch}, got "
            f"{height}x{width}: resize or crop them first"
        )


def check_base_channels(base_channels: int) -> None:
    """Raise InputError unless the 32 groups of the taming-style normalisation divide them."""
    if base_channels % 32:
        raise InputError(f"base_channels must be a multiple of 32, got {base_channels}")


def network_sizes(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Options of a taming-style encoder and codebook, from the shapes of its weights.

    Names are those of transformers (`encoder.down.0.block.0.conv1.weight`). Returns {} where the
    weights are of something else, so that the caller's own defaults then say what is missing.
    """
    block = re.compile(r"encoder\.(?:down_block\.)?down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    found = {(int(m[1]), int(m[2])): t for name, t in tensors.items() if (m := block.match(name))}
    first, last = tensors.get("encoder.conv_in.weight"), tensors.get("encoder.conv_out.weight")
    rows = tensors.get("quantize.embedding.weight")
    if first is None or last is None or rows is None or (0, 0) not in found:
        return {}
    base = first.shape[0]
    levels, blocks = (1 + max(place[axis] for place in found) for axis in (0, 1))
    widths = [found[level, 0].shape[0] for level in range(levels) if (level, 0) in found]
    return {
        "base_channels": base,
        "channel_multiplier": tuple(width // base for width in widths),
        "latent_channels": last.shape[0],
        "code_dim": rows.shape[1],
        "codebook_size": rows.shape[0],
        "res_blocks": blocks,
    }
