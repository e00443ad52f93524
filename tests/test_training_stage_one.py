import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training_toy import interrupt_at
from unicompress.codec import ImageCodec
from unicompress.errors import RecipeError
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.training import stage_one
from unicompress.training.recipe import StageOneRecipe
from unicompress.training.stage_one import StageOne, codec_spec, train_stage_one

SMALL = {"width": 16, "depth": 1, "heads": 2, "global_count": 2}
CODES = {"order": "block", "head": "codes"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    save_tokenizer(tokenizers.build("toy_single(rows=8, columns=8)"), folder)
    return folder


def recipe(out: Path, host: Path, **changes: Any) -> StageOneRecipe:
    values = {
        "tokenizer": str(host),
        "codec": SMALL,
        "steps": 4,
        "batch": 4,
        "lr": 1e-2,
        "log_every": 2,
        "save_every": 2,
        "validate_images": 4,
        "calibrate_images": 64,
        "tensorboard": False,
        "cpu": True,
    }
    return StageOneRecipe(out=str(out), **{**values, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, host: Path) -> Path:
    out = tmp_path_factory.mktemp("stage_one") / "run"
    train_stage_one(recipe(out, host, codec={**SMALL, **CODES}))
    return out


def test_the_log_has_every_term_and_what_the_globals_do(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    terms = {"loss", "regression", "codebook", "commitment", "accuracy"}
    globals_ = {"distinct_codes_per_slot", "shuffled_global_gap"}
    assert terms | globals_ <= lines[0].keys()
    assert {"val/psnr", "val/psnr_dense", "val/accuracy"} <= lines[-1].keys()


def test_the_host_is_not_touched(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load_tokenizer(host)
    before = {name: value.clone() for name, value in held.state_dict().items()}
    monkeypatch.setattr(stage_one, "load_tokenizer", lambda _source, _checkpoint: held)
    train_stage_one(recipe(tmp_path, host))
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())


def test_the_result_loads_around_its_host(trained: Path, host: Path) -> None:
    codec = ImageCodec.from_pretrained(trained / "final", load_tokenizer(host))
    assert codec.spec.global_count == 2
    assert codec.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 18, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"codec": CODES}, {"random_rate": True}],
    ids=["regression", "codes", "random"],
)
def test_training_resumes_bit_identical(
    changes: dict[str, Any], host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = {**SMALL, "strides": [4], "nested": True, "local_dropout": 0.2}
    codec["global_codebook"] = "separate"
    changes = {**changes, "codec": {**codec, **changes.get("codec", {})}}
    train_stage_one(recipe(tmp_path / "whole", host, **changes))
    stop, follow = interrupt_at(2), StageOne.after_step

    def after_step(self: StageOne, step: int) -> None:
        follow(self, step)
        stop(step)

    monkeypatch.setattr(StageOne, "after_step", after_step)
    given = recipe(tmp_path / "parts", host, **changes)
    assert train_stage_one(given).status == "interrupted"
    monkeypatch.undo()
    assert train_stage_one(given, resume=True).status == "done"
    expected, found = (
        ImageCodec.from_pretrained(tmp_path / name / "final", load_tokenizer(host)).state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_codec_options_override_the_preset(host: Path, tmp_path: Path) -> None:
    spec = codec_spec(recipe(tmp_path, host, preset="paper", codec={"stride": 4}))
    assert (spec.order, spec.head, spec.stride) == ("raster", "regression", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {"strid": 2}}, r"unknown key codec\.strid\. Did you mean stride\?"),
        ({"preset": "papr"}, "unknown preset 'papr': use one of paper, default"),
        ({"random_rate": True}, r"set codec\.strides or codec\.nested"),
    ],
)
def test_mistakes_in_the_codec_are_named(
    changes: dict[str, Any], message: str, host: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        codec_spec(recipe(tmp_path, host, **changes))
