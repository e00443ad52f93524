"""The user's own images by the number of their row, for processes that share the packing."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unicompress.data.streams import ImageStream, StreamSample, UnreadableError
from unicompress.training.feed import Place
from unicompress.training.outside import StreamSource
from unicompress.training.recipe import StreamData
from unicompress.training.sample import Sample

NOTHING = StreamSample(np.empty((0, 0, 3), dtype=np.uint8))


class RowStream(ImageStream):
    """A stream that gives one sample for every row: an empty one where there is no image.

    Rows that are not being read are passed over without decoding them.
    """

    reading = True

    def _sample(self, row: Mapping[str, Any]) -> StreamSample:
        if not self.reading:
            return NOTHING
        try:
            return super()._sample(row)
        except UnreadableError as error:
            self._skip(str(error))
            return NOTHING


class RowSource(StreamSource):
    """Rows of a stream in the order of one process, whoever reads them; it only goes forward."""

    kind = RowStream
    stream: RowStream

    def __init__(self, entry: StreamData, *, size: int, seed: int, questions: int):
        # Every process walks over all rows, so none has a share of the stream.
        super().__init__(entry, size=size, seed=seed, place=Place(), questions=questions)
        self.row = 0  # the next one

    def read(self, rows: range) -> list[Sample]:
        """The samples of the rows that hold an image that can be read."""
        self.stream.reading = False
        while self.row < rows.start:
            next(self.stream)
            self.row += 1
        self.stream.reading = True
        samples = [self.at(row) for row in rows]
        self.row = rows.stop
        return [sample for sample in samples if sample.pixels.size]

    def state(self) -> dict[str, Any]:
        # What this process met on its way is not part of the place: others read other rows.
        return {"row": self.row, "stream": {**self.stream.state(), "skipped_count": 0}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.row = int(state["row"])
        self.stream.restore(state["stream"])
