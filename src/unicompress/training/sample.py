"""One sample, and what gives samples by their place."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicompress.errors import CheckpointError


@dataclass(frozen=True)
class Sample:
    """One image (uint8 [size, size, 3]) with the texts that are known for it."""

    pixels: NDArray[np.uint8]
    caption: str | None = None
    phrases: tuple[str, ...] = ()  # parts of the caption that hold on their own
    questions: tuple[tuple[str, str], ...] = ()  # with their answers


class Source(ABC):
    """One entry of a recipe's data."""

    captioned: bool
    questioned: bool

    @abstractmethod
    def at(self, index: int) -> Sample:
        """The sample of a place; a stream gives its next one wherever it is asked for."""

    def state(self) -> dict[str, Any]:
        """The place in a stream."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` described; only streams have one."""
        raise CheckpointError(
            f"a place in a stream is stored for {type(self).__name__}, which is none: start anew"
        )

    def skipped(self) -> list[str]:
        """What could not be read since the last call, by name and reason."""
        return []
