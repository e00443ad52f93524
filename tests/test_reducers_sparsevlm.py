"""SparseVLM+: position correction, heads, schedule and positions; what SparseVLM keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from reducer_hosts import tiny
from unicompress.errors import InputError
from unicompress.reducers.base import Signals
from unicompress.reducers.cost import image_tokens
from unicompress.reducers.sparsevlm import FLOOR, SparseVLM, nearness, text_raters
from unicompress.tokens import Grid

GRID, N, T, HEADS, CHANNELS = Grid(4, 6), 24, 5, 6, 64
LONG, SHORT = [5, 6, 7, 8], [9, 10]


def tables(places: Tensor, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """RoPE tables of LLaVA-1.5's base for rows of places."""
    config = LlamaConfig(hidden_size=channels, num_attention_heads=1)
    return LlamaRotaryEmbedding(config)(torch.zeros(1), places)


def signals_of(seed: int = 0, **replaced: Any) -> Signals:
    draws = torch.Generator().manual_seed(seed)
    image, text = torch.arange(N).expand(2, -1) + 3, torch.arange(T).expand(2, -1) + 300
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[1, -2:] = False
    values: dict[str, Any] = {
        "text_attention": torch.randn(2, HEADS, T, N, generator=draws).softmax(-1),
        "text": torch.randn(2, T, 8, generator=draws),
        "text_valid": valid,
    }
    values["cosines"], values["sines"] = tables(image)
    values["text_cosines"], values["text_sines"] = tables(text)
    return Signals(**{**values, **replaced})


def tokens_of(seed: int = 1) -> Tensor:
    return torch.randn(2, N, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [8, 64, 128])
def test_the_correction_is_the_product_of_turned_vectors_of_ones(channels: int) -> None:
    image, text = torch.arange(0, 700, 7)[None], torch.arange(700, 704)[None]
    (c, s), (tc, ts) = tables(image, channels), tables(text, channels)
    ones = torch.ones(1, 1, 100, channels)
    keys = apply_rotary_pos_emb(ones, ones, c, s)[0]
    queries = apply_rotary_pos_emb(ones[:, :, :4], ones[:, :, :4], tc, ts)[0]
    expected = (queries @ keys.transpose(2, 3))[:, 0] / channels
    found = nearness(Signals(cosines=c, sines=s, text_cosines=tc, text_sines=ts))
    torch.testing.assert_close(found, expected.clamp(min=FLOOR), atol=1e-5, rtol=1e-4)
    # LLaVA-1.5's width never meets the floor on its 576 tokens; narrow heads do at once.
    assert bool((expected < FLOOR).any()) == (channels != 128)
    same = Signals(cosines=c, sines=s, text_cosines=c, text_sines=s)
    torch.testing.assert_close(nearness(same)[0].diagonal(), torch.ones(100))


def score_by_hand(signals: Signals, tokens: Tensor, row: int) -> list[float]:
    """Mean over the busiest heads and the raters of attention divided by nearness."""
    attention, text, valid = signals.text_attention, signals.text, signals.text_valid
    assert attention is not None
    assert text is not None
    assert valid is not None
    raters = text_raters(tokens, text, valid)[row].nonzero()[:, 0].tolist()
    weight = nearness(signals)[row]
    mass = [
        sum(float(attention[row, h, t, i] / weight[t, i]) for t in raters for i in range(N))
        for h in range(HEADS)
    ]
    busiest = sorted(range(HEADS), key=lambda h: -mass[h])[: round(HEADS * 14 / 32)]
    return [
        sum(float(attention[row, h, t, i] / weight[t, i]) for h in busiest for t in raters)
        for i in range(N)
    ]


@pytest.mark.parametrize("seed", [0, 3])
def test_plus_keeps_the_best_by_corrected_attention_of_busy_heads(seed: int) -> None:
    signals, tokens = signals_of(seed), tokens_of()
    result = SparseVLM(keep=9, version="plus")(tokens, GRID, signals)
    for row in range(2):
        score = score_by_hand(signals, tokens, row)
        best = sorted(sorted(range(N), key=lambda i, s=score: -s[i])[:9])
        assert result.indices[row].tolist() == best
    assert result.sizes.eq(1).all(), "nothing is recycled"
    assert result.positions == "keep"


