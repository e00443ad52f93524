import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training_toy import interrupt_at
from unicompress.errors import RecipeError
from unicompress.evals.image_metrics import psnr
from unicompress.tokenizers.io import load_tokenizer
from unicompress.training.recipe import TokenizerRecipe
from unicompress.training.samples import scene_images
from unicompress.training.tokenizer import TokenizerStage, train_tokenizer

OPTIONS = {
    "image_size": 32,
    "patch": 4,
    "channel_multiplier": [1],
    "latent_channels": 16,
    "code_dim": 4,
    "codebook_size": 16,
}


def recipe(out: Path, **changes: Any) -> TokenizerRecipe:
    values = {
        "steps": 4,
        "batch": 2,
        "lr": 1e-3,
        "log_every": 2,
        "save_every": 2,
        "validate_images": 4,
        "tensorboard": False,
        "cpu": True,
        "tokenizer": {"options": OPTIONS},
    }
    return TokenizerRecipe(out=str(out), **{**values, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_tokenizer(out / "final").state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train_tokenizer(recipe(out))
    return out


def test_the_result_is_a_host_and_as_good_as_validation_said(trained: Path) -> None:
    host = load_tokenizer(trained / "final")
    pixels = scene_images(4, size=32)
    _, rows = host.quantize(host.encode(pixels))
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert float(psnr(host.decode(rows), pixels).mean()) == pytest.approx(
        lines[-1]["val/psnr"], abs=1e-2
    )
    assert {"loss", "psnr", "commitment", "contrast", "perplexity"} <= lines[1].keys()


def test_training_resumes_bit_identical(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = interrupt_at(2)
    monkeypatch.setattr(TokenizerStage, "after_step", lambda _self, step: stop(step))
    assert train_tokenizer(recipe(tmp_path)).status == "interrupted"
    assert not (tmp_path / "final").exists()
    monkeypatch.undo()
    assert train_tokenizer(recipe(tmp_path), resume=True).status == "done"
    expected, found = weights(trained), weights(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unknown_host_options_name_the_nearest(tmp_path: Path) -> None:
    wrong = recipe(tmp_path, tokenizer={"options": {"base_chanels": 32}})
    with pytest.raises(RecipeError, match=r"tokenizer\.options\.base_chanels\. Did you mean base_"):
        train_tokenizer(wrong)


def test_other_hosts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only janus_vq is trained from scratch"):
        train_tokenizer(recipe(tmp_path, tokenizer={"name": "toy_single"}))
