"""The main job end to end: `unicompress demo`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saved_pair import save_tiny_pair
from unicompress import cli, reference
from unicompress.data.images import load_image
from unicompress.evals import demo
from unicompress.evals.cost import Effort

# Becomes True with the commit that ships weights; from then on missing weights fail here.
SHIPPED = True
QUICK = demo.DemoSize(
    images=2,
    prompts=2,
    questions=12,
    drawings=2,
    reconstructions=2,
    questions_per_image=2,
    effort=Effort(batch=1, repeats=1, warmup=0, flops=False),
)


def run(folder: Path, *words: str) -> dict[str, Any]:
    report, copy = folder / "report.json", folder / "copy.json"
    arguments = ["demo", "--out", str(folder), "--json", str(copy), *words]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output + result.stderr
    assert report.read_bytes() == copy.read_bytes()
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.parametrize("extra", ["jinja2", "matplotlib"])
def test_what_the_demo_needs_is_installed(extra: str) -> None:
    pytest.importorskip(extra, reason="pip install 'unicompress[demo]'")


def test_demo_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoSize", lambda: QUICK)
    save_tiny_pair(tmp_path)
    models = ("--dense", str(tmp_path / "dense"), "--compressed", str(tmp_path / "compressed"))
    found = run(tmp_path / "out", *models)
    assert found["dense"]["tokens_per_image"] == 64
    assert found["compressed"]["tokens_per_image"] == 20
    for side in ("dense", "compressed"):
        assert None not in found[side].values(), found[side]
    assert None not in found["ratio"].values()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # one file, nothing fetched
    pictures = list((tmp_path / "out" / "pictures").glob("*.png"))
    assert {"reconstructions.png", "drawings.png"} <= {path.name for path in pictures}
    for path in pictures:
        assert load_image(path).std() > 0, f"{path.name} is of one colour"


@pytest.mark.skipif(not SHIPPED, reason="the trained weights do not ship yet")
def test_the_reference_ships() -> None:
    """Both models are in the package, under 40 MB together, and do what the README says."""
    for name in reference.NAMES:
        assert reference.folder(name).is_dir()  # raises with the reason where it is missing
    size = sum(p.stat().st_size for p in reference.WEIGHTS.rglob("*") if p.is_file())
    assert size <= 40e6
    dense, compressed = reference.load("dense"), reference.load("compressed")
    assert (dense.tokens_per_image, compressed.tokens_per_image) == (256, 68)
    assert (dense.interface_tokens, compressed.interface_tokens) == (258, 71)


@pytest.mark.skipif(not SHIPPED, reason="the trained weights do not ship yet")
def test_demo_on_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, but with the real weights: the models must be well above what the text alone gives."""
    monkeypatch.setattr(demo, "DemoSize", lambda: replace(QUICK, questions=90))
    found = run(tmp_path / "out")
    for side in ("dense", "compressed"):
        assert found[side]["understanding_accuracy"] > 0.7  # 0.35 without looking
        assert found[side]["psnr"] > 25
