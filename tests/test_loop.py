import itertools
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import training_toy as toy
from unicompress.checkpoint import load_training_state
from unicompress.errors import CheckpointError, RecipeError, UnicompressError
from unicompress.training import loop
from unicompress.training.feed import Place, shares
from unicompress.training.loop import CHECKPOINT
from unicompress.training.optimizers import build_optimizers
from unicompress.training.progress import bf16_is_fast, learning_rate
from unicompress.training.run import ending, exit_code


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_and_resumed_run_ends_bit_identical(
    tmp_path: Path, stream: bool, optimizer: str
) -> None:
    whole = toy.recipe(tmp_path / "whole", optimizer=optimizer)
    _, expected = toy.run(whole, stream=stream, dropout=0.3)
    given = toy.recipe(tmp_path / "parts", optimizer=optimizer)
    first, _ = toy.run(given, stream=stream, dropout=0.3, at_step=toy.interrupt_at(6))
    assert (first.status, first.step, exit_code(first)) == ("interrupted", 7, 130)
    assert "--resume" in ending(first)
    second, weights = toy.run(given, resume=True, stream=stream, dropout=0.3)
    assert (second.status, second.step, exit_code(second)) == ("done", 12, 0)
    assert same(weights, expected)
    assert toy.log(tmp_path / "parts") == toy.log(tmp_path / "whole")
    states = [load_training_state(tmp_path / n / CHECKPOINT) for n in ("whole", "parts")]
    assert str(states[0]["optimizer"]) == str(states[1]["optimizer"])


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 10:
            raise RuntimeError("killed")

    _, expected = toy.run(toy.recipe(tmp_path / "whole"), dropout=0.3)
    given = toy.recipe(tmp_path / "parts")
    with pytest.raises(RuntimeError, match="killed"):
        toy.run(given, dropout=0.3, at_step=die)
    assert load_training_state(tmp_path / "parts" / CHECKPOINT)["step"] == 8
    _, weights = toy.run(given, resume=True, dropout=0.3)
    assert same(weights, expected)
    assert toy.log(tmp_path / "parts") == toy.log(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    result, _ = toy.run(toy.recipe(tmp_path), resume=True)
    assert (result.status, result.step) == ("done", 12)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    _, whole = toy.run(toy.recipe(tmp_path / "whole"))
    _, parts = toy.run(toy.recipe(tmp_path / "parts", accumulate=4))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-5, rtol=1e-4)
    losses = [[line["loss"] for line in toy.log(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_give_the_same_loss_as_one(tmp_path: Path, project: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(project / "src"), str(project / "tests")]),
    }
    command = [sys.executable, str(project / "tests" / "training_toy.py"), str(tmp_path / "two")]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [
        subprocess.Popen(command, env={**shared, **rank}, stderr=subprocess.PIPE) for rank in ranks
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    _, weights = toy.run(toy.recipe(tmp_path / "one", steps=5, log_every=1))
    losses = [[line["loss"] for line in toy.log(tmp_path / n)] for n in ("one", "two")]
    assert len(losses[1]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    together = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, weight in weights.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("late", [False, True])
def test_shares_cover_every_sample_once(late: bool) -> None:
    places = [Place(rank, 3) for rank in range(3)]
    parts = [shares(10, accumulate=2, place=place, late=late) for place in places]
    assert sorted(i for own in parts for part in own for i in part) == list(range(10))
    sizes = [len(parts[rank][micro]) for micro in range(2) for rank in range(3)]
    assert sorted(sizes, reverse=not late) == sizes


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    toy.run(toy.recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"already holds a run: add --resume .* another out"):
        toy.run(toy.recipe(tmp_path))


def test_a_run_resumes_under_its_own_recipe_only(tmp_path: Path) -> None:
    toy.run(toy.recipe(tmp_path), at_step=toy.interrupt_at(3))
    with pytest.raises(RecipeError, match=r"started with lr=0.05, not 0.01: resume it as it was"):
        toy.run(toy.recipe(tmp_path, lr=0.01), resume=True)
    result, _ = toy.run(toy.recipe(tmp_path, save_every=100, max_minutes=5), resume=True)
    assert result.status == "done"


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    toy.run(toy.recipe(tmp_path))
    state = tmp_path / CHECKPOINT / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        toy.run(toy.recipe(tmp_path), resume=True)


def test_batch_must_split_evenly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch 4 is no multiple of accumulate 3"):
        toy.recipe(tmp_path, accumulate=3)


def test_gradients_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UnicompressError, match="not finite at step"):
        toy.run(toy.recipe(tmp_path, lr=1e30, clip=0, warmup=0))


def test_max_minutes_pauses_with_a_checkpoint(tmp_path: Path) -> None:
    result, _ = toy.run(toy.recipe(tmp_path, max_minutes=1e-9))
    assert (result.status, exit_code(result)) == ("paused", 0)
    result, _ = toy.run(toy.recipe(tmp_path), resume=True)
    assert (result.status, result.step) == ("done", 12)


def test_a_time_budget_ends_the_run_and_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # one more at every look
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(loop, "time", clock)
    result, _ = toy.run(toy.recipe(tmp_path, steps=10**6, log_every=1, time_budget_minutes=1))
    assert result.status == "done"
    assert 10 < result.step < 60
    rates = [line["lr"] for line in toy.log(tmp_path)]
    assert rates[-1] < 0.1 * max(rates)


def test_learning_rate_warms_up_and_falls(tmp_path: Path) -> None:
    cosine = toy.recipe(tmp_path, lr=1.0, warmup=0.1, steps=1000, final_lr=0.1)
    assert 0 < learning_rate(cosine, 0.0) < 0.02
    assert learning_rate(cosine, 0.1) == pytest.approx(1.0)
    assert learning_rate(cosine, 0.55) == pytest.approx(0.55)
    assert learning_rate(cosine, 1.0) == pytest.approx(0.1)
    constant = toy.recipe(tmp_path, lr=1.0, schedule="constant", warmup=0, cooldown=0.2)
    rates = [learning_rate(constant, p) for p in (0.0, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_weight_decay_is_for_matrices(tmp_path: Path) -> None:
    optimizer = build_optimizers(toy.ToyObjective(), toy.recipe(tmp_path, weight_decay=0.5))
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {2: 0.5, 1: 0.0}


def test_the_callers_randomness_is_left_alone(tmp_path: Path) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    given, objective = toy.recipe(tmp_path), toy.ToyObjective(dropout=0.5)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    loop.fit(objective, lambda place: toy.ToyBatches(given, place), given)
    assert draws() == expected


def test_log_has_one_line_per_interval_and_a_last_one(tmp_path: Path) -> None:
    toy.run(toy.recipe(tmp_path))
    lines = toy.log(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["samples"] for line in lines] == [20, 40, 48]
    assert {"lr", "loss", "gradient_norm", "progress"} <= lines[0].keys()
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    toy.run(toy.recipe(tmp_path, tensorboard=True, steps=2, log_every=1))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_bf16_runs_and_auto_asks_the_hardware(tmp_path: Path) -> None:
    assert bf16_is_fast(torch.device("cpu")) in (True, False)
    result, weights = toy.run(toy.recipe(tmp_path, precision="bf16", steps=2))
    assert result.status == "done"
    assert weights["net.0.weight"].dtype == torch.float32
