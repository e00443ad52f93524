"""A recipe tried out before it is paid for: toy-size steps of every stage, and what all would cost.

Built twice. On torch's `meta` device at full size, which takes no memory: parameters, tokens and
arithmetic are counted there. And for real with `tiny()` hosts, a language model of the same class
and generated scenes: every stage takes two optimiser steps with the recipe's own options.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unicompress.backbones.base import backbones
from unicompress.backbones.projectors import projectors
from unicompress.checkpoint import read_json
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import RecipeError
from unicompress.evals.meter import count_flops
from unicompress.sequence import ImageLayout
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.io import load_tokenizer
from unicompress.training import toy_size
from unicompress.training.recipe import (
    SECTIONS,
    LoopRecipe,
    StageOneRecipe,
    StageTwoRecipe,
    load_recipe,
    sections,
    split_section,
)
from unicompress.training.stage_one import codec_spec, train_stage_one
from unicompress.training.stage_two import train_stage_two
from unicompress.unified_parts import code_space

GPUS = 8  # of the paper's machine
PEAK = 989e12  # FLOP/s of an H100 in dense bfloat16
UTILISATION = 0.35  # share of it that training is assumed to reach
TEXT_TOKENS = 128  # assumed per sample
FORMULAS = {
    "flops": "host encode (counted) + 6 x parameters x positions "
    "+ 6 x layers x width x positions^2; parameters 4 x under LoRA",
    "gpu_hours": f"samples x flops / ({UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s) / 3600",
    "memory": "16 bytes a trained and 4 a frozen parameter, 34 bytes a layer, channel and position "
    f"(2 where checkpointed), 6 bytes a text score; micro-batch over {GPUS} GPUs",
    "text": f"{TEXT_TOKENS} tokens assumed",
}


@dataclass(frozen=True)
class Side:
    """What one sample costs, dense or compressed."""

    image_tokens: int
    positions: int  # image with delimiters, and text
    flops: float  # per sample, forward and backward
    gpu_hours: float
    memory_bytes: float  # per GPU


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe: its size, its cost, and the toy's losses in its two steps."""

    stage: str
    samples: int
    trained_parameters: int
    frozen_parameters: int
    compressed: Side | None  # None: the recipe trains the dense model
    dense: Side | None  # None for stage one, which has no dense counterpart
    toy_losses: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """All stages of a recipe, in their order, with the formulas behind the figures."""

    recipe: str
    stages: tuple[StagePlan, ...]
    formulas: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(FORMULAS))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def dry_run(stage: str, path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """Try out a recipe: one stage, or all of them where the file has sections.

    `overrides` go to the named stage, or to the section that follows a # in `path`. Raises
    RecipeError for a stage that cannot be tried out.
    """
    found = sections(path)
    if stage not in SECTIONS:
        raise RecipeError(f"a dry run takes {' or '.join(SECTIONS)}, not {stage!r}")
    file, named = split_section(path)
    names = [name for name in SECTIONS if name in found] if found else [stage]
    recipes = {}
    for name in names:
        kind = StageOneRecipe if name == "stage-one" else StageTwoRecipe
        own = overrides if name == (named or stage) else ()
        recipes[name] = load_recipe(kind, file if found else path, own, section=name)
    with tempfile.TemporaryDirectory() as folder:
        losses = _toy_steps(recipes, Path(folder))
    plans = [_plan(name, recipe, recipes, losses[name]) for name, recipe in recipes.items()]
    return Plan(str(path), tuple(plans))


# The toy


def _toy_steps(recipes: Mapping[str, LoopRecipe], folder: Path) -> dict[str, tuple[float, ...]]:
    """Two optimiser steps of every stage, each on what the one before it left."""
    losses = {}
    host = toy_size.host(_tokenizer_of(recipes), folder / "host")
    plugin: Path | None = None
    model: Path | None = None
    for name, recipe in recipes.items():
        out = folder / name
        if isinstance(recipe, StageOneRecipe):
            train_stage_one(toy_size.stage_one(recipe, host, out))
            plugin = out / "final"
        else:
            assert isinstance(recipe, StageTwoRecipe)
            if plugin is None and recipe.codec is not None:
                plugin = toy_size.plugin(_codec_spec(recipe, recipes), host, folder / "plugin")
            toy = toy_size.stage_two(recipe, host, plugin, model, out)
            train_stage_two(toy)
            model = out / "final"
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[name] = tuple(line["loss"] for line in lines if "loss" in line)
    return losses


# The real size


def _plan(
    name: str,
    recipe: LoopRecipe,
    recipes: Mapping[str, LoopRecipe],
    losses: tuple[float, ...],
) -> StagePlan:
    tokenizer = _full_tokenizer(_tokenizer_of(recipes))
    host = _count(tokenizer)
    encode = _encode_flops(tokenizer)
    samples = recipe.steps * recipe.batch
    if isinstance(recipe, StageOneRecipe):
        spec = codec_spec(recipe)
        with torch.device("meta"):
            trained = _count(ImageCodec(tokenizer, spec))
        tokens = tokenizer.spec.grid.length
        side = _side(
            recipe,
            tokens=_layout(tokenizer, spec).tokens,
            positions=tokens,
            flops=encode + 6.0 * trained * tokens,
            state=16.0 * trained + 4.0 * host,
            activations=34.0 * spec.depth * spec.width * tokens,
        )
        return StagePlan(name, samples, trained, host, side, None, losses)
    assert isinstance(recipe, StageTwoRecipe)
    first = recipe if recipe.lm is not None else recipes["stage-two"]
    assert isinstance(first, StageTwoRecipe)
    dense, counts = _stage_two(recipe, first, tokenizer, None, encode)
    compressed = None
    if first.codec is not None:
        spec = _codec_spec(first, recipes)
        compressed, counts = _stage_two(recipe, first, tokenizer, spec, encode)
    return StagePlan(name, samples, *counts, compressed, dense, losses)


def _stage_two(
    recipe: StageTwoRecipe,
    first: StageTwoRecipe,
    tokenizer: ImageTokenizer,
    spec: CodecSpec | None,
    encode: float,
) -> tuple[Side, tuple[int, int]]:
    """What one side costs, and its (trained, frozen) parameters."""
    config = toy_size.lm_config(first)
    with torch.device("meta"):
        codec = None if spec is None else ImageCodec(tokenizer, spec)
        space = code_space(config.vocab_size, tokenizer, codec)
        lm = toy_size.build_lm(config, rows=space.vocabulary_size)
        quantized = first.understanding_source == "quantized"
        backbone = backbones.build(
            "causal_lm",
            lm=lm,
            space=space,
            projector=projectors.build(
                first.projector,
                dim=tokenizer.spec.code_dim if quantized else tokenizer.spec.dim,
                hidden=config.hidden_size,
            ),
        )
    everything = _count(backbone)
    tables = _count(lm.get_input_embeddings())
    heads = _count(backbone.get_submodule("heads"))
    body = _count(lm) - tables  # matrices that every position passes
    if not config.tie_word_embeddings:
        body -= tables
    trained, factor = (everything, 6.0) if first.lora is None else (everything - body, 4.0)
    layout = _layout(tokenizer, spec)
    positions = layout.length + TEXT_TOKENS
    layers, width = config.num_hidden_layers, config.hidden_size
    drawn = 1 - recipe.understanding_share
    flops = encode + factor * body * positions + 6.0 * layers * width * positions**2
    flops += drawn * 6.0 * heads * layout.tokens
    per_layer = 2.0 if first.lm is not None and first.lm.gradient_checkpointing else 34.0
    frozen = _count(tokenizer) + (0 if codec is None else _count(codec)) + everything - trained
    side = _side(
        recipe,
        tokens=layout.tokens,
        positions=positions,
        flops=flops,
        state=16.0 * trained + 4.0 * frozen,
        activations=per_layer * layers * width * positions + 6.0 * config.vocab_size * TEXT_TOKENS,
    )
    return side, (trained, frozen)


def _side(
    recipe: LoopRecipe,
    *,
    tokens: int,
    positions: int,
    flops: float,
    state: float,
    activations: float,
) -> Side:
    samples = recipe.steps * recipe.batch
    micro = max(1, recipe.batch // recipe.accumulate // GPUS)
    return Side(
        image_tokens=tokens,
        positions=positions,
        flops=flops,
        gpu_hours=samples * flops / (UTILISATION * PEAK) / 3600,
        memory_bytes=state + micro * activations,
    )


def _tokenizer_of(recipes: Mapping[str, LoopRecipe]) -> str:
    for recipe in recipes.values():
        name = getattr(recipe, "tokenizer", None)
        if name is not None:
            return str(name)
    raise RecipeError("a dry run builds the model from parts: name tokenizer and lm, not start")


def _full_tokenizer(source: str) -> ImageTokenizer:
    if Path(source).is_dir():
        return load_tokenizer(source).to("meta")
    with torch.device("meta"):
        return tokenizers.build(source)


def _encode_flops(tokenizer: ImageTokenizer) -> float:
    spec = tokenizer.spec
    height, width = (spec.image_size // spec.grid.rows * side for side in spec.grid)
    picture = torch.zeros(1, 3, height, width, device="meta")
    with torch.no_grad(), torch.device("meta"):
        return float(count_flops(lambda: tokenizer.encode(picture)))


def _layout(tokenizer: ImageTokenizer, spec: CodecSpec | None) -> ImageLayout:
    grid = tokenizer.spec.grid
    return ImageLayout(0, grid) if spec is None else _pooled(spec, tokenizer)


def _pooled(spec: CodecSpec, tokenizer: ImageTokenizer) -> ImageLayout:
    return ImageLayout(spec.global_count, tokenizer.spec.grid.pooled(spec.stride))


def _codec_spec(recipe: StageTwoRecipe, recipes: Mapping[str, LoopRecipe]) -> CodecSpec:
    """The plug-in's options: of the file's stage one, or of the trained plug-in that is named."""
    first = recipes.get("stage-one")
    if isinstance(first, StageOneRecipe):
        return codec_spec(first)
    path = Path(str(recipe.codec)) / "config.json"
    if not path.is_file():
        raise RecipeError(f"the plug-in {recipe.codec} is not there: train stage one first")
    return CodecSpec.from_dict(read_json(path)["spec"])


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
