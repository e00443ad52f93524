"""ViTamin and its mirror image: the encoder and the decoder of UniTok.

The encoder is a convolutional stem of two stages (patch 16 in all) under a plain vision transformer
without position embeddings or class token; the decoder is the same transformer under stages that
double the field. Source: UniTok, models/vitamin.py and models/vqvae.py; timm's ViTamin. Modules are
named as in the released checkpoint, so that its keys need next to no renaming.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.attention_projection import EPS, GatedMLP, split_heads
from unicompress.tokenizers.fields import to_field, to_sequence
from unicompress.tokens import Grid

EXPANSION = 4  # of channels within a convolutional block
STAGES = (2, 4)  # blocks of the encoder's stages; the decoder has them the other way round
PATCH = 16  # stem, two stages and the pool halve the field once each


class FieldNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a field."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(field.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Halve(nn.Module):
    """Shortcut of a block that halves the field: mean over 3x3 (what is there), then 1x1."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.expand = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        pooled = F.avg_pool2d(field, 3, stride=2, padding=1, count_include_pad=False)
        return self.expand(pooled)


class Double(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        return self.conv(F.interpolate(field, scale_factor=2, mode="nearest"))


class MobileBlock(nn.Module):
    """1x1, depthwise 3x3, 1x1 with GELU between, beside a shortcut; `scale` halves or doubles."""

    def __init__(self, inside: int, outside: int, *, scale: str = "keep"):
        super().__init__()
        wide = EXPANSION * outside
        if scale == "halve":
            self.shortcut: nn.Module = Halve(inside, outside)
        elif scale == "double":
            self.shortcut = Double(inside, outside)
        else:
            self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        self.pre_norm = FieldNorm(inside)
        self.conv1_1x1 = nn.Conv2d(inside, wide, 1)
        self.up = Double(wide, wide) if scale == "double" else nn.Identity()
        stride = 2 if scale == "halve" else 1
        self.conv2_kxk = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide)
        self.conv3_1x1 = nn.Conv2d(wide, outside, 1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        inner = self.up(F.gelu(self.conv1_1x1(self.pre_norm(field))))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(inner))) + self.shortcut(field)


class Stem(nn.Module):
    """Two 3x3 convolutions around a normalisation; the first halves the field."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm1 = FieldNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv2(F.gelu(self.norm1(self.conv1(pixels))))


class LastStem(nn.Module):
    """The stem backwards: doubles the field and ends in pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Double(channels, channels)
        self.norm1 = FieldNorm(channels)
        self.conv2 = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        return self.conv2(F.gelu(self.norm1(self.conv1(field))))


class Pool(nn.Module):
    """From the last convolutional stage to the width of the transformer."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.norm = FieldNorm(inside)
        self.proj = nn.Conv2d(inside, outside, 3, stride=2, padding=1)

    def forward(self, field: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        return self.proj(self.norm(field))


class ConvStages(nn.Module):
    """Pixels to a field of the transformer's width, one place per 16x16 pixels."""

    def __init__(self, channels: tuple[int, int], width: int):
        super().__init__()
        self.stem = Stem(channels[0])
        self.stages = nn.ModuleList()
        inside = channels[0]
        for outside, blocks in zip(channels, STAGES, strict=True):
            first = MobileBlock(inside, outside, scale="halve")
            rest = [MobileBlock(outside, outside) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            inside = outside
        self.pool = Pool(inside, width)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e rows columns"]:
        field = self.stem(pixels)
        for stage in self.stages:
            field = stage(field)
        return self.pool(field)


class SelfAttention(nn.Module):
    """Attention of every token to every token; no positions, which the stem's padding tells."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        mixed = F.scaled_dot_product_attention(*split_heads(self.qkv(tokens), self.heads))
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = GatedMLP(width, 2 * width)

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Encoder(nn.Module):
    """Pixels to tokens of the transformer's width, raster order."""

    def __init__(self, channels: tuple[int, int], width: int, depth: int, heads: int):
        super().__init__()
        self.convolutions = ConvStages(channels, width)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t e"]:
        return self.norm(self.blocks(to_sequence(self.convolutions(pixels))))


class Decoder(nn.Module):
    """Tokens of the transformer's width to pixels; four doublings."""

    def __init__(self, channels: tuple[int, int], width: int, depth: int, heads: int):
        super().__init__()
        outer, inner = channels
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up_conv1 = Double(width, inner)
        self.up_conv2 = self._stage(inner, inner, STAGES[1])
        self.up_conv3 = self._stage(inner, outer, STAGES[0])
        self.up_conv4 = LastStem(outer)

    @staticmethod
    def _stage(inside: int, outside: int, blocks: int) -> nn.Sequential:
        first = MobileBlock(inside, outside, scale="double")
        return nn.Sequential(first, *[MobileBlock(outside, outside) for _ in range(blocks - 1)])

    def forward(self, tokens: Float[Tensor, "b t e"], grid: Grid) -> Float[Tensor, "b 3 h w"]:
        field = self.up_conv1(to_field(self.norm(self.blocks(tokens)), grid))
        return self.up_conv4(self.up_conv3(self.up_conv2(field)))
