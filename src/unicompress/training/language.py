"""The language model and the text tokenizer that a stage-two recipe asks for."""

from collections.abc import Iterator, Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicompress.backbones.text import build_text_tokenizer
from unicompress.errors import InputError, RecipeError, first_line
from unicompress.registry import require
from unicompress.training.feed import Place, seed_of
from unicompress.training.recipe import Data, LanguageModelRecipe, LoraRecipe, check_keys
from unicompress.training.samples import mixture
from unicompress.unified import DESCRIBE, UnifiedModel

TEXT_SAMPLES = 2000  # images whose texts the tokenizer is built from
SMALLEST = 32  # pixels; the images are not looked at


def language_model(
    recipe: LanguageModelRecipe, data: Sequence[Data], *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Llama with random weights and a tokenizer built from the data's texts, or a released LM."""
    if recipe.name is not None:
        lm, text = _released(recipe.name, recipe.attention)
    else:
        text = build_text_tokenizer(_texts(data, seed), recipe.vocab_size)
        lm = _fresh(recipe, text, seed)
    if recipe.gradient_checkpointing:
        # transformers 5.18 has only the older name, which warns in versions that have both.
        newer = getattr(lm, "activation_checkpointing_enable", None)
        (newer or lm.gradient_checkpointing_enable)()
    return lm, text


def add_lora(model: UnifiedModel, recipe: LoraRecipe) -> None:
    """Freeze the language model but for adapters and the image's vocabulary entries, in place."""
    peft = require("peft", extra="train")
    space = model.backbone.space
    image = list(range(space.begin, space.vocabulary_size))
    tied = model.lm.config.tie_word_embeddings
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        trainable_token_indices=image if tied else {"embed_tokens": image, "lm_head": image},
    )
    try:
        model.backbone.lm = peft.get_peft_model(model.lm, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"lora does not fit this language model: {reason}") from error


def _fresh(
    recipe: LanguageModelRecipe, text: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    own = dict(recipe.config or {})
    check_keys(own, LlamaConfig().to_dict(), "lm.config")
    config = LlamaConfig(
        **{
            "vocab_size": len(text),
            "tie_word_embeddings": True,
            "pad_token_id": text.pad_token_id,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            **own,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, 0))
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=recipe.attention, dtype=torch.float32
        )


def _released(name: str, attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        text = AutoTokenizer.from_pretrained(name)
        lm = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation=attention, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"the language model {name!r} cannot be loaded ({reason}): check the name, the network "
            "and, for gated models, `hf auth login`"
        ) from error
    if not isinstance(text, PreTrainedTokenizerFast):
        raise InputError(f"{name} has no fast tokenizer: choose a model that ships tokenizer.json")
    return lm, text


def _texts(data: Sequence[Data], seed: int) -> Iterator[str]:
    """Captions, questions and answers of the first samples."""
    yield DESCRIBE
    samples = mixture(data, size=SMALLEST, seed=seed, place=Place(), questions=6)
    for index in range(TEXT_SAMPLES):
        sample = samples.at(index)
        if sample.caption is not None:
            yield sample.caption
        for pair in sample.questions:
            yield from pair
