"""What tests of hosts and of released models share: official numbers, files as released, plug-ins.

A file in fixtures/hosts/ holds random weights under the official names, inputs, and what the
official code made of them at toy size.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.training.recipe import StageOneRecipe
from unicompress.training.stage_one import train_stage_one
from unicompress.unified import UnifiedModel

FIXTURES = Path(__file__).parent / "fixtures" / "hosts"
WEIGHTS = ("weights.", "state.")  # what stands before the official names, in one file or another
PROMPTS = ["a red circle", "two blue squares left of a green triangle"]


def numbers(name: str) -> dict[str, Tensor]:
    """Everything in a file of fixtures."""
    return load_file(FIXTURES / f"{name}.safetensors")


def fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(official state dict, the rest) of a file of fixtures."""
    tensors = numbers(name)
    weights = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(WEIGHTS)}
    return weights, {n: t for n, t in tensors.items() if not n.startswith(WEIGHTS)}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def write_shards(folder: Path, *parts: Mapping[str, Tensor]) -> Path:
    """A model in shards beside an index, as transformers saves large ones."""
    places = {}
    for number, part in enumerate(parts, start=1):
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(dict(part), folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def with_plugin(
    folder: Path, dense: UnifiedModel, spec: CodecSpec, plugin: Path, **options: str
) -> UnifiedModel:
    """The released model in a folder around a plug-in of random weights, saved at `plugin`."""
    torch.manual_seed(5)
    ImageCodec(dense.tokenizer, spec).save_pretrained(plugin)
    return UnifiedModel.from_pretrained(folder, codec=plugin, **options)


def assert_same_weights(found: UnifiedModel, wanted: UnifiedModel) -> None:
    """Of the backbones: the same names, and the same numbers under them."""
    own, other = found.backbone.state_dict(), wanted.backbone.state_dict()
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


def after_stage_one(host: ImageTokenizer, folder: Path) -> tuple[ImageTokenizer, ImageCodec]:
    """The host as loaded again, and a plug-in after two steps of stage one around it."""
    save_tokenizer(host, folder / "host")
    recipe = StageOneRecipe(
        out=str(folder / "run"),
        tokenizer=str(folder / "host"),
        codec={"width": 16, "depth": 1, "heads": 2, "global_count": 2},
        steps=2,
        batch=2,
        lr=1e-3,
        log_every=1,
        save_every=2,
        validate_images=2,
        calibrate_images=4,
        tensorboard=False,
        cpu=True,
    )
    assert train_stage_one(recipe).status == "done"
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < float("inf") for loss in losses)
    loaded = load_tokenizer(folder / "host")
    return loaded, ImageCodec.from_pretrained(folder / "run" / "final", loaded)
