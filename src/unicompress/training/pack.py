"""Encoding a stage-two recipe's images once, so that training never runs the tokenizer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicompress.checkpoint import save_safetensors, write_json
from unicompress.errors import CheckpointError, InputError, RecipeError
from unicompress.training.feed import Place
from unicompress.training.packed import FORMAT, MANIFEST, identity, read_manifest
from unicompress.training.recipe import Data, PackedData, StageTwoRecipe
from unicompress.training.sample import Sample
from unicompress.training.samples import mixture, to_pixels
from unicompress.unified import UnifiedModel

BATCH = 16  # pictures that go through the tokenizer at once


@dataclass(frozen=True)
class Packed:
    """One folder: an entry of a recipe's `data`, encoded."""

    folder: Path
    count: int  # samples it holds now
    written: int  # of them in this run
    bytes: int


def pack(
    recipe: StageTwoRecipe,
    model: UnifiedModel,
    out: Path | str,
    *,
    count: int,
    shard: int = 1024,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Packed]:
    """Write the first `count` samples of every entry of `recipe.data`, `shard` to a file.

    One entry goes into `out`, several into its folders 0, 1, ... Every shard is complete or not
    there; the same call goes on where an earlier one stopped. Raises CheckpointError where the
    folder holds a pack of something else.
    """
    if min(count, shard) < 1:
        raise InputError(f"count and shard must be at least 1, got {count} and {shard}")
    if model.understanding is not None:
        raise InputError("this model reads with an encoder of its own, which cannot be packed yet")
    if any(isinstance(entry, PackedData) for entry in recipe.data):
        raise RecipeError("the data are packed already: name the images in data")
    out = Path(out)
    folders = [out] if len(recipe.data) == 1 else [out / str(i) for i in range(len(recipe.data))]
    return [
        _pack_entry(recipe, entry, model, folder, count, shard, progress)
        for entry, folder in zip(recipe.data, folders, strict=True)
    ]


def _pack_entry(
    recipe: StageTwoRecipe,
    entry: Data,
    model: UnifiedModel,
    folder: Path,
    count: int,
    shard: int,
    progress: Callable[[str, int, int], None] | None,
) -> Packed:
    source = mixture(
        [entry],
        size=model.tokenizer.spec.image_size,
        seed=recipe.seed,
        place=Place(),
        questions=recipe.questions_per_image,
    )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "identity": identity(model),
        "source": entry.model_dump(mode="json", exclude={"weight"}),
        "seed": recipe.seed,
        "questions_per_image": recipe.questions_per_image,
        "captioned": source.sources[0].captioned,
        "questioned": source.sources[0].questioned,
        "shards": [],
        "state": {},
    }
    if (folder / MANIFEST).is_file():
        manifest = _continued(manifest, folder)
    if manifest["state"]:
        source.restore(manifest["state"])
    first = done = sum(entry["count"] for entry in manifest["shards"])
    while done < count:
        places = range(done, min(done + shard, count))
        name = f"shard-{len(manifest['shards']):05d}.safetensors"
        _write_shard([source.at(place) for place in places], model, folder / name, manifest)
        # Only after the shard is there; the state is that of a stream behind its last sample.
        manifest["shards"].append({"name": name, "count": len(places)})
        manifest["state"] = source.state()
        write_json(manifest, folder / MANIFEST)
        done = places.stop
        if progress:
            progress(f"packing {folder.name}", done, count)
    size = sum((folder / shard["name"]).stat().st_size for shard in manifest["shards"])
    return Packed(folder, done, done - first, size)


def _continued(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest that is there, if it is of the same data and the same tokenizer stack."""
    there = read_manifest(folder)
    for key in ("identity", "source", "seed", "questions_per_image"):
        if there.get(key) != manifest[key]:
            raise CheckpointError(
                f"{folder} holds a pack that differs in {key}: choose another folder, or delete it"
            )
    return there


def _write_shard(
    samples: Sequence[Sample], model: UnifiedModel, path: Path, manifest: dict[str, Any]
) -> None:
    features, codes = [], []
    for start in range(0, len(samples), BATCH):
        pixels = to_pixels(samples[start : start + BATCH])
        read, written = model.encode_image(pixels.to(model.device))
        features.append(read.cpu())
        codes.append(written.cpu().int())
    texts = [{"caption": s.caption, "questions": list(s.questions)} for s in samples]
    save_safetensors(
        {
            "features": torch.cat(features),
            "codes": torch.cat(codes),
            "texts": torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), np.uint8).copy()),
        },
        path,
        {"format": FORMAT, "identity": json.dumps(manifest["identity"], sort_keys=True)},
    )
