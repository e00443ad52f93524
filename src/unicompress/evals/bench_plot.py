"""Where the time goes, as a picture: the parts of a measurement, dense total = 1."""

from dataclasses import asdict
from pathlib import Path

from unicompress.checkpoint import atomic_write
from unicompress.errors import InputError
from unicompress.evals.result import Result
from unicompress.registry import require


def save_plot(result: Result, path: Path | str) -> None:
    """Two stacked bars, as a PNG; raises InputError where the result has no times to compare."""
    sides = {
        "dense": asdict(result.dense_breakdown),
        "compressed": asdict(result.compressed_breakdown),
    }
    total = sum(value or 0.0 for value in sides["dense"].values())
    if not total:
        raise InputError("only what is timed in parts on both sides can be drawn: generation")
    figure = require("matplotlib.figure", extra="demo").Figure(figsize=(6, 2.2), dpi=110)
    axes = figure.add_subplot()
    left = dict.fromkeys(sides, 0.0)
    for part in sides["dense"]:
        widths = [(parts[part] or 0.0) / total for parts in sides.values()]
        axes.barh(list(sides), widths, left=list(left.values()), label=part.replace("_", " "))
        left = {side: left[side] + width for side, width in zip(left, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("time (dense = 1)")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    atomic_write(path, lambda file: figure.savefig(file, format="png"))
