"""Every reducer at the same budgets on one model, beside the controls: scenes and easy-vqa.

python -m unicompress.evals.reduction_table --json docs/results/reduction.json

A method beats a control only where the interval of their paired difference leaves out zero. Budgets
are what the first cut keeps; methods that cut inside the language model compute all tokens before
that, and some cut again later, so the average over layers and the saving of the prompt stand beside
each accuracy. `stand_in` marks methods that ask for the attention or keys of a vision encoder: the
reference model has none, and its language model's first layer answers instead.

Answers are kept beside the file, in `<file>.part`, until all are there: after Ctrl-C the same
command goes on from them. With `--add` it also goes on from a finished file, and asks only what
that does not hold: easy-vqa, budgets or methods that were left out before.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unicompress import reference
from unicompress.checkpoint import read_json, write_json
from unicompress.errors import InputError, UnicompressError
from unicompress.evals.progress import progress_bar
from unicompress.evals.reduction import CONTROLS, KEEPS, Row, Sheet, Table, tables
from unicompress.evals.reduction_overhead import overhead
from unicompress.evals.result import (
    Figures,
    Progress,
    Result,
    commit,
    hardware,
    module_command,
    plain,
)
from unicompress.evals.understanding import QuestionSet
from unicompress.reducers.base import reducers
from unicompress.unified import UnifiedModel

MODULE = "unicompress.evals.reduction_table"
SCENES, EASY = "scenes", "easy-vqa"
INTERRUPTED = 130  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, and give the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--model", default="dense", help="dense, compressed, folder or hub id")
    parser.add_argument("--questions", type=int, default=2000, help="about scenes; 0: none")
    parser.add_argument(
        "--easy-vqa", type=int, default=1000, metavar="N", help="of its test split; 0: none"
    )
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--methods", nargs="+", help="all, where not given; controls always")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time")
    parser.add_argument("--overhead", metavar="LM", help="also time reducers at this shape")
    parser.add_argument("--add", action="store_true", help="keep the answers that PATH holds")
    parser.add_argument("--json", metavar="PATH", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        with progress_bar() as progress:
            run(given, module_command(MODULE, arguments), progress)
    except UnicompressError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from there\n")
        return INTERRUPTED
    return 0


def run(given: argparse.Namespace, command: str, progress: Progress | None = None) -> None:
    """Measure what is not known yet, and write the result."""
    for name in given.methods or ():
        reducers.get(name)  # a misspelt name should not wait for the others
    part = given.json.with_name(f"{given.json.name}.part")
    finished = _stored(given.json, given.model) if given.add else {}
    stored = (finished, _stored(part, given.model))
    code = commit()  # now: writing a file that git tracks changes what it says
    model = reference.load_any(given.model)
    sets = question_sets(given.questions, given.easy_vqa, model.tokenizer.spec.image_size)
    known = _known(stored, sets)
    options: Any = {"keeps": given.keep, "methods": given.methods, "batch": given.batch}
    found: dict[str, Table] = {}
    for name, tests in sets.items():
        for table in tables(model, tests, known=known[name], progress=progress, **options):
            found[name] = table
            known[name] = {n: replace(s, commit=s.commit or code) for n, s in table.sheets.items()}
            tasks = {task: {"sheets": sheets} for task, sheets in known.items()}
            write_json(plain({"reduction": {"model": given.model, "tasks": tasks}}), part)
        found[name] = replace(found[name], sheets=known[name])
    spent = finished.get("overhead")
    if given.overhead and (spent is None or spent["lm"] != given.overhead):
        spent = overhead(given.overhead)
    result = _result(given.model, model, found, spent)
    replace(result, command=command, commit=code).write(given.json)
    part.unlink()


def question_sets(scenes: int, easy: int, size: int) -> dict[str, QuestionSet]:
    """The first questions of each test split; 0 leaves a set out, InputError without any."""
    sets = {}
    if scenes:
        sets[SCENES] = QuestionSet.scenes(scenes, size=size)
    if easy:
        sets[EASY] = QuestionSet.easy_vqa(easy, size=size)
    if not sets:
        raise InputError("there is nothing to ask: give --questions or --easy-vqa a number")
    return sets


# The file


def _stored(path: Path, model: str) -> Mapping[str, Any]:
    """What an earlier run left; InputError where it is of something else."""
    if not path.exists():
        return {}
    value = read_json(path)
    details = value.get("details", value) if isinstance(value, dict) else {}
    found = details.get("reduction") or {}
    if "tasks" not in found:
        raise InputError(f"{path} is no table of reducers to go on from: choose another --json")
    if found.get("model") != model:
        raise InputError(
            f"{path} holds answers of the model {found.get('model')}, not {model}: choose another "
            "--json, or delete it"
        )
    return found


def _known(
    stored: Sequence[Mapping[str, Any]], sets: Mapping[str, QuestionSet]
) -> dict[str, dict[str, Sheet]]:
    """The sheets of every set; InputError where they are of other questions than those asked."""
    known: dict[str, dict[str, Sheet]] = {name: {} for name in sets}
    for found in stored:
        for name, task in found.get("tasks", {}).items():
            sheets = {reducer: Sheet(**value) for reducer, value in task["sheets"].items()}
            asked = len(sets[name].questions) if name in sets else 0
            others = {len(sheet.right) for sheet in sheets.values()} - {asked}
            if others:
                raise InputError(
                    f"{others.pop()} questions of {name} have been answered before, not {asked}: "
                    "ask as many, or begin a new table without --add and without its .part file"
                )
            known.get(name, {}).update(sheets)
    return known


def _result(
    name: str, model: UnifiedModel, found: Mapping[str, Table], spent: Mapping[str, Any] | None
) -> Result:
    scenes = found.get(SCENES)
    figures = Figures(
        tokens_per_image=model.tokens_per_image,
        interface_tokens=model.interface_tokens,
        understanding_accuracy=None if scenes is None else scenes.all_tokens.overall.mean,
    )
    sides: dict[str, Any] = {"dense" if model.codec is None else "compressed": figures}
    return Result(
        command="",
        hardware=hardware(model.device),
        details={
            "title": "Reducers without training, at equal budgets",
            "reduction": {"model": name, "tasks": found, "overhead": spent},
            "tables": shown(found, spent),
        },
        **sides,
    )


# The results page


def shown(found: Mapping[str, Table], spent: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The tables of the results page."""
    shown = [_accuracies(found), _differences(found)] if found else []
    if spent is not None:
        shown.append(
            {
                "title": f"What a reducer costs, as a share of the prefill ({spent['lm']})",
                "note": f"{spent['tokens']} image tokens and {spent['text']} of text, half kept.",
                "columns": ["method", "share of prefill", "share of what it saves"],
                "rows": [
                    [name, share, spent["share_of_saving"][name]]
                    for name, share in spent["share_of_prefill"].items()
                ],
            }
        )
    return shown


