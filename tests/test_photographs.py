"""The comparison of a plug-in with its controls on pictures without captions."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import InputError
from unicompress.evals import photographs
from unicompress.evals.photographs import DENSE, UNQUANTIZED, evaluate_photographs, main
from unicompress.tokenizers.io import save_tokenizer
from unicompress.tokenizers.toy import ToyResidual
from unicompress.tokens import Grid

SPEC = CodecSpec(
    order="parallel", head="regression", width=16, heads=2, depth=1, global_count=1, residual=True
)


def test_every_way_is_scored_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    host = ToyResidual(columns=4).freeze()
    save_tokenizer(host, tmp_path / "host")
    ImageCodec(host, SPEC).eval().save_pretrained(tmp_path / "codec")
    (tmp_path / "photos").mkdir()
    for index in range(3):
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.byte().numpy()).save(tmp_path / "photos" / f"{index}.png")
    words = [str(tmp_path / name) for name in ("host", "codec", "photos")]
    out = ["--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png")]
    assert main([*words, *out]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    typed = shlex.join([*words, *out])  # with all options, since they change what is written
    assert content["command"] == f"python -m unicompress.evals.photographs {typed}"
    scores = content["details"]["photographs"]
    assert content["compressed"]["psnr"] == scores["compressed"]["psnr"]["mean"]
    assert content["dense"]["tokens_per_image"] == 16
    assert content["compressed"]["tokens_per_image"] == 5
    assert scores[DENSE]["sharpness"] == 1.0
    assert scores[DENSE]["psnr"]["count"] == 3
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (16 * (1 + len(scores)), 16 * 3)
    assert f"{UNQUANTIZED}: " in capsys.readouterr().out
    assert main([*words[:2], str(tmp_path / "none"), *out]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_one_picture_is_too_few() -> None:
    host = ToyResidual(columns=4).freeze()
    with pytest.raises(InputError, match="at least 2 pictures"):
        evaluate_photographs(host, ImageCodec(host, SPEC), torch.zeros(1, 3, 16, 16))


def test_nearest_expansion_repeats_and_bilinear_keeps_a_constant_field() -> None:
    tokens = torch.arange(4.0)[None, :, None]  # 2x2 cells of a 3x4 grid
    field = photographs._expanded(tokens, Grid(3, 4), 2, "nearest").view(3, 4)
    assert field.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    flat = photographs._expanded(torch.ones(1, 4, 2), Grid(3, 4), 2, "bilinear")
    torch.testing.assert_close(flat, torch.ones(1, 12, 2))
