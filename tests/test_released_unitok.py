"""UniTok's released layout against the official code: prompts, head, answers and drawn codes.

The fixture holds numbers: seeded weights under official names (float16, exactly), and what the
official code made of them, with the best code taken where it samples.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host_fixtures import PROMPTS, assert_same_weights, numbers, under, with_plugin, write_shards
from llama_toy import llama_text
from unicompress.backbones.projectors import UniTokProjector
from unicompress.errors import CheckpointError, InputError
from unicompress.released.unitok import UniTokLoader
from unicompress.tokenizers.unitok import UniTok
from unicompress.tokens import Grid
from unicompress.unified import UnifiedModel
from unified_toy import SPEC

QUESTIONS = ["how many objects?", "what is left?"]
HOST = str(UniTok.tiny())
RELEASE = f"mini_gemini(host={HOST!r})"
TOKENIZER = "unitok_tokenizer.pth"
CONFIG = {
    "model_type": "mini_gemini",
    "architectures": ["MiniGeminiLlamaForCausalLM"],
    "vocab_size": 354,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "mm_projector_lr": None,
}


OFFICIAL, IMAGE = numbers("unitok_lm"), numbers("unitok")


def released() -> dict[str, Tensor]:
    """The language model's weights; its copy of the codebooks is rounded as the rest is."""
    weights = under(OFFICIAL, "weights.")
    for name, tensor in under(IMAGE, "weights.quantizer.").items():
        weights[f"model.multi_embedder.quantizer.{name}"] = tensor.bfloat16()
    return weights


