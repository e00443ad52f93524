from pathlib import Path
from typing import Any

import pytest
import yaml

from unicompress.errors import RecipeError
from unicompress.training.recipe import (
    LoopRecipe,
    StageOneRecipe,
    StageTwoRecipe,
    TokenizerRecipe,
    check_keys,
    load_recipe,
)

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if "\nlr:" in p.read_text(encoding="utf-8"))
TOKENIZER = """
out: runs/x
steps: 10
batch: 4
lr: 1e-3
tokenizer: {options: {image_size: 32}}
data: [{kind: scenes, weight: 2}]
"""


def model_of(path: Path) -> type[LoopRecipe]:
    """The stage of a shipped recipe, which its header names."""
    text = path.read_text(encoding="utf-8")
    models = {"tokenizer": TokenizerRecipe, "stage-one": StageOneRecipe}
    models["stage-two"] = StageTwoRecipe
    return next(m for stage, m in models.items() if f"unicompress train {stage} " in text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "recipe.yaml"
    place.write_text(TOKENIZER)
    return place


@pytest.mark.parametrize("shipped", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(shipped: Path, project: Path) -> None:
    load_recipe(model_of(shipped), shipped)
    header = shipped.read_text(encoding="utf-8").split("\nout:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert str(shipped.relative_to(project)) in header
    assert "needs:" in header


def test_dense_and_compressed_reference_differ_in_the_codec_alone(project: Path) -> None:
    folder = project / "recipes" / "reference"
    dense, compressed = (
        yaml.safe_load((folder / f"stage_two_{name}.yaml").read_text())
        for name in ("dense", "compressed")
    )
    different = {key for key in dense.keys() | compressed.keys() if dense[key] != compressed[key]}
    assert different == {"out", "codec"}


def test_overrides_reach_into_parts_and_lists(path: Path) -> None:
    overrides = ["lr=3e-4", "tokenizer.options.image_size=64", "data.0.seed=7", "clip=0"]
    recipe = load_recipe(TokenizerRecipe, path, [*overrides, "objective.decay=0.5"])
    assert (recipe.lr, recipe.clip, recipe.objective.decay) == (3e-4, 0, 0.5)
    assert recipe.tokenizer.options == {"image_size": 64}
    assert (recipe.data[0].weight, recipe.data[0].seed) == (2, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stps=3"], "unknown key stps. Did you mean steps?"),
        (["objective.comitment=1"], "unknown key objective.comitment. Did you mean commitment?"),
        (["data.0.wieght=1"], "unknown key data.0.wieght. Did you mean weight?"),
        (["qqq=1"], "unknown key qqq. Known: out, seed,"),
        (["lr=-1"], "lr: input should be greater than 0, got -1"),
        (["steps=many"], "steps: input should be a valid integer"),
        (["precision=fp8"], "precision: input should be 'auto', 'fp32' or 'bf16', got 'fp8'"),
        (["batch=5", "accumulate=2"], "batch 5 is no multiple of accumulate 2"),
        (["data=[]"], "data is empty: name at least one source"),
        (["data.0.kind=photos"], "data.0: input tag 'photos'"),
        (["data.3.weight=1"], "cannot set data.3.weight: '3' is no place in a list of 1"),
        (["steps.more=1"], "cannot set steps.more: what stands before 'more' has no keys"),
        (["steps"], "cannot read the override 'steps': write key=value"),
        (["data=[{"], "cannot read the value of 'data=[{'"),
        (["out=null"], "out: input should be a valid string"),
    ],
)
def test_mistakes_are_told_in_one_line(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(TokenizerRecipe, path, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(path: Path) -> None:
    path.write_text("out: x\nsteps: 1\nbatch: 1\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: lr is missing"):
        load_recipe(TokenizerRecipe, path)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "a: 1\na: 2\n", ""])
def test_what_is_no_recipe_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not a"):
        load_recipe(TokenizerRecipe, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(TokenizerRecipe, tmp_path / "none.yaml")


def test_numbers_with_an_exponent_are_numbers(path: Path) -> None:
    recipe = load_recipe(TokenizerRecipe, path, ["tokenizer.options.x=2e-3"])
    assert recipe.tokenizer.options["x"] == 2e-3


@pytest.mark.parametrize(
    ("lm", "message"),
    [
        ({}, "lm: give either config or name"),
        ({"name": "a/b", "config": {}}, "lm: give either config or name"),
        ({"name": "a/b", "vocab_size": 100}, "lm.vocab_size: input should be greater than 257"),
    ],
)
def test_a_language_model_has_one_source(path: Path, lm: dict[str, Any], message: str) -> None:
    values = {"out": "x", "steps": 1, "batch": 1, "lr": 1e-3, "tokenizer": "t", "lm": lm}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageTwoRecipe, path)


def test_question_and_answer_columns_come_together(path: Path) -> None:
    stream = "{kind: stream, path: x, format: folder, question: q}"
    with pytest.raises(RecipeError, match="name the question column and the answer column"):
        load_recipe(TokenizerRecipe, path, [f"data=[{stream}]"])


def test_check_keys_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown key codec\.strid\. Did you mean stride\?"):
        check_keys(["strid"], ["stride", "width"], "codec")
