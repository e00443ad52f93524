"""The convolutional encoder and decoder of latent diffusion, which VILA-U and VAR are built on.

Levels halve (double) the field; attention sits in the middle and on the coarsest level. Source:
latent-diffusion, ldm/modules/diffusionmodules/model.py, as used by VAR (models/basic_vae.py) and
VILA-U (rqvaesiglip/modules.py). Modules are named as in their checkpoints, except that queries,
keys and values are one convolution, as in VAR; `fuse_attention` joins those of the others.
"""

import re
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError

PART = re.compile(r"(?P<attention>.*attn(_1|\.\d+))\.(?P<part>[qkv])\.(?P<kind>weight|bias)")


def fuse_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where `q`, `k` and `v` are apart, joins them as `qkv`; incomplete sets stay as they are."""
    fused = dict(tensors)
    for name in tensors:
        found = PART.fullmatch(name)
        if found is None or found["part"] != "q":
            continue
        names = [f"{found['attention']}.{part}.{found['kind']}" for part in "qkv"]
        if all(part in tensors for part in names):
            joined = torch.cat([fused.pop(part) for part in names])
            fused[f"{found['attention']}.qkv.{found['kind']}"] = joined
    return fused


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Normalisation over groups of channels; InputError where they do not divide."""
    if channels % groups:
        raise InputError(f"{channels} channels do not divide into norm_groups={groups}")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3, twice, beside a shortcut that is 1x1 where the width changes."""

    def __init__(self, inside: int, outside: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(inside, groups)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = group_norm(outside, groups)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        same = inside == outside
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h w"]:
        inner = self.conv1(F.silu(self.norm1(field)))
        return self.nin_shortcut(field) + self.conv2(F.silu(self.norm2(inner)))


class FieldAttention(nn.Module):
    """One head over all places of the field, added to it."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        parts = self.qkv(self.norm(field)).flatten(2).transpose(1, 2)  # [b, h w, 3 c]
        mixed = F.scaled_dot_product_attention(*parts.chunk(3, dim=-1))
        return field + self.proj_out(mixed.transpose(1, 2).unflatten(-1, field.shape[-2:]))


class Level(nn.Module):
    """Blocks of one resolution, with attention or without, and the way to the next one."""

    def __init__(self, inside: int, outside: int, blocks: int, groups: int, *, attend: bool):
        super().__init__()
        widths = [inside, *[outside] * blocks]
        self.block = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        count = blocks if attend else 0
        self.attn = nn.ModuleList(FieldAttention(outside, groups) for _ in range(count))
        self.downsample: nn.Module = nn.Identity()  # encoder and decoder put one of these in
        self.upsample: nn.Module = nn.Identity()

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        for place, block in enumerate(self.block):
            field = block(field)
            if len(self.attn):
                field = self.attn[place](field)
        return self.upsample(self.downsample(field))


class Middle(nn.Module):
    """Two blocks around attention."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = FieldAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(field)))


class Downsample(nn.Module):
    """3x3 convolution of stride two, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(field, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(field, scale_factor=2, mode="nearest"))


class ConvEncoder(nn.Module):
    """Pixels to a field of `latent_channels`; each level after the first halves it."""

    def __init__(
        self,
        *,
        channels: int,
        channel_multiplier: tuple[int, ...],
        latent_channels: int,
        res_blocks: int = 2,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [channels * factor for factor in channel_multiplier]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        inside = channels
        for place, outside in enumerate(widths):
            last = place == len(widths) - 1
            level = Level(inside, outside, res_blocks, norm_groups, attend=last)
            if not last:
                level.downsample = Downsample(outside)
            self.down.append(level)
            inside = outside
        self.mid = Middle(inside, norm_groups)
        self.norm_out = group_norm(inside, norm_groups)
        self.conv_out = nn.Conv2d(inside, latent_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        field = self.conv_in(pixels)
        for level in self.down:
            field = level(field)
        return self.conv_out(F.silu(self.norm_out(self.mid(field))))


class ConvDecoder(nn.Module):
    """A field of `latent_channels`, of any size, to pixels; the encoder's levels backwards.

    `up` is ordered from the finest level to the coarsest, as in the checkpoints, and is walked
    from its end. Each level has one block more than in the encoder.
    """

    def __init__(
        self,
        *,
        channels: int,
        channel_multiplier: tuple[int, ...],
        latent_channels: int,
        res_blocks: int = 2,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [channels * factor for factor in channel_multiplier]
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm_groups)
        self.up = nn.ModuleList()
        for place, outside in enumerate(widths):
            last = place == len(widths) - 1
            inside = widths[-1] if last else widths[place + 1]
            level = Level(inside, outside, res_blocks + 1, norm_groups, attend=last)
            if place:
                level.upsample = Upsample(outside)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, field: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b 3 h w"]:
        field = self.mid(self.conv_in(field))
        for level in reversed(self.up):
            field = level(field)
        return self.conv_out(F.silu(self.norm_out(field)))
