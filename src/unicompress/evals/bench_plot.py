"""A bench as a picture: where the time goes, or how it grows from shape to shape."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unicompress.checkpoint import atomic_write
from unicompress.errors import InputError
from unicompress.evals.result import Result
from unicompress.registry import require

FIGURES = {
    "generation": "generation_seconds",
    "understanding": "understanding_seconds",
    "training": "training_step_seconds",
}
AXES = {"tokens": "dense tokens of an image", "batch": "batch", "lm": "language model"}


def save_plot(result: Result, path: Path | str) -> None:
    """Write a PNG: two stacked bars (dense total = 1), or lines where several shapes were timed.

    Raises InputError where the result has no times to compare.
    """
    figure = require("matplotlib.figure", extra="demo").Figure
    grown = [(what, d["growth"]) for what, d in result.details.items() if "growth" in d]
    drawn = _growth(figure, *grown[0]) if grown else _parts(figure, result)
    drawn.tight_layout()
    atomic_write(path, lambda file: drawn.savefig(file, format="png"))


def _parts(figure: Any, result: Result) -> Any:
    """Where the time goes."""
    sides = {
        "dense": asdict(result.dense_breakdown),
        "compressed": asdict(result.compressed_breakdown),
    }
    total = sum(value or 0.0 for value in sides["dense"].values())
    if not total:
        raise InputError("only what is timed in parts on both sides can be drawn: generation")
    drawn = figure(figsize=(6, 2.2), dpi=110)
    axes = drawn.add_subplot()
    left = dict.fromkeys(sides, 0.0)
    for part in sides["dense"]:
        widths = [(parts[part] or 0.0) / total for parts in sides.values()]
        axes.barh(list(sides), widths, left=list(left.values()), label=part.replace("_", " "))
        left = {side: left[side] + width for side, width in zip(left, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("time (dense = 1)")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return drawn


def _growth(figure: Any, what: str, table: Sequence[Mapping[str, Any]]) -> Any:
    """Time of both sides beside their ratio, over the first thing that varies."""
    axis, lines = growth_lines(what, table)
    unit = next(iter(lines.values()))[0][1]
    drawn = figure(figsize=(8, 3.2), dpi=110)
    times, ratios = drawn.subplots(1, 2)
    ticks = list(dict.fromkeys(point[0] for points in lines.values() for point in points))
    for number, (name, points) in enumerate(lines.items()):
        places = [point[0] for point in points]
        color = f"C{number}"
        for side, style in ((1, "o-"), (2, "s--")):
            values = [point[side] / unit for point in points]
            label = f"{name} {('dense', 'compressed')[side - 1]}".strip()
            times.plot(places, values, style, color=color, label=label)
        ratios.plot(places, [p[2] / p[1] for p in points], "o-", color=color, label=name)
    times.set(ylabel="time (first dense = 1)", yscale="log")
    ratios.set(ylabel="compressed / dense")
    ratios.set_ylim(bottom=0, top=1.1 * ratios.get_ylim()[1])
    for axes in (times, ratios):
        axes.set_xlabel(AXES[axis])
        if axis != "lm":
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    times.legend(fontsize=7, frameon=False)
    return drawn


def growth_lines(
    what: str, table: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, list[tuple[Any, float, float]]]]:
    """What varies first (tokens, batch or lm), and a line of (place, dense, compressed) seconds.

    There is one line for each value of what else varies. Raises InputError without both sides.
    """
    figure = FIGURES.get(what)
    sides = [entry[side] for entry in table for side in ("dense", "compressed")]
    if figure is None or any(side[figure] is None for side in sides):
        raise InputError(f"growth is drawn where both sides are timed: {', '.join(FIGURES)}")
    rows = [
        {
            "tokens": entry["dense"]["tokens_per_image"],
            "batch": entry["batch"],
            "lm": entry["lm"] or "given",
            "seconds": (entry["dense"][figure], entry["compressed"][figure]),
        }
        for entry in table
    ]
    varied = [name for name in AXES if len({row[name] for row in rows}) > 1] or ["tokens"]
    lines: dict[str, list[tuple[Any, float, float]]] = {}
    for row in rows:
        rest = [(other, row[other]) for other in varied[1:]]
        name = ", ".join(str(value) if key == "lm" else f"{key} {value}" for key, value in rest)
        lines.setdefault(name, []).append((row[varied[0]], *row["seconds"]))
    if varied[0] != "lm":  # names stay in the order in which they were asked for
        lines = {name: sorted(points) for name, points in lines.items()}
    return varied[0], lines
