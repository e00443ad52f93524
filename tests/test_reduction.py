"""Reducers inside models: caches, positions, masks, padding, several images, no trace left."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from reducer_hosts import IMAGE, Tiny, tiny
from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, reducers
from unicompress.reducers.controls import AveragePool, Random, Uniform
from unicompress.reducers.fastv import FastV
from unicompress.reducers.g2tr import G2TR
from unicompress.reducers.ivc_prune import IVCPrune
from unicompress.reducers.ppe import PPE
from unicompress.reducers.pyramid_drop import PyramidDrop
from unicompress.reducers.sparsevlm import SparseVLM
from unicompress.reducers.todre import ToDRE
from unicompress.reducers.visionzip import VisionZip
from unicompress.reducers.vscan import VScan
from unified_toy import TEXTS, pictures, tiny_model

NAMES = reducers.names()
HOSTS = ["llava", "llava_next", "internvl", "janus", "qwen2_5_vl"]
SHORT, LONG = [9, 10], [5, 6, 7, 8]


def make(name: str, keep: Any = 0.5) -> Reducer:
    """With a cut that a language model of four layers has."""
    member = reducers.get(name)
    early = "layer" in inspect.signature(member.__init__).parameters
    return member(keep=keep, **({"layer": 1} if early else {}))


def written(host: Tiny, inputs: dict[str, Tensor], count: int = 4) -> Tensor:
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    if host.model.generation_config.max_length:
        options["max_length"] = None  # Janus has a default that only leads to a warning
    ids = host.model.generate(**inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


def fail_inside(reducer: Reducer, model: nn.Module, before: list[Any]) -> None:
    with reducer.on(model):
        assert trace(model) != before
        raise RuntimeError("stop")


def trace(model: nn.Module) -> list[Any]:
    """All that a hook could leave behind."""
    return [
        (
            name,
            type(module),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ]


# An obvious second way: full length, dropped columns masked out


class Plain:
    """Runs a language model layer by layer over the whole sequence, cut columns hidden by masks."""

    def __init__(self, host: Tiny, inputs: dict[str, Tensor], extra: Tensor):
        self.trunk = host.model.model.language_model
        seen: dict[str, Any] = {}

        def listen(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        handle = self.trunk.register_forward_pre_hook(listen, with_kwargs=True)
        host.model(**inputs, use_cache=False)
        handle.remove()
        embed = host.model.get_input_embeddings()
        self.hidden = torch.cat([seen["inputs_embeds"], embed(extra)], dim=1)
        mask = inputs["attention_mask"]
        self.prompt = mask.shape[1]
        self.valid = torch.cat([mask, torch.ones_like(extra)], dim=1).bool()
        self.positions = positions_of(seen.get("position_ids"), mask, extra.shape[1])

    def run(self, reducer: Reducer, tracker: Any) -> Tensor:
        """States of the last prompt token and of all that follow."""
        hidden, prompt = self.hidden, self.prompt
        b, length, _ = hidden.shape
        alive = torch.ones(b, length, dtype=torch.bool)
        alive_after = [alive]
        positions = self.positions
        cut = 0
        steps = {step.layer: step for step in reducer.steps(len(self.trunk.layers))}
        final = self._final(tracker, alive)
        for index, layer in enumerate(self.trunk.layers):
            if index in steps:
                hidden, alive = hidden.clone(), alive.clone()
                policy = steps[index].reducer.positions
                for number, field in enumerate(tracker.last.prompt.fields):
                    columns = field.columns[alive[field.row, field.columns]]
                    alive[field.row, columns] = False
                    if steps[index].keep == 0:
                        continue
                    result = tracker.last.reductions[number][cut]
                    policy = result.positions
                    kept = columns[result.indices[0]]
                    alive[field.row, kept] = True
                    hidden[field.row, kept] = result.tokens[0].to(hidden)
                if policy == "reindex" and positions.ndim == 2:
                    positions = (self.positions - (~alive).cumsum(dim=1)).clamp(min=0)
                cut += 1
            keys = alive[:, None].expand(-1, length, -1).clone()
            if steps and next(iter(steps.values())).reducer.retroactive:
                keys[:, prompt:] = final[:, None]
            order = torch.arange(length)
            seen = (order <= order[:, None]) & keys & self.valid[:, None]
            seen = seen | (order == order[:, None])
            tables = self.trunk.rotary_emb(hidden, positions)
            hidden = layer(hidden, attention_mask=seen[:, None], position_embeddings=tables)
            alive_after.append(alive)
        return self.trunk.norm(hidden)[:, prompt - 1 :]

    @staticmethod
    def _final(tracker: Any, alive: Tensor) -> Tensor:
        final = alive.clone()
        for number, field in enumerate(tracker.last.prompt.fields):
            final[field.row, field.columns] = False
            final[field.row, field.columns[tracker.last.alive[number]]] = True
        return final


def positions_of(given: Tensor | None, mask: Tensor, extra: int) -> Tensor:
    """Positions of prompt and continuation, with three axes where the model has them."""
    if given is not None and given.ndim == 3:
        later = given[-3:].amax(dim=(0, 2))[None, :, None] + 1 + torch.arange(extra)
        return torch.cat([given[-3:], later.expand(3, -1, -1)], dim=2)
    mask = torch.cat([mask, torch.ones(len(mask), extra, dtype=mask.dtype)], dim=1)
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def cached(host: Tiny, inputs: dict[str, Tensor], extra: Tensor, positions: Tensor) -> Tensor:
    """The same states by prompt and cached steps, one token at a time."""
    model, prompt = host.model.model, inputs["input_ids"].shape[1]
    output = model(**inputs, position_ids=positions[..., :prompt], use_cache=True)
    states, mask = [output.last_hidden_state[:, -1:]], inputs["attention_mask"]
    for step in range(extra.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        spot = prompt + step
        output = model(
            input_ids=extra[:, step, None],
            attention_mask=mask,
            position_ids=positions[..., spot : spot + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        states.append(output.last_hidden_state)
    return torch.cat(states, dim=1)


def check_cached(host: Tiny, reducer: Reducer, images: list[int]) -> Any:
    inputs = host.prompt([LONG, SHORT], images)
    extra = torch.tensor([[11, 12, 13], [14, 15, 16]])
    with torch.no_grad():
        plain = Plain(host, inputs, extra)
        with reducer.on(host.model) as tracker:
            fast = cached(host, inputs, extra, plain.positions)
        slow = plain.run(reducer, tracker)
    torch.testing.assert_close(fast, slow, atol=2e-4, rtol=2e-4)
    return tracker


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ppe"])
def test_cached_decoding_is_the_full_forward_with_the_pruned_context(name: str) -> None:
    """Janus gives every signal; one row has two images, the other is padded on the left."""
    tracker = check_cached(tiny("janus"), make(name), [2, 1])
    for alive, reductions in zip(tracker.last.alive, tracker.last.reductions, strict=True):
        assert len(alive) < 64
        # The three cuts of SparseVLM fall on one layer here, and the last is the narrowest.
        assert reductions[0].indices.shape[1] == (18 if name == "sparsevlm" else 32)


@pytest.mark.parametrize(
    ("host", "spec"),
    [
        ("llava", "sparsevlm(keep=0.5, version='plus')"),
        ("qwen2_5_vl", "sparsevlm(keep=0.5, version='plus')"),
        ("llava", "tome(keep=0.25, inside=True)"),
        ("janus", "tome(keep=0.25, inside=True, positions='keep')"),
    ],
)
def test_it_holds_for_variants_of_a_method(host: str, spec: str) -> None:
    reducer = reducers.build(spec)
    tracker = check_cached(tiny(host), reducer, [2, 1])
    shifted = tracker.last.stages[-1].shift
    assert shifted.gt(0).all() == (reducer.positions == "reindex")
    assert shifted.any() == (reducer.positions == "reindex")


@pytest.mark.parametrize("host", [h for h in HOSTS if h != "janus"])
@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramid_drop", "ivc_prune"])
def test_it_holds_on_every_host(host: str, name: str) -> None:
    check_cached(tiny(host), make(name), [1, 2])


@pytest.mark.parametrize("name", ["uniform", "pyramid_drop"])
def test_it_holds_for_eager_attention(name: str) -> None:
    host = tiny("llava", "eager")
    inputs = host.prompt([LONG, SHORT], [1, 1])
    with make(name).on(host.model):
        eager = written(host, inputs)
    other = tiny("llava")
    with make(name).on(other.model):
        assert torch.equal(written(other, inputs), eager)


@pytest.mark.parametrize("policy", ["keep", "reindex"])
def test_both_position_policies(policy: str) -> None:
    tracker = check_cached(tiny("llava"), Uniform(keep=0.25, positions=policy), [1, 1])
    stage = tracker.last.stages[-1]
    assert stage.shift.tolist() == ([48, 48] if policy == "reindex" else [0, 0])


# Generation


@pytest.mark.parametrize("host", HOSTS)
def test_ratio_one_changes_nothing_and_half_changes_something(host: str) -> None:
    model = tiny(host)
    inputs = model.prompt([LONG, SHORT], [1, 1])
    plain = written(model, inputs)
    with FastV(keep=1.0, layer=1).on(model.model):
        assert torch.equal(written(model, inputs), plain)
    with Uniform(keep=0.1).on(model.model):
        assert not torch.equal(written(model, inputs), plain)
    assert torch.equal(written(model, inputs), plain)


@pytest.mark.parametrize("host", ["llava", "janus", "internvl"])
@pytest.mark.parametrize("name", ["fastv", "visionzip", "sparsevlm", "average_pool"])
def test_a_padded_batch_writes_what_its_rows_write_alone(host: str, name: str) -> None:
    model = tiny(host)
    inputs = model.prompt([LONG, SHORT], [1, 2])
    with make(name).on(model.model):
        together = written(model, inputs)
        first = 0
        for row, count in enumerate([1, 2]):
            own = inputs["attention_mask"][row].bool()
            alone = written(
                model,
                {
                    "input_ids": inputs["input_ids"][row, own][None],
                    "attention_mask": torch.ones(1, int(own.sum()), dtype=torch.long),
                    "pixel_values": inputs["pixel_values"][first : first + count],
                },
            )
            first += count
            assert torch.equal(alone[0], together[row])


def test_text_alone_is_left_alone() -> None:
    model = tiny("llava")
    inputs = {"input_ids": torch.tensor([[3, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}
    plain = written(model, inputs)
    with Random(keep=0.1).on(model.model) as tracker:
        assert torch.equal(written(model, inputs), plain)
    assert tracker.last is None


def test_the_prompt_keeps_its_length_outside() -> None:
    model = tiny("llava")
    inputs = model.prompt([LONG], [1])
    with torch.no_grad(), FastV(keep=0.25, layer=2).on(model.model) as tracker:
        output = model.model.model(**inputs, use_cache=True)
    length = inputs["input_ids"].shape[1]
    assert output.last_hidden_state.shape[1] == length
    zero = output.last_hidden_state[0].eq(0).all(dim=-1)
    assert int(zero.sum()) == 48
    assert (inputs["input_ids"][0][zero] == IMAGE).all()
    sizes = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert sizes == [length, length, length - 48, length - 48]
    assert tracker.last.length == length


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (IVCPrune(keep=0.5, layer=-1), "has layers 0 to"),
        (IVCPrune(keep=0.5, positions="reindex"), "cannot be renumbered"),
    ],
)
def test_cuts_that_cannot_be_carried_out_are_refused(reducer: IVCPrune, message: str) -> None:
    model = tiny("llava").model
    with pytest.raises(InputError, match=message), reducer.on(model):
        pass


def test_ivc_prune_forgets_in_earlier_layers_too() -> None:
    model = tiny("llava")
    inputs = model.prompt([LONG], [1])
    with torch.no_grad(), IVCPrune(keep=0.25).on(model.model):
        cache = model.model.model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    assert [layer.get_seq_length() for layer in cache.layers] == [length - 48] * 4


def test_todre_leaves_the_image_at_the_end() -> None:
    model = tiny("llava")
    inputs = model.prompt([LONG], [1])
    with torch.no_grad(), ToDRE(keep=0.25, exit=0.75).on(model.model):
        cache = model.model.model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    assert [layer.get_seq_length() for layer in cache.layers] == [length - 48] * 3 + [length - 64]


def test_gradients_flow_through_a_reduced_model() -> None:
    model = tiny("llava")
    inputs = model.prompt([LONG, SHORT], [1, 1])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with AveragePool(keep=0.25).on(model.model):
        model.model(**inputs, labels=labels).loss.backward()
    weight = model.model.model.multi_modal_projector.linear_1.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    model.model.zero_grad(set_to_none=True)


def test_ppe_turns_channels_by_members() -> None:
    """With one member per token PPE is the merger itself at kept positions of first members."""
    model = tiny("llava")
    inputs = model.prompt([LONG], [1])
    states = {}
    for members in (1, 2):
        with torch.no_grad(), PPE(keep=0.25, members=members).on(model.model) as tracker:
            states[members] = model.model.model(**inputs, use_cache=True).last_hidden_state
    assert not torch.allclose(states[1], states[2])
    stage = tracker.last.stages[-1]
    assert stage.mixed is not None
    rotary = model.model.model.language_model.rotary_emb
    every = rotary(states[1], torch.arange(states[1].shape[1])[None])[0][0]
    columns = tracker.last.prompt.fields[0].columns
    group = (tracker.last.reductions[0][0].assignment[0] == 5).nonzero()[:, 0]
    pair = columns[group[[0, 1 % len(group)]]]
    slot = 1 + 5  # one text token comes first
    expected = torch.where(torch.arange(8) % 4 % 2 == 0, every[pair[0]], every[pair[1]])
    torch.testing.assert_close(stage.mixed[0][0, slot], expected)


# Signals


def test_the_last_row_is_that_of_eager_attention() -> None:
    model = tiny("llava", "eager")
    inputs = model.prompt([LONG, SHORT], [1, 1])
    with torch.no_grad():
        weights = model.model(**inputs, output_attentions=True).attentions[1]
    with torch.no_grad(), FastV(keep=7, layer=2).on(model.model) as tracker:
        model.model(**inputs)
    for row, field in enumerate(tracker.last.prompt.fields):
        received = weights[row, :, -1, field.columns].mean(dim=0)
        expected = received.topk(7).indices.sort().values
        assert torch.equal(tracker.last.alive[row], expected)


def test_the_encoder_is_read_where_the_methods_say() -> None:
    model = tiny("llava", "eager")
    inputs = model.prompt([LONG], [1])
    tower = model.model.model.vision_tower
    with torch.no_grad():
        weights = tower(inputs["pixel_values"], output_attentions=True).attentions
    with torch.no_grad(), VScan(keep=0.5).on(model.model) as tracker:
        model.model(**inputs)
    signals = tracker.last.prompt.fields[0].encoder
    torch.testing.assert_close(signals.attention, weights[-2][:, :, 0, 1:].mean(dim=1))
    torch.testing.assert_close(signals.shallow_attention, weights[2][:, :, 0, 1:].mean(dim=1))
    janus = tiny("janus", "eager")
    inputs = janus.prompt([LONG], [2])
    with torch.no_grad():
        weights = janus.model.model.vision_model(
            inputs["pixel_values"], output_attentions=True
        ).attentions
    with torch.no_grad(), VisionZip(keep=0.5).on(janus.model) as tracker:
        janus.model(**inputs)
    for index, field in enumerate(tracker.last.prompt.fields):
        expected = weights[1][index].mean(dim=(0, 1))
        torch.testing.assert_close(field.encoder.attention[0], expected)
        assert field.encoder.keys is not None


def test_janus_anchors_come_from_its_drawing_side() -> None:
    janus = tiny("janus")
    inputs = janus.prompt([LONG], [1])
    with torch.no_grad(), G2TR(keep=0.5, score="projection").on(janus.model) as tracker:
        janus.model(**inputs)
    signals = tracker.last.prompt.fields[0].encoder
    vq = janus.model.model.vqmodel
    with torch.no_grad():
        latent = vq.quant_conv(vq.encoder(inputs["pixel_values"]))
    assert tuple(signals.anchor_grid) == (4, 4)
    expected = latent[0, :, :2, :2].mean(dim=(1, 2))
    assert signals.anchors is None or torch.allclose(signals.anchors[0, 0], expected, atol=1e-5)
    assert signals.anchor_tokens.shape == (1, 16, 32)
    kept = tracker.last.alive[0]
    assert len({(int(i) // 8 // 2, int(i) % 8 // 2) for i in kept}) == 16, "every cell is covered"


def test_our_tokenizer_reads_a_picture_once_for_anchors_and_answer() -> None:
    model = unified()
    calls: list[int] = []
    encode = model.tokenizer.encode

    def counted(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return encode(pixels)

    vars(model.tokenizer)["encode"] = counted
    try:
        with G2TR(keep=0.5).on(model):
            model.answer(pictures(2), TEXTS[1:3])
    finally:
        del vars(model.tokenizer)["encode"]
    assert calls == [2]


# Our own model


def unified(dense: bool = True) -> Any:
    return tiny_model(spec=None) if dense else tiny_model()


@pytest.mark.parametrize("name", NAMES)
def test_our_own_model_answers_with_every_method(name: str) -> None:
    model = unified()
    images, questions = pictures(2), TEXTS[1:3]
    plain = model.answer(images, questions)
    with make(name, keep=1.0).on(model):
        assert model.answer(images, questions) == plain
    with make(name, keep=7).on(model) as tracker:
        together = model.answer(images, questions)
        alone = [model.answer(images[i, None], [questions[i]])[0] for i in range(2)]
    assert together == alone
    assert len(tracker.last.alive[0]) <= 12
    assert model.answer(images, questions) == plain


def test_drawing_is_not_touched_and_global_tokens_stay() -> None:
    model = unified(dense=False)
    codes = model.draw_codes(["a red circle"], seed=1)
    with Random(keep=3).on(model) as tracker:
        assert torch.equal(model.draw_codes(["a red circle"], seed=1), codes)
        assert tracker.last is None
        model.answer(pictures(1), TEXTS[1:2])
    (field,) = tracker.last.prompt.fields
    assert len(field.columns) == model.layout.local_count
    assert len(tracker.last.alive[0]) == 3


def test_training_losses_see_the_reduced_picture() -> None:
    model = unified()
    asked, told = [[TEXTS[1]]] * 2, [["red"]] * 2
    plain = model.understanding_loss(pictures(2), asked, told).loss
    with AveragePool(keep=0.25).on(model):
        loss = model.understanding_loss(pictures(2), asked, told).loss
    assert loss != plain
    loss.backward()
    assert model.backbone.projector.widen.weight.grad.abs().sum() > 0


def test_several_questions_suit_only_methods_that_ignore_them() -> None:
    model = unified()
    questions = [[TEXTS[1], TEXTS[2]], [TEXTS[2]]]
    with Uniform(keep=0.5).on(model):
        both = model.answer(pictures(2), questions)
        single = model.answer(pictures(2), [TEXTS[1], TEXTS[2]])
    assert [both[0][0], both[1][0]] == single
    with FastV(keep=0.5, layer=1).on(model), pytest.raises(InputError, match="a single question"):
        model.answer(pictures(2), questions)


# Leaving no trace, and saying what is wrong


@pytest.mark.parametrize("host", [*HOSTS, "unified"])
def test_nothing_is_left_behind_even_after_an_error(host: str) -> None:
    model = unified() if host == "unified" else tiny(host).model
    before, weights = trace(model), {n: t.clone() for n, t in model.state_dict().items()}
    for reducer in (make("pyramid_drop"), make("sparsevlm"), make("tome")):
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(reducer, model, before)
        assert trace(model) == before
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_other_models_are_refused_by_name() -> None:
    plain = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    with (
        pytest.raises(InputError, match="no reducer can act on a LlamaForCausalLM; supported: "),
        Uniform().on(plain),
    ):
        pass
    with pytest.raises(InputError) as error, Uniform().on(object()):
        pass
    for name in ("UnifiedModel", "LlavaForConditionalGeneration", "JanusForConditionalGeneration"):
        assert name in str(error.value)


def test_what_a_model_cannot_give_is_said_before_anything_runs() -> None:
    model = tiny("qwen2_5_vl").model
    for reducer, missing in (
        (G2TR(), "anchor_grid and anchor_tokens"),
        (VisionZip(), "attention and keys"),
        (VScan(), "attention and shallow_attention"),
    ):
        with (
            pytest.raises(InputError, match=f"needs {missing}, which qwen2_5_vl models do not"),
            reducer.on(model),
        ):
            pass
    with pytest.raises(
        InputError, match="before layer 9, but the language model has layers 0 to 3"
    ):
        FastV(layer=9).on(model).__enter__()


def test_backends_and_caches_that_hide_what_is_needed_are_refused() -> None:
    host = tiny("llava")
    trunk = host.model.model.language_model
    trunk.config._attn_implementation = "flex_attention"
    try:
        with (
            pytest.raises(InputError, match=r"'flex_attention' hides masks .* attn_impl"),
            Uniform().on(host.model),
        ):
            pass
    finally:
        trunk.config._attn_implementation = "sdpa"
    inputs = host.prompt([LONG], [1])
    static = StaticCache(config=trunk.config, max_cache_len=128)
    with Uniform().on(host.model), pytest.raises(InputError, match="a static cache has one length"):
        host.model(**inputs, past_key_values=static)
    with torch.no_grad():
        features = host.model.model.get_image_features(inputs.pop("pixel_values"))
    with Uniform().on(host.model), pytest.raises(InputError, match="encode images inside the with"):
        host.model(**inputs, mm_encoder_outputs={"image": features})


def test_grids_are_checked() -> None:
    host = tiny("llava")
    inputs = host.prompt([LONG], [1])
    from unicompress.tokens import Grid

    with Uniform(keep=0.5).on(host.model, grids=[Grid(4, 16)]) as tracker, torch.no_grad():
        host.model(**inputs)
    assert tracker.last.prompt.fields[0].grid == Grid(4, 16)
    with (
        Uniform().on(host.model, grids=[Grid(4, 4)]),
        pytest.raises(InputError, match="image 0 has 64 tokens, which none of the given grids"),
    ):
        host.model(**inputs)


def test_several_cuts_and_clusters_run_together() -> None:
    """Two images of one row are cut apart: each keeps its own budget at each cut."""
    host = tiny("llava")
    inputs = host.prompt([LONG], [2])
    for reducer, sizes in (
        (PyramidDrop(keep=0.5), [32, 16, 8]),
        (SparseVLM(keep=0.25), [9]),
    ):
        with reducer.on(host.model) as tracker, torch.no_grad():
            host.model(**inputs)
        for cuts in tracker.last.reductions:
            assert [cut.indices.shape[1] for cut in cuts] == sizes
