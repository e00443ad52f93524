"""The exported plain language model draws the same codes as ours, with stock transformers only."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from unicompress.checkpoint import load_safetensors, read_json
from unicompress.codec import CodecSpec
from unicompress.errors import InputError
from unicompress.export import ImageSlots, codes_of
from unicompress.losses import image_ids
from unified_toy import SEPARATE, SPEC, pictures, tiny_model

PROMPTS = ["a red circle", "a", "how many objects left of a square?"]


@pytest.mark.parametrize("spec", [None, SPEC, SEPARATE])
def test_stock_generate_draws_our_codes(spec: CodecSpec | None, tmp_path: Path) -> None:
    model = tiny_model("toy_single", spec)
    model.export_causal_lm(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is LlamaForCausalLM
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.padding_side = "left"
    inputs = words(
        [f"{prompt}<img:begin>" for prompt in PROMPTS],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    ids = plain.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        logits_processor=[ImageSlots(tmp_path)],
    )
    drawn = ids[:, inputs["input_ids"].shape[1] :]
    space = model.backbone.space
    assert drawn.shape[1] == model.interface_tokens - 1
    assert (drawn[:, -1] == space.begin + 2).all()
    wanted = model.draw_codes(PROMPTS, cfg=1.0, temperature=0)
    assert torch.equal(codes_of(drawn, model.layout, space), wanted)


def test_logits_and_names_are_ours(tmp_path: Path) -> None:
    model = tiny_model("toy_single", SEPARATE)
    model.export_causal_lm(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    _, codes = model.encode_image(pictures(1))
    ids = image_ids(model.backbone, model.layout, codes)
    first, second = codes[0, :2, 0].tolist()
    locals_ = "".join(f"<img:{code}>" for code in codes[0, 2:, 0].tolist())
    written = (
        f"<img:begin><img:global:{first}><img:global:{second}><img:separator>{locals_}<img:end>"
    )
    assert words(written, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        theirs = plain(ids).logits
        embeds = model.backbone.embed_text(ids)
        places = torch.arange(ids.shape[1])[None]
        hidden = model.backbone(embeds, None, places)
        ours = model.backbone.vocabulary_logits(hidden, 0, model.backbone.space.vocabulary_size)
    torch.testing.assert_close(theirs, ours)


def test_the_files_agree_with_each_other(tmp_path: Path) -> None:
    """What a server reads without asking us: sizes, ids, names, and where to stop."""
    model = tiny_model("toy_single", SEPARATE)
    model.export_causal_lm(tmp_path)
    config, stop = read_json(tmp_path / "config.json"), model.backbone.space.begin + 2
    assert config["architectures"] == ["LlamaForCausalLM"]
    weights, _ = load_safetensors(tmp_path / "model.safetensors", digest_required=False)
    size = len(weights["model.embed_tokens.weight"])
    text = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (
        config["vocab_size"]
        == size
        == text.get_vocab_size()
        == model.backbone.space.vocabulary_size
    )
    ends = [model.text.eos_token_id, stop]
    generation = GenerationConfig.from_pretrained(tmp_path)
    generation.validate(strict=True)
    assert config["eos_token_id"] == generation.eos_token_id == ends
    assert config["pad_token_id"] == generation.pad_token_id == model.text.pad_token_id
    assert config["bos_token_id"] == model.text.bos_token_id
    assert generation.max_new_tokens == model.interface_tokens - 1
    assert generation.max_new_tokens < config["max_position_embeddings"]
    slots = read_json(tmp_path / "image_slots.json")
    names = ("<img:begin>", "<img:separator>", "<img:end>")
    assert [text.token_to_id(name) for name in names] == [
        slots["begin"], slots["separator"], slots["end"]
    ]  # fmt: skip
    assert all(0 <= first < first + count <= size for first, count in slots["entries"])
    # One entry a name, in text and out of it, also where special tokens are left out.
    code = model.backbone.space.first("local") + 7
    assert text.encode("a circle<img:7>", add_special_tokens=False).ids[-1] == code
    assert text.decode([slots["begin"], code, stop], skip_special_tokens=True).strip() == "<img:7>"


@pytest.mark.parametrize("scaled", [False, True])
def test_older_servers_read_the_same_rotary_embedding(scaled: bool, tmp_path: Path) -> None:
    model = tiny_model("toy_single")
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    if scaled:
        rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    model.lm.config.rope_parameters = rope
    model.export_causal_lm(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == ({"rope_type": "linear", "factor": 2.0} if scaled else None)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    words = read_json(tmp_path / "tokenizer_config.json")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_half_precision_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model("toy_single")
    model.export_causal_lm(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_a_sampler_without_constraints_is_asked_for_at_training(tmp_path: Path) -> None:
    """With the loss over the whole vocabulary, plain greedy decoding learns eq. 5 by itself."""
    model = tiny_model("toy_single", code_loss="vocabulary").train()
    optimizer = torch.optim.Adam(model.trainable_parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.generation_loss(pictures(1), ["a red circle"]).loss
        loss.backward()
        optimizer.step()
    model.eval().export_causal_lm(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    prompt = words("a red circle<img:begin>", add_special_tokens=False, return_tensors="pt")
    ids = plain.generate(input_ids=prompt["input_ids"], do_sample=False)
    _, codes = model.encode_image(pictures(1))
    wanted = image_ids(model.backbone, model.layout, codes)[0, 1:]
    assert torch.equal(ids[0, prompt["input_ids"].shape[1] :], wanted)


def test_several_codes_per_token_are_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this one has 8"):
        tiny_model("toy_multi").export_causal_lm(tmp_path)
