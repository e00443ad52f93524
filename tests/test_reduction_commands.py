"""The matched-budget table and the command that draws what is kept."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval_pair import SIDE, tiny_pair
from saved_pair import save_tiny_pair
from unicompress.checkpoint import read_json
from unicompress.cli import app
from unicompress.cli.reduce import shade
from unicompress.evals.reduction_table import (
    CONTROLS,
    MODULE,
    PerQuestion,
    fitted,
    main,
    overhead,
    shown,
    table,
)
from unicompress.evals.understanding import QuestionSet
from unicompress.reducers.base import reducers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_tiny_pair(folder)
    return folder


def test_the_table_has_a_row_for_each_method_and_budget() -> None:
    model = tiny_pair().any
    tests = QuestionSet.scenes(6, size=SIDE)
    methods = ["g2tr", "fastv", "visionzip"]
    everything, rows = table(model, tests, keeps=[0.5, 0.25], methods=methods)
    assert len(rows) == 2 * (len(CONTROLS) + len(methods))
    by_name = {(row.method.split("(")[0], row.keep): row for row in rows}
    assert by_name["uniform", 0.25].tokens == 16
    assert by_name["uniform", 0.25].average == 0.25
    assert by_name["fastv", 0.5].average == 0.75  # its first layer of two sees everything
    assert by_name["visionzip", 0.5].stand_in
    assert not by_name["g2tr", 0.5].stand_in
    assert set(by_name["g2tr", 0.5].against) == set(CONTROLS)
    assert set(by_name["random", 0.5].against) == set(CONTROLS) - {"random"}
    for row in rows:
        assert row.prefill_ratio > 1
        assert len(row.correct) == len(everything.correct) == 6
        own = sum(map(int, row.correct)) / 6 - everything.accuracy.overall.mean
        assert row.against_all.difference == pytest.approx(own)


def test_every_method_fits_a_shallow_model() -> None:
    for name in reducers.names():
        assert all(step.layer < 4 for step in fitted(name, 0.5, 4).steps(4))


def test_a_picture_per_question_gives_the_same_answers() -> None:
    model = tiny_pair().any
    tests = QuestionSet.scenes(7, size=SIDE)
    pixels = tests.pixels([0, 1])
    questions = [[q.text for q in tests.questions[:6]], [tests.questions[6].text]]
    assert PerQuestion(model).answer(pixels, questions) == model.answer(pixels, questions)


def test_the_table_is_written_as_a_result(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "reduction.json"
    arguments = ["--model", str(saved / "dense"), "--questions", "3", "--keep", "0.5"]
    assert main([*arguments, "--methods", "tome", "--json", str(path)]) == 0
    value = read_json(path)
    assert value["schema"] == 1
    details = value["details"]["reduction"]
    assert [row["method"].split("(")[0] for row in details["rows"]] == [*CONTROLS, "tome"]
    assert (
        value["dense"]["understanding_accuracy"]
        == details["all_tokens"]["accuracy"]["overall"]["mean"]
    )
    words = [*arguments, "--methods", "tome", "--json", str(path)]
    assert value["command"] == shlex.join(["python", "-m", MODULE, *words])
    (accuracies,) = value["details"]["tables"]  # no overhead was asked for
    assert accuracies["columns"] == ["method", "keep 0.5", "prompt cheaper by"]
    assert [row[0] for row in accuracies["rows"]] == [*CONTROLS, "tome"]
    assert main([*arguments, "--methods", "tomee", "--json", str(path)]) == 2


def test_overhead_is_a_share_of_the_prompt() -> None:
    found = overhead("tiny", side=8, text=4, repeats=1)
    (costs,) = shown([], found)[1:]
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
    assert shown.shape == (600, 600, 3) or shown.shape == (300, 300, 3)
    assert (shown[10, 10] == 100).all()
    assert (shown[10, -10] == 20).all()
    assert (shown[-10, -10] == 100).all()
