"""Chameleon's VQGAN: transformers' encoder and quantiser, and a pixel decoder beside them.

transformers reads pictures with it but cannot draw them: its checkpoints (facebook/chameleon-7b)
leave the decoder out, while Meta's own `vqgan.ckpt` and those derived from it (Anole) have it. The
decoder here is taming's, built of the blocks that Janus' decoder shares with it; the names are the
official ones, with the level of the finest grid as `up.0`. X is tapped before `quant_conv`, a 1x1
convolution with which average pooling commutes.
Source: taming-transformers (arXiv 2012.09841), taming/modules/diffusionmodules/model.py.
"""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import (
    JanusVQVAEConvUpsample,
    JanusVQVAEMidBlock,
    JanusVQVAEResnetBlock,
)

from unicompress.errors import InputError
from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import check_pixels, seeded, square_grid, to_field, to_sequence
from unicompress.tokenizers.official import Layout, ReleasedTokenizer, ReleasedWeights
from unicompress.tokenizers.vq_parts import (
    check_base_channels,
    nearest_row,
    network_sizes,
    per_token,
)
from unicompress.tokens import TokenSpec


class UpLevel(nn.Module):
    """Residual blocks on one grid, then twice its size where a finer level follows."""

    def __init__(
        self, config: JanusVQVAEConfig, widths: tuple[int, int], blocks: int, finest: bool
    ):
        super().__init__()
        inward, outward = widths
        self.block = nn.ModuleList(
            JanusVQVAEResnetBlock(config, outward if place else inward, outward)
            for place in range(blocks)
        )
        if not finest:
            self.upsample = JanusVQVAEConvUpsample(outward)
        self.finest = finest

    def forward(self, field: Float[Tensor, "b c rows columns"]) -> Float[Tensor, "b e h w"]:
        for block in self.block:
            field = block(field)
        return field if self.finest else self.upsample(field)


class TamingDecoder(nn.Module):
    """Field of latents [b, d, rows, columns] to pixels; attention only at the coarsest grid."""

    def __init__(self, channels: int, multiplier: tuple[int, ...], latent: int, res_blocks: int):
        super().__init__()
        config = JanusVQVAEConfig()  # the blocks read their dropout from it
        outward = [channels * times for times in multiplier]  # finest level first
        inward = [*outward[1:], outward[-1]]
        self.conv_in = nn.Conv2d(latent, outward[-1], 3, padding=1)
        self.mid = JanusVQVAEMidBlock(config, outward[-1])
        self.up = nn.ModuleList(
            UpLevel(config, widths, res_blocks + 1, finest=level == 0)
            for level, widths in enumerate(zip(inward, outward, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, outward[0], eps=1e-6)
        self.conv_out = nn.Conv2d(outward[0], 3, 3, padding=1)

    def forward(self, field: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b 3 h w"]:
        field = self.mid(self.conv_in(field))
        for level in reversed(self.up):
            field = level(field)
        return self.conv_out(F.silu(self.norm_out(field)))


@tokenizers.register("chameleon")
class Chameleon(ReleasedTokenizer):
    """Single-codebook host; the defaults are the released ones (512 px, 32 x 32 tokens).

    `decoder=False` is a host that reads pictures but cannot draw them, as a checkpoint without the
    decoder's weights makes it. Its `decode` raises InputError.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="Meta Chameleon research licence",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
        limits="the decoder comes from the original checkpoint, transformers has none",
    )
    layout: ClassVar[Layout] = Layout(
        files=("vqgan.ckpt", "tokenizer/vqgan.ckpt", "model.safetensors"),
        hub="GAIR/Anole-7b-v0.1",
        inside=("state_dict", "model"),
        prefixes=("model.vqmodel.", "vqmodel.", "vq."),
        ignore=(r"loss\.",),  # the discriminator and the perceptual network
    )

    def __init__(
        self,
        *,
        image_size: int = 512,
        base_channels: int = 128,
        channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4),
        latent_channels: int = 256,
        code_dim: int = 256,
        codebook_size: int = 8192,
        res_blocks: int = 2,
        decoder: bool = True,
    ):
        super().__init__()
        check_base_channels(base_channels)
        self.image_size = image_size
        self.base_channels = base_channels
        self.channel_multiplier = tuple(channel_multiplier)
        self.latent_channels = latent_channels
        self.code_dim = code_dim
        self.codebook_size = codebook_size
        self.res_blocks = res_blocks
        self.decoder = decoder
        self.spec = TokenSpec(
            grid=square_grid(image_size, 2 ** (len(channel_multiplier) - 1)),
            dim=latent_channels,
            code_dim=code_dim,
            codes_per_token=1,
            codebook_size=codebook_size,
            image_size=image_size,
        )
        self.vq = ChameleonVQVAE(
            ChameleonVQVAEConfig(
                embed_dim=code_dim,
                num_embeddings=codebook_size,
                latent_channels=latent_channels,
                resolution=image_size,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=res_blocks,
            )
        )
        if decoder:
            self.vq.decoder = TamingDecoder(
                base_channels, self.channel_multiplier, latent_channels, res_blocks
            )

    @property
    def released_part(self) -> nn.Module:
        return self.vq

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_pixels(pixels, self.image_size)
        return to_sequence(self.vq.encoder(pixels))

    def dense_target(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return per_token(self.vq.quant_conv, tokens)

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        codes = nearest_row(self.dense_target(tokens), self.vq.quantize.embedding.weight)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return self.vq.quantize.embedding(codes[..., 0])

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        if not self.decoder:
            raise InputError(
                "this Chameleon has no pixel decoder, so it reads pictures but cannot draw them: "
                "load Meta's vqgan.ckpt or an Anole checkpoint"
            )
        field = to_field(dense, self.spec.grid)
        return self.vq.decoder(self.vq.post_quant_conv(field)).clamp(-1, 1)

    @classmethod
    def options_in(cls, weights: ReleasedWeights) -> dict[str, object]:
        sizes = network_sizes(weights.tensors)
        drawn = any(name.startswith("decoder.") for name in weights.tensors)
        return {**sizes, "decoder": drawn} if sizes else {}

    @classmethod
    def tiny(cls) -> "Chameleon":
        with seeded():
            return cls(
                image_size=16,
                base_channels=32,
                channel_multiplier=(1, 1),
                latent_channels=16,
                code_dim=8,
                codebook_size=32,
                res_blocks=1,
            )
