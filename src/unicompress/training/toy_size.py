"""The same recipe at toy size: `tiny()` hosts, a small language model of the same class, scenes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from unicompress.backbones.text import build_text_tokenizer
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.scenes import Scenes
from unicompress.errors import InputError, RecipeError
from unicompress.evals.language_models import LMS, shape_config, stored_config
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.training.recipe import StageOneRecipe, StageTwoRecipe
from unicompress.training.stage_one import codec_spec

WIDTH, DEPTH, HEADS = 32, 1, 2
STEPS, BATCH = 2, 4
TEXTS = 100  # scenes that the toy's text tokenizer is built from
SMALL_LM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
LOOP: dict[str, Any] = {
    "steps": STEPS,
    "batch": BATCH,
    "accumulate": 1,
    "data": [{"kind": "scenes"}],
    "cpu": True,
    "precision": "fp32",
    "log_every": 1,
    "validate_every": 0,
    "validate_images": 2,
    "tensorboard": False,
    "time_budget_minutes": None,
}


def host(source: str, folder: Path) -> Path:
    """The tiny sibling of a host given by spec or folder, saved where recipes can name it."""
    if Path(source).is_dir():
        member = type(load_tokenizer(source))
    else:
        member = tokenizers.get(source.partition("(")[0].strip())
    save_tokenizer(member.tiny(), folder)
    return folder


def small(spec: CodecSpec) -> CodecSpec:
    """The same plug-in, narrow."""
    return replace(spec, width=WIDTH, depth=DEPTH, heads=HEADS)


def plugin(spec: CodecSpec, tokenizer: Path, folder: Path) -> Path:
    """A narrow untrained plug-in around the toy host, saved where recipes can name it."""
    ImageCodec(load_tokenizer(tokenizer), small(spec)).save_pretrained(folder)
    return folder


def stage_one(recipe: StageOneRecipe, tokenizer: Path, out: Path) -> StageOneRecipe:
    """The recipe with a toy host, a narrow plug-in and generated data."""
    spec = small(codec_spec(recipe)).to_dict()
    own = {"tokenizer": str(tokenizer), "checkpoint": None, "codec": spec, "out": str(out)}
    values = {**recipe.model_dump(), **LOOP, **own, "refine": None, "calibrate_images": 8}
    return StageOneRecipe.model_validate(values)


def stage_two(
    recipe: StageTwoRecipe,
    tokenizer: Path,
    codec: Path | None,
    start: Path | None,
    out: Path,
) -> StageTwoRecipe:
    """The recipe with toy parts, or with the toy model that an earlier stage left."""
    values = {**recipe.model_dump(), **LOOP, "out": str(out), "checkpoint": None}
    if recipe.start is not None:
        if start is None:
            raise RecipeError("a dry run builds the model from parts: name tokenizer and lm")
        return StageTwoRecipe.model_validate({**values, "start": str(start)})
    assert recipe.lm is not None  # the recipe checks it
    lm = {
        "name": str(_saved_lm(recipe, out.parent / "lm")),
        "attention": recipe.lm.attention,
        "gradient_checkpointing": recipe.lm.gradient_checkpointing,
    }
    parts = {"tokenizer": str(tokenizer), "codec": None if codec is None else str(codec), "lm": lm}
    return StageTwoRecipe.model_validate({**values, **parts})


def lm_config(recipe: StageTwoRecipe) -> Any:
    """The configuration of a recipe's language model at full size.

    Known shapes need no network; other names are asked of the hub. RecipeError where that fails.
    """
    assert recipe.lm is not None
    if recipe.lm.name is None:
        return LlamaConfig(
            **{"vocab_size": recipe.lm.vocab_size, "tie_word_embeddings": True},
            **dict(recipe.lm.config or {}),
        )
    name = recipe.lm.name
    # Of a hub id the last part says the shape; a folder says it itself.
    known = None if Path(name).exists() else shape_config(name.rpartition("/")[2])
    try:
        return known or stored_config(name)
    except InputError as error:
        raise RecipeError(
            f"the shape of {name!r} is not known here ({error}): pass its folder as lm.name, or "
            f"one of {', '.join(LMS)}"
        ) from error


def build_lm(config: Any, *, rows: int) -> PreTrainedModel:
    """A language model of a configuration with another number of vocabulary entries."""
    values = {**config.to_dict(), "vocab_size": rows}
    return AutoModelForCausalLM.from_config(type(config).from_dict(values), dtype=torch.float32)


def _saved_lm(recipe: StageTwoRecipe, folder: Path) -> Path:
    """A small language model of the recipe's class with a text tokenizer, as a folder."""
    scenes = Scenes("train", size=32)
    text = build_text_tokenizer([scenes[i].caption for i in range(TEXTS)], 300)
    text.save_pretrained(folder)
    values = {**lm_config(recipe).to_dict(), **SMALL_LM, "vocab_size": len(text)}
    kind = type(lm_config(recipe))
    special = {n: getattr(text, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        lm = AutoModelForCausalLM.from_config(kind.from_dict({**values, **special}))
    lm.save_pretrained(folder)
    return folder
