"""ToMe inside vision encoders: what merges, what the model then sees, and no trace left."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from reducer_hosts import IMAGE, VISION, Tiny, llama, sharper, tiny
from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals
from unicompress.reducers.hosts.blocks import EncoderBlocks, attend
from unicompress.reducers.ppe import PPE
from unicompress.reducers.tome import Groups, ToMe, first_of, merge_groups, next_numbers
from unicompress.tokens import Grid

LONG, SHORT = [5, 6, 7, 8], [9, 10]


def siglip() -> Tiny:
    """LLaVA with an encoder that has no class token."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**VISION, num_hidden_layers=3, image_size=32, patch_size=4)
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=llama(),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    return Tiny(sharper(LlavaForConditionalGeneration(config)), tokens=64, side=32)


def host_of(name: str) -> Tiny:
    return siglip() if name == "siglip" else tiny(name)


def layers_of(model: Any) -> list[Any]:
    inner = model.model
    tower = inner.vision_model if hasattr(inner, "vision_model") else inner.vision_tower
    return list(getattr(tower, "vision_model", tower).encoder.layers)


def run(host: Tiny, reducer: Reducer, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad(), reducer.on(host.model) as tracker:
        host.model(**inputs)
    return tracker


# The mathematics


def pairs_by_hand(keys: Tensor, merging: int) -> list[set[int]]:
    """Groups of one image after one round, the obvious way."""
    a, b = range(0, len(keys), 2), range(1, len(keys), 2)
    offers = []
    for i in a:
        likeness = [float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in b]
        best = max(range(len(likeness)), key=lambda n: likeness[n])
        offers.append((likeness[best], i, b[best]))
    offers.sort(key=lambda offer: -offer[0])
    groups = {j: {j} for j in range(len(keys))}
    for _, i, j in offers[:merging]:
        groups[j] |= groups.pop(i)
    return sorted(groups.values(), key=min)


@pytest.mark.parametrize("merging", [1, 3, 5])
def test_one_round_joins_the_best_pairs_in_raster_order(merging: int) -> None:
    keys = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(0))
    numbers = next_numbers(keys, merging)
    for row in range(2):
        expected = pairs_by_hand(keys[row], merging)
        found = [set((numbers[row] == n).nonzero()[:, 0].tolist()) for n in range(11 - merging)]
        assert found == expected


def test_tokens_are_means_over_their_members_however_many_rounds_it_takes() -> None:
    draws = torch.Generator().manual_seed(1)
    tokens, keys = torch.randn(2, 12, 5, generator=draws), torch.randn(2, 12, 6, generator=draws)
    groups = Groups.single(2, 12, tokens.device)
    merged, between = merge_groups(tokens, keys, groups, 9)
    merged, after = merge_groups(merged, keys[:, :9], between, 2)  # 9 -> 5 -> 3 -> 2
    assert merged.shape == (2, 2, 5)
    for row in range(2):
        for number in range(2):
            members = after.owner[row] == number
            assert int(members.sum()) == after.sizes[row, number]
            torch.testing.assert_close(merged[row, number], tokens[row][members].mean(dim=0))
    first = first_of(after.owner, 2)
    assert (first[:, 0] == 0).all(), "the first group has the first token"
    assert (first[:, 1] > first[:, 0]).all()


