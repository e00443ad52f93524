"""A dense and a compressed model of a few kilobytes that see scenes of 32 x 32 pixels."""

import functools

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.evals.cost import Pair
from unicompress.evals.language_models import random_pair
from unicompress.tokenizers.toy import ToySingle

SIDE = 32
SPEC = CodecSpec(stride=2, global_count=4, width=32, depth=1, heads=2)


@functools.cache
def tiny_pair() -> Pair:
    """64 dense tokens against 4 + 16; random weights, so the answers mean nothing."""
    tokenizer = ToySingle(rows=8, columns=8)
    tokenizer.freeze()
    codec = ImageCodec(tokenizer, SPEC).eval()
    return random_pair("tiny", tokenizer=tokenizer, codec=codec)
