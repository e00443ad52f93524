"""The language model's side: vocabulary, projectors, depth head, cache, text tokenizer."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from unicompress.backbones.base import CodeSpace
from unicompress.backbones.causal_lm import CausalLM, DepthHead, check_causal_lm
from unicompress.backbones.projectors import projectors
from unicompress.backbones.text import build_text_tokenizer
from unicompress.errors import InputError
from unicompress.sequence import SHARED, visible
from unicompress.tokens import Grid
from unified_toy import text_tokenizer, tiny_lm, tiny_model


def test_code_space_is_contiguous() -> None:
    space = CodeSpace(100, 1, 16, 5)
    assert (space.begin, space.first_code, space.first("local")) == (100, 103, 103)
    assert (space.first("global"), space.size("global")) == (119, 5)
    assert space.vocabulary_size == 124
    shared = CodeSpace(100, 1, 16)
    assert shared.first("global") == shared.first("local")
    assert shared.size("global") == 16
    assert CodeSpace(100, 8, 16).vocabulary_size == 103


@pytest.mark.parametrize("name", projectors.names())
@pytest.mark.parametrize("count", [0, 2])
def test_projectors_keep_batch_and_order(name: str, count: int) -> None:
    projector = projectors.build(name, dim=6, hidden=10)
    globals_, locals_ = torch.randn(2, count, 6), torch.randn(2, 15, 6)
    out = projector(globals_, locals_, Grid(3, 5))
    assert out.shape == (2, count + 15, 10)
    alone = projector(globals_[1:], locals_[1:], Grid(3, 5))
    torch.testing.assert_close(out[1:], alone)
    other = projector(globals_ + torch.randn_like(globals_), locals_, Grid(3, 5))
    torch.testing.assert_close(out[:, count:], other[:, count:])  # globals do not leak into locals


def test_local_projector_mixes_neighbours_and_knows_places() -> None:
    projector = projectors.build("local(width=16, depth=1)", dim=4, hidden=8)
    same = projector(torch.zeros(1, 0, 4), torch.ones(1, 12, 4), Grid(3, 4))
    assert not torch.allclose(same[0, 5], same[0, 6])
    field = torch.zeros(1, 12, 4, requires_grad=True)
    projector(torch.zeros(1, 0, 4), field, Grid(3, 4))[0, 5].sum().backward()
    assert field.grad is not None
    assert field.grad[0, 6].abs().sum() > 0


def test_unknown_projector_option() -> None:
    with pytest.raises(InputError, match="has no option 'size'; it takes: dim, hidden"):
        projectors.build("linear(size=3)", dim=4, hidden=8)


def reference_depth_head(
    head: DepthHead, hidden: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Every code on its own: rerun the whole token for each, and look at the last position."""
    rows = []
    for count in range(codes.shape[1]):
        tokens = [head.enter(hidden)]
        for k in range(count):
            tokens.append(head.entries.entries.weight[codes[:, k] + k * head.size])
        stream = torch.stack(tokens, dim=1) + head.positions[: count + 1]
        for block in head.blocks:
            stream = block(stream, causal=True)
        rows.append(head.norm(stream[:, -1]) @ head.leave[count].T)
    return torch.stack(rows, dim=1)


def test_depth_head_equals_plain_reference_and_its_cache() -> None:
    head = DepthHead(hidden=12, codes=4, size=7, width=16).double()
    hidden, codes = torch.randn(3, 12, dtype=torch.float64), torch.randint(7, (3, 4))
    wanted = reference_depth_head(head, hidden, codes)
    torch.testing.assert_close(head(hidden, codes), wanted)
    seen = []

    def choose(scores: torch.Tensor, number: int) -> torch.Tensor:
        seen.append(scores)
        return codes[:, number]

    assert torch.equal(head.sample(hidden, choose), codes)
    torch.testing.assert_close(torch.stack(seen, dim=1), wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_steps_equal_one_pass(attention: str) -> None:
    lm = tiny_lm(attn_implementation=attention).eval()
    projector = projectors.build("linear", dim=4, hidden=32)
    backbone = CausalLM(
        lm=lm, space=CodeSpace(len(text_tokenizer()) - 30, 1, 20), projector=projector
    )
    groups = torch.tensor([[SHARED, SHARED, 1, 1, 2, 2], [-1, SHARED, SHARED, 1, 1, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3], [0, 0, 1, 2, 3, 2]])
    embeds = torch.randn(2, 6, 32)
    mask = visible(groups, groups, first=0)
    with torch.no_grad():
        wanted = backbone(embeds, mask, positions)
        cache, parts = backbone.new_cache(6), []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            rows = mask[:, :, start:stop, :stop]
            parts.append(backbone(embeds[:, start:stop], rows, positions[:, start:stop], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-5, rtol=1e-5)


def test_logits_are_slices_of_the_models_own() -> None:
    model = tiny_model("toy_single")
    space = model.backbone.space
    ids = torch.tensor([[3, 4, space.first_code, 5]])
    with torch.no_grad():
        wanted = model.lm(ids).logits
        hidden = model.backbone(model.backbone.embed_text(ids), None, torch.arange(4)[None])
        text = model.backbone.text_logits(hidden)
        codes = model.backbone.code_logits(hidden, torch.zeros(1, 4, 1, dtype=torch.long), "local")
    torch.testing.assert_close(text, wanted[..., : space.text_size])
    torch.testing.assert_close(codes[:, :, 0], wanted[..., space.first_code :])


def test_other_architectures_serve() -> None:
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    check_causal_lm(lm)


class Softcapped(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.tanh()
        return output


def test_a_model_that_changes_its_logits_is_refused() -> None:
    with pytest.raises(InputError, match="Softcapped changes its logits after its head"):
        check_causal_lm(Softcapped(tiny_lm().config))


def test_vocabulary_must_be_large_enough() -> None:
    projector = projectors.build("linear", dim=4, hidden=32)
    with pytest.raises(InputError, match="text and codes need 1103"):
        CausalLM(lm=tiny_lm(), space=CodeSpace(100, 1, 1000), projector=projector)


def test_text_tokenizer_writes_any_text_and_is_deterministic() -> None:
    texts = ["a red circle", "the blue square", "two circles"]
    first, second = (build_text_tokenizer(texts, 280) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    for text in ("a red circle", "Größe: 7 µm!", "\n"):
        ids = first(text, add_special_tokens=False)["input_ids"]
        assert first.decode(ids).strip() == text.strip()
    assert first.eos_token == "<eos>"
    with pytest.raises(InputError, match="at least 258 entries, got 100"):
        build_text_tokenizer(texts, 100)
