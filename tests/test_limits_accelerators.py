"""HiMix, HMGen and withdrawal: exact identities, caches, gradients, costs, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from unicompress.accelerators.base import (
    Accelerator,
    ImageColumns,
    Mode,
    accelerators,
    build_accelerators,
)
from unicompress.accelerators.cost import Widths, multiply_adds, paper_cost
from unicompress.accelerators.decoder import check_decoder, image_projections, walk
from unicompress.backbones.base import CodeSpace
from unicompress.backbones.causal_lm import CausalLM, run_trunk
from unicompress.backbones.projectors import projectors
from unicompress.codec import ImageCodec
from unicompress.errors import InputError
from unicompress.sequence import SHARED, ImageLayout, drawing, reading, visible
from unicompress.tokenizers.base import tokenizers
from unicompress.tokens import Grid
from unicompress.unified import UnifiedModel
from unified_toy import SPEC, pictures, text_tokenizer

SPECS = {
    "himix": "himix",
    "hmgen": "hmgen(count=2)",
    "withdrawal": "withdrawal(after=2)",
}
OWN = {
    "himix": "himix(projections='image')",
    "hmgen": "hmgen(count=2, projections='image')",
    "withdrawal": "withdrawal(after=2, projections='image')",
}


def lm(kind: str = "llama", layers: int = 6, **options: Any) -> PreTrainedModel:
    """Large weights, grouped keys, and biases in Qwen2: what could be forgotten is there."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        **options,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    return model


