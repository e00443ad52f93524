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
    released_size: ClassVar[int] = 384

    @classmethod
    def tiny(cls) -> "UniFork":
        with seeded():
            return cls(image_size=24, **TINY)
