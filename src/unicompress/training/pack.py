"""Encoding a stage-two recipe's images once, so that training never runs the tokenizer.

Several processes share the work without talking to each other: shard k belongs to process k modulo
their number, is complete or not there, and depends on the recipe and k alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicompress.checkpoint import save_safetensors, write_json
from unicompress.errors import CheckpointError, InputError, RecipeError
from unicompress.evals.result import Progress
from unicompress.training.feed import Place
from unicompress.training.pack_rows import RowSource
from unicompress.training.packed import (
    FORMAT,
    MANIFEST,
    Shard,
    identity,
    read_manifest,
    shard_path,
    written_shards,
)
from unicompress.training.recipe import Data, PackedData, StageTwoRecipe, StreamData
from unicompress.training.sample import Sample, Source
from unicompress.training.samples import mixture, to_pixels
from unicompress.unified import UnifiedModel

BATCH = 16  # pictures that go through the tokenizer at once


@dataclass(frozen=True)
class Packed:
    """One folder: an entry of a recipe's `data`, encoded."""

    folder: Path
    count: int  # samples it holds now, of all processes
    unreadable: int  # images that were left out of it
    written: int  # samples by this process in this run
    bytes: int
    complete: bool  # nothing is left for another process to write


@dataclass(frozen=True)
class Work:
    """How much is packed, and which part of it this process does."""

    count: int  # places, from the first
    shard: int  # places of a file
    place: Place = field(default_factory=Place)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if min(self.count, self.shard) < 1:
            raise InputError(
                f"count and shard must be at least 1, got {self.count} and {self.shard}"
            )
        if not 0 <= self.place.rank < self.place.count:
            raise InputError(f"there is no process {self.place.rank} of {self.place.count}")

    def places(self, number: int) -> range:
        """The places of a shard."""
        return range(number * self.shard, min((number + 1) * self.shard, self.count))

    def missing(self, there: Mapping[int, Shard]) -> list[int]:
        """The shards that nobody has written yet, or that have grown since."""
        numbers = range(ceil(self.count / self.shard))
        return [n for n in numbers if n not in there or there[n].stop < self.places(n).stop]

    def own(self, numbers: Sequence[int]) -> list[int]:
        """Those of them that this process writes."""
        return [n for n in numbers if n % self.place.count == self.place.rank]


def process_place(environment: Mapping[str, str]) -> Place:
    """Which process this is, as launchers say it (RANK, WORLD_SIZE); without one, the only one."""
    values = {
        "RANK": environment.get("RANK", "0"),
        "WORLD_SIZE": environment.get("WORLD_SIZE", "1"),
    }
    for name, value in values.items():
        if not value.isdecimal():
            raise InputError(f"{name} must be a whole number, got {value!r}: use a launcher")
    return Place(int(values["RANK"]), int(values["WORLD_SIZE"]))


def pack(
    recipe: StageTwoRecipe,
    model: UnifiedModel,
    out: Path | str,
    *,
    count: int,
    shard: int = 1024,
    place: Place | None = None,
    progress: Progress | None = None,
) -> list[Packed]:
    """Write this process's shards of the first `count` samples of every entry of `recipe.data`.

    One entry goes into `out`, several into its folders 0, 1, ... Every shard (`shard` samples) is
    complete or not there, and the same call writes what is missing, however many processes there
    were before and are now. In streams an image that cannot be read leaves its place empty. Raises
    CheckpointError where the folder holds a pack of something else, InputError where no image can
    be read.
    """
    work = Work(count, shard, place or Place(), progress)
    if model.understanding is not None:
        raise InputError("this model reads with an encoder of its own, which cannot be packed yet")
    if any(isinstance(entry, PackedData) for entry in recipe.data):
        raise RecipeError("the data are packed already: name the images in data")
    out = Path(out)
    folders = [out] if len(recipe.data) == 1 else [out / str(i) for i in range(len(recipe.data))]
    who = identity(model)
    return [
        _pack_entry(recipe, entry, model, who, folder, work)
        for entry, folder in zip(recipe.data, folders, strict=True)
    ]


