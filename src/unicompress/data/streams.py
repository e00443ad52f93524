"""The user's own images: folders, parquet files, webdataset tars and hub datasets, streamed.

Rows come through Hugging Face `datasets`; images are decoded here, so that one that cannot be read
is counted, named and left out, and the run goes on.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicompress.data.images import load_image
from unicompress.errors import InputError, first_line
from unicompress.registry import require

FORMATS = ("folder", "parquet", "webdataset", "hub")
BLOCK = 64  # rows read at once without a shuffle buffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StreamSample:
    """One image (uint8 [size, size, 3]) with its texts; empty where no column is named."""

    pixels: NDArray[np.uint8]
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()  # with their answers


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Where the rows are and which columns hold what.

    `path` is a folder of images (with a `metadata.csv` or `.jsonl` for texts), a parquet file, a
    tar (both may be globs), or a name on the hub with `subset` as its configuration. A column may
    reach into a structure, as in `json.caption`, and hold one text or a list of them. `shuffle` is
    the number of rows mixed at a time; 0 keeps the order.
    """

    path: str
    format: str
    split: str = "train"
    subset: str | None = None
    image: str = "image"
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    shuffle: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"unknown data format {self.format!r}: use one of {', '.join(FORMATS)}"
            )
        if (self.question is None) != (self.answer is None):
            raise InputError("name the question column and the answer column together")


@dataclass
class ImageStream:
    """Endless samples, epoch after epoch, for process `rank` of `count`; `state` resumes exactly.

    Raises InputError for a source that cannot be opened, lacks a named column, or yields no
    readable image in a whole epoch. `skipped_count` and `skipped` tell what was left out.
    """

    options: StreamOptions
    size: int
    seed: int = 0
    rank: int = 0
    count: int = 1
    skipped_count: int = 0
    skipped: list[str] = field(default_factory=list)  # to be emptied by whoever reports it

    def __post_init__(self) -> None:
        self._dataset = _open(self.options)
        self._epoch = self._number = self._offset = 0
        self._good = self._bad = 0  # in this epoch
        self._block: list[dict[str, Any]] = []
        self._start(None)

    def __iter__(self) -> Iterator[StreamSample]:
        return self

    def __next__(self) -> StreamSample:
        while True:
            while self._offset >= len(self._block):
                self._next_block()
            row = self._block[self._offset]
            self._offset += 1
            try:
                sample = self._sample(row)
            except UnreadableError as error:
                self._bad += 1
                self._skip(str(error))
                continue
            self._good += 1
            return sample

    def state(self) -> dict[str, Any]:
        """The place after the last sample, in plain values."""
        return {
            "epoch": self._epoch,
            "number": self._number,
            "offset": self._offset,
            "good": self._good,
            "bad": self._bad,
            "skipped_count": self.skipped_count,
            "before_block": self._before_block,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` described; the source must be unchanged."""
        self._epoch, self._number = state["epoch"], state["number"]
        self._good, self._bad = state["good"], state["bad"]
        self.skipped_count = state["skipped_count"]
        self._start(state["before_block"])
        if state["offset"]:
            self._read_block()
        self._offset = state["offset"]

    def _start(self, place: Any) -> None:
        """Read from the beginning of an epoch, or from a place within it."""
        if place is None:
            self._dataset = _open(self.options)
        else:
            self._dataset.load_state_dict(place)
        self._before_block = place
        self._rows = iter(self._dataset)
        self._block, self._offset = [], 0

    def _next_block(self) -> None:
        self._number += 1
        self._before_block = self._dataset.state_dict()
        self._read_block()
        if self._block:
            return
        if not self._good:
            raise InputError(
                f"{self.options.path} holds no image that can be read ({self._bad} skipped): "
                "check the path, the split and the image column"
            )
        self._epoch, self._number, self._good, self._bad = self._epoch + 1, 0, 0, 0
        self._start(None)

    def _read_block(self) -> None:
        """This process's share of the next rows, mixed if asked for."""
        length = self.options.shuffle or BLOCK
        try:
            rows = list(islice(self._rows, length * self.count))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.options.path}: {first_line(error)}") from error
        self._block, self._offset = rows[self.rank :: self.count], 0
        # An epoch's tail may leave some processes without a row: they take one again.
        if rows and not self._block:
            self._block = rows[-1:]
        if self.options.shuffle:
            order = np.random.default_rng((self.seed, self._epoch, self._number))
            self._block = [self._block[i] for i in order.permutation(len(self._block))]

    def _sample(self, row: Mapping[str, Any]) -> StreamSample:
        options = self.options
        value = self._column(row, options.image)
        captions = self._texts(row, options.caption)
        pairs: tuple[tuple[str, str], ...] = ()
        if options.question is not None:
            questions = self._texts(row, options.question)
            answers = self._texts(row, options.answer)
            # Several answers to a single question are the votes of several people.
            pairs = tuple(zip(questions, answers, strict=False))
        return StreamSample(_image(value, self.size, _name(row, value)), captions, pairs)

    def _texts(self, row: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
        if column is None:
            return ()
        value = self._column(row, column)
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_text(entry) for entry in values if entry is not None)

    def _column(self, row: Mapping[str, Any], column: str) -> Any:
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(
                    f"{self.options.path} has no column {column!r}; it has: {', '.join(row)}"
                )
            value = value[part]
        return value

    def _skip(self, reason: str) -> None:
        self.skipped_count += 1
        self.skipped.append(reason)
        logger.warning("skipped (%d so far): %s", self.skipped_count, reason)


class UnreadableError(Exception):
    """An image that cannot be read; its text names it."""


def _open(options: StreamOptions) -> Any:
    """A streaming dataset whose images are left as bytes."""
    datasets = require("datasets", extra="train")
    given: dict[str, Any]
    if options.format == "hub":
        given = {"path": options.path, "name": options.subset}
    elif options.format == "folder":
        folder = Path(options.path)
        if not folder.is_dir():
            raise InputError(f"there is no folder {options.path}: check data.path")
        given = {"path": "imagefolder", "data_dir": options.path}
        if not (folder / options.split).is_dir():
            # Left to itself, imagefolder takes every file with "train" or "test" in its name for
            # that split alone, and silently leaves out the others.
            given["data_files"] = {options.split: "**"}
    else:
        given = {"path": options.format, "data_files": options.path}
    try:
        dataset = datasets.load_dataset(**given, split=options.split, streaming=True)
        features = dataset.features or {}
        for name, feature in features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot open {options.path}: {first_line(error)}") from error
    return dataset


def _image(value: Any, size: int, name: str) -> NDArray[np.uint8]:
    """Decode what an image column holds: bytes, a structure with bytes or path, or a path."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, bytes | str):
        raise UnreadableError(f"{name} holds no image, but {type(value).__name__}")
    try:
        return load_image(value, size, name=name)
    except InputError as error:
        raise UnreadableError(str(error)) from error


def _name(row: Mapping[str, Any], value: Any) -> str:
    """How an image is called in messages: its path, or its key in a tar."""
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str) and path:
        return path
    key = row.get("__key__")
    return str(key) if key is not None else "an image without a name"


def _text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
