"""Sampling and the cached loops, against plain loops that recompute everything."""

import pytest
import torch
from torch import Tensor

from unicompress.codec import CodecSpec
from unicompress.errors import InputError
from unicompress.generate import Sampling, Timings, noise
from unicompress.unified import UnifiedModel
from unified_toy import HOSTS, LONG, SEPARATE, SPEC, pictures, tiny_model

HALF = torch.full((1,), 0.5, dtype=torch.float64)


def test_cuts_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double().log()
    kept = {
        (0, 1.0): [0.4, 0.3, 0.2, 0.1],
        (2, 1.0): [4 / 7, 3 / 7, 0, 0],
        (0, 0.5): [0.4, 0.3, 0, 0],
        (0, 0.01): [0.4, 0, 0, 0],
    }
    for (k, p), wanted in kept.items():
        probabilities = Sampling(top_k=k, top_p=p).probabilities(logits)
        torch.testing.assert_close(probabilities, torch.tensor([wanted]).double())


def test_sampling_follows_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = noise([7], 4000, 1)[0, :, 0]
    codes = Sampling().choose(shares.log().expand(4000, -1), uniform)
    found = torch.bincount(codes, minlength=4) / 4000
    assert found[1] == 0
    torch.testing.assert_close(found, shares, atol=0.03, rtol=0)


def test_extremes_of_the_noise_never_pick_what_was_cut_off() -> None:
    logits = torch.tensor([[-30.0, 2.0, 1.0, -30.0]])
    for value in (0.0, 1 - 2**-24):
        uniform = torch.tensor([value], dtype=torch.float64)
        assert Sampling(top_k=2).choose(logits, uniform).item() in (1, 2)


def test_temperature_sharpens_and_guidance_follows_the_formula() -> None:
    conditional, unconditional = torch.tensor([[1.0, 0.9]]), torch.tensor([[1.0, 0.0]])
    both = torch.cat([conditional, unconditional])
    assert Sampling(temperature=0).choose(conditional, HALF).tolist() == [0]
    assert Sampling(cfg=2, temperature=0).choose(both, HALF).tolist() == [1, 1]
    assert Sampling(cfg=0, temperature=0).choose(both, HALF).tolist() == [0, 0]
    cold = Sampling(temperature=0.01).probabilities(conditional)
    assert cold[0, 0] > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"cfg": -1.0}, "cfg must be 0 or more"),
    ],
)
def test_impossible_sampling(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)


@torch.no_grad()
def plain_greedy_codes(model: UnifiedModel, prompt: str, cfg: float) -> Tensor:
    """The whole sequence from scratch for every code, one prompt, no cache, no padding, no mask."""
    backbone, layout = model.backbone, model.layout
    found: list[Tensor] = []

    def state(text: str) -> Tensor:
        ids = torch.tensor([model._caption_ids(text)], dtype=torch.long)
        begin, separator, _ = (row[None, None] for row in backbone.delimiters())
        parts = [backbone.embed_text(ids), begin]
        for index, codes in enumerate(found):
            stream = "global" if index < layout.global_count else "local"
            parts.append(backbone.embed_codes(codes[None, None], stream))
            if index + 1 == layout.global_count:
                parts.append(separator)
        embeds = torch.cat(parts, dim=1)
        return backbone(embeds, None, torch.arange(embeds.shape[1])[None])[:, -1]

    for index in range(layout.tokens):
        stream = "global" if index < layout.global_count else "local"
        states = [state(prompt), state("")]
        token = torch.zeros(1, backbone.space.codes_per_token, dtype=torch.long)
        for number in range(backbone.space.codes_per_token):
            yes, no = (backbone.code_logits(s, token, stream)[0, number] for s in states)
            token[0, number] = (no + cfg * (yes - no)).argmax()
        found.append(token[0])
    return torch.stack(found)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "spec", [None, SPEC, SEPARATE, CodecSpec(stride=4, global_count=0, width=32)]
)
def test_ragged_cached_drawing_equals_the_plain_loop(host: str, spec: CodecSpec | None) -> None:
    model = tiny_model(host, spec)
    prompts = ["a red circle", "", LONG]
    codes = model.draw_codes(prompts, cfg=1.5, temperature=0)
    assert codes.shape == (3, model.tokens_per_image, model.tokenizer.spec.codes_per_token)
    for row, prompt in list(zip(codes, prompts, strict=True))[1:]:
        assert torch.equal(row, plain_greedy_codes(model, prompt, 1.5))


