"""Emu3's vision tokenizer on single pictures: any grid, tokens of four channels.

The network is transformers' `Emu3VQVAE`, made for clips of four frames; a picture is four equal
ones. The frames meet only in the small temporal convolutions, so the large spatial networks run on
one frame here, with the same result for a quarter of the work. X is tapped after `quant_conv`:
short of it no tensor is wide and linear in the codes. The decoder is conditioned on the quantised
field (`SpatialNorm`) besides reading it through `post_quant_conv`.
Source: Emu3 (arXiv 2409.18869), emu3/tokenizer/modeling_emu3visionvq.py.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import seeded, to_field, to_sequence
from unicompress.tokenizers.official import Layout, ReleasedTokenizer, ReleasedWeights
from unicompress.tokenizers.vq_parts import (
    check_base_channels,
    check_multiple,
    nearest_row,
    network_sizes,
)
from unicompress.tokens import Grid, TokenSpec

FRAMES = 4  # that become one


def flatten_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official attention has 1x1 convolutions where transformers has linear maps."""
    return {
        name: tensor[:, :, 0, 0] if name.endswith("_proj.weight") and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
    }


@tokenizers.register("emu3")
class Emu3(ReleasedTokenizer):
    """Single-codebook host of 8 x 8 pixels per token; the default grid is that of 720 x 720 pixels.

    Pictures of any sides that are multiples of 8 can be encoded; `decode` takes the grid of the
    spec, `rows` x `columns`.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="Apache-2.0",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
        limits="X is four channels wide",
    )
    layout: ClassVar[Layout] = Layout(
        files=("model.safetensors", "model.safetensors.index.json"),
        hub="BAAI/Emu3-VisionTokenizer",
        prefixes=("model.vqmodel.", "vqmodel.", "vq."),
        renames=(
            (r"^encoder\.down\.", "encoder.down_block.down."),
            (r"^decoder\.up\.", "decoder.up_block.up."),
            (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.middle_block.attn_norm."),
            (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
            (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
            (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
            (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
        ),
        adapt=flatten_attention,
    )

    def __init__(
        self,
        *,
        rows: int = 90,
        columns: int = 90,
        base_channels: int = 256,
        channel_multiplier: tuple[int, ...] = (1, 2, 2, 4),
        code_dim: int = 4,
        codebook_size: int = 32768,
        res_blocks: int = 2,
    ):
        super().__init__()
        check_base_channels(base_channels)
        self.rows, self.columns = rows, columns
        self.base_channels = base_channels
        self.channel_multiplier = tuple(channel_multiplier)
        self.code_dim = code_dim
        self.codebook_size = codebook_size
        self.res_blocks = res_blocks
        self.patch = 2 ** (len(channel_multiplier) - 1)  # pixels per token and side
        self.spec = TokenSpec(
            grid=Grid(rows, columns),
            dim=code_dim,
            code_dim=code_dim,
            codes_per_token=1,
            codebook_size=codebook_size,
            image_size=self.patch * rows,
        )
        self.vq = Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=codebook_size,
                embed_dim=code_dim,
                latent_channels=code_dim,
                temporal_downsample_factor=FRAMES,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=res_blocks,
                attn_resolutions=[len(channel_multiplier) - 1],
                hidden_size=base_channels * channel_multiplier[-1],
            )
        )

    @property
    def released_part(self) -> nn.Module:
        return self.vq

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_multiple(pixels, self.patch)
        net = self.vq.encoder
        field = net.middle_block(net.down_block(net.conv_in(pixels)))
        field = net.conv_out(_swish(net.norm_out(field)))
        clip = field[:, :, None].expand(-1, -1, FRAMES, -1, -1)  # [b, d, frames, rows, columns]
        for conv in net.time_conv:
            clip = _swish(conv(clip))
        for block in net.time_res_stack:
            clip = block(clip)
        return to_sequence(self.vq.quant_conv(clip)[:, :, 0])

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        codes = nearest_row(tokens, self.vq.quantize.embedding.weight)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return self.vq.quantize.embedding(codes[..., 0])

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        quantized = to_field(dense, self.spec.grid)[:, :, None]  # [b, e, 1, rows, columns]
        net = self.vq.decoder
        clips = torch.cat([self.vq.post_quant_conv(quantized), quantized])
        for block in net.time_res_stack:
            clips = block(clips)
        for conv in net.time_conv:
            clips = _swish(conv(clips))
        field, condition = clips[:, :, 0].chunk(2)  # the first of the frames is the picture
        field = net.middle_block(net.conv_in(field), condition)
        field = net.norm_out(net.up_block(field, condition), condition)
        return net.conv_out(_swish(field)).clamp(-1, 1)

    @classmethod
    def options_in(cls, weights: ReleasedWeights) -> dict[str, object]:
        sizes = network_sizes(weights.tensors)
        return {name: size for name, size in sizes.items() if name != "latent_channels"}

    @classmethod
    def tiny(cls) -> "Emu3":
        with seeded():
            return cls(
                rows=8,
                columns=8,
                base_channels=32,
                channel_multiplier=(1, 1),
                codebook_size=32,
                res_blocks=1,
            )


def _swish(field: Tensor) -> Tensor:
    return field * torch.sigmoid(field)
