"""VILA-U's vision tower: SigLIP, a residual quantiser of depth four, a convolutional decoder.

* X is the hidden state before SigLIP's last layer, without the final normalisation, so the last
  layer and the pooling head of a released file are not built. X is code space: nothing lies
  between it and the quantiser.
* All four codes of a token index one table. Its last row is padding and never chosen.
* The decoder takes sums of four rows; they have no fixed length, so there is no manifold.

The official decoder runs in bfloat16 whatever its weights are; this one runs in the precision it is
given. Source: VILA-U (arXiv 2409.04429), rqvaesigliptransformer/rqvaesiglip.
"""

import re
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from unicompress.errors import CheckpointError
from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import check_pixels, seeded, square_grid, to_field
from unicompress.tokenizers.ldm import ConvDecoder, fuse_attention
from unicompress.tokenizers.official import Layout, ReleasedTokenizer
from unicompress.tokenizers.residual import residual_codes
from unicompress.tokens import TokenSpec

TABLES = "quantizer.codebooks."
LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def adapt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What names cannot say: one codebook for its copies, no last layer, joined attention.

    Raises CheckpointError where the copies of the codebook differ: then it is not shared.
    """
    tables = {name: tensor for name, tensor in tensors.items() if name.startswith(TABLES)}
    layers = {name: int(found[1]) for name in tensors if (found := LAYER.match(name))}
    last = {name for name, layer in layers.items() if layer == max(layers.values())}
    rest = {name: t for name, t in tensors.items() if name not in tables and name not in last}
    for name, table in tables.items():
        if not torch.equal(rest.setdefault("codebook.weight", table), table):
            raise CheckpointError(
                f"{name} differs from {TABLES}0.weight: this tower has a codebook for each depth; "
                f"get {LAYOUT.files[0]} of {LAYOUT.hub}, which shares one"
            )
    return fuse_attention(rest)


TINY: dict[str, Any] = {
    "positions": 4,
    "width": 16,
    "depth": 3,
    "heads": 2,
    "codebook_size": 32,
    "channels": 8,
    "channel_multiplier": (1, 1, 2),
    "latent_channels": 12,
    "norm_groups": 4,
}
LAYOUT = Layout(
    files=("vision_tower/model.safetensors", "model.safetensors"),
    hub="mit-han-lab/vila-u-7b-256",
    prefixes=(
        "rqvaesiglip.",
        "vision_tower.rqvaesiglip.",
        "vision_tower.vision_tower.rqvaesiglip.",
    ),
    renames=((r"siglip_model\.vision_model\.", ""),),
    ignore=(
        r"(siglip_model\.)?logit_(scale|bias)$",
        r"siglip_model\.text_model\.",
        r"siglip_model\.vision_model\.(post_layernorm|head)\.",
        r".*\.position_ids$",
        r".*_ema$",  # running means that training moves the codebook by
    ),
    adapt=adapt,
)


@tokenizers.register("vila_u")
class VilaU(ReleasedTokenizer):
    """Residual host; the defaults are the released VILA-U-256 (16 x 16 tokens of four codes).

    `depth` counts SigLIP's layers as released; the last is not run. `positions` is the side of the
    grid that the position embeddings were trained on: at another `image_size` they are resized,
    bicubically. The patch of SigLIP is what the decoder's levels upsample by.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
    )
    layout: ClassVar[Layout] = LAYOUT
    released_size: ClassVar[int] = 256  # pixels per side, where nothing else is asked for

    def __init__(
        self,
        *,
        image_size: int | None = None,
        positions: int = 16,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        codes: int = 4,
        codebook_size: int = 16384,
        channels: int = 128,
        channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4),
        latent_channels: int = 256,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.image_size = self.released_size if image_size is None else image_size
        self.positions = positions
        self.width = width
        self.depth = depth
        self.heads = heads
        self.codes = codes
        self.codebook_size = codebook_size
        self.channels = channels
        self.channel_multiplier = tuple(channel_multiplier)
        self.latent_channels = latent_channels
        self.norm_groups = norm_groups
        patch = 2 ** (len(channel_multiplier) - 1)
        self.spec = TokenSpec(
            grid=square_grid(self.image_size, patch),
            dim=width,
            code_dim=width,
            codes_per_token=codes,
            codebook_size=codebook_size,
            image_size=self.image_size,
        )
        siglip = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=depth - 1,
                num_attention_heads=heads,
                image_size=patch * positions,
                patch_size=patch,
                vision_use_head=False,
            )
        )
        self.embeddings, self.encoder = siglip.embeddings, siglip.encoder
        self.codebook = nn.Embedding(codebook_size + 1, width)  # and padding
        self.post_quant_conv = nn.Conv2d(width, latent_channels, 1)
        self.decoder = ConvDecoder(
            channels=channels,
            channel_multiplier=self.channel_multiplier,
            latent_channels=latent_channels,
            norm_groups=norm_groups,
        )

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_pixels(pixels, self.image_size)
        resize = self.spec.grid.rows != self.positions
        tokens = self.embeddings(pixels, interpolate_pos_encoding=resize)
        return self.encoder(inputs_embeds=tokens).last_hidden_state

    @property
    def rows(self) -> Float[Tensor, "v d"]:
        """The codebook without its padding."""
        return self.codebook.weight[:-1]

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        """Four codes per token, each nearest (Euclidean) to what the ones before left over."""
        codes = residual_codes(tokens, self.rows, self.codes)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        """The sum of the rows of a token."""
        return self.codebook(codes).sum(-2)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        field = to_field(dense, self.spec.grid)
        return self.decoder(self.post_quant_conv(field)).clamp(-1, 1)

    @classmethod
    def tiny(cls) -> "VilaU":
        with seeded():
            return cls(image_size=16, **TINY)
