"""Janus through our seams against transformers' own model: the same tokens, answers and pixels."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from host_fixtures import PROMPTS, assert_same_weights, with_plugin
from unicompress.backbones.text import build_text_tokenizer
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.feature_taps import taps
from unicompress.tokenizers.io import save_tokenizer
from unicompress.unified import UnifiedModel
from unified_toy import SPEC

BEGIN, END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
TOKENS = 16  # 4 x 4 at 16 pixels


@cache
def text() -> PreTrainedTokenizerFast:
    tokenizer = build_text_tokenizer(PROMPTS, 300)
    tokens = [AddedToken(t, special=True) for t in ("<s>", BEGIN, END, IMAGE)]
    tokenizer.add_special_tokens({"bos_token": tokens[0], "additional_special_tokens": tokens[1:]})
    return tokenizer


@cache
def official() -> JanusForConditionalGeneration:
    """Janus at toy size with weights large enough that its choices differ from place to place."""
    torch.manual_seed(3)
    ids = text().convert_tokens_to_ids
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(text()),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=text().bos_token_id,
            eos_token_id=text().eos_token_id,
            pad_token_id=text().pad_token_id,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=4,
            num_embeddings=24,
            latent_channels=16,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        image_token_id=ids(IMAGE),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "vqmodel" not in name:
                weight.normal_(std=0.35)
    model.generation_config.pad_token_id = text().pad_token_id
    model.generation_config.bos_token_id = text().bos_token_id
    model.generation_config.eos_token_id = text().eos_token_id
    model.generation_config.generation_kwargs = {"boi_token_id": ids(BEGIN)}
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("janus")
    official().save_pretrained(path)
    text().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense(folder: Path) -> UnifiedModel:
    return UnifiedModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def compressed(folder: Path, dense: UnifiedModel, tmp_path_factory) -> UnifiedModel:
    return with_plugin(folder, dense, SPEC, tmp_path_factory.mktemp("plugin"))


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ids(*parts: str) -> list[int]:
    return [i for part in parts for i in text()(part, add_special_tokens=False)["input_ids"]]


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pad = text().pad_token_id
    padded = [[pad] * (width - len(r)) + r for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(padded), torch.tensor(mask)


def official_codes(prompts: list[str], guidance: float) -> Tensor:
    start, begin = [text().bos_token_id], ids(BEGIN)
    rows = [start + ids(f"<|User|>: {p}\n\n<|Assistant|>:") + begin for p in prompts]
    tokens, mask = left_padded(rows)
    return official().generate(
        inputs=tokens,
        attention_mask=mask,
        generation_mode="image",
        do_sample=False,
        guidance_scale=guidance,
    )


@pytest.mark.parametrize("cfg", [5.0, 2.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_draws_the_codes_of_transformers(
    dense: UnifiedModel, prompts: list[str], cfg: float
) -> None:
    """Greedy with guidance; prompts of different lengths are padded on the left by both."""
    own = dense.draw_codes(prompts, cfg=cfg, temperature=0)
    assert own.shape == (len(prompts), TOKENS, 1)
    assert len(own.unique()) > 3  # the toy is not stuck on one code
    torch.testing.assert_close(own[..., 0], official_codes(prompts, cfg), rtol=0, atol=0)


def test_draws_greedily_without_guidance(dense: UnifiedModel) -> None:
    """transformers cannot leave guidance out; a scale barely above 1 is its nearest."""
    own = dense.draw_codes(PROMPTS, cfg=1.0, temperature=0)
    assert not torch.equal(own, dense.draw_codes(PROMPTS, cfg=5.0, temperature=0))
    torch.testing.assert_close(own[..., 0], official_codes(PROMPTS, 1 + 1e-9), rtol=0, atol=0)


def test_pixels_are_those_of_transformers(dense: UnifiedModel) -> None:
    codes = torch.arange(TOKENS)[None, :, None] % 24
    theirs = official().decode_image_tokens(codes[..., 0]).permute(0, 3, 1, 2)
    torch.testing.assert_close(dense.decode_codes(codes), theirs.clamp(-1, 1), rtol=0, atol=1e-5)


def test_answers_are_those_of_transformers(dense: UnifiedModel) -> None:
    """The image's features stand between the same words; greedy answers are the same ids."""
    questions = ["how many objects?", "what is left of the square?"]
    images = pictures(2)
    opening = [text().bos_token_id, *ids("<|User|>: "), *ids(BEGIN)]
    image = [official().config.image_token_id] * TOKENS + ids(END)
    rows = [opening + image + ids(f"\n{q}\n\n<|Assistant|>:") for q in questions]
    wanted = []
    for row, picture in zip(rows, images, strict=True):
        tokens = torch.tensor([row])
        normed = picture[None]  # mean and deviation 0.5: pixels in [-1, 1] as they are
        written = official().generate(
            inputs=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=normed,
            do_sample=False,
            max_new_tokens=12,
        )
        kept = written[0, len(row) :]
        wanted.append(text().decode(kept, skip_special_tokens=True).strip())
    assert dense.answer(images, questions, max_new_tokens=12) == wanted
    assert wanted[0] != wanted[1]
    assert dense.answer(-images, questions, max_new_tokens=12) != wanted  # the picture is looked at


def test_normalisation_is_the_released_one(folder: Path, dense: UnifiedModel) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    try:
        other = UnifiedModel.from_pretrained(folder)
    finally:
        path.unlink()
    assert other.understanding.tap.mean == (0.4, 0.5, 0.6)
    images = pictures(1)
    shift = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    scale = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    same = ((images + 1) / 2 - shift) / scale
    theirs = official().model.vision_model(pixel_values=same).last_hidden_state
    torch.testing.assert_close(other._features(images), theirs, rtol=1e-4, atol=1e-5)