def test_half_precision_counts_beyond_256() -> None:
    tokens = torch.ones(1, 600, 2, dtype=torch.bfloat16)
    merged, _ = merge_groups(tokens, tokens, Groups.single(1, 600, tokens.device), 1)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.ones_like(merged))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 16}, (12, 12, 12, 12)),
        ({"keep": 16, "inflection": -1.0}, (24, 16, 8, 0)),
        ({"keep": 16, "inflection": 1.0}, (0, 8, 16, 24)),
        ({"keep": 2, "inflection": -1.0}, (31, 16, 8, 7)),  # half at most, the last finishes
        ({"keep": 1.0}, (0, 0, 0, 0)),
        ({"keep": 0.5}, (8, 8, 8, 8)),
    ],
)
def test_merges_spread_over_blocks_as_asked(
    options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert ToMe(**options).merged_by_block(64, 4) == expected
    assert sum(ToMe(**options).merged_by_block(64, 1)) == sum(expected)


# Inside models


@pytest.mark.parametrize("name", ["llava", "siglip", "janus"])
def test_the_block_that_is_written_out_is_the_models_own(name: str) -> None:
    block = layers_of(host_of(name).model)[1]
    hidden = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        half, keys = attend(block, hidden, None)
        assert torch.equal(half + block.mlp(block.layer_norm2(half)), block(hidden, None))
    projected = block.self_attn.k_proj(block.layer_norm1(hidden))
    torch.testing.assert_close(keys, projected.unflatten(-1, (2, 12)).mean(dim=2))


@pytest.mark.parametrize("name", ["llava", "siglip", "janus"])
@pytest.mark.parametrize("keep", [0.5, 37, 3])
def test_the_budget_is_exact_and_blocks_get_shorter(name: str, keep: float) -> None:
    host = host_of(name)
    inputs = host.prompt([LONG, SHORT], [1, 2])
    widths: list[int] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        for layer in layers_of(host.model)
    ]
    tracker = run(host, ToMe(keep=keep, inside=True), inputs)
    for handle in handles:
        handle.remove()
    count = 32 if keep == 0.5 else int(keep)
    extra = int(name == "llava")  # the class token; the last layer of LLaVA's is not read
    away = ToMe(keep=count).merged_by_block(64, 3 if name == "janus" else 2)
    left = [64 - sum(away[: i + 1]) + extra for i in range(3)]
    assert widths == left
    assert widths[-1] == count + extra
    for cuts, alive in zip(tracker.last.reductions, tracker.last.alive, strict=True):
        (cut,) = cuts
        assert cut.indices.shape == (1, count)
        assert (cut.indices[0, 1:] > cut.indices[0, :-1]).all()
        assert torch.equal(cut.indices[0], alive)
        assert torch.equal(cut.assignment.gather(1, cut.indices)[0], torch.arange(count))
        assert int(cut.sizes.sum()) == 64


