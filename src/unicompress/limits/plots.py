"""Pictures of an attention allocation: shares over depth, and every head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicompress.checkpoint import atomic_write
from unicompress.errors import InputError
from unicompress.limits.attention import Allocation
from unicompress.registry import require

COLUMNS = (("all tokens", True), ("without the first token", False))


def plot_allocations(
    allocations: Mapping[str, Allocation],
    path: Path | str,
    *,
    asked: str = "output",
    focus: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG with one row per allocation.

    Left: shares of the segments over depth, with and without the first token. Right: what every
    head gives to one segment (`focus`, by name of the allocation; the first segment otherwise),
    without the first token. Raises MissingDependencyError without matplotlib.
    """
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path} must end in .png: that is the format written")
    figures = require("matplotlib.figure", extra="demo")
    figure: Any = figures.Figure(figsize=(13, 3.6 * len(allocations)), layout="constrained")
    axes = figure.subplots(len(allocations), 3, squeeze=False)
    for row, (name, allocation) in zip(axes, allocations.items(), strict=True):
        for axis, (label, sink) in zip(row, COLUMNS, strict=False):
            _shares(axis, allocation, asked, sink)
            axis.set_title(f"{name}, {label}")
        segment = (focus or {}).get(name, allocation.names[0])
        _heads(figure, row[2], allocation, asked, segment)
        row[2].set_title(f"{name}, to {segment} by head")
    atomic_write(Path(path), lambda file: figure.savefig(file, format="png", dpi=110))


def _shares(axis: Any, allocation: Allocation, asked: str, sink: bool) -> None:
    shares = allocation.share(asked, sink=sink)
    layers = range(len(shares))
    axis.stackplot(layers, shares.T.numpy(), labels=allocation.names)
    axis.set(xlabel="layer", ylabel=f"attention of {asked}", ylim=(0, 1))
    axis.set_xlim(0, max(1, len(shares) - 1))
    axis.legend(loc="upper right", fontsize="small")


def _heads(figure: Any, axis: Any, allocation: Allocation, asked: str, segment: str) -> None:
    heads = allocation.by_head(asked, sink=False)[..., allocation.names.index(segment)]
    image = axis.imshow(heads.T.numpy(), aspect="auto", origin="lower", vmin=0, vmax=1)
    axis.set(xlabel="layer", ylabel="head")
    figure.colorbar(image, ax=axis)
