"""Emu3 through our seams against transformers' own model: the same logits, answers and codes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from host_fixtures import PROMPTS, with_plugin
from unicompress.backbones.text import build_text_tokenizer
from unicompress.engine import use_engine
from unicompress.errors import CheckpointError, InputError
from unicompress.reducers.controls import Random
from unicompress.sequence import ImageLayout
from unicompress.tokens import Grid
from unicompress.unified import UnifiedModel
from unified_toy import SPEC

QUESTIONS = ["how many objects?", "what is left of the square?"]
GRID = Grid(3, 4)  # 24 x 32 pixels
RELEASE = f"emu3(rows={GRID.rows}, columns={GRID.columns})"
CODES = 24
EOL = "<|extra_200|>"
NAMES = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}


@cache
def text() -> PreTrainedTokenizerFast:
    small = build_text_tokenizer([*PROMPTS, *QUESTIONS], 300).backend_tokenizer
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = ["<|endoftext|>", "<|extra_203|>", "<|extra_204|>", EOL, *NAMES.values()]
    tokens += [f"<|visual token {code:06d}|>" for code in range(CODES)]
    small.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=small,
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMES,
        padding_side="left",
    )


@cache
def official() -> Emu3ForConditionalGeneration:
    """Emu3 at toy size with weights large enough that its choices differ from place to place."""
    torch.manual_seed(3)
    special = {n: getattr(text(), n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Emu3Config(
        text_config={
            "vocab_size": len(text()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **special,
        },
        vq_config={
            "codebook_size": CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
        vocabulary_map=text().get_vocab(),
    )
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "vqmodel" not in name:
                weight.normal_(std=0.35)
        spread_codebook(model.model.vqmodel)
    for name, entry in special.items():
        setattr(model.generation_config, name, entry)
    return model


def spread_codebook(vq: Emu3VQVAE) -> None:
    """Put the rows where the encoder's outputs lie, so that a picture has many codes."""
    noise = torch.rand(2, 3, 8 * GRID.rows, 8 * GRID.columns) * 2 - 1
    hidden = vq.encode(noise, [(24, 32)] * 2).last_hidden_state.transpose(1, 2)
    found = vq.quant_conv(hidden).movedim(1, -1).flatten(0, -2)
    rows = vq.quantize.embedding.weight
    rows.copy_(found.mean(dim=0) + found.std(dim=0) * rows)


@cache
def processor() -> Emu3Processor:
    images = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=64)
    return Emu3Processor(images, text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emu3")
    official().save_pretrained(path)
    text().save_pretrained(path)
    processor().image_processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_pretrained(folder, release=RELEASE)


@pytest.fixture(scope="module")
def compressed(
    folder: Path, dense: UnifiedModel, tmp_path_factory: pytest.TempPathFactory
) -> UnifiedModel:
    return with_plugin(folder, dense, SPEC, tmp_path_factory.mktemp("plugin"), release=RELEASE)


@cache
def photographs() -> list[Image.Image]:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, 8 * GRID.rows, 8 * GRID.columns, 3), generator=draw)
    return [Image.fromarray(values.byte().numpy()) for values in noise]


def pictures() -> Tensor:
    """The same in [-1, 1], [b 3 h w]."""
    return processor().image_processor(photographs(), return_tensors="pt")["pixel_values"]


def asked(question: str) -> str:
    return f"You are a helpful assistant. USER: <image>{question}. ASSISTANT:"


def in_lines(batch: int, ids: Tensor) -> list[int]:
    """`prefix_allowed_tokens_fn`: what may follow the tokens of one row."""
    entry = text().convert_tokens_to_ids
    written = len(ids) - 1 - ids.tolist().index(entry("<|image token|>"))
    line, after = GRID.columns + 1, written - GRID.rows * (GRID.columns + 1)
    if after >= 0:
        closing = ["<|extra_201|>", "<|image end|>", "<|extra_204|>", "<|endoftext|>"]
        return [entry(closing[min(after, 3)])]
    if written % line == GRID.columns:
        return [entry(EOL)]
    return official().vocabulary_mapping.image_tokens


