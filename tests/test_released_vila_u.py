"""VILA-U's released layout against the official code: prompts, head, answers and drawn codes.

The fixture holds numbers: seeded weights under official names (float16, exactly), and what the
official code made of them, with the best code taken where it samples.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from host_fixtures import PROMPTS, assert_same_weights, numbers, under, with_plugin, write_shards
from llama_toy import llama_text
from unicompress.backbones.vicuna import SYSTEM
from unicompress.errors import CheckpointError, MissingDependencyError
from unicompress.unified import UnifiedModel
from unified_toy import SPEC

QUESTIONS = ["how many objects?", "what is left?"]
LLM = {
    "model_type": "llama",
    "vocab_size": 358,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
TOWER = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": 16,
    "rqvaesiglip": {
        "embed_dim": 16,
        "n_embed": 32,
        "latent_shape": [4, 4, 16],
        "code_shape": [4, 4, 4],
        "shared_codebook": True,
        "ddconfig": {"ch": 8, "ch_mult": [1, 1, 2], "z_channels": 12, "num_res_blocks": 2},
        "pretrained_model": "siglip",
    },
    "rqtransformer": {
        "block_size": [4, 4, 4],
        "embed_dim": 24,
        "vocab_size": 32,
        "head": {"n_layer": 2, "block": {"n_head": 3}},
    },
}


OFFICIAL = numbers("vila_u_lm")


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of mit-han-lab/vila-u-7b-256."""
    root = tmp_path_factory.mktemp("vila-u")
    parts = {f"{part}_cfg": {} for part in ("llm", "vision_tower", "mm_projector")}
    write(root / "config.json", {"model_type": "vila_u_llama", **parts})
    write(root / "llm" / "config.json", LLM)
    write(root / "vision_tower" / "config.json", TOWER)
    heads = {"vision_config": {"num_attention_heads": 2}}
    write(root / "vision_tower" / "siglip" / "config.json", heads)
    write(root / "mm_projector" / "config.json", {"mm_projector_type": "mlp2x_gelu"})
    llama_text("<im_start>", "<im_end>", "<vi_start>", "<vi_end>").save_pretrained(root / "llm")
    weights = under(OFFICIAL, "weights.")
    own = sorted(under(weights, "llm.").items())
    write_shards(root / "llm", dict(own[: len(own) // 2]), dict(own[len(own) // 2 :]))
    save_file(under(weights, "mm_projector."), root / "mm_projector" / "model.safetensors")
    tower = under(numbers("vila_u"), "weights.")  # running means and copies of the table included
    tower |= under(weights, "vision_tower.")
    save_file(tower, root / "vision_tower" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def dense(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_pretrained(folder)


def pictures() -> Tensor:
    return numbers("vila_u")["input"].float()


def test_prompts_are_the_official_ids(dense: UnifiedModel) -> None:
    """What stands before <im_start>; a blank request loses the space after its role."""
    begin = dense.text.convert_tokens_to_ids("<im_start>")
    for own, name in (
        (dense._caption_ids(PROMPTS[0]), "prompt_ids"),
        (dense._caption_ids(""), "blank_ids"),
    ):
        assert [*own, begin] == OFFICIAL[name].tolist()
    assert dense.text.decode(OFFICIAL["blank_ids"]).endswith(
        "questions. USER:ASSISTANT: <im_start>"
    )
    image = -200
    for number, question in enumerate(QUESTIONS):
        prompts = dense.backbone.prompts
        opening = [*dense._start(), *dense._ids(prompts.opening)]
        own = [*opening, image, *dense._question_ids(question)]
        assert own == OFFICIAL[f"question_ids.{number}"].tolist()
    assert prompts.opening.startswith(SYSTEM)


def test_delimiters_are_rows_of_the_vocabulary(dense: UnifiedModel) -> None:
    rows = dense.lm.get_input_embeddings().weight
    ids = dense.text.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert ids == [len(rows) - 4, len(rows) - 3]  # where the official code looks for them
    own = dense.backbone.delimiters()
    torch.testing.assert_close(own[[0, 2]], rows[ids], rtol=0, atol=0)
    assert not torch.equal(own[0], own[2])


def test_hidden_states_and_head_are_the_official_ones(dense: UnifiedModel) -> None:
    """Teacher forced on the codes of a picture, after a prompt."""
    backbone, layout = dense.backbone, dense.layout
    codes = OFFICIAL["true_codes"].long()
    features, own_codes = dense.encode_image(pictures()[:1])
    assert torch.equal(own_codes, codes)
    torch.testing.assert_close(features, dense.tokenizer.embed(codes), rtol=0, atol=0)
    text = backbone.embed_text(torch.tensor([dense._caption_ids(PROMPTS[0])]))
    image = layout.arrange(backbone.delimiters(), backbone.embed_codes(codes, "local"))
    embeds = torch.cat([text, image[:, :-1]], dim=1)
    with torch.no_grad():
        hidden = backbone(embeds, None, torch.arange(embeds.shape[1])[None])[:, text.shape[1] :]
        hidden = hidden[:, layout.predictors]
        scores = backbone.code_logits(OFFICIAL["hidden"], codes, "local")
    torch.testing.assert_close(hidden, OFFICIAL["hidden"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(scores, OFFICIAL["logits"], rtol=1e-4, atol=1e-5)


def test_draws_the_official_codes(dense: UnifiedModel) -> None:
    """Greedy at guidance 3, prompts of different lengths in one batch."""
    codes = dense.draw_codes(PROMPTS, cfg=3.0, temperature=0)
    assert torch.equal(codes, OFFICIAL["drawn"].long())
    assert not torch.equal(codes, dense.draw_codes(PROMPTS, cfg=1.0, temperature=0))
    assert dense.decode_codes(codes).shape == (2, 3, 16, 16)


def test_answers_are_the_official_ones(dense: UnifiedModel) -> None:
    """The image stands without its start and end tokens, as in the published script."""
    wanted = [
        dense.text.decode(OFFICIAL[f"bare_answer.{n}"], skip_special_tokens=True).strip()
        for n in (0, 1)
    ]
    assert dense.answer(pictures(), QUESTIONS, max_new_tokens=10) == wanted
    assert wanted[0] != wanted[1]
    assert dense.answer(-pictures(), QUESTIONS, max_new_tokens=10) != wanted


def test_a_plugin_starts_from_the_released_weights(
    folder: Path, dense: UnifiedModel, tmp_path: Path
) -> None:
    model = with_plugin(folder, dense, SPEC, tmp_path / "plugin")
    assert_same_weights(model, dense)
    assert (dense.tokens_per_image, model.tokens_per_image) == (16, 6)
    assert (dense.understanding_layout.length, model.understanding_layout.length) == (16, 9)
    drawn = model.draw_codes(PROMPTS, temperature=0)
    assert drawn.shape == (2, 6, 4)
    model.save_pretrained(tmp_path / "model")
    again = UnifiedModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.draw_codes(PROMPTS, temperature=0), drawn)


def test_rows_beyond_the_text_do_no_harm(folder: Path, dense: UnifiedModel, tmp_path: Path) -> None:
    """The language model may have more rows than its text tokenizer has entries."""
    shorter = copied(folder, tmp_path)
    with_text_of("<im_start>", "<im_end>")(shorter)
    model = UnifiedModel.from_pretrained(shorter)
    assert len(model.text) == len(dense.text) - 2
    assert len(model.lm.get_input_embeddings().weight) == len(dense.text)
    asked = (pictures(), QUESTIONS, 10)
    assert model.answer(*asked) == dense.answer(*asked)


def test_half_precision(folder: Path) -> None:
    model = UnifiedModel.from_pretrained(folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.draw(PROMPTS[:1], temperature=0).isfinite().all()


def copied(folder: Path, path: Path) -> Path:
    return Path(shutil.copytree(folder, path / "copy"))


def edited(path: str, *keys: str, value: object = None) -> Callable[[Path], None]:
    """Set (or, with None, remove) an entry of a configuration."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / path).read_text())
        part = whole
        for key in keys[:-1]:
            part = part[key]
        part.pop(keys[-1], None)
        if value is not None:
            part[keys[-1]] = value
        write(folder / path, whole)

    return change


def without(path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def lacking(path: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / path)
        del tensors[name]
        save_file(tensors, folder / path, {"format": "pt"})

    return change


def with_text_of(*tokens: str) -> Callable[[Path], None]:
    return lambda folder: llama_text(*tokens).save_pretrained(folder / "llm")


WEIGHTS = "model.safetensors"
TOWER_CONFIG = "vision_tower/config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mm_projector"), "lacks the folder mm_projector: fetch mit-han-lab"),
        (without("vision_tower"), "lacks the folder vision_tower"),
        (without("llm/model-00002-of-00002.safetensors"), "cannot be read as LlamaForCausalLM"),
        (without(f"vision_tower/{WEIGHTS}"), "vision_tower holds no weights"),
        (without(f"mm_projector/{WEIGHTS}"), "mm_projector holds no weights"),
        (without("llm/tokenizer.json"), "llm lacks its text tokenizer"),
        (edited("config.json", "vision_tower_cfg"), "does not name vision_tower_cfg"),
        (edited(TOWER_CONFIG, "rqtransformer"), "does not say rqtransformer.embed_dim"),
        (edited(TOWER_CONFIG, "rqvaesiglip", "ddconfig"), "does not say rqvaesiglip.ddconfig"),
        (
            edited(TOWER_CONFIG, "rqvaesiglip", "decoder_latent_shape", value=[32, 32]),
            "resizes its tokens before decoding",
        ),
        (without("vision_tower/siglip"), "how many heads its SigLIP of width 16 has"),
        (
            lacking(f"vision_tower/{WEIGHTS}", "rqtransformer.in_mlp_1.weight"),
            r"lacks heads.local.context.weight \(1 missing",
        ),
        (
            lacking(f"vision_tower/{WEIGHTS}", "rqvaesiglip.post_quant_conv.bias"),
            "1 missing: post_quant_conv.bias",
        ),
        (lacking(f"mm_projector/{WEIGHTS}", "layers.2.bias"), "lacks projector.layers.1.bias"),
        (with_text_of("<im_start>"), "lacks <im_end>: it is not that of VILA-U"),
        (with_text_of("a1", "a2", "a3", "<im_start>", "<im_end>"), "357 and 358, but .* has 358"),
    ],
    ids=lambda value: "" if callable(value) else value.replace(" ", "-")[:30],
)
def test_what_is_missing_is_named_in_one_line(
    folder: Path, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    broken = copied(folder, tmp_path)
    change(broken)
    with pytest.raises(CheckpointError, match=message) as error:
        UnifiedModel.from_pretrained(broken)
    assert "\n" not in str(error.value)


def test_pieces_alone_need_a_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copied(folder, tmp_path)
    (broken / "llm" / "tokenizer.json").rename(broken / "llm" / "tokenizer.model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match="sentencepiece"):
        UnifiedModel.from_pretrained(broken)


def test_parts_may_be_named_by_folder(folder: Path, dense: UnifiedModel, tmp_path: Path) -> None:
    moved = copied(folder, tmp_path)
    (moved / "mm_projector").rename(moved / "joint")
    edited("config.json", "mm_projector_cfg", value="joint")(moved)
    again = UnifiedModel.from_pretrained(moved).backbone.state_dict()
    assert all(torch.equal(again[n], t) for n, t in dense.backbone.state_dict().items())