def _pack_entry(
    recipe: StageTwoRecipe,
    entry: Data,
    model: UnifiedModel,
    who: dict[str, str],
    folder: Path,
    work: Work,
) -> Packed:
    source = _source(recipe, entry, model.tokenizer.spec.image_size)
    manifest = {
        "format": FORMAT,
        "identity": who,
        "source": entry.model_dump(mode="json", exclude={"weight"}),
        "seed": recipe.seed,
        "questions_per_image": recipe.questions_per_image,
        "captioned": source.captioned,
        "questioned": source.questioned,
        "shard": work.shard,
    }
    _claim(manifest, folder, work.place)
    there = written_shards(folder)
    own = work.own(work.missing(there))
    if own:
        _go_to(source, own[0] * work.shard, there)
    written = 0
    for done, number in enumerate(own, start=1):
        places = work.places(number)
        samples = _read(source, places)
        notes = {"first": str(places.start), "stop": str(places.stop)}
        if state := source.state():
            notes["state"] = json.dumps(state)
        _write_shard(samples, model, shard_path(folder, number), {**_notes(manifest), **notes})
        written += len(samples)
        if work.progress:
            work.progress(f"packing {folder.name}", done, len(own))
    return _report(folder, work, written)


def _source(recipe: StageTwoRecipe, entry: Data, size: int) -> Source:
    if isinstance(entry, StreamData):
        return RowSource(entry, size=size, seed=recipe.seed, questions=recipe.questions_per_image)
    mixed = mixture(
        [entry], size=size, seed=recipe.seed, place=Place(), questions=recipe.questions_per_image
    )
    return mixed.sources[0]


def _read(source: Source, places: range) -> list[Sample]:
    if isinstance(source, RowSource):
        return source.read(places)
    return [source.at(place) for place in places]


def _go_to(source: Source, place: int, there: Mapping[int, Shard]) -> None:
    """Start a stream behind the last shard before `place` instead of at its beginning."""
    before = [shard for shard in there.values() if shard.state and shard.stop <= place]
    if before and before[-1].state:
        source.restore(before[-1].state)


def _claim(manifest: Mapping[str, Any], folder: Path, place: Place) -> None:
    """Say what the folder holds; raises CheckpointError if it is something else."""
    if (folder / MANIFEST).is_file():
        there = read_manifest(folder)
        for key in ("identity", "source", "seed", "questions_per_image", "shard"):
            if there.get(key) != manifest[key]:
                raise CheckpointError(
                    f"{folder} holds a pack that differs in {key}: choose another folder, or "
                    "delete it"
                )
    elif place.rank == 0:
        write_json(manifest, folder / MANIFEST)


def _report(folder: Path, work: Work, written: int) -> Packed:
    shards = written_shards(folder)
    count = sum(shard.count for shard in shards.values())
    places = sum(shard.stop - shard.first for shard in shards.values())
    complete = (folder / MANIFEST).is_file() and not work.missing(shards)
    if complete and not count:
        raise InputError(
            f"none of {places} images could be read: check path, split and image column of data"
        )
    size = sum(shard.path.stat().st_size for shard in shards.values())
    return Packed(folder, count, places - count, written, size, complete)


def _notes(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {"format": FORMAT, "identity": json.dumps(manifest["identity"], sort_keys=True)}


def _write_shard(
    samples: Sequence[Sample], model: UnifiedModel, path: Path, notes: Mapping[str, str]
) -> None:
    features, codes = [], []
    for start in range(0, len(samples), BATCH):
        pixels = to_pixels(samples[start : start + BATCH])
        read, written = model.encode_image(pixels)  # moved to what encodes
        features.append(read.cpu())
        codes.append(written.cpu().int())
    if not samples:  # a black picture says what shapes nothing has
        size = model.tokenizer.spec.image_size
        read, written = model.encode_image(torch.zeros(1, 3, size, size))
        features, codes = [read.cpu()[:0]], [written.cpu().int()[:0]]
    texts = [{"caption": s.caption, "questions": list(s.questions)} for s in samples]
    save_safetensors(
        {
            "features": torch.cat(features),
            "codes": torch.cat(codes),
            "texts": torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), np.uint8).copy()),
        },
        path,
        notes,
    )