def official_codes(prompts: list[str], cfg: float) -> Tensor:
    options = {
        "return_tensors": "pt",
        "padding": True,
        "return_for_image_generation": True,
        "ratio": f"{GRID.columns}:{GRID.rows}",
        "image_area": 64 * GRID.length,
    }
    inputs = processor()(text=prompts, **options)
    blank = processor()(text=[""] * len(prompts), **options)
    assert inputs.pop("image_sizes") == [[*GRID]] * len(prompts)
    length = GRID.rows * (GRID.columns + 1) + 3
    written = official().generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        prefix_allowed_tokens_fn=in_lines,
        guidance_scale=cfg,
        negative_prompt_ids=blank.input_ids,
        negative_prompt_attention_mask=blank.attention_mask,
    )[:, inputs.input_ids.shape[1] :]
    assert written.shape[1] == length
    lines = written[:, :-3].unflatten(1, (GRID.rows, GRID.columns + 1))
    return official().vocabulary_mapping.convert_bpe2img(lines).flatten(1)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_draws_the_codes_of_transformers(
    dense: UnifiedModel, prompts: list[str], cfg: float
) -> None:
    own = dense.draw_codes(prompts, cfg=cfg, temperature=0)
    assert own.shape == (len(prompts), GRID.length, 1)
    assert len(own.unique()) > 3  # the toy is not stuck on one code
    assert torch.equal(own[..., 0], official_codes(prompts, cfg).long())


def test_the_two_guidances_differ(dense: UnifiedModel) -> None:
    plain, guided = (dense.draw_codes(PROMPTS, cfg=cfg, temperature=0) for cfg in (1.0, 3.0))
    assert not torch.equal(plain, guided)


def test_fixed_shapes_draw_the_same(dense: UnifiedModel) -> None:
    plain = dense.draw_codes(PROMPTS, cfg=3.0, temperature=0)
    with use_engine("fixed"):
        assert torch.equal(plain, dense.draw_codes(PROMPTS, cfg=3.0, temperature=0))


