"""UniFork's tokenizer: VILA-U's tower at 384 px, with its position embeddings resized bicubically.

UniFork (arXiv 2506.17202) forks the language model, not the tokenizer: both of its tasks use this
one. It has no released weights of its own; those of VILA-U-256 are what it starts from. Pictures
smaller than 256 px are resized for as well, where the official code cuts the position table off.
"""

from typing import ClassVar

from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import seeded
from unicompress.tokenizers.vila_u import TINY, VilaU


@tokenizers.register("unifork")
class UniFork(VilaU):
    """`vila_u` with 24 x 24 tokens; options as there."""

    facts: ClassVar[HostFacts] = HostFacts(
        licence="none released",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
        limits="no weights of its own: those of VILA-U are the start",
    )

    def __init__(
        self,
        *,
        image_size: int = 384,
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
        super().__init__(
            image_size=image_size,
            positions=positions,
            width=width,
            depth=depth,
            heads=heads,
            codes=codes,
            codebook_size=codebook_size,
            channels=channels,
            channel_multiplier=channel_multiplier,
            latent_channels=latent_channels,
            norm_groups=norm_groups,
        )

    @classmethod
    def tiny(cls) -> "UniFork":
        with seeded():
            return cls(image_size=24, **TINY)
