"""Training on from what was trained: refining, starting from a model, shipping, ablating."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import InputError, RecipeError
from unicompress.evals.results_page import load as load_results
from unicompress.evals.results_page import results_page
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.training import ablation
from unicompress.training.recipe import StageOneRecipe, StageTwoRecipe, parse_recipe
from unicompress.training.ship import ship
from unicompress.training.stage_one import train_stage_one
from unicompress.training.stage_two import build_model, train_stage_two
from unicompress.unified import UnifiedModel

HOST = "toy_single(rows=8, columns=8)"
SPEC = CodecSpec(width=16, depth=1, heads=2, global_count=2, global_codebook="separate")
COMMON = {
    "steps": 2,
    "batch": 4,
    "lr": 1e-2,
    "validate_images": 4,
    "tensorboard": False,
    "cpu": True,
}
LM = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a host, a plug-in and its refinement, and a model trained on the plug-in."""
    folder = tmp_path_factory.mktemp("parts")
    host = tokenizers.build(HOST)
    save_tokenizer(host, folder / "host")
    torch.manual_seed(0)
    ImageCodec(host, SPEC).save_pretrained(folder / "codec")
    refine = {**COMMON, "tokenizer": str(folder / "host"), "refine": str(folder / "codec")}
    train_stage_one(StageOneRecipe(out=str(folder / "refine"), **refine))
    two = {
        **COMMON,
        "tokenizer": str(folder / "host"),
        "codec": str(folder / "codec"),
        "lm": {"config": LM, "vocab_size": 300},
        "projector": "linear",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unicompress.training.language.TEXT_SAMPLES", 20)
        train_stage_two(StageTwoRecipe(out=str(folder / "two"), **two))
    return folder


def codec_of(folder: Path, name: str) -> ImageCodec:
    return ImageCodec.from_pretrained(folder / name, load_tokenizer(folder / "host"))


def test_refining_trains_the_decompressor_alone(parts: Path) -> None:
    before = codec_of(parts, "codec").state_dict()
    after = codec_of(parts, "refine/final").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decompressor.") for name in changed)


def test_a_new_decompressor_for_the_same_codes(parts: Path, tmp_path: Path) -> None:
    recipe = StageOneRecipe(
        out=str(tmp_path / "new"),
        tokenizer=str(parts / "host"),
        refine=str(parts / "codec"),
        codec={"order": "parallel", "head": "regression", "width": 8},
        **COMMON,
    )
    train_stage_one(recipe)
    new = ImageCodec.from_pretrained(tmp_path / "new" / "final", load_tokenizer(parts / "host"))
    before, after = codec_of(parts, "codec").state_dict(), new.state_dict()
    kept = [name for name in before if not name.startswith("decompressor.")]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (new.spec.order, new.spec.head, new.spec.global_count) == ("parallel", "regression", 2)
    model = UnifiedModel.from_pretrained(parts / "two" / "final")
    codes = model.draw_codes(["a", "b"], seed=1)
    ship(parts / "two" / "final", tmp_path / "shipped", tmp_path / "new" / "final")
    shipped = UnifiedModel.from_pretrained(tmp_path / "shipped").float()
    assert shipped.codec is not None
    assert shipped.codec.spec == new.spec
    restored = new.decompress(codes)
    torch.testing.assert_close(shipped.codec.decompress(codes), restored, rtol=0.05, atol=0.05)


def test_refining_keeps_the_codes(parts: Path, tmp_path: Path) -> None:
    values = {**COMMON, "out": str(tmp_path / "o"), "tokenizer": str(parts / "host")}
    values |= {"refine": str(parts / "codec"), "codec": {"stride": 4}}
    with pytest.raises(RecipeError, match=r"codec\.stride would change the codes"):
        train_stage_one(parse_recipe(StageOneRecipe, values, "r.yaml"))


def test_shipping_joins_model_and_refined_decompressor(parts: Path, tmp_path: Path) -> None:
    ship(parts / "two" / "final", tmp_path / "shipped", parts / "refine" / "final")
    shipped = UnifiedModel.from_pretrained(tmp_path / "shipped")
    trained = UnifiedModel.from_pretrained(parts / "two" / "final")
    refined = codec_of(parts, "refine/final").decompressor
    assert shipped.codec is not None
    assert refined is not None
    for name, weight in shipped.codec.decompressor.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(weight, refined.state_dict()[name].bfloat16().float())
    small, large = (
        p / "model.safetensors" for p in (tmp_path / "shipped", parts / "two" / "final")
    )
    assert small.stat().st_size < 0.7 * large.stat().st_size
    assert shipped.tokens_per_image == trained.tokens_per_image


def test_another_plug_ins_decompressor_is_refused(parts: Path) -> None:
    model = UnifiedModel.from_pretrained(parts / "two" / "final")
    torch.manual_seed(1)
    with pytest.raises(InputError, match="refine the plug-in that it was trained with"):
        model.use_decompressor(ImageCodec(model.tokenizer, SPEC))
    with pytest.raises(InputError, match="only the same plug-in"):
        model.use_decompressor(ImageCodec(model.tokenizer, CodecSpec(global_count=0)))


def test_stage_two_goes_on_from_a_model(parts: Path, tmp_path: Path) -> None:
    recipe = StageTwoRecipe(
        out=str(tmp_path / "more"), start=str(parts / "two" / "final"), **COMMON
    )
    start, trained = build_model(recipe), UnifiedModel.from_pretrained(parts / "two" / "final")
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, start.state_dict()[name]), name
    train_stage_two(recipe)
    more = UnifiedModel.from_pretrained(tmp_path / "more" / "final").state_dict()
    changed = {
        name for name, weight in more.items() if not torch.equal(weight, start.state_dict()[name])
    }
    assert changed
    assert all(name.startswith("backbone.") for name in changed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name the tokenizer and the lm, or a unified model to start from"),
        ({"start": "m", "tokenizer": "t"}, "leave them out"),
    ],
)
def test_stage_two_starts_from_a_model_or_from_parts(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(StageTwoRecipe, {**COMMON, "out": "o", **given}, "r.yaml")


def test_ablation_writes_a_row_per_setting_and_keeps_old_ones(parts: Path, tmp_path: Path) -> None:
    stage_one = {**COMMON, "out": str(tmp_path / "run"), "tokenizer": str(parts / "host")}
    codec = {"width": 16, "depth": 1, "heads": 2, "global_count": 2}
    settings = {"two": {}, "identity": {"stride": 1, "global_count": 0}}
    recipe = {
        "results": str(tmp_path / "results"),
        "pictures": 4,
        "stage_one": {**stage_one, "calibrate_images": 64, "codec": codec},
        "axes": {"global tokens": settings},
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert ablation.main([str(path)]) == 0
    files = sorted((tmp_path / "results").glob("*.json"))
    assert [f.stem for f in files] == [
        "ablation-global-tokens-identity",
        "ablation-global-tokens-two",
    ]
    identity, two = (json.loads(file.read_text()) for file in files)
    assert identity["compressed"]["psnr"] == identity["dense"]["psnr"]
    assert (two["compressed"]["tokens_per_image"], two["dense"]["tokens_per_image"]) == (18, 64)
    stamps = [file.stat().st_mtime_ns for file in files]
    assert ablation.main([str(path)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert "## Ablation: global tokens" in results_page(load_results(files))


def test_shipped_results_make_their_page() -> None:
    folder = Path(__file__).parents[1] / "docs" / "results"
    assert (folder / "README.md").read_text() == results_page(
        load_results([*folder.glob("*.json")])
    )
