"""The smallest unified models: hidden width 32, toy hosts with 1, 4 and 8 codes per token."""

from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unicompress.backbones.text import build_text_tokenizer
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.tokenizers.base import tokenizers
from unicompress.unified import UnifiedModel

HOSTS = ["toy_single", "toy_residual", "toy_multi"]
SPEC = CodecSpec(stride=2, global_count=2, width=32, depth=1, heads=2)
SEPARATE = CodecSpec(
    stride=2,
    global_count=2,
    width=32,
    depth=1,
    heads=2,
    global_codebook="separate",
    global_codebook_size=5,
)
TEXTS = ["a red circle left of a blue square", "what colour is the circle?", "how many objects?"]
LONG = "what is the colour of the circle left of the square?"


@cache
def text_tokenizer() -> PreTrainedTokenizerFast:
    return build_text_tokenizer(TEXTS, 300)


def tiny_lm(positions: int = 256, **options: object) -> LlamaForCausalLM:
    """Large weights, so that a tiny network tells its inputs apart."""
    config = LlamaConfig(
        vocab_size=len(text_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config)


def tiny_model(
    host: str = "toy_single", spec: CodecSpec | None = SPEC, positions: int = 256, **options: str
) -> UnifiedModel:
    torch.manual_seed(1)
    tokenizer = tokenizers.get(host).tiny()
    model = UnifiedModel.from_parts(
        tokenizer=tokenizer,
        codec=None if spec is None else ImageCodec(tokenizer, spec),
        lm=tiny_lm(positions),
        text_tokenizer=text_tokenizer(),
        **options,
    )
    return model.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    """Random pixels of the toys' size, 16 x 24."""
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1
