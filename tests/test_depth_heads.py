"""Backbones of released unified models at toy size: their heads, their codes, and drawing."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from unicompress.backbones.unitok import LlamaHead
from unicompress.backbones.vila_u import ResidualHead
from unicompress.codec import ImageCodec
from unicompress.engine import use_engine
from unicompress.errors import InputError
from unicompress.sequence import drawing
from unicompress.tokenizers.base import tokenizers
from unicompress.unified import UnifiedModel
from unified_toy import SPEC, TEXTS, pictures, text_tokenizer, tiny_lm

MODELS = {
    "vila_u": ("toy_residual", "vila_u(code_dim=16, width=24, depth=2, block_heads=2)"),
    "unifork": ("toy_residual", "unifork(code_dim=16, width=24, depth=1, block_heads=2)"),
    "unitok": ("toy_multi", "unitok(code_dim=16, depth=2, block_heads=2)"),
}


def qwen() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(text_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config)


def model(name: str, compressed: bool = True, **options: str) -> UnifiedModel:
    torch.manual_seed(1)
    host, backbone = MODELS[name]
    tokenizer = tokenizers.get(host).tiny()
    return UnifiedModel.from_parts(
        tokenizer=tokenizer,
        codec=ImageCodec(tokenizer, SPEC) if compressed else None,
        lm=qwen() if name == "unifork" else tiny_lm(),
        text_tokenizer=text_tokenizer(),
        **{"projector": "mlp", "backbone": backbone, **options},
    ).eval()


def official_depth(head: ResidualHead, hidden: Tensor, rows: Tensor) -> Tensor:
    """The published arithmetic, one code at a time, with attention written out."""
    context = [head.enter(hidden)]
    total = torch.zeros_like(rows[:, 0])
    scores = []
    for number in range(rows.shape[1] + 1):
        if number:
            total = total + rows[:, number - 1]
            context.append(F.linear(total, head.context.weight, head.context.bias))
        x = torch.stack(context, dim=1) + head.positions[: number + 1]
        for block in head.blocks:
            normed = block.self_norm(x)
            q, k, v = block.self_attention.project(normed).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (block.self_attention.heads, -1)) for t in (q, k, v))
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            hidden_keys = torch.ones(number + 1, number + 1).triu(1).bool()
            weights = weights.masked_fill(hidden_keys, -torch.inf).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
            x = x + block.self_attention.out(mixed)
            x = x + block.mlp(block.mlp_norm(x))
        scores.append(head.leave(head.norm(x[:, -1])))
    return torch.stack(scores, dim=1)


def test_residual_head_is_the_published_one() -> None:
    head = ResidualHead(hidden=12, code_dim=6, codes=4, size=9, width=16, depth=2, heads=2).double()
    hidden = torch.randn(3, 12, dtype=torch.float64)
    rows = torch.randn(3, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(head(hidden, rows), official_depth(head, hidden, rows))


def test_llama_head_with_its_cache_equals_teacher_forcing() -> None:
    head = LlamaHead(hidden=16, codes=8, size=9, depth=2, block_heads=2).double()
    hidden, codes = torch.randn(3, 16, dtype=torch.float64), torch.randint(9, (3, 8))
    wanted, seen = head(hidden, codes), []

    def choose(scores: Tensor, number: int) -> Tensor:
        seen.append(scores)
        return codes[:, number]

    assert torch.equal(head.sample(hidden, choose), codes)
    torch.testing.assert_close(torch.stack(seen, dim=1), wanted)
    other = codes.clone()
    other[:, 4] = (other[:, 4] + 1) % 9
    changed = (head(hidden, other) - wanted).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.tolist() == [False] * 5 + [True] * 3  # a code is seen by later ones alone


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_tokenizers(name: str) -> None:
    made = model(name)
    codes = torch.randint(16, (2, 5, made.tokenizer.spec.codes_per_token))
    rows = made.backbone.tables["local"](codes)
    torch.testing.assert_close(rows, made.tokenizer.embed(codes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
def test_greedy_drawing_follows_teacher_forcing(name: str, compressed: bool) -> None:
    """Every drawn code is the best one under `code_logits` of the same prefix, with guidance 1."""
    made = model(name, compressed)
    codes = made.draw_codes(TEXTS[:2], cfg=1.0, temperature=0)
    spec = made.tokenizer.spec
    assert codes.shape == (2, made.tokens_per_image, spec.codes_per_token)
    assert len(codes.unique()) > 3
    backbone, layout = made.backbone, made.layout
    for row, prompt in enumerate(TEXTS[:2]):
        own = codes[row : row + 1]
        ids = torch.tensor([made._caption_ids(prompt)])
        streams = own.split([layout.global_count, layout.local_count], dim=1)
        tokens = torch.cat(
            [backbone.embed_codes(c, s) for c, s in zip(streams, ("global", "local"), strict=True)],
            dim=1,
        )
        image = layout.arrange(backbone.delimiters(), tokens)[:, :-1]
        embeds = torch.cat([backbone.embed_text(ids), image], dim=1)
        places = torch.arange(embeds.shape[1])[None]
        columns = drawing(layout, ids.shape[1], embeds.shape[1])
        states = backbone(embeds, None, places, image=columns)[:, ids.shape[1] :]
        scores = backbone.code_logits(states[:, layout.predictors], own, "local")
        assert torch.equal(scores.argmax(-1), own)


@pytest.mark.parametrize("name", MODELS)
def test_guidance_samples_alike_for_one_and_many(name: str) -> None:
    made = model(name)
    both = made.draw_codes(TEXTS[:2], cfg=3.0, top_k=8, seed=[4, 5])
    alone = made.draw_codes(TEXTS[1:2], cfg=3.0, top_k=8, seed=[5])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both, made.draw_codes(TEXTS[:2], cfg=1.0, top_k=8, seed=[4, 5]))
    assert made.decode_codes(both).shape == (2, 3, 16, 24)


@pytest.mark.parametrize("name", MODELS)
def test_trains_saves_and_loads(name: str, tmp_path) -> None:
    made = model(name).train()
    loss = made.generation_loss(pictures(2), [TEXTS[0], ""]).loss
    loss = loss + made.understanding_loss(pictures(2), [["what?"], ["how?"]], [["a"], ["b"]]).loss
    loss.backward()
    missed = [n for n, p in made.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []
    made.eval().save_pretrained(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    assert torch.equal(
        made.draw_codes(TEXTS[:1], temperature=0), again.draw_codes(TEXTS[:1], temperature=0)
    )
    assert made.answer(pictures(1), ["what?"]) == again.answer(pictures(1), ["what?"])


def test_fork_starts_equal_and_parts_by_task() -> None:
    """Drawing uses the copies and reading the originals; both use the lower half."""
    made = model("unifork")
    trunk = made.lm.base_model
    before = copy.deepcopy(trunk.state_dict())
    draw = {"cfg": 1.0, "temperature": 0.0}
    codes, answer = made.draw_codes(TEXTS[:1], **draw), made.answer(pictures(1), ["what?"])
    with torch.no_grad():
        for weight in made.backbone.generation_layers.parameters():
            weight.mul_(-1)
    assert made.answer(pictures(1), ["what?"]) == answer
    changed = made.draw_codes(TEXTS[:1], **draw)
    assert not torch.equal(changed, codes)
    with use_engine("fixed"):
        assert torch.equal(made.draw_codes(TEXTS[:1], **draw), changed)
    with torch.no_grad():
        for weight in made.backbone.generation_layers.parameters():
            weight.mul_(-1)
        for layer in trunk.layers[made.backbone.shared :]:
            for weight in layer.parameters():
                weight.mul_(-1)
    assert torch.equal(made.draw_codes(TEXTS[:1], **draw), codes)
    assert made.answer(pictures(1), ["what?"]) != answer
    assert len(trunk.layers) == 4
    assert before.keys() == trunk.state_dict().keys()  # no trace of the other half is left


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="set its code_dim"):
        model("vila_u", backbone="vila_u(code_dim=8, width=24, depth=1, block_heads=2)")
    with pytest.raises(InputError, match="takes tokens one by one"):
        model("unitok", projector="local(width=16, depth=1)").draw_codes(TEXTS[:1])
    with pytest.raises(InputError, match="fork must be from 0 to below 1"):
        model("unifork", backbone="unifork(code_dim=16, width=24, block_heads=2, fork=1.0)")
    host = tokenizers.get("toy_single").tiny()
    with pytest.raises(InputError, match="no vocabulary of the backbone"):
        UnifiedModel.from_parts(
            tokenizer=host,
            lm=tiny_lm(),
            text_tokenizer=text_tokenizer(),
            backbone="janus(code_dim=4)",
            projector="mlp",
            code_loss="vocabulary",
        )
