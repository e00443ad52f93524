"""The tables of the synergy experiment, from the result files of its runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from unicompress.evals.result import Result
from unicompress.evals.results_page import NOTHING, cell

Runs = Mapping[str, Mapping[int, Result]]  # run -> seed -> what was measured
# column -> where it stands in a run's measurements: its task comes first, a `loss` is a cost
FIGURES: dict[str, tuple[str, ...]] = {
    "questions, accuracy": ("understanding", "accuracy"),
    "answers, loss": ("understanding", "loss"),
    "whole caption drawn": ("generation", "whole"),
    "codes, loss": ("generation", "loss"),
    "codes, accuracy": ("generation", "code_accuracy"),
}
SEEDS_ONLY = "Mean +- standard deviation over the seeds."


def value(result: Result, path: Sequence[str]) -> float | None:
    """A figure of one run, None where it was not measured."""
    found: Any = result.details.get("synergy")
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def gains(runs: Runs, comparison: Mapping[str, str | None], figure: str) -> dict[int, float]:
    """Joint against single-task training, by seed; positive where training together helps."""
    path = FIGURES[figure]
    sign = -1 if path[-1] == "loss" else 1
    single, joint = comparison[path[0]], comparison["joint"]
    found = {}
    for seed in sorted(set(runs.get(joint or "", {})) & set(runs.get(single or "", {}))):
        together, alone = (value(runs[str(name)][seed], path) for name in (joint, single))
        if together is not None and alone is not None:
            found[seed] = sign * (together - alone)
    return found


def tables(
    runs: Runs, comparisons: Mapping[str, Mapping[str, str | None]], baseline: str
) -> list[dict[str, Any]]:
    """All tables, as `details.tables` of a result file wants them."""
    return [
        _runs_table(runs),
        _synergy_table(runs, comparisons),
        _loss_table(runs, comparisons, baseline),
        _cosine_table(runs),
        _reach_table(runs),
    ]


def _runs_table(runs: Runs) -> dict[str, Any]:
    rows = []
    for name, seeds in runs.items():
        results = list(seeds.values())
        known: Any = results[0].details["synergy"]
        rows.append(
            [
                name,
                ", ".join(known["accelerators"]) or NOTHING,
                str(known["tokens_per_image"]),
                f"{known['steps']} x {known['batch']}",
                *(_figure(results, path) for path in FIGURES.values()),
                *(
                    _figure(results, ("gigaflops", task))
                    for task in ("understanding", "generation")
                ),
                str(len(results)),
            ]
        )
    return {
        "title": "Runs",
        "note": f"{SEEDS_ONLY} GFLOP: the language model's layers, forward, per image.",
        "columns": [
            "run",
            "accelerators",
            "tokens per image",
            "steps x samples",
            *FIGURES,
            "GFLOP reading",
            "GFLOP drawing",
            "seeds",
        ],
        "rows": rows,
    }


def _synergy_table(
    runs: Runs, comparisons: Mapping[str, Mapping[str, str | None]]
) -> dict[str, Any]:
    rows = [
        [name, *(_signed(gains(runs, comparison, figure)) for figure in FIGURES)]
        for name, comparison in comparisons.items()
    ]
    return {
        "title": "Synergy",
        "note": "What training both tasks together adds to training each alone, seed by seed; "
        f"positive is a gain, losses are turned round. {SEEDS_ONLY}",
        "columns": ["comparison", *FIGURES],
        "rows": rows,
    }


def _loss_table(
    runs: Runs, comparisons: Mapping[str, Mapping[str, str | None]], baseline: str
) -> dict[str, Any]:
    rows = []
    for name, comparison in comparisons.items():
        cells = []
        for figure in FIGURES:
            base = gains(runs, comparisons[baseline], figure)
            own = gains(runs, comparison, figure)
            cells.append(_signed({s: base[s] - own[s] for s in base.keys() & own.keys()}))
        if name != baseline:
            rows.append([name, *cells])
    return {
        "title": "Synergy loss",
        "note": f"Synergy of `{baseline}` minus that of the row: positive where the method costs "
        f"synergy. {SEEDS_ONLY}",
        "columns": ["comparison", *FIGURES],
        "rows": rows,
    }


def _cosine_table(runs: Runs) -> dict[str, Any]:
    joint = _joint(runs)
    groups = _groups(joint)
    columns, cells = ["weights"], []
    for name, results in joint.items():
        for when in ("start", "end"):
            columns.append(f"{name}, {when}")
            cells.append([_agreement(results, when, group, "cosine") for group in groups])
        for task in ("understanding", "generation"):
            columns.append(f"{name}, end, within {task}")
            key = f"cosine_within_{task}"
            cells.append([_agreement(results, "end", group, key) for group in groups])
    return {
        "title": "Gradients of understanding and generation, cosine",
        "note": "On held-out pictures, before and after training. `within` compares two halves of "
        "one task's pictures: it shows how much of a low cosine is noise.",
        "columns": columns,
        "rows": [[group, *(column[i] for column in cells)] for i, group in enumerate(groups)],
    }


def _reach_table(runs: Runs) -> dict[str, Any]:
    keys = ("reached_by_understanding", "reached_by_generation", "reached_by_both")
    rows = [
        [name, *(_agreement(results, "end", "all", key) for key in keys)]
        for name, results in _joint(runs).items()
    ]
    return {
        "title": "Share of the weights that a task's gradient reaches",
        "note": "",
        "columns": ["run", "understanding", "generation", "both"],
        "rows": rows,
    }


def _joint(runs: Runs) -> dict[str, list[Result]]:
    found = {}
    for name, seeds in runs.items():
        results = [r for r in seeds.values() if r.details["synergy"].get("gradients")]
        if results:
            found[name] = results
    return found


def _groups(joint: Mapping[str, Sequence[Result]]) -> list[str]:
    names = [
        group
        for results in joint.values()
        for result in results
        for group in result.details["synergy"]["gradients"]["end"]
    ]
    return list(dict.fromkeys(names))


def _agreement(results: Sequence[Result], when: str, group: str, key: str) -> str:
    return _figure(results, ("gradients", when, group, key))


def _figure(results: Sequence[Result], path: Sequence[str]) -> str:
    found = [number for result in results if (number := value(result, path)) is not None]
    return cell(found) if found else NOTHING


def _signed(by_seed: Mapping[int, float]) -> str:
    return cell([by_seed[seed] for seed in sorted(by_seed)], sign=True) if by_seed else NOTHING
