"""LlamaGen's image tokenizers VQ-16 and VQ-8: `JanusVQ` with the released sizes and key names.

Source: LlamaGen (arXiv 2406.06525), tokenizer/tokenizer_image/vq_model.py. Janus took the network
over with all names, so both load through the same renames into transformers' `JanusVQVAE`.
"""

from typing import ClassVar

from torch import nn

from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import seeded
from unicompress.tokenizers.janus_vq import JanusVQ
from unicompress.tokenizers.official import Layout, ReleasedTokenizer, ReleasedWeights
from unicompress.tokenizers.vq_parts import network_sizes

RENAMES = (
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"^((?:encoder\.down|decoder\.up)\.\d+)\.res\.", r"\1.block."),
    (r"^((?:encoder|decoder)\.mid)\.0\.", r"\1.block_1."),
    (r"^((?:encoder|decoder)\.mid)\.1\.", r"\1.attn_1."),
    (r"^((?:encoder|decoder)\.mid)\.2\.", r"\1.block_2."),
)
UNUSED = (r"quantize\.codebook_used$",)  # a history of codes, kept for a usage figure


@tokenizers.register("llamagen")
class LlamaGen(JanusVQ, ReleasedTokenizer):
    """Single-codebook host; the defaults are VQ-16 at 256 px (16 x 16 tokens).

    A checkpoint says itself how many levels it has: `vq_ds8_c2i.pt` becomes VQ-8 (32 x 32 tokens).
    The network has no positions: `image_size` may also be 384 or 512, which it was tested at.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
    )
    layout: ClassVar[Layout] = Layout(
        files=("vq_ds16_c2i.pt", "vq_ds16_t2i.pt", "vq_ds8_c2i.pt"),
        hub="FoundationVision/LlamaGen",
        inside=("model", "ema", "state_dict"),
        prefixes=("vq.",),
        renames=RENAMES,
        ignore=UNUSED,
    )
    released_size: ClassVar[int] = 256  # pixels per side, where nothing else is asked for

    def __init__(
        self,
        *,
        image_size: int | None = None,
        base_channels: int = 128,
        channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4),
        latent_channels: int = 256,
        code_dim: int = 8,
        codebook_size: int = 16384,
        res_blocks: int = 2,
    ):
        super().__init__(
            image_size=self.released_size if image_size is None else image_size,
            patch=1,
            base_channels=base_channels,
            channel_multiplier=channel_multiplier,
            latent_channels=latent_channels,
            code_dim=code_dim,
            codebook_size=codebook_size,
            res_blocks=res_blocks,
        )

    @property
    def released_part(self) -> nn.Module:
        return self.vq

    @classmethod
    def options_in(cls, weights: ReleasedWeights) -> dict[str, object]:
        return network_sizes(weights.tensors)

    @classmethod
    def tiny(cls) -> "LlamaGen":
        with seeded():
            return cls(
                image_size=16,
                base_channels=32,
                channel_multiplier=(1, 1),
                latent_channels=16,
                code_dim=4,
                codebook_size=32,
                res_blocks=1,
            )
