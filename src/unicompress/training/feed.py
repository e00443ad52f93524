"""Which samples a process sees at which step, prepared by a thread that runs ahead."""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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


def shares(
    total: int, *, accumulate: int, place: Place, late: bool = False
) -> list[list[int]]:
    """Positions of each micro-batch of this process among the `total` samples of a step.

    Where they do not divide evenly, the first parts take one more, or the last if `late`.
    """
    parts = np.array_split(np.arange(total), accumulate * place.count)
    parts = parts[::-1] if late else parts
    return [parts[i * place.count + place.rank].tolist() for i in range(accumulate)]


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Feed(Generic[B]):
    """Iterates over (micro-batches, state of the data after them), prepared by a thread."""

    def __init__(self, batches: Batches[B], *, start: int, stop: int):
        self._batches = batches
        self._queue: queue.Queue[tuple[list[B], dict[str, Any]] | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start, stop), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[list[B], dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[list[B], dict[str, Any]]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: every later call meets the same end
            raise item
        return item

    def close(self) -> None:
        """End the thread; what it prepared in advance is dropped."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def _run(self, start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                item = self._batches.at(step), self._batches.state()
                self._put(item)
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # noqa: BLE001  # raised again where the loop can be told
            self._put(error)

    def _put(self, item: tuple[list[B], dict[str, Any]] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
