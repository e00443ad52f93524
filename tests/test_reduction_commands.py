"""The matched-budget table and the command that draws what is kept."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval_pair import SIDE, tiny_pair
from saved_pair import save_tiny_pair
from unicompress.checkpoint import read_json
from unicompress.cli import app
from unicompress.cli.reduce import shade
from unicompress.errors import InputError
from unicompress.evals import reduction
from unicompress.evals.reduction import ALL, CONTROLS, PerQuestion, Sheet, fitted, tables
from unicompress.evals.reduction_overhead import overhead
from unicompress.evals.reduction_table import MODULE, main, shown
from unicompress.evals.results_page import load as load_results
from unicompress.evals.results_page import results_page
from unicompress.evals.understanding import QuestionSet, evaluate_understanding
from unicompress.reducers.base import reducers

ASK_ALL = reduction.ask_all


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_tiny_pair(folder)
    return folder


def test_the_table_has_a_row_for_each_method_and_budget() -> None:
    model = tiny_pair().any
    tests = QuestionSet.scenes(6, size=SIDE)
    methods = ["g2tr", "fastv", "visionzip"]
    *_, table = tables(model, tests, keeps=[0.5, 0.25], methods=methods)
    rows = table.rows
    assert len(rows) == 2 * (len(CONTROLS) + len(methods))
    by_name = {(row.method.split("(")[0], row.keep): row for row in rows}
    assert by_name["uniform", 0.25].tokens == 16
    assert by_name["uniform", 0.25].average == 0.25
    assert by_name["fastv", 0.5].average == 0.75  # its first layer of two sees everything
    assert by_name["visionzip", 0.5].stand_in
    assert not by_name["g2tr", 0.5].stand_in
    assert set(by_name["g2tr", 0.5].against) == set(CONTROLS)
    assert set(by_name["random", 0.5].against) == set(CONTROLS) - {"random"}
    whole = evaluate_understanding(model, tests, baselines=False)
    assert table.all_tokens == whole.accuracy
    for row in rows:
        assert row.prefill_ratio > 1
        right = table.sheets[row.method].right
        assert len(right) == len(table.sheets[ALL].right) == 6
        assert row.accuracy.mean == sum(map(int, right)) / 6
        own = row.accuracy.mean - whole.accuracy.overall.mean
        assert row.against_all.difference == pytest.approx(own)


def test_pictures_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_pair().any
    tests = QuestionSet.scenes(9, size=SIDE)
    encode, seen = model.tokenizer.encode, []

    def counted(pixels: Any) -> Any:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.tokenizer, "encode", counted)
    *_, table = tables(model, tests, keeps=[0.5], methods=["g2tr", "fastv"], batch=1)
    assert seen == [1, 1]  # nine questions about two pictures
    for row in table.rows:
        (name,) = (n for n in [*CONTROLS, "g2tr", "fastv"] if row.method.startswith(f"{n}("))
        reducer = fitted(name, 0.5, 2)
        with reducer.on(model):
            asked = PerQuestion(model, 1) if name == "fastv" else model
            pixels = evaluate_understanding(asked, tests, batch=1, baselines=False)
        assert table.sheets[row.method].right == "".join(str(int(c)) for c in pixels.correct)


def test_every_method_fits_a_shallow_model() -> None:
    for name in reducers.names():
        assert all(step.layer < 4 for step in fitted(name, 0.5, 4).steps(4))


def test_a_picture_per_question_gives_the_same_answers() -> None:
    model = tiny_pair().any
    tests = QuestionSet.scenes(7, size=SIDE)
    pixels = tests.pixels([0, 1])
    questions = [[q.text for q in tests.questions[:6]], [tests.questions[6].text]]
    for batch in (32, 2):
        assert PerQuestion(model, batch).answer(pixels, questions) == model.answer(
            pixels, questions
        )


def test_both_sets_of_questions_are_written_as_a_result(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    path = tmp_path / "reduction.json"
    words = ["--model", str(saved / "dense"), "--questions", "3", "--easy-vqa", "4"]
    words += ["--keep", "0.5", "--methods", "visionzip", "--json", str(path)]
    assert main(words) == 0
    value = read_json(path)
    assert value["schema"] == 1
    assert value["command"] == shlex.join(["python", "-m", MODULE, *words])
    tasks = value["details"]["reduction"]["tasks"]
    assert {name: task["questions"] for name, task in tasks.items()} == {"scenes": 3, "easy-vqa": 4}
    for task in tasks.values():
        names = [row["method"].split("(")[0] for row in task["rows"]]
        assert names == [*CONTROLS, "visionzip"]
        assert all(sheet["commit"] for sheet in task["sheets"].values())
    accuracy = tasks["scenes"]["all_tokens"]["overall"]["mean"]
    assert value["dense"]["understanding_accuracy"] == accuracy
    accuracies, differences = value["details"]["tables"]  # no overhead was asked for
    heads = ["method", "scenes, keep 0.5", "easy-vqa, keep 0.5", "prompt cheaper by"]
    assert accuracies["columns"] == heads
    assert [row[0] for row in accuracies["rows"]] == [*CONTROLS, "visionzip *"]
    for column, task in ((1, "scenes"), (2, "easy-vqa")):
        shown_cells = [row[column] for row in accuracies["rows"]]
        assert shown_cells == [row["accuracy"] for row in tasks[task]["rows"]]
        best = max(tasks[task]["rows"][:4], key=lambda row: row["accuracy"]["mean"])
        name = best["method"].split("(")[0]
        assert differences["columns"][column] == f"{task}, keep 0.5, minus {name}"
        against = tasks[task]["rows"][-1]["against"][name]
        assert differences["rows"][-1][column].startswith(f"{against['difference']:+.3f} [")
    page = results_page(load_results([path]))
    assert "| method | scenes, keep 0.5 | easy-vqa, keep 0.5 | prompt cheaper by |" in page
    cell = tasks["easy-vqa"]["rows"][0]["accuracy"]
    assert f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in page


def test_a_table_goes_on_after_ctrl_c(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, part = tmp_path / "reduction.json", tmp_path / "reduction.json.part"
    words = ["--model", str(saved / "dense"), "--questions", "3", "--easy-vqa", "0"]
    words += ["--methods", "tome", "g2tr", "--keep", "0.5", "0.25", "--json", str(path)]
    whole = tmp_path / "whole.json"
    assert main([*words[:-1], str(whole)]) == 0
    asked = counted_asking(monkeypatch, stop_after=3)
    assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not path.exists()
    assert len(read_json(part)["reduction"]["tasks"]["scenes"]["sheets"]) == 3  # one is without
    first = [label for label in asked if label != f"scenes: {ALL}"]
    asked = counted_asking(monkeypatch)
    assert main(words) == 0
    later = [label for label in asked if label != f"scenes: {ALL}"]
    assert len(first) == 3  # the third was interrupted, and is asked again
    assert sorted({*first, *later}) == sorted([*first[:2], *later])
    assert len(later) == 2 * (len(CONTROLS) + 2) - 2
    assert not part.exists()
    resumed, straight = (read_json(p)["details"]["reduction"]["tasks"] for p in (path, whole))
    assert resumed == straight


def test_a_finished_table_takes_more_methods_and_questions(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("easy_vqa")
    words = ["--model", str(saved / "dense"), "--keep", "0.5"]
    out = ["--json", str(tmp_path / "reduction.json")]
    scenes = ["--questions", "3", "--methods", "tome"]
    assert main([*words, *scenes, "--easy-vqa", "0", *out]) == 0
    asked = counted_asking(monkeypatch)
    assert main([*words, *scenes, "g2tr", "--easy-vqa", "2", "--add", *out]) == 0
    assert [label for label in asked if label.startswith("scenes")] == [
        f"scenes: {ALL}",
        "scenes: keep 0.5, g2tr",
    ]
    assert len(asked) == 2 + 1 + len(CONTROLS) + 2
    capsys.readouterr()
    for changed, said in (
        (["--questions", "4", "--easy-vqa", "2"], "3 questions of scenes have been answered befo"),
        (["--questions", "0", "--easy-vqa", "2"], "of scenes have been answered before, not 0"),
        (["--model", str(saved / "compressed")], "holds answers of the model"),
    ):
        assert main([*words, *changed, "--add", *out]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main([*words, "--add", "--json", str(tmp_path / "other.json")]) == 2
    assert "is no table of reducers to go on from" in capsys.readouterr().err
    # Without --add everything is asked anew.
    del asked[:]
    assert main([*words, *scenes, "--easy-vqa", "0", *out]) == 0
    assert len(asked) == 1 + len(CONTROLS) + 1
    nothing = ["--questions", "0", "--easy-vqa", "0", "--json", str(tmp_path / "new.json")]
    assert main([*words, *nothing]) == 2
    assert "there is nothing to ask" in capsys.readouterr().err
    assert main([*words, "--methods", "tomee", "--json", str(tmp_path / "new.json")]) == 2
    assert "Did you mean 'tome'" in capsys.readouterr().err


def test_answers_of_another_model_are_not_gone_on_from() -> None:
    tests = QuestionSet.scenes(2, size=SIDE)
    sheets = {ALL: Sheet("11")}  # the tiny model knows nothing
    growing = tables(tiny_pair().any, tests, keeps=[0.5], methods=["tome"], known=sheets)
    with pytest.raises(InputError, match="answers scenes otherwise than when the table was begun"):
        next(growing)


def counted_asking(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """Labels of what is asked from now on; Ctrl-C in the middle of the method after so many."""
    asked: list[str] = []

    def ask_all(*values: Any, label: str, **options: Any) -> Any:
        asked.append(label)
        if stop_after is not None and len(asked) > stop_after:
            raise KeyboardInterrupt
        return ASK_ALL(*values, label=label, **options)

    monkeypatch.setattr(reduction, "ask_all", ask_all)
    return asked


def test_overhead_is_a_share_of_the_prompt() -> None:
    found = overhead("tiny", side=8, text=4, repeats=1)
    (costs,) = shown({}, found)
    assert [row[0] for row in costs["rows"]] == list(found["share_of_prefill"])
    assert found["tokens"] == 64
    seconds = found["seconds"]
    assert found["share_of_prefill"]["g2tr"] == seconds["g2tr"] / seconds["prefill"]


def test_the_command_draws_what_is_kept(saved: Path, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.fromarray(np.full((SIDE, SIDE, 3), 200, dtype=np.uint8)).save(picture)
    out, values = tmp_path / "out.png", tmp_path / "out.json"
    command = ["reduce", str(saved / "dense"), str(picture), "-o", str(out), "--json", str(values)]
    done = CliRunner().invoke(app, [*command, "--method", "uniform", "--keep", "0.25"])
    assert done.exit_code == 0, done.output
    assert "16 of 64 tokens kept" in done.output
    found = json.loads(values.read_text())
    assert len(found["kept"]) == 16
    assert found["method"] == "uniform(keep=0.25, positions='reindex')"
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (256, 256, 3)
    assert (drawn > 100).all(axis=-1).mean() == pytest.approx(0.25)
    refused = CliRunner().invoke(app, [*command, "--keep", "1.5"])
    assert refused.exit_code == 2
    assert "a keep ratio must lie in (0, 1], got 1.5" in refused.output


def test_cells_of_dropped_tokens_are_dark() -> None:
    shown = shade(np.full((300, 300, 3), 100, dtype=np.uint8), (2, 3), [0, 5])
    assert shown.shape == (300, 300, 3)  # large enough already
    assert shade(np.zeros((100, 120, 3), np.uint8), (1, 1), []).shape == (300, 360, 3)
    assert (shown[10, 10] == 100).all()
    assert (shown[10, -10] == 20).all()
    assert (shown[-10, -10] == 100).all()
