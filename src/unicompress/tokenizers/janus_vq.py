"""The LlamaGen / Janus tokenizer: a convolutional VQ autoencoder with one cosine codebook.

The network is transformers' `JanusVQVAE`; ours are the tap, the quantiser and the manifold:

* X is tapped before `quant_conv` (a 1x1 convolution, so average pooling commutes with it), where it
  is `latent_channels` wide instead of the 8 channels of code space.
* The quantiser is the official one, nearest by cosine. The `encode` of transformers 5 compares raw
  distances instead and gives other codes for codebook rows that are not of unit length.
* The pixel decoder only ever saw unit vectors, so its manifold is `l2`.
"""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from unicompress.tokenizers.base import HostFacts, ImageTokenizer, tokenizers
from unicompress.tokenizers.fields import check_pixels, seeded, square_grid, to_field, to_sequence
from unicompress.tokenizers.vq_parts import check_base_channels, per_token
from unicompress.tokens import TokenSpec


@tokenizers.register("janus_vq")
class JanusVQ(ImageTokenizer):
    """Single-codebook VQ host; the defaults are the small reference (64 px, 16 x 16 tokens).

    `patch` folds patch x patch pixels into channels before the first convolution, which makes the
    reference affordable on a CPU; the released LlamaGen and Janus networks have `patch=1`.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="that of this package (the reference)",
        verified="transformers' JanusVQVAE; the shipped reference model",
    )

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch: int = 2,
        base_channels: int = 32,
        channel_multiplier: tuple[int, ...] = (1, 2),
        latent_channels: int = 128,
        code_dim: int = 8,
        codebook_size: int = 512,
        res_blocks: int = 1,
    ):
        super().__init__()
        grid = square_grid(image_size, patch * 2 ** (len(channel_multiplier) - 1))
        check_base_channels(base_channels)
        self.image_size = image_size
        self.patch = patch
        self.base_channels = base_channels
        self.channel_multiplier = tuple(channel_multiplier)
        self.latent_channels = latent_channels
        self.code_dim = code_dim
        self.codebook_size = codebook_size
        self.res_blocks = res_blocks
        self.spec = TokenSpec(
            grid=grid,
            dim=latent_channels,
            code_dim=code_dim,
            codes_per_token=1,
            codebook_size=codebook_size,
            image_size=image_size,
            manifold="l2",
        )
        self.vq = JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=code_dim,
                num_embeddings=codebook_size,
                latent_channels=latent_channels,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=res_blocks,
                num_patches=grid.rows,
                in_channels=3 * patch * patch,
                out_channels=3 * patch * patch,
            )
        )

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_pixels(pixels, self.image_size)
        field = self.vq.encoder(F.pixel_unshuffle(pixels, self.patch))
        return to_sequence(field)

    def to_code_space(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """The 1x1 `quant_conv`, per token, before normalisation."""
        return per_token(self.vq.quant_conv, tokens)

    def dense_target(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return F.normalize(self.to_code_space(tokens), dim=-1)

    def codebook(self) -> Float[Tensor, "v e"]:
        """The codebook as unit vectors."""
        return F.normalize(self.vq.quantize.embedding.weight, dim=-1)

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        codes = (self.to_code_space(tokens) @ self.codebook().T).argmax(-1, keepdim=True)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return F.normalize(self.vq.quantize.embedding(codes[..., 0]), dim=-1)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        return self.raw_pixels(dense).clamp(-1, 1)

    def raw_pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        """Decoder output without the clamp, for training the host itself."""
        field = to_field(dense, self.spec.grid)
        return F.pixel_shuffle(self.vq.decoder(self.vq.post_quant_conv(field)), self.patch)

    @classmethod
    def tiny(cls) -> "JanusVQ":
        with seeded():
            return cls(
                image_size=16,
                channel_multiplier=(1, 1),
                latent_channels=16,
                code_dim=4,
                codebook_size=32,
            )