def example(task: str = "understanding") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, mask, positions and marks: image tokens in two runs, text on every side."""
    torch.manual_seed(3)
    marks = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    groups = torch.tensor([[SHARED] * 8 + [1, 2]] * 2)
    groups[1, 0] = -1  # padding on the left, as where prompts differ in length
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 8], [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]])
    return torch.randn(2, 10, 32), visible(groups, groups, first=0), positions, marks


def states(
    model: PreTrainedModel, plan: tuple[Mode, ...], own: Any = None, embeds: Tensor | None = None
) -> Tensor:
    given, mask, positions, marks = example()
    return walk(model, plan, own, given if embeds is None else embeds, mask, positions, marks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_full_layers_are_the_language_models_own(kind: str, attention: str) -> None:
    """HMGen with K = 0, projections tied or fresh copies: the first step is that of the model."""
    model = lm(kind, attn_implementation=attention)
    embeds, mask, positions, _ = example()
    wanted = run_trunk(model, embeds, mask, positions)
    members = build_accelerators(["hmgen(count=0, projections='image')"])
    plan = members["generation"].plan(6)
    torch.testing.assert_close(states(model, plan), wanted, rtol=1e-4, atol=1e-5)
    own = image_projections(model, members)["image"]
    torch.testing.assert_close(states(model, plan, own), wanted, rtol=1e-4, atol=1e-5)
    nn.init.zeros_(own[3]["v_proj"].weight)  # and they are really used
    assert not torch.allclose(states(model, plan, own), wanted, atol=1e-3)


@pytest.mark.parametrize("name", accelerators.names())
def test_without_image_tokens_nothing_changes(name: str) -> None:
    model = lm()
    embeds, mask, positions, _ = example()
    plan = accelerators.build(SPECS[name]).plan(6)
    found = walk(model, plan, None, embeds, mask, positions, torch.zeros(10, dtype=torch.bool))
    wanted = run_trunk(model, embeds, mask, positions)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_himix_in_one_layer_is_exact_for_text() -> None:
    """With one layer and shared projections nothing the text reads has been computed yet."""
    model = lm(layers=1)
    embeds, mask, positions, marks = example()
    wanted, found = run_trunk(model, embeds, mask, positions), states(model, ("keys",))
    torch.testing.assert_close(found[:, ~marks], wanted[:, ~marks], rtol=1e-4, atol=1e-5)
    two = lm(layers=2)
    differs = states(two, ("keys",) * 2) - run_trunk(two, embeds, mask, positions)
    assert differs[:, ~marks].abs().max() > 1e-2


def test_himix_never_updates_image_rows() -> None:
    model = lm()
    embeds, _, _, marks = example()
    found = states(model, ("keys",) * 6)
    assert torch.equal(found[:, marks], model.model.norm(embeds)[:, marks])


def test_himix_respects_causal_order_of_image_keys() -> None:
    """Text before an image token does not notice it; text behind it does."""
    model = lm()
    embeds, _, _, _ = example()
    other = embeds.clone()
    other[:, 5] += 1.0  # an image token after text 0 and 3, before 7, 8 and 9
    before, after = states(model, ("keys",) * 6), states(model, ("keys",) * 6, embeds=other)
    assert torch.equal(before[:, [0, 3]], after[:, [0, 3]])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


def test_himix_gives_the_image_no_gradient_through_queries_and_feed_forward() -> None:
    """Queries, output projection and feed-forward network see rows of text and no others."""
    model = lm(layers=2)
    members = build_accelerators([OWN["himix"]])
    own = image_projections(model, members)["image"]
    assert {n.split(".")[1] for n, _ in own.named_parameters()} == {"k_proj", "v_proj"}
    embeds, mask, positions, marks = example()
    leaf = embeds.clone().requires_grad_(True)
    seen: list[tuple[str, Tensor]] = []
    modules = {
        name: getattr(layer.self_attn if "proj" in name else layer, name)
        for layer in model.model.layers[-1:]
        for name in ("q_proj", "o_proj", "mlp")
    }
    hooks = [
        module.register_forward_hook(lambda _m, given, _out, n=name: seen.append((n, given[0])))
        for name, module in modules.items()
    ]
    walk(model, ("keys", "keys"), own, leaf, mask, positions, marks)[:, ~marks].sum().backward()
    for hook in hooks:
        hook.remove()
    assert {name for name, _ in seen} == set(modules)
    assert all(given.shape[1] == int((~marks).sum()) for _, given in seen)  # text rows only
    assert leaf.grad is not None
    assert leaf.grad[:, marks].abs().amax(-1).min() > 0  # through keys and values it learns
    own_gradients = [p.grad for p in own.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in own_gradients)


def test_a_shallow_layer_passes_the_image_through_and_does_not_show_it() -> None:
    model = lm(layers=3)
    embeds, mask, positions, marks = example()
    captured = []
    hook = model.model.norm.register_forward_pre_hook(lambda _m, given: captured.append(given[0]))
    states(model, ("full", "text", "text"))
    states(model, ("full", "text", "full"))
    model.model.layers = model.model.layers[:1]
    run_trunk(model, embeds, mask, positions)
    hook.remove()
    assert torch.equal(captured[0][:, marks], captured[2][:, marks])  # bit by bit
    assert not torch.allclose(captured[1][:, marks], captured[2][:, marks])
    other = embeds.clone()
    other[:, marks] = 0
    alone = lm(layers=3)
    first, second = (states(alone, ("text",) * 3, embeds=e) for e in (embeds, other))
    assert torch.equal(first[:, ~marks], second[:, ~marks])


def test_hmgen_alternates_in_the_middle() -> None:
    def shallow(spec: str, layers: int) -> list[int]:
        return [i for i, mode in enumerate(accelerators.build(spec).plan(layers)) if mode == "text"]

    assert shallow("hmgen(count=3)", 28) == [12, 14, 16]
    assert shallow("hmgen(count=2)", 6) == [2, 4]
    assert shallow("hmgen(count=1)", 4) == [2]
    assert shallow("hmgen(count=0)", 4) == []
    for spec, layers in (("hmgen(count=2)", 4), ("hmgen(count=1)", 2), ("hmgen(count=9)", 16)):
        with pytest.raises(InputError, match="do not fit between the first and the last"):
            accelerators.build(spec).plan(layers)


def test_withdrawal_goes_on_with_the_text() -> None:
    plan = accelerators.build("withdrawal(after=2)").plan(4)
    assert plan == ("full", "full", "text", "text")
    with pytest.raises(InputError, match="needs at least 5 layers, the language model has 4"):
        accelerators.build("withdrawal(after=5)").plan(4)


def backbone(specs: list[str], layers: int = 6) -> CausalLM:
    model = lm(layers=layers)
    found = CausalLM(
        lm=model,
        space=CodeSpace(290, 1, 20),
        projector=projectors.build("linear", dim=4, hidden=32),
    )
    found.accelerate(specs)
    for sets in found.image_projections.values():  # so that they differ from the text's
        for weight in sets.parameters():
            nn.init.normal_(weight, std=0.3)
    return found.eval()


@pytest.mark.parametrize("specs", [SPECS, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("name", ["himix", "hmgen", "withdrawal"])
@torch.no_grad()
def test_cached_steps_equal_one_pass(name: str, specs: dict[str, str]) -> None:
    model = backbone([specs[name]])
    embeds, mask, positions, marks = example()
    task = accelerators.get(name).task
    wanted = model(embeds, mask, positions, None, ImageColumns(task, marks))
    plain = model(embeds, mask, positions)
    assert not torch.allclose(wanted[:, ~marks], plain[:, ~marks], atol=1e-3)
    cache, parts = model.new_cache(10), []
    for start, stop in ((0, 2), (2, 5), (5, 6), (6, 8), (8, 10)):
        image = ImageColumns(task, marks[:stop])
        rows = mask[:, :, start:stop, :stop]
        parts.append(model(embeds[:, start:stop], rows, positions[:, start:stop], cache, image))
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    text = int((~marks).sum())
    assert lengths == [text if mode == "text" else 10 for mode in model.plans[task]]


def test_paper_cost_is_that_of_the_paper() -> None:
    text, image, width = 60, 256, 3072
    full = paper_cost(("full",), text=text, image=image, width=width)
    assert full == 316**2 * width + 8 * 316 * width**2
    himix = paper_cost(accelerators.build("himix").plan(28), text=text, image=image, width=width)
    assert himix / (28 * full) == pytest.approx(60 / 316, rel=1e-12)
    hmgen = accelerators.build("hmgen(count=3)").plan(28)
    shallow = 60**2 * width + 8 * 60 * width**2
    found = paper_cost(hmgen, text=text, image=image, width=width)
    assert found == 25 * full + 3 * shallow
    assert found / (28 * full) > 1 - 3 / 28
    # With the image's keys and values, HiMix on Llama-3.2-3B costs 0.24, the paper's figure.
    widths = Widths(hidden=3072, queries=3072, keys=1024, feed_forward=8192)
    costs = [multiply_adds(plan, widths, text=text, image=image) for plan in (("keys",), ("full",))]
    assert round(costs[0] / costs[1], 2) == 0.24


@pytest.mark.parametrize("plan", [("full",) * 3, ("keys",) * 3, ("full", "text", "full")])
@torch.no_grad()
def test_counted_cost_is_what_torch_counts(plan: tuple[Mode, ...]) -> None:
    model = lm(layers=3, attn_implementation="eager")
    embeds, mask, positions, marks = example()
    with FlopCounterMode(display=False) as counter:
        walk(model, plan, None, embeds[:1], mask[:1], positions[:1], marks)
    widths = Widths.of(model.config)
    wanted = multiply_adds(plan, widths, text=int((~marks).sum()), image=int(marks.sum()))
    assert counter.get_total_flops() == 2 * wanted


def test_training_reaches_the_same_gradients_with_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = lm(layers=3).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        states(model, ("keys", "full", "text")).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def unified(specs: list[str], **options: str) -> UnifiedModel:
    tokenizer = tokenizers.get("toy_single").tiny()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(text_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return UnifiedModel.from_parts(
        tokenizer=tokenizer,
        codec=ImageCodec(tokenizer, SPEC),
        lm=LlamaForCausalLM(config),
        text_tokenizer=text_tokenizer(),
        accelerators=specs,
        **options,
    ).eval()


SHARE_ALL = ["himix(projections='image')", "hmgen(count=1, projections='image')"]
SHARE_PARTIAL = ["himix(projections='read')", "hmgen(count=1, projections='drawn')"]


@pytest.mark.parametrize("specs", [["himix"], SHARE_ALL, SHARE_PARTIAL])
def test_saved_models_come_back_with_their_accelerators(specs: list[str], tmp_path: Path) -> None:
    model = unified(specs)
    for weight in model.backbone.image_projections.parameters():
        nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    loaded = UnifiedModel.from_pretrained(tmp_path)
    assert {str(a) for a in loaded.backbone.accelerators.values()} == {
        str(a) for a in model.backbone.accelerators.values()
    }
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    asked = (pictures(2), ["what colour is the circle?", "how many objects?"])
    assert loaded.answer(*asked) == model.answer(*asked)
    drawn = [m.draw_codes(["a red circle", "a"], seed=3) for m in (loaded, model)]
    assert torch.equal(*drawn)


def test_sets_of_projections_hold_what_their_users_need() -> None:
    shared, partial = (
        unified(specs).backbone.image_projections for specs in (SHARE_ALL, SHARE_PARTIAL)
    )
    full, keys = {"q_proj", "k_proj", "v_proj"}, {"k_proj", "v_proj"}
    assert [set(layer) for layer in shared["image"]] == [full, full, keys, full]
    assert [set(layer) for layer in partial["read"]] == [keys] * 4
    assert [set(layer) for layer in partial["drawn"]] == [full, full, set(), full]


def test_losses_and_use_agree_about_the_image() -> None:
    """What training computes in one pass, answering and drawing compute step by step."""
    model = unified(["himix", "hmgen(count=1)"])
    plain = unified([])
    images, question = pictures(2), "how many objects?"
    with torch.no_grad():
        for number in range(2):
            one = images[number : number + 1]
            answer = model.answer(one, [question], max_new_tokens=3)[0]
            greedy = model.draw_codes(["a red circle"], cfg=1.0, temperature=0)
            layout = model.layout
            prompt = torch.tensor([model._caption_ids("a red circle")])
            tokens = torch.cat(
                [
                    model.backbone.embed_codes(greedy[:, : layout.global_count], "global"),
                    model.backbone.embed_codes(greedy[:, layout.global_count :], "local"),
                ],
                dim=1,
            )
            image = layout.arrange(model.backbone.delimiters(), tokens)
            embeds = torch.cat([model.backbone.embed_text(prompt), image], dim=1)
            places = torch.arange(embeds.shape[1])[None]
            columns = drawing(layout, prompt.shape[1], embeds.shape[1])
            hidden = model.backbone(embeds, None, places, image=columns)
            at = [prompt.shape[1] + i for i in layout.predictors]
            scores = model.backbone.code_logits(hidden[:, at], greedy, "local")
            assert torch.equal(scores.argmax(-1), greedy)
            front = model._image_embeds(one)
            asked = torch.tensor([model._question_ids(question)])
            whole = torch.cat([front, model.backbone.embed_text(asked)], dim=1)
            marks = reading(model._token_columns(front), whole.shape[1])
            assert int(marks.keys.sum()) == layout.tokens
            places = torch.arange(whole.shape[1])[None]
            first = model.backbone(whole, None, places, image=marks)[:, -1]
            word = model.text.decode(model.backbone.text_logits(first).argmax(-1)).strip()
            assert answer.startswith(word)
    losses = [
        m.understanding_loss(images, [[question]] * 2, [["two"]] * 2).loss for m in (model, plain)
    ]
    assert not torch.isclose(*losses)
    losses = [m.generation_loss(images, ["a red circle", "a"]).loss for m in (model, plain)]
    assert not torch.isclose(*losses)


def test_layout_marks_tokens_and_not_delimiters() -> None:
    marks = ImageLayout(2, Grid(1, 3)).token_columns
    assert marks.tolist() == [False, True, True, False, True, True, True, False]
    assert ImageLayout(0, Grid(1, 2)).token_columns.tolist() == [False, True, True, False]


def test_a_trained_model_can_be_accelerated_and_set_free_again() -> None:
    model = unified([])
    asked = (pictures(1), ["how many objects?"])
    before = model.draw_codes(["a red circle"], seed=1)
    model.accelerate(["hmgen(count=1)", "withdrawal(after=1)"])
    assert model.config.accelerators == ["hmgen(count=1)", "withdrawal(after=1)"]
    assert not torch.equal(before, model.draw_codes(["a red circle"], seed=1))
    model.answer(*asked)
    with pytest.raises(InputError, match=r"draws with hmgen.* is no plain language model"):
        model.export_causal_lm("nowhere")
    model.accelerate([])
    assert torch.equal(before, model.draw_codes(["a red circle"], seed=1))


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match=r"himix.* and withdrawal.* both accelerate understanding"):
        build_accelerators(["himix", "withdrawal(after=1)"])
    with pytest.raises(InputError, match=r"projections must be a plain name .* got 'a.b'"):
        build_accelerators(["himix(projections='a.b')"])
    with pytest.raises(InputError, match=r"unknown accelerator 'himx'. Did you mean 'himix'"):
        build_accelerators(["himx"])
    with pytest.raises(InputError, match="count of 0 or more"):
        build_accelerators(["hmgen(count=-1)"])
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(InputError, match="layers of Llama or Qwen2, GPT2LMHeadModel has others"):
        check_decoder(gpt)


@pytest.mark.parametrize("name", accelerators.names())
def test_every_accelerator_says_what_it_is(name: str) -> None:
    member = accelerators.build(SPECS[name])
    assert isinstance(member, Accelerator)
    assert str(accelerators.build(str(member))) == str(member)
    assert set(member.plan(6)) <= {"full", "keys", "text"}
    assert len(member.plan(6)) == 6