def test_pixels_are_those_of_transformers(dense: UnifiedModel) -> None:
    codes = torch.arange(GRID.length)[None, :, None] % CODES
    theirs = official().model.vqmodel.decode(codes.view(1, *GRID))
    torch.testing.assert_close(dense.decode_codes(codes), theirs.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_are_those_of_transformers(dense: UnifiedModel) -> None:
    """Of the whole prompt: start, role, announced image, lines of codes, question."""
    inputs = processor()(images=photographs()[:1], text=[asked(QUESTIONS[0])], return_tensors="pt")
    theirs = official()(**inputs).logits
    words = torch.tensor([dense._question_ids(QUESTIONS[0])])
    front = dense._image_embeds(pictures()[:1])
    embeds = torch.cat([front, dense.backbone.embed_text(words)], dim=1)
    hidden = dense.backbone(embeds, None, torch.arange(embeds.shape[1])[None])
    own = dense.backbone.text_logits(hidden)
    assert own.shape == theirs.shape
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_answers_are_those_of_transformers(dense: UnifiedModel) -> None:
    wanted = []
    for image, question in zip(photographs(), QUESTIONS, strict=True):
        inputs = processor()(images=[image], text=[asked(question)], return_tensors="pt")
        written = official().generate(**inputs, do_sample=False, max_new_tokens=12)
        kept = written[0, inputs.input_ids.shape[1] :]
        wanted.append(text().decode(kept, skip_special_tokens=True).strip())
    assert dense.answer(pictures(), QUESTIONS, max_new_tokens=12) == wanted
    assert wanted[0] != wanted[1]
    other = dense.answer(pictures().flip(0), QUESTIONS, max_new_tokens=12)
    assert other != wanted  # the picture is looked at


def test_compressed_sequence_is_the_announced_one(
    dense: UnifiedModel, compressed: UnifiedModel
) -> None:
    """12 tokens in 3 lines become 2 globals and 4 tokens in 2 lines, under the smaller grid."""
    assert (dense.tokens_per_image, dense.interface_tokens) == (12, 12 + 3 + 2)
    assert (compressed.tokens_per_image, compressed.interface_tokens) == (6, 6 + 2 + 3)
    codes = compressed.encode_image(pictures()[:1])[1][0, :, 0].tolist()
    words = [f"<|visual token {code:06d}|>" for code in codes]
    # SEP starts as the end of a line.
    lines = [*words[:2], EOL, *words[2:4], EOL, *words[4:], EOL, "<|extra_201|>"]
    written = "You are a helpful assistant. USER: <|image start|>2*2<|image token|>"
    ids = text()(text().bos_token + written + "".join(lines), return_tensors="pt").input_ids
    front = compressed._image_embeds(pictures()[:1])
    assert torch.equal(front, official().get_input_embeddings()(ids))
    drawn = text().decode(compressed._caption_ids("a red circle"))
    assert drawn == "<|extra_203|>a red circle<|image start|>2*2"


def test_compressed_starts_from_the_released_weights(
    dense: UnifiedModel, compressed: UnifiedModel
) -> None:
    """Codes of the host's codebook mean what they meant: nothing is new but the plug-in."""
    own, released = compressed.backbone.state_dict(), dense.backbone.state_dict()
    assert own.keys() == released.keys()
    assert all(torch.equal(own[name], released[name]) for name in own)
    assert {name for name in own if not name.startswith("lm.")} == {"special"}


def test_compressed_answers_and_draws(compressed: UnifiedModel) -> None:
    drawn = compressed.draw(PROMPTS, cfg=2.0, seed=1)
    assert drawn.shape == (2, 3, 24, 32)
    assert len(compressed.answer(pictures(), QUESTIONS)) == 2


@torch.no_grad()
def test_compressed_drawing_equals_the_plain_loop(compressed: UnifiedModel) -> None:
    """The whole sequence from scratch for every code, without cache, padding or mask."""
    backbone, found = compressed.backbone, []
    begin, separator, _, line = (row[None, None] for row in backbone.delimiters())
    for _ in range(6):
        parts = [backbone.embed_text(torch.tensor([compressed._caption_ids(PROMPTS[1])])), begin]
        for place, code in enumerate(found):
            parts.append(backbone.embed_codes(code[None], "local"))
            parts += [separator] if place == 1 else [line] if place in (3, 5) else []
        embeds = torch.cat(parts, dim=1)
        hidden = backbone(embeds, None, torch.arange(embeds.shape[1])[None])[:, -1]
        scores = official().lm_head(hidden)
        visual = official().vocabulary_mapping.image_tokens
        found.append(scores[:, visual].argmax(dim=-1, keepdim=True))
    own = compressed.draw_codes(PROMPTS, cfg=1.0, temperature=0)[1]
    assert torch.equal(own, torch.cat(found))


def test_codes_of_ones_own(folder: Path, dense: UnifiedModel, tmp_path: Path) -> None:
    """Separate globals get entries of their own; locals only where their number is another."""
    spec = replace(SPEC, global_codebook="separate", local_codebook="separate")
    same = with_plugin(folder, dense, spec, tmp_path / "same", release=RELEASE)
    assert set(same.backbone.tables) == set(same.backbone.heads) == {"global"}
    spec = replace(spec, local_codebook_size=9)
    other = with_plugin(folder, dense, spec, tmp_path / "other", release=RELEASE)
    assert set(other.backbone.tables) == {"global", "local"}
    codes = other.draw_codes(PROMPTS * 4, temperature=4.0)
    assert codes[:, 2:].max() < 9 <= codes[:, :2].max() < CODES
    loss = other.generation_loss(pictures(), PROMPTS).loss
    loss.backward()
    assert all(p.grad is not None for p in other.backbone.heads.parameters())


def test_saves_and_loads_whole(compressed: UnifiedModel, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    options = {"cfg": 3.0, "temperature": 0.0}
    assert torch.equal(
        compressed.draw_codes(PROMPTS, **options), again.draw_codes(PROMPTS, **options)
    )
    assert compressed.answer(pictures(), QUESTIONS) == again.answer(pictures(), QUESTIONS)


def test_losses_train_the_language_model_alone(folder: Path, tmp_path: Path, dense) -> None:
    model = with_plugin(folder, dense, SPEC, tmp_path, release=RELEASE).train()
    reading = model.understanding_loss(pictures(), [["how many?"], ["what?"]], [["two"], ["a"]])
    drawing = model.generation_loss(pictures(), ["a circle", ""])
    (reading.loss + drawing.loss).backward()
    graded = {id(p) for p in model.parameters() if p.grad is not None}
    assert graded == {id(p) for p in model.trainable_parameters()}
    assert model.backbone.special.grad.abs().sum(dim=1).count_nonzero() == 4


@torch.no_grad()
def test_generation_loss_is_that_of_the_official_sequence(dense: UnifiedModel) -> None:
    """The mean cross-entropy of the visual tokens among themselves, in transformers' sequence."""
    codes = dense.encode_image(pictures()[:1])[1][0, :, 0]
    assert len(codes.unique()) > 3
    rows = official().vocabulary_mapping.convert_img2bpe(codes.view(*GRID)).flatten()
    front = processor()(
        text=[PROMPTS[0]],
        return_tensors="pt",
        return_for_image_generation=True,
        ratio=f"{GRID.columns}:{GRID.rows}",
        image_area=64 * GRID.length,
    ).input_ids
    ids = torch.cat([front, rows[None].long()], dim=1)
    visual = official().vocabulary_mapping.image_tokens
    scores = official()(ids).logits[0, front.shape[1] - 1 : -1, visual].log_softmax(dim=-1)
    kept = rows != text().convert_tokens_to_ids(EOL)
    wanted = -scores[kept].gather(1, codes[:, None]).mean()
    own = dense.generation_loss(pictures()[:1], PROMPTS[:1]).loss
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_line_ends_stand_behind_the_rows_of_local_tokens() -> None:
    layout = ImageLayout(2, Grid(2, 3), row_ends=True)
    tokens = torch.arange(8)[None, :, None]
    row = layout.arrange(torch.tensor([[-1], [-2], [-3], [-4]]), tokens)[0, :, 0].tolist()
    assert row == [-1, 0, 1, -2, 2, 3, 4, -4, 5, 6, 7, -4, -3]
    assert len(row) == layout.length
    assert [row[place] for place in layout.local_places] == [2, 3, 4, 5, 6, 7]
    assert [row[place + 1] for place in layout.predictors] == list(range(8))
    assert [r for r, token in zip(row, layout.token_columns, strict=True) if token] == [*range(8)]
    assert [token for token in range(8) if layout.ends_row(token)] == [4, 7]


@torch.no_grad()
def test_reducers_find_the_codes_between_the_line_ends(compressed: UnifiedModel) -> None:
    with Random(keep=2).on(compressed) as tracker:
        compressed.answer(pictures()[:1], QUESTIONS[:1])
    (field,) = tracker.last.prompt.fields
    codes = compressed.encode_image(pictures()[:1])[1][0, 2:, 0]
    front = compressed._image_embeds(pictures()[:1])[0]
    found = front[field.columns]
    assert torch.equal(found, compressed.backbone.embed_codes(codes[None, :, None], "local")[0])
    assert len(tracker.last.alive[0]) == 2


def test_both_layouts_of_names_are_read(folder: Path, dense: UnifiedModel, tmp_path: Path) -> None:
    """Released folders have the names that transformers still writes; newer ones are its own."""
    shutil.copytree(folder, tmp_path / "other")
    weights = {name: tensor.clone() for name, tensor in official().state_dict().items()}
    assert not load_file(folder / "model.safetensors").keys() & weights.keys()
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    model = UnifiedModel.from_pretrained(tmp_path / "other", release=RELEASE)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in dense.state_dict().items())


def test_the_default_grid_is_the_released_one(folder: Path) -> None:
    model = UnifiedModel.from_pretrained(folder)
    assert model.tokenizer.spec.grid == Grid(90, 90)
    assert model.interface_tokens == 90 * 91 + 2


def _no_map(values: dict) -> None:
    values["vocabulary_map"] = None


def _swapped(values: dict) -> None:
    entries = values["vocabulary_map"]
    first, second = (f"<|visual token {code:06d}|>" for code in (0, 1))
    entries[first], entries[second] = entries[second], entries[first]


def _fewer(values: dict) -> None:
    del values["vocabulary_map"][f"<|visual token {CODES - 1:06d}|>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_map, "has no vocabulary_map with all visual tokens in order"),
        (_swapped, "has no vocabulary_map with all visual tokens in order"),
        (_fewer, "names 23 visual tokens for a codebook of 24"),
    ],
)
def test_foreign_vocabularies_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        UnifiedModel.from_pretrained(tmp_path / "copy", release=RELEASE)
    assert "\n" not in str(error.value)


