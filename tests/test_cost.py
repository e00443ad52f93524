"""Cost: honest turns, figures where they belong, and models that are left as they were."""

import itertools

import pytest
import torch
from torch import nn

from eval_pair import tiny_pair
from unicompress.checkpoint import fingerprint
from unicompress.errors import InputError
from unicompress.evals import cost
from unicompress.evals.cost import (
    BENCHES,
    Effort,
    Pair,
    bench_generation,
    count_flops,
    kv_cache_bytes,
    medians,
    take_turns,
)
from unicompress.evals.language_models import LMS, random_lm
from unicompress.generate import Sampling

QUICK = Effort(batch=1, repeats=1, warmup=0, flops=False)
COUNTED = Effort(batch=1, repeats=1, warmup=1)
# From the model cards, in millions.
PARAMETERS = {
    "smollm2-135m": 134.5,
    "smollm2-360m": 361.8,
    "qwen2.5-0.5b": 494.0,
    "llama-3.2-1b": 1235.8,
    "qwen2.5-1.5b": 1543.7,
    "llama-3.2-3b": 3212.7,
    "llama-3.1-8b": 8030.3,
}


def test_tasks_take_turns_and_warm_up_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = itertools.count()
    monkeypatch.setattr(cost, "now", lambda: float(next(ticks)))
    told: list[tuple[str, int, int]] = []
    tasks = {"dense": lambda: order.append("d"), "compressed": lambda: order.append("c")}
    seconds = take_turns(
        tasks, repeats=3, warmup=1, progress=lambda label, done, of: told.append((label, done, of))
    )
    assert "".join(order) == "dccddccd"  # who goes first changes, so drift hits both
    assert seconds == {"dense": [1.0] * 3, "compressed": [1.0] * 3}
    assert told[-1] == ("timing", 4, 4)


def test_one_slow_run_does_not_move_the_median() -> None:
    assert medians({"a": [1.0, 1.1, 60.0], "b": [2.0]}) == {"a": 1.1, "b": 2.0}


def test_drawing_is_timed_with_its_parts() -> None:
    found = bench_generation(tiny_pair(), COUNTED, sampling=Sampling())
    assert found.dense.tokens_per_image == 64
    assert found.compressed.tokens_per_image == 20
    for side, parts in (
        (found.dense, found.dense_breakdown),
        (found.compressed, found.compressed_breakdown),
    ):
        spent = [parts.prefill, parts.lm_steps, parts.head, parts.decompressor, parts.image_decoder]
        assert None not in spent
        assert side.generation_seconds is not None
        assert 0 < sum(x for x in spent if x) <= side.generation_seconds
        assert side.understanding_seconds is None
    flops = found.details["generation"]["flops"]
    assert 0 < flops["compressed"] < flops["dense"]
    assert found.ratio["kv_cache_bytes"] is not None
    assert found.ratio["kv_cache_bytes"] < 1


def test_answering_is_timed_on_both_sides() -> None:
    found = BENCHES["understanding"](tiny_pair(), COUNTED)
    assert found.dense.understanding_seconds is not None
    assert found.ratio["understanding_seconds"] is not None
    assert found.details["understanding"]["flops"]["dense"] > 0


def test_a_timed_training_step_trains_nothing() -> None:
    pair = tiny_pair()
    before = [fingerprint(model) for _, model in pair]
    found = BENCHES["training"](pair, QUICK)
    assert found.ratio["training_step_seconds"] is not None
    assert [fingerprint(model) for _, model in pair] == before
    for _, model in pair:
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_decompressor_is_timed_in_every_order_and_head() -> None:
    found = BENCHES["decompressor"](tiny_pair(), QUICK)
    named = found.details["decompressor"]["medians"]
    orders, heads = ("raster", "block", "parallel"), ("codes", "regression")
    assert set(named) >= {f"{order}/{head}" for order in orders for head in heads}
    assert found.compressed_breakdown.decompressor == named["trained"]
    assert found.dense_breakdown.decompressor is None


def test_one_side_may_be_missing() -> None:
    pair = tiny_pair()
    alone = Pair(dense=None, compressed=pair.compressed)
    found = BENCHES["understanding"](alone, QUICK)
    assert found.dense.understanding_seconds is None
    assert found.ratio["tokens"] is None
    assert found.details["understanding"]["flops"] is None
    with pytest.raises(InputError, match="no decompressor"):
        BENCHES["decompressor"](Pair(dense=pair.dense, compressed=None), QUICK)
    with pytest.raises(InputError, match="no model to measure"):
        BENCHES["generation"](Pair(dense=None, compressed=None), QUICK)


def test_the_cache_size_is_that_of_a_real_cache() -> None:
    for _, model in tiny_pair():
        length = model.interface_tokens + 3
        cache = model.backbone.new_cache(length)
        embeds = torch.zeros(1, length, model.backbone.hidden_size)
        with torch.no_grad():
            model.backbone(embeds, None, torch.arange(length)[None], cache)
        real = sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        )
        assert kv_cache_bytes(model, prompt_tokens=3) == real


def test_flops_of_a_known_product() -> None:
    layer = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        assert count_flops(lambda: layer(torch.zeros(5, 16))) == 2 * 5 * 16 * 8


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_fused_attention_are_those_of_its_products(masked: bool) -> None:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool) if masked else None

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    product = 2 * 2 * 16 * 16 * 8
    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().sum().backward()) == 7 * product


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_are_those_of_the_released_models(name: str) -> None:
    lm = random_lm(name, device="meta")
    count = sum(parameter.numel() for parameter in lm.parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_a_random_model_is_the_same_each_time_and_disturbs_no_seed() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first, second = random_lm("tiny"), random_lm("TINY")
    assert torch.equal(torch.rand(1), wanted)
    assert fingerprint(first) == fingerprint(second)


def test_an_unknown_shape_names_the_nearest() -> None:
    assert "llama-3.2-1b" in LMS
    with pytest.raises(InputError, match=r"Did you mean 'llama-3\.2-1b'"):
        random_lm("llama-3.2-1B-it")


@pytest.mark.parametrize("bad", [{"batch": 0}, {"repeats": 0}, {"warmup": -1}])
def test_no_effort_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least"):
        Effort(**bad)