def features_by_hand(host: Tiny, pixels: Tensor, reducer: ToMe) -> Tensor:
    """LLaVA's features of one picture [k, d]: softmax written out, groups as lists of members."""
    inner = host.model.model
    tower = inner.vision_tower
    layers = layers_of(host.model)[:-1]
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    members = [[i] for i in range(64)]
    for layer, away in zip(layers, reducer.merged_by_block(64, len(layers)), strict=True):
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden)
        q, k, v = (
            getattr(attention, f"{which}_proj")(normed).unflatten(-1, (2, 12)).transpose(0, 1)
            for which in "qkv"
        )
        sizes = torch.tensor([0.0, *(log(len(group)) for group in members)])
        weights = (q @ k.transpose(1, 2) / 12**0.5 + sizes).softmax(dim=-1)
        hidden = hidden + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        joined = pairs_by_hand(k.mean(dim=0)[1:], away)
        patches = hidden[1:]
        rows = []
        for group in joined:
            mass = sum(len(members[i]) for i in group)
            rows.append(sum(patches[i] * len(members[i]) for i in group) / mass)
        members = [sorted(m for i in group for m in members[i]) for group in joined]
        hidden = torch.cat([hidden[:1], torch.stack(rows)])
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return inner.multi_modal_projector(hidden[1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_what_the_paper_says_step_by_step(attention: str) -> None:
    host = tiny("llava", attention)
    inputs = host.prompt([LONG], [1])
    reducer = ToMe(keep=0.4, inside=True, inflection=-0.5)
    tracker = run(host, reducer, inputs)
    with torch.no_grad():
        expected = features_by_hand(host, inputs["pixel_values"][0], reducer)
    torch.testing.assert_close(
        tracker.last.reductions[0][0].tokens[0], expected, atol=1e-4, rtol=1e-4
    )


def test_equal_patches_merge_without_changing_anything() -> None:
    """With log(size), a group of equal tokens is to the others what its members were."""
    host = siglip()
    inputs = host.prompt([LONG], [1])
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"]) * 0.3
    tower = host.model.model.vision_tower
    tower.embeddings.position_embedding.weight.data[1:32] = (
        tower.embeddings.position_embedding.weight.data[0]
    )
    tower.embeddings.position_embedding.weight.data[33:] = (
        tower.embeddings.position_embedding.weight.data[32]
    )
    with torch.no_grad():
        dense = host.model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    (cut,) = run(host, ToMe(keep=12, inside=True), inputs).last.reductions[0]
    owners = cut.indices[0] // 32
    torch.testing.assert_close(cut.tokens[0], dense[32 * owners], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "siglip", "janus"])
def test_everything_kept_is_the_model_itself(name: str) -> None:
    host = host_of(name)
    inputs = host.prompt([LONG], [1])
    with torch.no_grad():
        plain = host.model(**inputs).logits
        with ToMe(keep=1.0, inside=True).on(host.model):
            assert torch.equal(host.model(**inputs).logits, plain)
        with ToMe(keep=0.25, inside=True).on(host.model):
            assert not torch.allclose(host.model(**inputs).logits, plain)
        assert torch.equal(host.model(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["llava", "janus"])
def test_a_batch_of_pictures_is_what_they_are_alone(name: str) -> None:
    host = host_of(name)
    inputs = host.prompt([LONG, SHORT], [1, 2])
    both = run(host, ToMe(keep=0.25, inside=True), inputs).last.reductions
    for number in range(3):
        alone = host.prompt([LONG], [1])
        alone["pixel_values"] = inputs["pixel_values"][number, None]
        ((cut,),) = run(host, ToMe(keep=0.25, inside=True), alone).last.reductions
        assert torch.equal(cut.assignment, both[number][0].assignment)
        torch.testing.assert_close(cut.tokens, both[number][0].tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "janus"])
def test_a_padded_batch_writes_what_its_rows_write_alone(name: str) -> None:
    host = host_of(name)
    both = host.prompt([LONG, SHORT], [1, 1])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "max_length": None}
    plain = host.model.generate(**both, **options)
    with ToMe(keep=0.1, inside=True).on(host.model) as tracker:
        together = host.model.generate(**both, **options)
        assert [len(alive) for alive in tracker.last.alive] == [6, 6]
        for row, text in enumerate([LONG, SHORT]):
            alone = host.prompt([text], [1])
            alone["pixel_values"] = both["pixel_values"][row, None]
            written = host.model.generate(**alone, **options)
            assert torch.equal(written[0, -4:], together[row, -4:])
    assert not torch.equal(plain, together)
    assert torch.equal(host.model.generate(**both, **options), plain)


def test_gradients_reach_the_encoder() -> None:
    host = siglip()
    inputs = host.prompt([LONG], [1])
    with ToMe(keep=0.25, inside=True).on(host.model):
        host.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in layers_of(host.model)[:-1]:
        assert layer.mlp.fc1.weight.grad.abs().sum() > 0


def test_it_can_be_wrapped() -> None:
    host = tiny("llava")
    inputs = host.prompt([LONG], [1])
    wrapped = run(host, PPE(keep=0.25, inner="tome(inside=True)"), inputs).last
    plain = run(host, ToMe(keep=0.25, inside=True), inputs).last
    (cut,), (expected,) = wrapped.reductions[0], plain.reductions[0]
    assert torch.equal(cut.assignment, expected.assignment)
    assert torch.equal(cut.tokens, expected.tokens)
    assert wrapped.stages[-1].mixed is not None