def test_compressed_lengths(dense: UnifiedModel, compressed: UnifiedModel) -> None:
    """576 become 144 + N_g in the released size; 16 become 4 + 2 here, on both sides."""
    assert (dense.tokens_per_image, dense.interface_tokens) == (16, 18)
    assert (compressed.tokens_per_image, compressed.interface_tokens) == (6, 9)
    assert compressed.understanding_layout.length == 9
    features, codes = compressed.encode_image(pictures(2))
    assert features.shape == (2, 6, 32)
    assert codes.shape == (2, 6, 1)
    drawn = compressed.draw(PROMPTS, cfg=2.0, seed=1)
    assert drawn.shape == (2, 3, 16, 16)
    assert len(compressed.answer(pictures(1), ["how many?"])) == 1


def test_compressed_starts_from_the_released_weights(
    dense: UnifiedModel, compressed: UnifiedModel
) -> None:
    """With the host's codebook the codes mean what they meant, so table and head stay."""
    assert_same_weights(compressed, dense)


def test_codes_of_ones_own_get_a_new_head(
    folder: Path, dense: UnifiedModel, tmp_path: Path
) -> None:
    spec = replace(SPEC, global_codebook="separate", local_codebook="separate")
    ImageCodec(dense.tokenizer, spec).save_pretrained(tmp_path)
    model = UnifiedModel.from_pretrained(folder, codec=tmp_path)
    own, released = model.backbone.state_dict(), dense.backbone.state_dict()
    new = {name for name in released if not torch.equal(own[name], released[name])}
    assert new == {name for name in released if name.startswith(("tables.", "heads."))}
    assert any(name.startswith("heads.global.") for name in own)


def test_saves_and_loads_whole(compressed: UnifiedModel, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    options = {"cfg": 3.0, "temperature": 0.0}
    assert torch.equal(
        compressed.draw_codes(PROMPTS, **options), again.draw_codes(PROMPTS, **options)
    )
    features, _ = again.encode_image(pictures(1))
    assert torch.equal(features, compressed.encode_image(pictures(1))[0])


def test_losses_train_the_pooler_and_nothing_frozen(folder: Path, tmp_path: Path) -> None:
    model = UnifiedModel.from_pretrained(folder)
    spec = CodecSpec(stride=2, global_count=2, width=32, depth=1, heads=2)
    ImageCodec(model.tokenizer, spec).save_pretrained(tmp_path)
    model = UnifiedModel.from_pretrained(folder, codec=tmp_path).train()
    model.understanding.calibrate(pictures(3))
    reading = model.understanding_loss(pictures(2), [["how many?"], ["what?"]], [["two"], ["a"]])
    drawing = model.generation_loss(pictures(2), ["a circle", ""])
    (reading.loss + drawing.loss).backward()
    trained = {id(p) for p in model.trainable_parameters()}
    graded = {id(p) for p in model.parameters() if p.grad is not None}
    assert graded <= trained
    assert model.understanding.global_tokens.queries.grad.abs().sum() > 0
    assert model.backbone.special.grad.abs().sum(dim=1).count_nonzero() == 3
    assert all(p.grad is None for p in model.understanding.tap.parameters())
    assert not model.understanding.tap.training


def test_unconditional_prompt_is_padding(dense: UnifiedModel) -> None:
    prompt = dense._caption_ids("a red circle")
    blank = dense._unconditional_ids(prompt)
    assert blank[0] == text().bos_token_id
    assert set(blank[1:]) == {text().pad_token_id}
    assert len(blank) == len(prompt)


def test_plugin_of_another_host_is_refused(folder: Path, tmp_path: Path) -> None:
    other = official().config
    assert other.vq_config.num_embeddings == 24
    torch.manual_seed(9)
    from unicompress.tokenizers.janus_vq import JanusVQ

    ImageCodec(JanusVQ.tiny(), SPEC).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained around the tokenizer"):
        UnifiedModel.from_pretrained(folder, codec=tmp_path)


def test_our_own_folder_takes_no_codec(compressed: UnifiedModel, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="already says whether it compresses"):
        UnifiedModel.from_pretrained(tmp_path / "model", codec=tmp_path)


def test_incomplete_folder_is_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"cannot be read as JanusForConditional.*") as error:
        UnifiedModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_absent_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    """transformers would draw them at random and say so in a warning."""
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.generation_head.vision_head.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="generation_head") as error:
        UnifiedModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_every_tap_keeps_its_contract() -> None:
    for name in taps.names():
        tap = taps.get(name).tiny().eval()
        images = torch.rand(2, 3, tap.spec.image_size, tap.spec.image_size) * 2 - 1
        field = tap.encode(images)
        assert field.shape == (2, tap.spec.grid.length, tap.spec.dim)
        torch.testing.assert_close(field[:1], tap.encode(images[:1]), rtol=1e-4, atol=1e-5)
        again = taps.build(str(tap)).eval()
        again.load_state_dict(tap.state_dict())
        torch.testing.assert_close(again.encode(images), field)


def test_the_tokenizer_can_be_taken_out_for_stage_one(dense: UnifiedModel, tmp_path: Path) -> None:
    from unicompress.tokenizers.io import load_tokenizer

    save_tokenizer(dense.tokenizer, tmp_path / "host")
    host = load_tokenizer(tmp_path / "host")
    ImageCodec(host, SPEC).save_pretrained(tmp_path / "plugin")
    ImageCodec.from_pretrained(tmp_path / "plugin", dense.tokenizer)  # the same host