def test_separate_codebooks_keep_to_their_range() -> None:
    codes = tiny_model("toy_single", SEPARATE).draw_codes(["a"] * 6, temperature=5.0)
    assert codes[:, :2].max() < 5
    assert codes[:, 2:].max() >= 5


@pytest.mark.parametrize("host", ["toy_single", "toy_residual"])
def test_a_picture_depends_on_its_prompt_and_seed_alone(host: str) -> None:
    model = tiny_model(host)
    options = {"cfg": 2.0, "temperature": 1.0, "top_k": 12, "top_p": 0.95}
    batch = model.draw_codes(["a red circle", LONG, "a red circle"], seed=5, **options)
    again = model.draw_codes(["a red circle", LONG, "a red circle"], seed=5, **options)
    assert torch.equal(batch, again)
    assert torch.equal(batch[1:2], model.draw_codes([LONG], seed=6, **options))
    assert torch.equal(batch[[2]], model.draw_codes(["a red circle"], seed=[7], **options))
    assert not torch.equal(batch[0], batch[2])


def test_guidance_of_one_needs_no_second_branch() -> None:
    model = tiny_model("toy_single")
    seen = []
    model.backbone.lm.register_forward_pre_hook(lambda *_: seen.append("head"))
    model.backbone.inner.base_model.register_forward_pre_hook(
        lambda _m, _a, options: seen.append(len(options["inputs_embeds"])), with_kwargs=True
    )
    model.draw_codes(["a", "b"], cfg=1.0)
    assert seen == [2] * model.tokens_per_image  # as many passes as codes, none over all logits
    seen.clear()
    model.draw_codes(["a", "b"], cfg=2.0)
    assert seen == [4] * model.tokens_per_image


def test_drawing_ends_in_pixels_and_is_timed() -> None:
    for spec in (None, SPEC):
        model, timings = tiny_model("toy_single", spec), Timings()
        drawn = model.draw(["a red circle", "b"], seed=1, timings=timings)
        assert drawn.shape == (2, 3, 16, 24)
        assert drawn.abs().max() <= 1
        parts = vars(timings)
        assert list(parts) == ["prefill", "lm_steps", "head", "decompressor", "image_decoder"]
        assert all(seconds > 0 for seconds in parts.values())
        assert timings.total == pytest.approx(sum(parts.values()))
        assert torch.equal(drawn, model.draw(["a red circle", "b"], seed=1))


@torch.no_grad()
def plain_answer(model: UnifiedModel, image: Tensor, question: str, count: int) -> str:
    """One question, everything recomputed for every token."""
    front = model._image_embeds(image)
    ids = model._question_ids(question)
    written: list[int] = []
    for _ in range(count):
        words = model.backbone.embed_text(torch.tensor([ids + written]))
        embeds = torch.cat([front, words], dim=1)
        hidden = model.backbone(embeds, None, torch.arange(embeds.shape[1])[None])
        written.append(int(model.backbone.text_logits(hidden[:, -1]).argmax()))
    return model._decode(written, model._end())


@pytest.mark.parametrize("host", ["toy_single", "toy_multi"])
@pytest.mark.parametrize("spec", [None, SPEC])
def test_ragged_answers_equal_the_plain_loop(host: str, spec: CodecSpec | None) -> None:
    model = tiny_model(host, spec)
    images = pictures(3)
    questions = [["how many?", LONG, "a"], [LONG], ["what colour?", "how many?"]]
    answers = model.answer(images, questions, max_new_tokens=4)
    for image, asked, told in zip(images, questions, answers, strict=True):
        wanted = [plain_answer(model, image[None], question, 4) for question in asked]
        assert told == wanted
    flat = model.answer(images, ["how many?", LONG, "what colour?"], max_new_tokens=4)
    assert flat == [answers[0][0], answers[1][0], answers[2][0]]


def test_answers_stop_at_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("toy_single")
    red, steps = model._ids("red"), []

    def scripted(states: Tensor) -> Tensor:
        """ "red" and the end for the first question, the end at once for the second."""
        logits = torch.zeros(*states.shape[:2], model.config.text_size)
        word = [*red, model._end()][len(steps)]
        logits[:, 0, word], logits[:, 1, model._end()] = 1, 1
        steps.append(states.shape)
        return logits

    monkeypatch.setattr(model.backbone, "text_logits", scripted)
    assert model.answer(pictures(1), [["how many?", "a"]], max_new_tokens=50) == [["red", ""]]
    assert len(steps) == len(red) + 1
