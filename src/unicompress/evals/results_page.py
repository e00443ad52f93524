"""Result files to one Markdown page, so that no number in the documentation is typed by hand.

Files that differ only in `-seedN` at the end of their name are one experiment, shown as mean and
standard deviation. Optional keys of `details` that this page reads beside the tasks' own:
`title`, `note`, `ablation` = {"axis", "setting", "figures": {...}}, and `tables` = a list of
{"title", "note", "columns", "rows"}.
"""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from unicompress.checkpoint import atomic_write
from unicompress.errors import InputError
from unicompress.evals.image_metrics import FID_PROTOCOL
from unicompress.evals.result import GPU, RATIOS, Breakdown, Result

NOTHING = "-"
RowSource = tuple[str, tuple[str, ...]]  # what a row is called, and where its value stands
FIGURES = {
    "tokens_per_image": "tokens per image",
    "interface_tokens": "positions in the language model",
    "understanding_accuracy": "questions about scenes, accuracy",
    "generation_accuracy": "drawings, whole caption right",
    "psnr": "reconstruction, PSNR (dB)",
    "generation_seconds": "drawing, seconds",
    "understanding_seconds": "answering, seconds",
    "training_step_seconds": "training step, seconds",
    "kv_cache_bytes": "key/value cache of one picture, bytes",
}
HEAD = """# Results

This page is made from the `*.json` files beside it by
`python -m unicompress.evals.results_page docs/results`: do not edit it. Accuracies are fractions.
Brackets are 95 % bootstrap intervals (pictures resampled) where there is one seed; with several
seeds the value is mean +- standard deviation.
Ratios are compressed / dense. `{fid}` is a Frechet distance on the features of a fixed random
network: it ranks the rows of this page and means nothing beside a published FID.
Absolute seconds are shown for a GPU only.
"""


@dataclass(frozen=True)
class Experiment:
    """One experiment with its seeds."""

    name: str
    results: tuple[Result, ...]

    @property
    def details(self) -> Any:
        """Of the first seed, for texts and keys."""
        return self.results[0].details

    def values(self, *path: str) -> list[Any]:
        """What stands at a path of the JSON in every seed; without the seeds that lack it."""
        found = []
        for result in self.results:
            value: Any = result.as_json()
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.append(value)
        return found

    def cell(self, *path: str, sign: bool = False) -> str:
        """The value at a path as text: with its interval for one seed, its spread for several."""
        return cell(self.values(*path), sign=sign)


def write_results_page(jsons: Sequence[Path | str], out_md: Path | str) -> None:
    """Write the page of all result files, atomically; raises InputError without any."""
    if not jsons:
        raise InputError("there are no result files to show: pass at least one JSON file")
    atomic_write(Path(out_md), lambda file: file.write(results_page(load(jsons)).encode()))


def load(jsons: Sequence[Path | str]) -> list[Experiment]:
    """Read the files and join the seeds, in the order of their names."""
    joined: dict[str, list[Result]] = {}
    for path in sorted(map(Path, jsons)):
        joined.setdefault(re.sub(r"-seed\d+$", "", path.stem), []).append(Result.load(path))
    return [Experiment(name, tuple(results)) for name, results in joined.items()]


def results_page(experiments: Sequence[Experiment]) -> str:
    """The page as Markdown."""
    blocks = [HEAD.format(fid=FID_PROTOCOL)]
    ablations = [e for e in experiments if "ablation" in e.details]
    for experiment in experiments:
        if experiment not in ablations:
            blocks.append(_section(experiment))
    for axis in dict.fromkeys(str(e.details["ablation"].get("axis", "")) for e in ablations):
        rows = [e for e in ablations if str(e.details["ablation"].get("axis", "")) == axis]
        blocks.append(_ablation(axis, rows))
    return "\n".join(block.rstrip() + "\n" for block in blocks if block.strip())


def cell(values: Sequence[Any], *, sign: bool = False) -> str:
    """One table cell of the values of all seeds."""
    means = [_mean(value) for value in values]
    if not means or any(mean is None for mean in means):
        return str(values[0]) if values and isinstance(values[0], str) else NOTHING
    numbers = [float(mean) for mean in means if mean is not None]
    text = number(statistics.fmean(numbers), sign=sign)
    if len(numbers) > 1:
        return f"{text} +- {number(statistics.stdev(numbers))}"
    only = values[0]
    if isinstance(only, dict) and only.get("low") is not None:
        low, high = (number(only[end], sign=sign) for end in ("low", "high"))
        return f"{text} [{low}, {high}]"
    return text


