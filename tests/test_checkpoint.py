"""Weights on disk: what survives a crash, and what is refused."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unicompress import checkpoint
from unicompress.checkpoint import (
    current_folder,
    fingerprint,
    load_into,
    load_safetensors,
    load_training_state,
    read_json,
    save_safetensors,
    save_training_state,
    write_json,
)
from unicompress.errors import CheckpointError


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_tensors_of_all_kinds_come_back_bit_identical(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "a": shared,
        "tied": shared,
        "part": shared[1:3],
        "across": shared.T,
        "number": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(5).bfloat16(),
        "nothing": torch.zeros(0, 3),
    }
    save_safetensors(tensors, tmp_path / "deep" / "a.safetensors", {"key": "value"})
    found, notes = load_safetensors(tmp_path / "deep" / "a.safetensors")
    assert notes == {"key": "value"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert os.listdir(tmp_path / "deep") == ["a.safetensors"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"weight": torch.arange(4.0)}, path, {"stride": "2"})
    good = path.read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            tensors, notes = load_safetensors(path)
        except CheckpointError:
            continue
        # A flipped letter of the header's white space or key order may change nothing.
        assert notes == {"stride": "2"}
        assert torch.equal(tensors["weight"], torch.arange(4.0))


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"weight": torch.randn(9)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is (no complete|damaged)") as error:
        load_safetensors(path)
    assert "again" in one_line(error)


def test_a_header_larger_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        load_safetensors(path)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "a.safetensors"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(CheckpointError, match="is a pickle, which can run code: refused"):
            load_safetensors(path)
    torch.save({"a": Bomb()}, path)
    with pytest.raises(CheckpointError, match="is a pickle") as error:
        load_safetensors(path)
    assert ".safetensors file" in one_line(error)
    assert not (tmp_path / "exploded").exists()


def test_a_file_without_digest_needs_permission(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no sha256 digest"):
        load_safetensors(path)
    tensors, _ = load_safetensors(path, digest_required=False)
    assert torch.equal(tensors["weight"], torch.ones(2))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_safetensors(tmp_path / "absent.safetensors")


def test_misfits_are_named() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"1 weights missing \(bias\), 1 unknown \(extra\)"):
        load_into(module, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, "f")
    with pytest.raises(CheckpointError, match=r"weight has shape \(2, 2\), needed \(3, 2\)"):
        load_into(module, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "f")


def test_the_fingerprint_sees_weights_and_not_precision() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = fingerprint(module)
    assert before == fingerprint(module.eval())
    assert fingerprint(module.bfloat16().float()) == before
    with torch.no_grad():
        module[0].weight[0, 0] += 1
    assert fingerprint(module) != before


def full_disk(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"weight": torch.ones(2)}, path)
    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        save_safetensors({"weight": torch.zeros(2)}, path)
    assert "previous version is untouched" in one_line(error)
    monkeypatch.undo()
    assert torch.equal(load_safetensors(path)[0]["weight"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.safetensors"]


LIMITED = """
import resource, signal, sys, torch
from unicompress.checkpoint import save_safetensors, save_training_state
from unicompress.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for save, name in ((save_safetensors, "a.safetensors"), (None, "checkpoint")):
    try:
        if save:
            save({"weight": torch.zeros(100_000)}, f"{sys.argv[1]}/{name}")
        else:
            save_training_state({"weight": torch.zeros(100_000)}, f"{sys.argv[1]}/{name}")
        print("saved")
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs file size limits")
def test_a_write_that_really_fails_half_way_loses_nothing(tmp_path: Path) -> None:
    save_safetensors({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    save_training_state({"step": 1}, tmp_path / "checkpoint")
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 2, ran.stderr
    assert all(line.startswith("cannot write") and "untouched" in line for line in lines)
    assert torch.equal(load_safetensors(tmp_path / "a.safetensors")[0]["weight"], torch.ones(2))
    assert load_training_state(tmp_path / "checkpoint") == {"step": 1}
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "checkpoint"]


ENDLESS = """
import sys, torch
from unicompress.checkpoint import save_safetensors, save_training_state
step = 0
while True:
    step += 1
    tensors = {"weight": torch.full((200_000,), float(step))}
    save_safetensors(tensors, f"{sys.argv[1]}/a.safetensors", {"step": str(step)})
    save_training_state({"step": step, **tensors}, f"{sys.argv[1]}/checkpoint")
    print(step, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_nine_during_a_save_leaves_a_whole_version(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    saved = int(process.stdout.readline())  # one complete round, then kill in the middle of one
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    tensors, notes = load_safetensors(tmp_path / "a.safetensors")
    assert int(notes["step"]) >= saved
    assert (tensors["weight"] == float(notes["step"])).all()
    state = load_training_state(tmp_path / "checkpoint")
    assert state["step"] >= saved
    assert (state["weight"] == state["step"]).all()
    # The next save clears away what the dead process left.
    save_safetensors({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    save_training_state({"step": -1}, tmp_path / "checkpoint")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "checkpoint"]


def test_a_crash_between_the_two_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    save_training_state({"step": 1}, folder)
    replace, calls = os.replace, []

    def second_rename_fails(source: object, target: object) -> None:
        if Path(str(target)).name.startswith("checkpoint"):
            calls.append(target)
            if len(calls) == 2:
                full_disk()
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", second_rename_fails)
    with pytest.raises(CheckpointError):
        save_training_state({"step": 2}, folder)
    monkeypatch.undo()
    assert current_folder(folder) == tmp_path / "checkpoint.old"
    assert load_training_state(folder) == {"step": 1}
    save_training_state({"step": 3}, folder)
    assert load_training_state(folder) == {"step": 3}
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_state_of_every_plain_kind_comes_back(tmp_path: Path) -> None:
    state: dict[Any, Any] = {
        "weights": {"a": torch.randn(3)},
        "random": torch.random.get_rng_state(),
        "python": (3, tuple(range(4)), None),
        "list": [1, 2.5, "x", True, b"bytes"],
        7: {1, 2},
        "dtype": torch.bfloat16,
    }
    save_training_state(state, tmp_path / "checkpoint")
    found = load_training_state(tmp_path / "checkpoint")
    assert torch.equal(found["weights"].pop("a"), state["weights"].pop("a"))
    assert torch.equal(found.pop("random"), state.pop("random"))
    assert found == state


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Path("x"), nn.Linear(1, 1)])
def test_a_state_that_could_not_be_read_safely_is_not_written(
    tmp_path: Path, value: object
) -> None:
    with pytest.raises(CheckpointError, match=r"state\['optimizer'\]\[1\] is a "):
        save_training_state({"optimizer": [0, value]}, tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_dangerous_state_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_training_state(folder)
    save_training_state({"weights": torch.zeros(100)}, folder)
    state = folder / "state.pt"
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"state\.pt is missing or damaged"):
        load_training_state(folder)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"a": Bomb()}, state)
    digest = checkpoint._file_digest(state)
    (folder / "manifest.json").write_text(json.dumps({"state.pt": digest}))
    with pytest.raises(CheckpointError) as error:
        load_training_state(folder)
    one_line(error)
    assert not (tmp_path / "exploded").exists()


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"b": 1, "a": [None, "\u00e9"]}, path)
    assert read_json(path) == {"b": 1, "a": [None, "\u00e9"]}
    assert path.read_bytes().isascii()
    for text in ("", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not valid JSON"):
            read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path)