def test_another_layer_may_be_read() -> None:
    host = tiny("llava")
    inputs = host.prompt([LONG], [1])
    config, given = host.model.config, host.model.config.vision_feature_layer
    try:
        for taken, widths in ((1, [17, 17, 17]), (-1, [49, 33, 17])):
            config.vision_feature_layer = taken
            seen: list[int] = []
            handles = [
                layer.register_forward_hook(lambda _, __, out, s=seen: s.append(out.shape[1]))
                for layer in layers_of(host.model)
            ]
            run(host, ToMe(keep=16, inside=True), inputs)
            for handle in handles:
                handle.remove()
            assert seen == widths
        config.vision_feature_layer = [1, 2]
        with pytest.raises(InputError, match=r"layers \[1, 2\] differ in length when tokens merge"):
            ToMe(inside=True).on(host.model).__enter__()
        config.vision_feature_layer = 0
        with pytest.raises(InputError, match="this one has no block before its features"):
            ToMe(inside=True).on(host.model).__enter__()
    finally:
        config.vision_feature_layer = given


# Leaving no trace, and saying what is wrong


def test_nothing_is_left_in_the_encoder_even_after_an_error() -> None:
    host = tiny("janus")
    inputs = host.prompt([LONG], [1])
    host.model(**inputs)
    before = [(name, sorted(vars(m)), list(m._forward_hooks)) for name, m in
              host.model.named_modules()]  # fmt: skip
    broken = {**inputs, "pixel_values": inputs["pixel_values"][:, :, :5]}
    with pytest.raises(RuntimeError, match="size of tensor"), ToMe(inside=True).on(host.model):
        host.model(**broken)
    blocks = layers_of(host.model)

    def fail() -> None:
        with EncoderBlocks(blocks, class_token=False).merging(ToMe(inside=True)):
            assert all("forward" in vars(block) for block in blocks)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [(name, sorted(vars(m)), list(m._forward_hooks)) for name, m in
            host.model.named_modules()] == before  # fmt: skip


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "llava_next"])
def test_hosts_whose_patches_are_joined_name_those_that_can(name: str) -> None:
    message = rf"needs encoder_groups, which {name} models do not have \(but janus and llava models"
    with pytest.raises(InputError, match=message):
        ToMe(inside=True).on(tiny(name).model).__enter__()


def test_encoders_that_cannot_merge_are_refused() -> None:
    host = tiny("llava")
    tower = tiny("internvl").model.model.vision_tower
    with pytest.raises(InputError, match="CLIP, SigLIP, Janus encoders, and this one has InternVL"):
        EncoderBlocks(list(tower.encoder.layer), class_token=True).check()
    blocks = EncoderBlocks(layers_of(host.model), class_token=True)
    config = blocks.blocks[0].self_attn.config
    backend = config._attn_implementation
    try:
        config._attn_implementation = "flash_attention_2"
        with pytest.raises(InputError, match="'flash_attention_2' cannot weigh merged tokens"):
            blocks.check()
    finally:
        config._attn_implementation = backend
    with (
        blocks.merging(ToMe(inside=True)),
        pytest.raises(InputError, match="has replaced the forward"),
    ):
        blocks.check()
    trained = siglip()
    for layer in layers_of(trained.model.train()):
        layer.gradient_checkpointing = True
    with pytest.raises(InputError, match="turn its gradient checkpointing off"):
        ToMe(inside=True).on(trained.model).__enter__()


def test_options_and_groups_are_checked() -> None:
    with pytest.raises(InputError, match=r"inflection must lie in \[-1, 1\], got 1.5"):
        ToMe(inflection=1.5)
    tokens, grid = torch.randn(1, 6, 4), Grid(2, 3)
    groups = torch.tensor([[0, 1, 0, 2, 1, 2]])
    result = ToMe(keep=3, inside=True)(tokens, grid, Signals(encoder_groups=groups))
    assert result.indices.tolist() == [[0, 1, 3]]
    assert torch.equal(result.tokens, tokens[:, [0, 1, 3]])
    with pytest.raises(InputError, match=r"groups of \[3\] tokens do not make 4"):
        ToMe(keep=4, inside=True)(tokens, grid, Signals(encoder_groups=groups))
    with pytest.raises(InputError, match="needs encoder_groups: pass Signals with it"):
        ToMe(keep=4, inside=True)(tokens, grid)
