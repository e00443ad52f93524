"""The generation tokenizer of Janus and Janus-Pro: LlamaGen's VQ-16, tuned further, at 384 px.

Reads it out of the whole model: the official one (`gen_vision_model.`) or transformers' own
(`model.vqmodel.`); only the shards that hold it need to be there. The quantiser is the official
one, by cosine, not that of transformers 5 (see `janus_vq.py`).
Source: deepseek-ai/Janus, janus/models/vq_model.py.
"""

from typing import ClassVar

from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.llamagen import RENAMES, UNUSED, LlamaGen
from unicompress.tokenizers.official import Layout


@tokenizers.register("janus")
class Janus(LlamaGen):
    """Single-codebook host; the defaults are those of Janus-Pro-1B and -7B (24 x 24 tokens)."""

    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT (card); DeepSeek model licence beside it",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
    )
    layout: ClassVar[Layout] = Layout(
        files=("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        hub="deepseek-community/Janus-Pro-1B",
        prefixes=("model.vqmodel.", "vqmodel.", "gen_vision_model.", "vq."),
        renames=RENAMES,
        ignore=UNUSED,
    )
    released_size: ClassVar[int] = 384
