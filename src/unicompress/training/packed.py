"""Packed data: features and codes of images that were encoded once, in shards read as needed."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicompress.checkpoint import fingerprint, load_safetensors, read_json
from unicompress.codec_spec import OF_THE_CODES
from unicompress.errors import CheckpointError, HostMismatchError, RecipeError
from unicompress.tokens import EncodedImages
from unicompress.training.sample import Sample, Source
from unicompress.unified import UnifiedModel

FORMAT = "unicompress-pack-2"
MANIFEST = "pack.json"
PREFIX, SUFFIX = "shard-", ".safetensors"
HELD = 4  # shards kept in memory by one source
NO_PIXELS = np.empty((0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Shard:
    """One file of a pack: the samples of the places from `first` to before `stop`.

    The files themselves say what a pack holds, so that processes can write it side by side.
    """

    path: Path
    number: int
    first: int
    stop: int
    count: int  # samples, fewer than places where images could not be read
    state: dict[str, Any] | None = None  # of a stream behind its last place

    @classmethod
    def of(cls, path: Path) -> "Shard":
        """From the file's header; raises CheckpointError where it is damaged or foreign."""
        try:
            with safe_open(str(path), framework="pt") as file:
                notes = file.metadata() or {}
                count = int(file.get_slice("codes").get_shape()[0])
            state = json.loads(notes["state"]) if "state" in notes else None
            number = int(path.stem.removeprefix(PREFIX))
            return cls(path, number, int(notes["first"]), int(notes["stop"]), count, state)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged or no shard of a pack ({error}): delete it and pack again"
            ) from error


@dataclass(frozen=True)
class PackedSample(Sample):
    """A sample without pixels: what the language model reads and writes of it is known."""

    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # [n, d]
    codes: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))  # [n, c]


class PackedSource(Source):
    """A folder that `pack` wrote, again and again; a place always has the same sample.

    Raises CheckpointError for a damaged, foreign or empty one.
    """

    def __init__(self, path: Path | str, *, questions: int):
        self.path = Path(path)
        self.questions = questions
        self.manifest = read_manifest(self.path)
        self.shards = _in_order(self.path)
        self.starts = np.cumsum([0, *(shard.count for shard in self.shards)])
        if not len(self):
            raise CheckpointError(f"{self.path} holds no sample yet: let pack finish")
        self.captioned = bool(self.manifest["captioned"])
        self.questioned = bool(self.manifest["questioned"])
        self._held: OrderedDict[int, tuple[EncodedImages, list[dict[str, Any]]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, index: int) -> Sample:
        # An even count: stage two reads even places and draws odd ones, in every epoch.
        usable = max(1, len(self) - len(self) % 2)
        index %= usable
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        images, texts = self._shard(number)
        row = index - int(self.starts[number])
        own = texts[row]
        asked = tuple((question, answer) for question, answer in own["questions"])
        return PackedSample(
            pixels=NO_PIXELS,
            caption=own["caption"],
            questions=asked[: self.questions],
            features=images.features[row],
            codes=images.codes[row],
        )

    def _shard(self, number: int) -> tuple[EncodedImages, list[dict[str, Any]]]:
        if number not in self._held:
            path = self.shards[number].path
            tensors, notes = load_safetensors(path)
            if notes.get("identity") != json.dumps(self.manifest["identity"], sort_keys=True):
                raise CheckpointError(f"{path} belongs to another pack: pack the data again")
            texts = json.loads(tensors["texts"].numpy().tobytes().decode())
            images = EncodedImages(tensors["features"], tensors["codes"].long())
            if not len(images) == len(texts) == self.shards[number].count:
                raise CheckpointError(f"{path} holds another number of samples than of texts")
            self._held[number] = (images, texts)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is written."""
    return folder / f"{PREFIX}{number:05d}{SUFFIX}"


def written_shards(folder: Path) -> dict[int, Shard]:
    """The shards that are there, complete each, by number and in order."""
    shards = [Shard.of(path) for path in folder.glob(f"{PREFIX}*{SUFFIX}")]
    return {shard.number: shard for shard in sorted(shards, key=lambda shard: shard.number)}


def _in_order(folder: Path) -> list[Shard]:
    """All shards; raises CheckpointError where one in between is missing or cut short."""
    place, shards = 0, list(written_shards(folder).values())
    for number, shard in enumerate(shards):
        if (shard.number, shard.first) != (number, place):
            raise CheckpointError(
                f"{folder} is not packed to its end, samples from {place} on are missing: run the "
                "same unicompress pack again, which goes on"
            )
        place = shard.stop
    return shards


def to_images(samples: Sequence[Sample]) -> EncodedImages:
    """The encoded images of packed samples; RecipeError where some have pixels instead."""
    packed = [sample for sample in samples if isinstance(sample, PackedSample)]
    if len(packed) < len(samples):
        raise RecipeError("packed data cannot be mixed with images: pack all entries of data")
    return EncodedImages(
        torch.stack([sample.features for sample in packed]),
        torch.stack([sample.codes for sample in packed]),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a pack says of itself; raises CheckpointError where it is none."""
    found = read_json(folder / MANIFEST)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is no {FORMAT} folder: make one with unicompress pack")
    return found


def identity(model: UnifiedModel) -> dict[str, str]:
    """What features and codes depend on."""
    codec = model.codec
    return {
        "host": str(model.tokenizer),
        "host_fingerprint": fingerprint(model.tokenizer),
        "plug_in_fingerprint": "none" if codec is None else encoder_fingerprint(model),
        "understanding_source": model.config.understanding_source,
    }


def encoder_fingerprint(model: UnifiedModel) -> str:
    """Of the plug-in without its decompressor, which packed images do not depend on."""
    assert model.codec is not None  # its caller asks before
    parts = {n: part for n, part in model.codec.named_children() if n != "decompressor"}
    # Some options, such as a compressor without weights, change codes and no tensor.
    options = [str(getattr(model.codec.spec, name)) for name in OF_THE_CODES]
    return "-".join([fingerprint(torch.nn.ModuleDict(parts)), *options])


def check_packed(paths: Sequence[str], model: UnifiedModel) -> None:
    """Raise HostMismatchError unless packs hold what this model's tokenizer stack would give."""
    own = identity(model) if paths else {}
    for path in paths:
        written: Mapping[str, Any] = read_manifest(Path(path))["identity"]
        for key, here in own.items():
            if written.get(key) != here and key != "host":
                raise HostMismatchError(
                    f"{path} was packed with another tokenizer, plug-in or rate ({key} "
                    f"{str(written.get(key))[:12]}, here {here[:12]}): pack the data again"
                )
