"""How cost grows with image size, batch and language model: one bench at several shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from unicompress.evals.result import Result


@dataclass(frozen=True)
class Shape:
    """What is varied; None is what the models themselves bring."""

    batch: int
    lm: str | None = None
    tokenizer: str | None = None


def growth(what: str, measured: Sequence[tuple[Shape, Result]]) -> Result:
    """One result of several: the first one's figures, and `growth` with all of them in details."""
    first = measured[0][1]
    table = [_entry(what, shape, result) for shape, result in measured]
    return replace(first, details={what: {**first.details[what], "growth": table}})


def _entry(what: str, shape: Shape, result: Result) -> dict[str, Any]:
    details: Mapping[str, Any] = result.details[what]
    return {
        **asdict(shape),
        "dense": asdict(result.dense),
        "compressed": asdict(result.compressed),
        "ratio": result.ratio,
        "breakdown": {
            "dense": asdict(result.dense_breakdown),
            "compressed": asdict(result.compressed_breakdown),
        },
        **{name: details.get(name) for name in ("medians", "flops", "peak_bytes", "orders")},
    }