def test_heads_are_chosen_by_raters_alone() -> None:
    """A head that only other text looks through is not asked."""
    attention = torch.full((1, HEADS, T, N), 1e-3)
    attention[0, :3, 0, :9] = 1.0  # the rater, through three heads
    attention[0, 3:, 1:, 9:18] = 5.0  # the others, through the other three
    attention[0, 3:, 0, 18:] = 0.5
    tokens = torch.ones(1, N, 8)
    text = torch.zeros(1, T, 8)
    text[0, 0] = 1.0
    given = signals_of().of(0)
    signals = Signals(
        text_attention=attention, text=text, text_valid=given.text_valid,
        cosines=torch.ones(1, N, 4), sines=torch.zeros(1, N, 4),
        text_cosines=torch.ones(1, T, 4), text_sines=torch.zeros(1, T, 4),
    )  # fmt: skip
    assert text_raters(tokens, text, given.text_valid)[0].tolist() == [True] + [False] * 4
    result = SparseVLM(keep=9, version="plus")(tokens, GRID, signals)
    assert result.indices[0].tolist() == list(range(9))


def test_far_tokens_gain_and_only_in_plus() -> None:
    """Equal attention: the first by index; corrected, those that RoPE alone holds back most."""
    flat = torch.full((2, HEADS, T, N), 0.02)
    far = torch.arange(N).flip(0).expand(2, -1) * 5  # the last token is the farthest
    cosines, sines = tables(far)
    signals = signals_of(text_attention=flat, cosines=cosines, sines=sines)
    tokens = tokens_of()
    plus = SparseVLM(keep=4, version="plus")(tokens, GRID, signals)
    weight = nearness(signals)
    assert weight[..., -4:].mean() < weight[..., :4].mean()
    for row, raters in enumerate(text_raters(tokens, signals.text, signals.text_valid)):
        gain = (1 / weight[row, raters]).mean(dim=0)
        assert plus.indices[row].tolist() == gain.topk(4).indices.sort().values.tolist()
    v1 = SparseVLM(keep=4)(tokens, GRID, signals)
    assert {0, 1} <= set(v1.indices[0].tolist())


def test_schedules_are_the_official_ones() -> None:
    plus, v1 = SparseVLM(keep=192, version="plus"), SparseVLM(keep=192)
    assert image_tokens(plus, 576, 32) == [576] * 3 + [300] * 4 + [200] * 9 + [118] * 16
    assert image_tokens(v1, 576, 32) == [576] * 2 + [300] * 4 + [200] * 9 + [110] * 17
    assert [step.layer for step in plus.steps(4)] == [1, 2]
    assert all(step.keep == 1 for step in SparseVLM(keep=1.0, version="plus").steps(32))


def test_plus_needs_the_table_of_positions() -> None:
    signals = signals_of()
    needed = set(SparseVLM(version="plus").needs) - set(SparseVLM().needs)
    assert needed == {"cosines", "sines", "text_cosines", "text_sines"}
    for name in needed:
        values = {n: getattr(signals, n) for n in signals.given() - {name}}
        with pytest.raises(InputError, match=f"'sparsevlm' needs {name}: pass Signals"):
            SparseVLM(keep=4, version="plus")(tokens_of(), GRID, Signals(**values))
    with pytest.raises(InputError, match="version must be v1 or plus, got 'v2'"):
        SparseVLM(version="v2")


@pytest.mark.parametrize("host", ["llava", "janus", "qwen2_5_vl"])
def test_models_tell_the_places_of_their_text(host: str) -> None:
    """Rows of a padded batch choose what they choose alone, and every token keeps its place."""
    model = tiny(host)
    both = model.prompt([LONG, SHORT], [1, 1])
    reducer = SparseVLM(keep=0.25, version="plus")
    with torch.no_grad(), reducer.on(model.model) as tracker:
        model.model(**both)
        together = tracker.last
        alone = model.prompt([SHORT], [1], seed=0)
        for name in ("pixel_values", "image_grid_thw"):
            if name in alone:
                alone[name] = both[name][len(both[name]) // 2 :]
        model.model(**alone)
    assert torch.equal(tracker.last.alive[0], together.alive[1])
    assert len(together.alive[0]) == int(64 * 0.25 * 118 / 192)
    assert [stage.shift.tolist() for stage in together.stages] == [[0, 0]] * 3
    stage = together.stages[-1]
    field = together.prompt.fields[0]
    assert set(field.columns[together.alive[0]].tolist()) <= set(stage.columns[0].tolist())
    assert stage.offset.eq(0).all()