def save_image_tokenizer(path: Path, weights: dict[str, Tensor]) -> None:
    content = {"args": {"model": "vitamin_large"}, "trainer": {"unitok": weights}}
    torch.save(content, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of FoundationVision/unitok_mllm, with the tokenizer's file in it."""
    root = tmp_path_factory.mktemp("unitok") / "mllm"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    llama_text().save_pretrained(root)
    weights = sorted(released().items())
    write_shards(root, dict(weights[::2]), dict(weights[1::2]))
    save_image_tokenizer(root / TOKENIZER, under(IMAGE, "weights."))
    return root


@pytest.fixture(scope="module")
def dense(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_pretrained(folder, release=RELEASE)


def pictures() -> Tensor:
    return IMAGE["input"].float()


def official_codes() -> Tensor:
    return IMAGE["codes"].long().transpose(1, 2)  # books stand before tokens there


def test_prompts_are_the_official_ids(dense: UnifiedModel) -> None:
    """The zero byte at the end of the published prompts is the start of the image, our BOS."""
    zero = dense.text.convert_tokens_to_ids("<0x00>")
    assert zero == 3
    for own, name in (
        (dense._caption_ids(PROMPTS[0]), "prompt_ids"),
        (dense._caption_ids(""), "blank_ids"),
    ):
        assert [*own, zero] == OFFICIAL[name].tolist()
    rows = dense.lm.get_input_embeddings().weight
    torch.testing.assert_close(dense.backbone.delimiters()[[0, 2]], rows[3:5], rtol=0, atol=0)
    for number, question in enumerate(QUESTIONS):
        opening = [*dense._start(), *dense._ids(dense.backbone.prompts.opening)]
        own = [*opening, -200, *dense._question_ids(question)]
        assert own == OFFICIAL[f"question_ids.{number}"].tolist()


@torch.no_grad()
def test_codes_enter_as_officially(dense: UnifiedModel) -> None:
    """Read as a whole, each token after its predecessors; drawn one by one, as if alone."""
    codes = official_codes()[:1]
    features, own = dense.encode_image(pictures()[:1])
    assert torch.equal(own, codes)
    read = dense.backbone.embed_features(features[:, :0], features, dense.layout.grid)
    drawn = dense.backbone.embed_codes(codes, "local")
    torch.testing.assert_close(read, OFFICIAL["image"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(drawn, OFFICIAL["alone"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(read[:, 0], drawn[:, 0], rtol=1e-4, atol=2e-5)
    assert (read - drawn).abs().max() > 1  # the documented difference is not small


@torch.no_grad()
def test_hidden_states_and_head_are_the_official_ones(dense: UnifiedModel) -> None:
    """Teacher forced on the codes of a picture, after a prompt."""
    backbone, layout, codes = dense.backbone, dense.layout, official_codes()[:1]
    text = backbone.embed_text(torch.tensor([dense._caption_ids(PROMPTS[0])]))
    image = layout.arrange(backbone.delimiters(), backbone.embed_codes(codes, "local"))
    embeds = torch.cat([text, image[:, :-1]], dim=1)
    hidden = backbone(embeds, None, torch.arange(embeds.shape[1])[None])[:, text.shape[1] :]
    hidden = hidden[:, layout.predictors]
    torch.testing.assert_close(hidden, OFFICIAL["hidden"], rtol=1e-4, atol=2e-5)
    scores = backbone.code_logits(OFFICIAL["hidden"], codes, "local")
    torch.testing.assert_close(scores, OFFICIAL["logits"], rtol=1e-4, atol=1e-5)


def test_draws_the_official_codes(dense: UnifiedModel) -> None:
    """Greedy at guidance 3, prompts of different lengths in one batch."""
    codes = dense.draw_codes(PROMPTS, cfg=3.0, temperature=0)
    assert torch.equal(codes, OFFICIAL["drawn"].long().transpose(1, 2))
    assert not torch.equal(codes[:1], dense.draw_codes(PROMPTS[:1], cfg=1.0, temperature=0))
    assert dense.decode_codes(codes).shape == (2, 3, 64, 64)


def test_answers_are_the_official_ones(dense: UnifiedModel) -> None:
    """The image stands without its start and end tokens, as in the published script."""
    wanted = [
        dense.text.decode(OFFICIAL[f"bare_answer.{n}"], skip_special_tokens=True).strip()
        for n in (0, 1)
    ]
    assert dense.answer(pictures(), QUESTIONS, max_new_tokens=10) == wanted
    assert dense.answer(pictures().flip(0), QUESTIONS, max_new_tokens=10) != wanted


def test_a_plugin_starts_from_the_released_weights(
    folder: Path, dense: UnifiedModel, tmp_path: Path
) -> None:
    model = with_plugin(folder, dense, SPEC, tmp_path / "plugin", release=RELEASE)
    assert_same_weights(model, dense)
    assert (dense.tokens_per_image, model.tokens_per_image) == (16, 6)
    assert (dense.understanding_layout.length, model.understanding_layout.length) == (16, 9)
    drawn = model.draw_codes(PROMPTS, temperature=0)
    assert drawn.shape == (2, 6, 8)
    model.save_pretrained(tmp_path / "model")
    again = UnifiedModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.draw_codes(PROMPTS, temperature=0), drawn)
    loss = model.train().understanding_loss(pictures(), [["what?"]] * 2, [["a"], ["b"]]).loss
    (loss + model.generation_loss(pictures(), PROMPTS).loss).backward()
    missed = [n for n, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []


def test_half_precision(folder: Path) -> None:
    model = UnifiedModel.from_pretrained(folder, release=RELEASE, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.draw(PROMPTS[:1], temperature=0).isfinite().all()


def test_a_model_of_the_hub_takes_the_tokenizer_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = Path(shutil.copytree(folder, tmp_path / "snapshots" / "1"))
    (fetched / TOKENIZER).unlink()
    asked = []

    def load_tokenizer(spec: str, checkpoint: Path | str) -> UniTok:
        asked.append((spec, checkpoint))
        return UniTok.tiny()

    monkeypatch.setattr("unicompress.released.unitok.fetch_folder", lambda *_, **__: fetched)
    monkeypatch.setattr("unicompress.released.unitok.load_tokenizer", load_tokenizer)
    with pytest.raises(CheckpointError, match="are not the tokenizer's"):  # random weights
        UniTokLoader().load("FoundationVision/unitok_mllm")
    assert asked == [("unitok", "FoundationVision/unitok_tokenizer")]


def test_what_belongs_to_other_parts_is_not_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UnifiedModel.from_pretrained(folder, release=RELEASE)
    assert "UNEXPECTED" not in caplog.text
    assert "mini_gemini" not in caplog.text


def test_codes_are_rows_of_the_tokenizer(dense: UnifiedModel) -> None:
    codes = torch.randint(16, (2, 5, 8), generator=torch.Generator().manual_seed(0))
    rows = dense.backbone.tables["local"](codes)
    torch.testing.assert_close(rows, dense.tokenizer.embed(codes), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
def test_projector_keeps_streams_and_order_apart(heads: int) -> None:
    projector = UniTokProjector(dim=4, hidden=6, heads=heads)
    globals_, locals_ = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    before = projector(globals_, locals_, Grid(1, 5))
    torch.testing.assert_close(before[:, 3:], projector(globals_ * 2, locals_, Grid(1, 5))[:, 3:])
    locals_[:, 2] = torch.randn(2, 4)
    changed = (projector(globals_, locals_, Grid(1, 5)) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_the_tokenizer_is_found_beside_or_named(
    folder: Path, dense: UnifiedModel, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "model"))
    (moved / TOKENIZER).rename(tmp_path / TOKENIZER)
    wanted = dense.tokenizer.state_dict()
    beside = UniTokLoader(host=HOST).load(moved).tokenizer.state_dict()
    assert all(torch.equal(beside[name], tensor) for name, tensor in wanted.items())
    (tmp_path / TOKENIZER).rename(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=f"comes without {TOKENIZER}: fetch https") as error:
        UnifiedModel.from_pretrained(moved, release=RELEASE)
    assert "\n" not in str(error.value)
    spec = f"mini_gemini(host={HOST!r}, tokenizer={str(tmp_path / 'other.pth')!r})"
    named = UnifiedModel.from_pretrained(moved, release=spec).tokenizer.state_dict()
    assert all(torch.equal(named[name], tensor) for name, tensor in wanted.items())


def edited(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """All weights in one file, changed."""

    def write(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        weights = released()
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return write


def no_part(part: str) -> Callable[[Path], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [n for n in weights if n.startswith(part)]:
            del weights[name]

    return rewritten(change)


def other_books(folder: Path) -> None:
    """A tokenizer of another release: the same names and shapes."""
    weights = under(IMAGE, "weights.")
    name = "quantizer.codebooks.3.codebook.weight"
    weights[name] = weights[name].flip(0)
    save_image_tokenizer(folder / TOKENIZER, weights)


BOOK = "model.multi_embedder.quantizer.codebooks.7."
LINEAR = "model.multi_embedder.attn_projection.proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks 1 of 2 shards"),
        (lambda f: [p.unlink() for p in f.glob("model*")], "holds no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks its text tokenizer"),
        (no_part("ar_head."), r"holds no ar_head.\*: it is another model of the type mini_gemini"),
        (no_part("model.multi_embedder."), r"holds no model.multi_embedder.\*"),
        (no_part("ar_head.linear_head.bias"), r"lacks heads.local.leave.bias \(1 missing"),
        (no_part("ar_head.layers.2."), r"lacks heads.local.trunk.layers.2.* \(9 missing"),
        (no_part("model.multi_embedder.mm_projector.0.bias"), "lacks projector.mlp.norm.bias"),
        (no_part(LINEAR), f"lacks {LINEAR}"),
        (no_part("model.layers.1."), "does not fit LlamaForCausalLM: missing keys"),
        (no_part(BOOK), r"has codebooks of \[7, 16, 2\]"),
        (other_books, "are not the tokenizer's: it was trained with another"),
        (edited(rope_theta=5e5), "rotary positions of another kind"),
        (edited(intermediate_size=64), "does not fit LlamaForCausalLM: mismatched"),
        (lambda f: (f / TOKENIZER).write_bytes(b"PK\x03\x04 cut"), "damaged or half-downloaded"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    folder: Path, change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(broken)
    with pytest.raises(CheckpointError, match=message) as error:
        UnifiedModel.from_pretrained(broken, release=RELEASE)
    assert "\n" not in str(error.value)


def test_the_host_must_be_unitok(folder: Path) -> None:
    with pytest.raises(InputError, match="host must be unitok"):
        UnifiedModel.from_pretrained(folder, release="mini_gemini(host='toy_multi')")
