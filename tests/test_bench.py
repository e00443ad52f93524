"""What `bench` counts, draws and compares with, beyond the times that test_cost.py covers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from eval_pair import tiny_pair
from unicompress.errors import InputError
from unicompress.evals.bench_plot import save_plot
from unicompress.evals.cost import BASELINE, Effort, bench_generation, bench_understanding
from unicompress.evals.janus_baseline import janus_task
from unicompress.evals.language_models import lm_config, random_codec, random_lm
from unicompress.evals.meter import meter
from unicompress.evals.result import Breakdown, Result
from unicompress.generate import Sampling
from unicompress.tokenizers.toy import ToySingle
from unified_toy import SPEC

CPU = torch.device("cpu")


def test_the_meter_counts_products_and_the_largest_memory() -> None:
    layer = nn.Linear(16, 8, bias=False)

    def task() -> None:
        with torch.no_grad():
            for _ in range(3):
                rows = torch.zeros(5, 16)  # 320 bytes
                out = layer(rows)  # 160 bytes
                del rows
                out = out + 1  # 160 more while both are there
                del out

    found = meter(task, CPU)
    assert found.flops == 3 * 2 * 5 * 16 * 8
    assert found.peak_bytes == 480  # neither the weights nor the earlier rounds


def test_a_view_is_no_memory_of_its_own() -> None:
    weight = torch.zeros(1000)
    assert meter(lambda: weight.view(10, 100)[1].t(), CPU).peak_bytes == 0
    assert meter(lambda: [weight + 1 for _ in range(3)], CPU).peak_bytes == 12000


def test_janus_draws_as_many_tokens_with_our_language_model() -> None:
    dense = tiny_pair().dense
    assert dense is not None
    steps: list[int] = []
    hook = dense.backbone.inner.base_model.register_forward_pre_hook(
        lambda _m, _a, options: steps.append(options["inputs_embeds"].shape[0]), with_kwargs=True
    )
    try:
        task = janus_task(dense, prompts=2, length=5, sampling=Sampling(cfg=2.0))
        pixels = task()
    finally:
        hook.remove()
    assert steps == [4] * 64  # both branches of guidance, one pass per dense token
    assert pixels.shape == (2, 3, 32, 32)


def test_the_baseline_takes_part_in_the_turns() -> None:
    effort = Effort(batch=1, repeats=1, warmup=0)
    found = bench_generation(tiny_pair(), effort, sampling=Sampling(), baseline=True)
    details = found.details["generation"]
    assert set(details["medians"]) == {"dense", "compressed", BASELINE}
    assert 0 < details["peak_bytes"]["compressed"] < details["peak_bytes"]["dense"]
    assert found.dense.generation_seconds == details["medians"]["dense"]


def test_the_prefill_of_a_question_is_timed_alone() -> None:
    found = bench_understanding(tiny_pair(), Effort(batch=1, repeats=1, warmup=0))
    medians = found.details["understanding"]["medians"]
    assert found.dense_breakdown.prefill == medians["dense_prefill"] > 0
    flops = found.details["understanding"]["flops"]
    assert flops["compressed_prefill"] < flops["dense_prefill"] < flops["dense"]


def test_a_language_model_by_its_configuration(tmp_path: Path) -> None:
    values = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": 3, "vocab_size": 64}))
    for name in (str(path), str(tmp_path)):
        assert lm_config(name).num_hidden_layers == 3
    assert random_lm(lm_config(str(path)), device="meta").config.model_type == "qwen2"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no language model configuration in"):
        lm_config(str(tmp_path / "empty"))


def test_a_random_codec_is_the_same_each_time_in_the_hosts_precision() -> None:
    host = ToySingle(rows=4, columns=4).to(torch.bfloat16)
    first, second = (random_codec(host, SPEC).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {t.dtype for t in first.values() if t.is_floating_point()} == {torch.bfloat16}


def test_the_plot_needs_times(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = Breakdown(prefill=0.1, lm_steps=0.8, head=0.1, decompressor=0.0, image_decoder=0.1)
    result = Result(command="bench", dense_breakdown=parts, compressed_breakdown=parts)
    save_plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="timed in parts"):
        save_plot(Result(command="bench"), tmp_path / "b.png")
