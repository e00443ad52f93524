import json
import warnings
from pathlib import Path

import pytest
import torch

from stage_two_toy import LM, recipe, saved_parts
from training_toy import interrupt_at
from unicompress.errors import InputError, RecipeError
from unicompress.training import stage_two
from unicompress.training.feed import Place
from unicompress.training.stage_two import (
    StageTwo,
    UnifiedBatches,
    build_model,
    train_stage_two,
)
from unicompress.unified import DESCRIBE, UnifiedModel


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a host and of a plug-in around it."""
    return saved_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 20)


@pytest.mark.parametrize("dense", [False, True], ids=["compressed", "dense"])
def test_no_weight_of_the_tokenizer_stack_changes(
    dense: bool, parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"codec": None} if dense else {}
    given = recipe(tmp_path / "run", parts, **changes)
    model = build_model(given)
    frozen = [model.tokenizer, *([model.codec] if model.codec else [])]
    before = [{n: t.clone() for n, t in part.state_dict().items()} for part in frozen]
    start = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    monkeypatch.setattr(stage_two, "build_model", lambda _recipe: model)
    assert train_stage_two(given).status == "done"
    for part, old in zip(frozen, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())
    assert any(not torch.equal(p, start[n]) for n, p in model.backbone.named_parameters())
    loaded = UnifiedModel.from_pretrained(tmp_path / "run" / "final")
    assert loaded.tokens_per_image == (64 if dense else 18)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "understanding/loss", "generation/loss"} <= lines[0].keys()
    assert {"val/understanding/answers", "val/generation/loss"} <= lines[-1].keys()


def test_training_resumes_bit_identical(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_stage_two(recipe(tmp_path / "whole", parts))
    stop = interrupt_at(1)
    monkeypatch.setattr(StageTwo, "after_step", lambda _self, step: stop(step))
    given = recipe(tmp_path / "parts", parts)
    assert train_stage_two(given).status == "interrupted"
    monkeypatch.undo()
    monkeypatch.setattr("unicompress.training.language.TEXT_SAMPLES", 20)
    assert train_stage_two(given, resume=True).status == "done"
    expected, found = (
        UnifiedModel.from_pretrained(tmp_path / name / "final").state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dense_and_compressed_models_start_alike_and_see_the_same_data(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    recipes = [recipe(tmp_path, parts, codec=codec) for codec in (None, str(parts[1]))]
    models = [build_model(given) for given in recipes]
    names = [{n for n, _ in model.backbone.lm.named_parameters()} for model in models]
    assert names[0] == names[1]
    first, second = (dict(model.backbone.lm.named_parameters()) for model in models)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n].ndim == 2)
    batches = [UnifiedBatches(given, 32, Place()).at(5)[0] for given in recipes]
    assert torch.equal(batches[0].read, batches[1].read)
    assert torch.equal(batches[0].drawn, batches[1].drawn)
    assert batches[0].questions == batches[1].questions
    assert batches[0].captions == batches[1].captions


def test_samples_are_shared_out_by_the_stated_ratio(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    given = recipe(tmp_path, parts, batch=8, understanding_share=0.25, caption_dropout=0)
    batch = UnifiedBatches(given, 32, Place()).at(0)[0]
    assert (len(batch.read), len(batch.drawn)) == (2, 6)
    assert [len(own) for own in batch.questions] == [7, 7]
    assert all(own[-1] == DESCRIBE for own in batch.questions)
    assert all(batch.captions)
    for share, read, drawn in ((0.0, None, 8), (1.0, 8, None)):
        only = recipe(tmp_path, parts, batch=8, understanding_share=share)
        batch = UnifiedBatches(only, 32, Place()).at(0)[0]
        assert [None if t is None else len(t) for t in (batch.read, batch.drawn)] == [read, drawn]


def test_captions_are_left_out_at_the_stated_rate(parts: tuple[Path, Path], tmp_path: Path) -> None:
    given = recipe(tmp_path, parts, batch=64, understanding_share=0, caption_dropout=0.5)
    captions = UnifiedBatches(given, 32, Place()).at(0)[0].captions
    assert 16 < captions.count("") < 48


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    for accumulate in (1, 2):
        out = tmp_path / str(accumulate)
        given = recipe(out, parts, steps=1, batch=6, accumulate=accumulate, warmup=0)
        train_stage_two(given)
        steps.append(UnifiedModel.from_pretrained(out / "final").state_dict())
    lines = [
        json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[0]) for n in ("1", "2")
    ]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)
    assert lines[1]["gradient_norm"] == pytest.approx(lines[0]["gradient_norm"], rel=1e-3)


def test_lora_trains_adapters_projector_and_image_entries_alone(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    given = recipe(tmp_path / "run", parts, lora={"rank": 2, "targets": ["q_proj"]})
    names = {n for n, p in build_model(given).backbone.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in names)
    assert all("lora_" in n or "trainable_tokens" in n or "projector" in n for n in names)
    assert train_stage_two(given).status == "done"
    before, after = build_model(given), UnifiedModel.from_pretrained(tmp_path / "run" / "final")
    text = before.backbone.space.text_size
    old = before.backbone.inner.get_input_embeddings().weight
    new = after.backbone.inner.get_input_embeddings().weight
    assert torch.equal(new[:text], old[:text])
    assert not torch.equal(new[text:], old[text:])


def test_mistakes_are_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    wrong = recipe(tmp_path, parts, lm={"config": {"hiden_size": 16}})
    with pytest.raises(RecipeError, match=r"lm\.config\.hiden_size\. Did you mean hidden_size\?"):
        build_model(wrong)
    wrong = recipe(tmp_path, parts, lora={"targets": ["nothing_proj"]})
    with pytest.raises(RecipeError, match="lora does not fit this language model"):
        build_model(wrong)
    wrong = recipe(tmp_path, parts, lm={"name": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="cannot be loaded"):
        build_model(wrong)


def test_layers_are_checkpointed_when_asked_without_a_warning(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    lm = {"config": LM, "vocab_size": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        asked = build_model(recipe(tmp_path, parts, lm={**lm, "gradient_checkpointing": True}))
    plain = build_model(recipe(tmp_path, parts, lm=lm))
    for model, wanted in ((asked, True), (plain, False)):
        assert [layer.gradient_checkpointing for layer in model.lm.model.layers] == [wanted]