def _mean(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("mean", value.get("difference"))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def number(value: float, *, sign: bool = False) -> str:
    """Whole numbers in full, others with three or four digits that matter."""
    plus = "+" if sign else ""
    if float(value).is_integer() and abs(value) >= 2:
        return f"{value:{plus},.0f}"
    if abs(value) >= 10:
        return f"{value:{plus}.2f}"
    return f"{value:{plus}.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:{plus}.2e}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns in which no row says anything are left out."""
    kept = [
        index
        for index, _ in enumerate(columns)
        if index == 0 or any(row[index] not in ("", NOTHING) for row in rows)
    ]
    lines = [[columns[i] for i in kept], ["---" for _ in kept]]
    lines += [[str(row[i]).replace("|", "/") for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _section(experiment: Experiment) -> str:
    first, details = experiment.results[0], experiment.details
    seeds = sorted({seed for result in experiment.results for seed in result.seeds})
    blocks = [f"\n## {details.get('title', experiment.name)}\n"]
    if details.get("note"):
        blocks.append(f"{details['note']}\n")
    blocks.append(
        f"`{first.command}`; commit `{first.commit}`; {first.hardware}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds)) or 'none'}; "
        f"{len(experiment.results)} file{'s' if len(experiment.results) > 1 else ''}.\n"
    )
    blocks.append(_figures(experiment))
    blocks += [
        f"### {title}\n\n{make(experiment, key)}"
        for key, (title, make) in _TASKS.items()
        if any(experiment.values("details", key, side) for side in ("dense", "compressed"))
    ]
    blocks.append(_breakdown(experiment))
    for extra in details.get("tables") or []:
        rows = [[_plain(value) for value in row] for row in extra["rows"]]
        title, note = extra.get("title", ""), extra.get("note", "")
        blocks.append(f"### {title}\n\n{f'{note}{chr(10)}{chr(10)}' if note else ''}")
        blocks.append(table(extra["columns"], rows))
    return "\n".join(block for block in blocks if block)


def _figures(experiment: Experiment) -> str:
    """The fixed figures; seconds only where they were taken on a GPU."""
    on_gpu = all(result.hardware.startswith(GPU) for result in experiment.results)
    keys = {figure: key for key, figure in RATIOS.items()}
    rows = []
    for figure, label in FIGURES.items():
        dense, compressed = experiment.cell("dense", figure), experiment.cell("compressed", figure)
        if dense == compressed == NOTHING:
            continue
        ratio = experiment.cell("ratio", keys[figure]) if figure in keys else NOTHING
        if figure.endswith("_seconds") and not on_gpu:
            dense = compressed = NOTHING
            label = label.removesuffix(", seconds") + ", time"
            if ratio == NOTHING:
                continue
        rows.append([label, dense, compressed, ratio])
    return table(["", "dense", "compressed", "ratio"], rows) if rows else ""


def _understanding(experiment: Experiment, key: str) -> str:
    sides = [side for side in ("dense", "compressed") if experiment.values("details", key, side)]
    kinds = experiment.values("details", key, sides[0], "accuracy", "by_kind")
    paths: list[RowSource] = [("all", ("accuracy", "overall"))]
    paths += [("combinations seen in training", ("seen",)), ("held-out", ("held_out",))]
    paths += [(kind, ("accuracy", "by_kind", kind)) for kind in (kinds[0] if kinds else ())]
    rows = []
    for label, path in paths:
        row = [
            label,
            *(experiment.cell("details", key, side, *path) for side in ("dense", "compressed")),
        ]
        row.append(
            experiment.cell("details", key, "difference", sign=True) if label == "all" else NOTHING
        )
        for baseline in ("question_only", "shuffled_image"):
            cells = [
                _short(experiment.values("details", key, side, baseline, *path[1:]))
                for side in sides
            ]
            row.append(" / ".join(cells) if any(c != NOTHING for c in cells) else NOTHING)
        row.append(
            _short(experiment.values("details", key, sides[0], "best_without_looking", label))
        )
        rows.append(row)
    counts = experiment.cell("details", key, sides[0], "questions")
    columns = ["", "dense", "compressed", "compressed - dense", "no picture", "another picture"]
    return f"{counts} questions.\n\n{table([*columns, 'best from the text alone'], rows)}"


def _short(values: Sequence[Any]) -> str:
    """The mean alone, for crowded columns."""
    means = [mean for value in values if (mean := _mean(value)) is not None]
    return number(statistics.fmean(means)) if means else NOTHING


def _generation(experiment: Experiment, key: str) -> str:
    sides = [side for side in ("dense", "compressed") if experiment.values("details", key, side)]
    names = experiment.values("details", key, sides[0], "attributes")
    paths: list[RowSource] = [
        ("whole caption", ("whole",)),
        ("combinations seen in training", ("seen",)),
    ]
    paths += [("held-out", ("held_out",))]
    paths += [(name, ("attributes", name)) for name in (names[0] if names else ())]
    other = f"{FID_PROTOCOL}_of_other_real_pictures"
    paths += [(FID_PROTOCOL, (FID_PROTOCOL,)), ("the same of other real pictures", (other,))]
    rows = [
        [
            label,
            *(experiment.cell("details", key, side, *path) for side in ("dense", "compressed")),
            experiment.cell("details", key, "difference", sign=True)
            if path == ("whole",)
            else NOTHING,
        ]
        for label, path in paths
    ]
    counts = experiment.cell("details", key, sides[0], "prompts")
    columns = ["", "dense", "compressed", "compressed - dense"]
    return f"{counts} prompts.\n\n{table(columns, rows)}"


def _reconstruction(experiment: Experiment, key: str) -> str:
    columns = ["psnr", "ssim", FID_PROTOCOL, "token_accuracy", "whole"]
    ways = [
        (side, way)
        for side in ("dense", "compressed")
        for way in (experiment.values("details", key, side) or [{}])[0]
        if not (
            side == "compressed" and way == "host" and experiment.values("details", key, "dense")
        )
    ]
    rows = [
        [
            way.replace("_", " "),
            *(experiment.cell("details", key, side, way, column) for column in columns),
        ]
        for side, way in ways
    ]
    names = ["", "PSNR (dB)", "SSIM", FID_PROTOCOL, "dense tokens right", "whole caption read back"]
    return table(names, rows)


_TASKS: dict[str, tuple[str, Callable[[Experiment, str], str]]] = {
    "understanding": ("Questions about scenes", _understanding),
    "easy-vqa": ("easy-vqa, test split", _understanding),
    "generation": ("Drawing from captions", _generation),
    "reconstruction": ("Reconstruction", _reconstruction),
}


def _breakdown(experiment: Experiment) -> str:
    """Where the drawing time goes, as shares of the dense total."""
    total = [v for v in experiment.values("dense", "generation_seconds") if v]
    rows = []
    for part in (field.name for field in fields(Breakdown)):
        cells = []
        for side in ("dense", "compressed"):
            seconds = experiment.values("breakdown", side, part)
            whole = len(seconds) == len(total)
            shares = [s / t for s, t in zip(seconds, total, strict=True)] if whole else []
            cells.append(cell(shares))
        rows.append([part.replace("_", " "), *cells])
    if not total or all(row[1:] == [NOTHING, NOTHING] for row in rows):
        return ""
    return "### Where the drawing time goes (dense total = 1)\n\n" + table(
        ["", "dense", "compressed"], rows
    )


def _ablation(axis: str, experiments: Sequence[Experiment]) -> str:
    shown = ("tokens_per_image", "understanding_accuracy", "generation_accuracy", "psnr")
    names = [n for e in experiments for n in (e.details["ablation"].get("figures") or {})]
    extra = list(dict.fromkeys(names))
    rows = [
        [
            str(e.details["ablation"].get("setting", e.name)),
            *(e.cell("compressed", figure) for figure in shown),
            *(e.cell("details", "ablation", "figures", name) for name in extra),
            str(len(e.results)),
        ]
        for e in experiments
    ]
    columns = [axis, *(FIGURES[figure] for figure in shown), *extra, "seeds"]
    sources = ", ".join(f"`{e.name}`" for e in experiments)
    return f"\n## Ablation: {axis}\n\n{table(columns, rows)}\nFrom {sources}.\n"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return NOTHING if value is None else cell([value])


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m unicompress.evals.results_page FOLDER`: FOLDER/README.md of FOLDER/*.json."""
    folder = Path((sys.argv[1:] if arguments is None else list(arguments))[0])
    write_results_page(sorted(folder.glob("*.json")), folder / "README.md")


if __name__ == "__main__":
    main()
