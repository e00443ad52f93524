"""The whole model: losses, isolation of questions, frozen parts, files, bad input."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import hub

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.losses import image_ids, read_text
from unicompress.sequence import pack_text
from unicompress.tokenizers.base import tokenizers
from unicompress.unified import DESCRIBE, UnifiedConfig, UnifiedModel
from unified_toy import HOSTS, LONG, SEPARATE, SPEC, pictures, text_tokenizer, tiny_lm, tiny_model

QUESTIONS = [["how many?", "what colour is the circle?"], [LONG]]
ANSWERS = [["two", "red"], ["blue"]]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("spec", [None, SPEC, SEPARATE])
def test_gradients_reach_what_is_trained_and_nothing_else(
    host: str, spec: CodecSpec | None
) -> None:
    model = tiny_model(host, spec).train()
    before = {n: t.clone() for n, t in model.tokenizer.state_dict().items()}
    loss = model.understanding_loss(pictures(2), QUESTIONS, ANSWERS).loss
    (loss + model.generation_loss(pictures(2), ["a red circle", ""]).loss).backward()
    trained = {id(p) for p in model.trainable_parameters()}
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("tokenizer.", "codec."))
        assert (id(parameter) in trained) != frozen, name
        assert parameter.requires_grad != frozen, name
        if frozen:
            assert parameter.grad is None, name
        elif spec is not None or "global" not in name:
            assert parameter.grad is not None, name
    assert all(torch.equal(t, before[n]) for n, t in model.tokenizer.state_dict().items())
    assert model.backbone.training
    assert not model.tokenizer.training
    assert spec is None or not model.codec.training


def test_generation_loss_is_the_mean_over_codes() -> None:
    model = tiny_model("toy_residual", SEPARATE)
    images, captions = pictures(2), ["a red circle", ""]
    _, codes = model.encode_image(images)
    with torch.no_grad():
        output = model.generation_loss(images, captions)
        total = torch.zeros(())
        for row, caption in zip(codes, captions, strict=True):
            ids = torch.tensor([model._caption_ids(caption)], dtype=torch.long)
            begin, separator, _ = (r[None, None] for r in model.backbone.delimiters())
            parts = [model.backbone.embed_text(ids), begin]
            for index, token in enumerate(row):
                stream = "global" if index < 2 else "local"
                embeds = torch.cat(parts, dim=1)
                places = torch.arange(embeds.shape[1])[None]
                state = model.backbone(embeds, None, places)[:, -1]
                logits = model.backbone.code_logits(state, token[None], stream)[0]
                total += torch.nn.functional.cross_entropy(logits, token, reduction="sum")
                parts.append(model.backbone.embed_codes(token[None, None], stream))
                if index == 1:
                    parts.append(separator)
    torch.testing.assert_close(output.loss, total / codes.numel())
    assert output.logs["tokens"] == codes.numel()
    assert {"loss", "accuracy", "loss_global", "loss_local"} <= output.logs.keys()


def test_packed_questions_equal_questions_alone() -> None:
    for spec in (None, SPEC):
        model = tiny_model("toy_single", spec)
        images = pictures(2)
        with torch.no_grad():
            packed = model.understanding_loss(images, QUESTIONS, ANSWERS)
            losses, counts = [], []
            for image, asked, told in zip(images, QUESTIONS, ANSWERS, strict=True):
                for question, answer in zip(asked, told, strict=True):
                    alone = model.understanding_loss(image[None], [[question]], [[answer]])
                    counts.append(alone.logs["tokens"])
                    losses.append(float(alone.loss))
        assert packed.logs["tokens"] == sum(counts)
        assert float(packed.loss) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_question_is_blind_to_the_others(attention: str) -> None:
    model = tiny_model("toy_single")
    model.lm.set_attn_implementation(attention)
    second = model._question_ids("what colour is the circle?")
    states = []
    for first in ("how many?", "a blu e", LONG):
        ids = model._question_ids(first)
        text = pack_text([[(ids, []), (second, [])]])
        with torch.no_grad():
            hidden = read_text(model.backbone, model._image_embeds(pictures(1)), text)
        states.append(hidden[:, len(ids) :])
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[0], states[2], atol=1e-5, rtol=1e-5)


def test_accuracy_logs() -> None:
    model = tiny_model("toy_single")
    head = model.lm.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        output = model.understanding_loss(pictures(2), QUESTIONS, ANSWERS)
    # All scores are equal, so the first entry wins everywhere and no answer is right.
    assert output.logs["answers"] == 0
    assert float(output.loss) == pytest.approx(torch.tensor(model.config.text_size).log().item())


def test_dense_tokens_stand_for_their_pixels() -> None:
    model = tiny_model("toy_multi")
    images = pictures(2)
    dense = model.tokenizer.encode(images)
    for given in (images, dense):
        features, codes = model.encode_image(given)
        torch.testing.assert_close(features, model.codec.compress(dense).sequence)
        assert torch.equal(codes, model.codec.encode(images))


def test_sources_differ_in_width_and_both_work() -> None:
    for spec in (None, SPEC):
        model = tiny_model("toy_single", spec, understanding_source="quantized")
        features, _ = model.encode_image(pictures(1))
        assert features.shape == (1, model.tokens_per_image, model.tokenizer.spec.code_dim)
        assert isinstance(model.describe(pictures(1), max_new_tokens=3)[0], str)


def test_describe_is_the_answer_to_a_fixed_question() -> None:
    model = tiny_model("toy_single")
    wanted = model.answer(pictures(2), [DESCRIBE] * 2, max_new_tokens=6)
    assert model.describe(pictures(2), max_new_tokens=6) == wanted


def test_token_counts() -> None:
    dense, compressed = tiny_model("toy_single", None), tiny_model("toy_single")
    assert (dense.tokens_per_image, dense.interface_tokens) == (24, 26)
    assert (compressed.tokens_per_image, compressed.interface_tokens) == (8, 11)
    assert compressed.interface_tokens == compressed.codec.interface_tokens()


def test_images_keep_their_precision_under_autocast() -> None:
    model = tiny_model("toy_single")
    features, codes = model.encode_image(pictures(2))
    with torch.autocast("cpu", torch.bfloat16):
        narrow_features, narrow_codes = model.encode_image(pictures(2))
        loss = model.understanding_loss(pictures(2), QUESTIONS, ANSWERS).loss
        (loss + model.generation_loss(pictures(2), ["a", LONG]).loss).backward()
    assert torch.equal(codes, narrow_codes)
    assert torch.equal(features, narrow_features)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("spec", [None, SEPARATE])
def test_saved_folder_needs_nothing_else(host: str, spec: CodecSpec | None, tmp_path: Path) -> None:
    model = tiny_model(host, spec)
    model.save_pretrained(tmp_path)
    loaded = UnifiedModel.from_pretrained(tmp_path)
    for other in (loaded, AutoModel.from_pretrained(tmp_path)):
        assert isinstance(other, UnifiedModel)
        assert not other.training
        weights = other.state_dict()
        assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(loaded.draw(["a red circle"], seed=3), model.draw(["a red circle"], seed=3))
    assert loaded.answer(pictures(1), ["how many?"]) == model.answer(pictures(1), ["how many?"])
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UnifiedConfig)


def test_half_precision_halves_the_file_and_ties_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UnifiedModel.from_parts(
        tokenizer=tokenizers.get("toy_single").tiny(),
        lm=tiny_lm(tie_word_embeddings=True),
        text_tokenizer=text_tokenizer(),
    )
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    full, half = (tmp_path / n / "model.safetensors" for n in ("full", "half"))
    unique = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert full.stat().st_size < 4 * sum(unique.values()) + 20_000
    assert half.stat().st_size < 2 * sum(unique.values()) + 20_000
    loaded = UnifiedModel.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    entries = loaded.lm.get_input_embeddings().weight
    assert entries is loaded.lm.get_output_embeddings().weight
    assert torch.equal(entries, model.lm.get_input_embeddings().weight.bfloat16().float())


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    tiny_model("toy_single").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    with pytest.raises(CheckpointError, match="is damaged"):
        UnifiedModel.from_pretrained(tmp_path)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        UnifiedModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="does not describe a unicompress model"):
        UnifiedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("entries", ["all", "image"])
def test_adapter_is_trained_and_merged_into_the_folder(entries: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, names = tiny_model("toy_single"), ["embed_tokens", "lm_head"]
    space = model.backbone.space
    image = list(range(space.begin, space.vocabulary_size))
    options = {
        "all": {"modules_to_save": names},
        "image": {"trainable_token_indices": dict.fromkeys(names, image)},
    }
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options[entries])
    model.lm = peft.get_peft_model(model.lm, config)
    assert model.lm is model.backbone.lm
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.understanding_loss(pictures(2), QUESTIONS, ANSWERS).loss.backward()
    model.generation_loss(pictures(2), ["a", ""]).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = UnifiedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.generation_loss(pictures(2), ["a", LONG]).loss
        torch.testing.assert_close(loaded.generation_loss(pictures(2), ["a", LONG]).loss, wanted)


def test_vocabulary_loss_counts_delimiters_too() -> None:
    model = tiny_model("toy_single", code_loss="vocabulary")
    images = pictures(2)
    _, codes = model.encode_image(images)
    ids = image_ids(model.backbone, model.layout, codes)
    with torch.no_grad():
        logits = model.lm(ids).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        output = model.generation_loss(images, ["", ""])
    torch.testing.assert_close(output.loss, wanted)
    assert output.logs["tokens"] == 2 * (model.interface_tokens - 1)


def test_bad_input() -> None:
    model, images = tiny_model("toy_single", positions=40), pictures(2)
    cases = [
        (lambda: model.draw([]), "list of at least one prompt"),
        (lambda: model.draw("a red circle"), "list of at least one prompt"),
        (lambda: model.draw(["a"], top_p=0.0), "top_p must be above 0"),
        (lambda: model.draw(["a"], temperature=-1.0), "temperature must be 0 or more"),
        (lambda: model.draw(["a", "b"], seed=[1]), "2 prompts need as many seeds, got 1"),
        (lambda: model.draw(["wxyz " * 30]), "the language model has 40: shorten the text"),
        (lambda: model.answer(images, ["wxyz " * 30] * 2), "has 40: shorten the text"),
        (lambda: model.answer(images, ["how?"]), "2 images need one question"),
        (lambda: model.answer(images, "how?"), "2 images need one question .* got a string"),
        (lambda: model.answer(images, ["how?", ["how?"]]), "all strings or all lists"),
        (lambda: model.answer(images, [[], []]), "no question to answer"),
        (lambda: model.answer(images, ["how?"] * 2, 0), "max_new_tokens must be at least 1"),
        (lambda: model.describe(torch.rand(1, 3, 8, 8)), r"shape \[batch, 3, 16, 24\], got"),
        (lambda: model.describe(images[:0]), "no image: pass at least one"),
        (lambda: model.encode_image(images[:0]), "at least one picture"),
        (lambda: model.understanding_loss(images, [["a"]] * 2, [["b"], []]), "1 questions came"),
        (lambda: model.generation_loss(images, ["a"]), "2 images need one caption each, got 1"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_parts_must_fit_together() -> None:
    host, other = (tokenizers.get("toy_multi").tiny() for _ in range(2))
    parts = {"tokenizer": host, "lm": tiny_lm(), "text_tokenizer": text_tokenizer()}
    for options, message in (
        ({"codec": ImageCodec(other, SPEC)}, "another tokenizer object"),
        ({"understanding_source": "pixels"}, "must be one of continuous, quantized"),
        ({"code_loss": "all"}, "must be one of slot, vocabulary"),
        ({"code_loss": "vocabulary"}, "needs one code per token, this tokenizer has 8"),
        ({"projector": "lineer"}, "Did you mean 'linear'"),
    ):
        with pytest.raises(InputError, match=message):
            UnifiedModel.from_parts(**parts, **options)


def test_push_to_hub_uploads_a_complete_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, uploaded = tiny_model("toy_single"), []
    api = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/tiny"))
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))

    def upload(_: UnifiedModel, folder: str, name: str, **__: object) -> None:
        uploaded.append((name, UnifiedModel.from_pretrained(folder)))

    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(UnifiedModel, "_upload_modified_files", upload)
    model.push_to_hub("me/tiny")
    [(name, loaded)] = uploaded
    assert name == "me/tiny"
    assert torch.equal(loaded.state_dict()["backbone.lm.lm_head.weight"], model.lm.lm_head.weight)
