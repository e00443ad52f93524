"""Language models of known shapes with random weights: their cost is that of trained ones."""

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicompress.backbones.text import build_text_tokenizer
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.scenes import Scenes
from unicompress.errors import InputError, first_line
from unicompress.evals.cost import Pair
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.unified import UnifiedModel

POSITIONS = 2048
TEXT = 512  # positions left for text beside a dense image


@dataclass(frozen=True)
class LMShape:
    """What decides the cost of a Llama-like language model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 64
    tied: bool = True  # one table for words in and words out


# From the config.json of the released models. Qwen's bias terms are left out: they cost nothing.
LMS = {
    "tiny": LMShape(64, 128, 2, 4, 2, 512, head_dim=16),
    "reference": LMShape(256, 704, 4, 4, 4, 512),
    "smollm2-135m": LMShape(576, 1536, 30, 9, 3, 49152),
    "smollm2-360m": LMShape(960, 2560, 32, 15, 5, 49152),
    "qwen2.5-0.5b": LMShape(896, 4864, 24, 14, 2, 151936),
    "llama-3.2-1b": LMShape(2048, 8192, 16, 32, 8, 128256),
    "qwen2.5-1.5b": LMShape(1536, 8960, 28, 12, 2, 151936, head_dim=128),
    "llama-3.2-3b": LMShape(3072, 8192, 28, 24, 8, 128256, head_dim=128),
    "llama-3.1-8b": LMShape(4096, 14336, 32, 32, 8, 128256, head_dim=128, tied=False),
}


def lm_config(name: str) -> PreTrainedConfig:
    """Configuration of a known shape, of a `config.json` (or its folder), or of a hub id.

    Raises InputError that names the nearest known shape, or says why a file cannot be used.
    """
    known = shape_config(name)
    if known is not None:
        return known
    if not Path(name).exists() and "/" not in name:
        close = difflib.get_close_matches(name.lower(), LMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"unknown language model shape {name!r}.{hint} Known: {', '.join(LMS)}, or a "
            "config.json, or a hub id"
        )
    return stored_config(name)


def shape_config(name: str) -> PreTrainedConfig | None:
    """Configuration of a known shape, by its name in any case; None for another name."""
    shape = LMS.get(name.lower())
    if shape is None:
        return None
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=shape.tied,
    )


def stored_config(name: str) -> PreTrainedConfig:
    """Configuration in a file, a folder or on the hub; raises InputError that says why not."""
    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"no language model configuration in {name!r}: {reason}") from error


def random_lm(
    name: str | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A language model of a shape (see `lm_config`), with random weights."""
    config = lm_config(name) if isinstance(name, str) else name
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_pair(
    name: str | PreTrainedConfig,
    *,
    tokenizer: ImageTokenizer,
    codec: ImageCodec,
    text_tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """A dense and a compressed model around one host and one language model of a known shape.

    Both share the same language model in memory, which is only possible because it is not trained.
    It and what surrounds it have the type `dtype`; the host and the codec stay as they are.
    """
    text = text_tokenizer or caption_tokenizer()
    config = lm_config(name) if isinstance(name, str) else name
    needed = tokenizer.spec.grid.length + TEXT
    config.max_position_embeddings = max(config.max_position_embeddings, needed)
    lm = random_lm(config, dtype=dtype, device=tokenizer.device)
    models = [
        UnifiedModel.from_parts(tokenizer=tokenizer, codec=plugin, lm=lm, text_tokenizer=text)
        for plugin in (None, codec)
    ]
    for model in models:
        model.backbone.to(device=tokenizer.device, dtype=dtype)
    return Pair(dense=models[0].eval(), compressed=models[1].eval())


def random_codec(tokenizer: ImageTokenizer, spec: CodecSpec, *, seed: int = 0) -> ImageCodec:
    """A plug-in with random weights around a host, of the host's precision."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec = ImageCodec(tokenizer, spec)
    weight = next(tokenizer.parameters())
    return codec.to(weight.device, weight.dtype).eval()


@functools.cache
def caption_tokenizer(size: int = 64, vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A small text tokenizer that knows the words of scenes."""
    data = Scenes("train", size=size)
    samples = [data[index] for index in range(200)]
    texts = [text for s in samples for text in (s.caption, *(q.text for q in s.questions))]
    return build_text_tokenizer(texts, vocabulary)