def test_another_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.48, 0.46, 0.41]}')
    with pytest.raises(CheckpointError, match=r"image_mean \[0.48, 0.46, 0.41\]; this host only"):
        UnifiedModel.from_pretrained(tmp_path / "copy", release=RELEASE)


def test_another_text_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    build_text_tokenizer(PROMPTS, 300).save_pretrained(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"lacks <\|image token\|>: it is not that of Emu3"):
        UnifiedModel.from_pretrained(tmp_path / "copy", release=RELEASE)


def test_incomplete_folder_is_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read as Emu3ForConditional") as error:
        UnifiedModel.from_pretrained(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_release_must_be_of_the_model(folder: Path, dense: UnifiedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a released emu3: release cannot be janus"):
        UnifiedModel.from_pretrained(folder, release="janus")
    dense.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a model of our own"):
        UnifiedModel.from_pretrained(tmp_path, release=RELEASE)


def test_features_are_refused(dense: UnifiedModel) -> None:
    with pytest.raises(InputError, match="reads codes, not features"):
        UnifiedModel.from_parts(
            tokenizer=dense.tokenizer,
            lm=dense.lm,
            text_tokenizer=dense.text,
            backbone=str(dense.config.backbone),
        )


def test_codes_beside_the_vocabulary_are_not_exported(dense: UnifiedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beside its vocabulary"):
        dense.export_causal_lm(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
