"""Which samples a process sees at which step, prepared by a thread that runs ahead."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch

AHEAD = 2  # steps prepared in advance


@dataclass(frozen=True)
class Place:
    """Which process of how many this is."""

    rank: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one micro-batch on one process.

    `counts` has, for every term of the loss, the number of elements its mean runs over; with them
    the loop weighs micro-batches and processes so that any split gives the gradient of the whole.
    """

    step: int
    counts: Mapping[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        return self


B = TypeVar("B", bound=Batch)


class Batches(ABC, Generic[B]):
    """Everything a stage feeds on, in a fixed order."""

    @abstractmethod
    def at(self, step: int) -> list[B]:
        """The micro-batches of this process at a step; called once per step, in order."""

    def state(self) -> dict[str, Any]:
        """The place after the last `at`; empty where the step alone decides."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` described."""

    def skipped(self) -> list[str]:
        """What could not be read since the last call, by name and reason."""
        return []


def shares(total: int, *, accumulate: int, place: Place, late: bool = False) -> list[list[int]]:
    """Positions of each micro-batch of this process among the `total` samples of a step.

    Where they do not divide evenly, the first parts take one more, or the last if `late`.
    """
    parts = np.array_split(np.arange(total), accumulate * place.count)
    parts = parts[::-1] if late else parts
    return [parts[i * place.count + place.rank].tolist() for i in range(accumulate)]


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


Prepared = tuple[list[B], dict[str, Any]]  # micro-batches, and the state of the data after them


class Feed(Generic[B]):
    """Iterates over what the steps from `start` to `stop` need, prepared by one thread in order."""

    def __init__(self, batches: Batches[B], *, start: int, stop: int):
        self._batches = batches
        self._steps = iter(range(start, stop))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: deque[Future[Prepared[B]]] = deque()
        for _ in range(AHEAD):
            self._submit()

    def __iter__(self) -> Iterator[Prepared[B]]:
        return self

    def __next__(self) -> Prepared[B]:
        if not self._ahead:
            raise StopIteration
        prepared = self._ahead.popleft().result()  # raises here what went wrong there
        self._submit()
        return prepared

    def close(self) -> None:
        """End the thread; what it prepared in advance is dropped."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._worker.submit(self._prepare, step))

    def _prepare(self, step: int) -> Prepared[B]:
        return self._batches.at(step), self._batches.state()