def _accuracies(found: Mapping[str, Table]) -> dict[str, Any]:
    """By budget: accuracy on each set, and what the prompt saves."""
    columns, cells = ["method"], []
    for keep in _keeps(found):
        ratios: dict[str, Any] = {}
        for task, rows in _rows(found, keep).items():
            columns.append(f"{task}, keep {keep:g}")
            cells.append({name: row.accuracy for name, row in rows.items()})
            ratios |= {name: row.prefill_ratio for name, row in rows.items()}
        columns.append("prompt cheaper by")
        cells.append(ratios)
    whole = ", ".join(
        f"{task} {table.all_tokens.overall} ({table.questions} questions about {table.pictures} "
        "pictures)"
        for task, table in found.items()
    )
    commits = sorted({sheet.commit for table in found.values() for sheet in table.sheets.values()})
    of = f" Answered at the commits {', '.join(commits)}." if len(commits) > 1 else ""
    return {
        "title": "Accuracy",
        "note": f"With all tokens: {whole}. `*`: the first layer of the language model stands in "
        f"for an encoder.{of}",
        "columns": columns,
        "rows": _lines(found, cells),
    }


def _differences(found: Mapping[str, Table]) -> dict[str, Any]:
    """Every method minus the control that does best at its budget."""
    columns, cells = ["method"], []
    for keep in _keeps(found):
        for task, rows in _rows(found, keep).items():
            best = max(CONTROLS, key=lambda name: rows[name].accuracy.mean)
            columns.append(f"{task}, keep {keep:g}, minus {best}")
            cells.append({n: str(r.against[best]) for n, r in rows.items() if n != best})
    return {
        "title": "Against the best control of each budget",
        "note": "Paired differences on the same questions: a method beats the control where the "
        "interval lies above zero.",
        "columns": columns,
        "rows": _lines(found, cells),
    }


def _keeps(found: Mapping[str, Table]) -> list[float]:
    return list(dict.fromkeys(row.keep for table in found.values() for row in table.rows))


def _rows(found: Mapping[str, Table], keep: float) -> dict[str, dict[str, Row]]:
    """Set of questions -> name of the method -> row of one budget."""
    return {
        task: {_name(row): row for row in table.rows if row.keep == keep}
        for task, table in found.items()
    }


def _name(row: Row) -> str:
    return row.method.partition("(")[0]


def _lines(found: Mapping[str, Table], cells: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """One line a method, with nothing where a column lacks it."""
    labels = {
        _name(row): _name(row) + (" *" if row.stand_in else "")
        for table in found.values()
        for row in table.rows
    }
    return [[label, *(column.get(name) for column in cells)] for name, label in labels.items()]


if __name__ == "__main__":
    sys.exit(main())
