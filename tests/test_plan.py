"""The plan: its arithmetic, its extrapolation, and the commands that show it."""

from dataclasses import replace

import pytest
import torch

from eval_pair import SPEC, tiny_pair
from unicompress.codec import CodecSpec
from unicompress.errors import InputError
from unicompress.evals import plan as planning
from unicompress.evals.language_models import lm_config
from unicompress.evals.plan import Costs, Plan, StepCost, make_plan, timed_depths
from unicompress.generate import Sampling, processor_time
from unicompress.tokenizers.toy import ToySingle

COSTS = Costs(step=StepCost(1.0, 0.01), prefill=2.0, head=0.5, decompressor=10.0, image_decoder=3.0)


def test_drawing_adds_up_its_steps() -> None:
    # Step i (the second token is i = 1) reads the prompt, BOS and the i tokens before and with it.
    steps = sum(1.0 + 0.01 * (planning.PROMPT + 1 + i) for i in range(1, 64))
    wanted = 2.0 + steps + 64 * 0.5 + 3.0
    assert COSTS.drawing(64, compressed=False) == pytest.approx(wanted, rel=0.01)
    more = COSTS.drawing(64, compressed=True) - COSTS.drawing(64, compressed=False)
    assert more == pytest.approx(10.0)


def example(**changes: float) -> Plan:
    costs = replace(COSTS, **changes)
    return Plan(
        dense_tokens=256,
        compressed_tokens=68,
        dense_seconds=costs.drawing(256, compressed=False),
        compressed_seconds=costs.drawing(68, compressed=True),
        costs=costs,
        layers_timed=(1, 2),
        layers=16,
    )


def test_at_the_break_even_nothing_is_gained() -> None:
    plan = example()
    assert plan.limit < plan.ratio < 1
    assert example(decompressor=plan.break_even).ratio == pytest.approx(1.0)
    assert example(decompressor=0.0).ratio == pytest.approx(plan.limit)
    steps = plan.in_steps(plan.break_even)
    assert steps * plan.dense_tokens * plan.step == pytest.approx(plan.break_even)


def test_large_models_are_timed_at_two_depths_that_no_cache_holds() -> None:
    assert timed_depths(lm_config("tiny"), torch.float32) == (2,)
    assert timed_depths(lm_config("llama-3.2-1b"), torch.bfloat16) == (1, 2)
    few, more = timed_depths(lm_config("smollm2-135m"), torch.float32)
    assert more == 2 * few
    assert few * 3.54e6 * 4 >= planning.ENOUGH  # parameters of one of its layers


def test_depths_are_extrapolated_on_a_line() -> None:
    found = {"short/2": 3.0, "short/4": 5.0}
    assert planning._at_depth(found, "short", [2, 4], 16) == pytest.approx(17.0)
    assert planning._at_depth({"short/3": 4.0}, "short", [3], 3) == 4.0


def test_a_plan_of_a_tiny_model() -> None:
    found = make_plan("tiny", tokenizer=ToySingle(rows=8, columns=8), spec=SPEC, budget=0.01)
    assert (found.dense_tokens, found.compressed_tokens) == (64, 20)
    assert found.layers_timed == (2,)
    costs = found.costs
    parts = [costs.prefill, costs.head, costs.decompressor, costs.image_decoder]
    assert min(*parts, costs.step.at(planning.PROMPT + 2)) > 0
    assert costs.step.per_position >= 0
    assert found.ratio > found.limit > 0


def test_two_depths_are_timed_where_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "timed_depths", lambda *_: (1, 2))
    found = make_plan("reference", tokenizer=ToySingle(rows=8, columns=8), spec=SPEC, budget=0.01)
    assert (found.layers_timed, found.layers) == ((1, 2), 4)


def test_a_timed_step_reads_the_context_it_says() -> None:
    pair = tiny_pair()
    assert pair.dense is not None
    seen: list[tuple[int, int]] = []
    plain = pair.dense.backbone.forward

    def spy(embeds: torch.Tensor, mask: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((embeds.shape[1], mask.shape[-1]))
        return plain(embeds, mask, *rest)

    pair.dense.backbone.forward = spy
    try:
        tasks = dict(planning._passes(pair.dense, 1, Sampling(cfg=2.0)))
        seen.clear()
        for name in ("prefill", "short", "long", "short"):
            tasks[name]()
    finally:
        del pair.dense.backbone.forward
    first, last = planning.PROMPT + 1, planning.PROMPT + 1 + 64
    assert seen == [(first, first), (1, first + 1), (1, last), (1, first + 1)]


def test_what_compresses_nothing_has_no_plan() -> None:
    host = ToySingle(rows=8, columns=8)
    with pytest.raises(InputError, match="compresses nothing"):
        make_plan("tiny", tokenizer=host, spec=CodecSpec(stride=1, global_count=0))
    with pytest.raises(InputError, match=r"Did you mean 'llama-3\.2-1b'"):
        make_plan("lama-3.2-1b", tokenizer=host, spec=SPEC)


def test_processor_time_does_not_count_waiting() -> None:
    import time

    with processor_time():
        start = planning.now()
        time.sleep(0.2)
        assert planning.now() - start < 0.15
    start = planning.now()
    time.sleep(0.02)
    assert planning.now() - start > 0.015
