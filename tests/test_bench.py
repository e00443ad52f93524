"""What `bench` counts, draws and compares with, beyond the times that test_cost.py covers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from eval_pair import SPEC as PAIR_SPEC
from eval_pair import tiny_pair
from saved_pair import save_tiny_pair
from unicompress import cli
from unicompress.codec import ImageCodec
from unicompress.data.scenes import Scenes
from unicompress.errors import InputError
from unicompress.evals.bench_growth import Shape, growth
from unicompress.evals.bench_orders import bench_orders
from unicompress.evals.bench_plot import growth_lines, save_plot
from unicompress.evals.cost import BASELINE, Effort, bench_generation, bench_understanding
from unicompress.evals.generation import judge, real_pictures
from unicompress.evals.image_metrics import psnr
from unicompress.evals.janus_baseline import janus_task
from unicompress.evals.language_models import lm_config, random_codec, random_lm
from unicompress.evals.meter import meter
from unicompress.evals.result import Breakdown, Figures, Result
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


# The orders of the decompressor

QUICK = Effort(batch=2, repeats=2, warmup=0, flops=False)


def codec_in(order: str, seed: int = 0, **changes: Any) -> ImageCodec:
    pair = tiny_pair()
    torch.manual_seed(seed)
    return ImageCodec(pair.any.tokenizer, replace(PAIR_SPEC, order=order, **changes)).eval()


def test_one_command_says_what_an_order_costs_and_loses() -> None:
    trained = {"mine": codec_in("block"), "paper": codec_in("raster", seed=1)}
    found = bench_orders(tiny_pair(), trained, QUICK)
    details = found.details["decompressor"]
    for head in ("codes", "regression"):
        assert details["orders"][f"raster/{head}"]["against_raster"] == 1
        named = {name: details["medians"][f"{name}/{head}"] for name in ("raster", "block")}
        ratio = details["orders"][f"block/{head}"]["against_raster"]
        assert ratio == pytest.approx(named["block"] / named["raster"])
    assert details["pictures"] == 4
    samples = [Scenes("val", size=32)[i] for i in range(4)]
    pixels = real_pictures(samples)
    wanted = {}
    for name, codec in trained.items():
        with torch.no_grad():
            made = codec.decode(codec.encode(pixels))
        wanted[name] = psnr(made, pixels).double()
        entry = details["trained"][name]
        assert entry["psnr"].mean == pytest.approx(wanted[name].mean().item(), rel=1e-5)
        whole = [verdict.whole for verdict in judge(made, samples)]
        assert entry["whole"].mean == sum(whole) / 4
        assert entry["seconds"] > 0
    assert found.compressed.psnr == details["trained"]["mine"]["psnr"].mean
    assert details["against"] == "paper"
    (difference,) = details["differences"].values()
    change = (wanted["mine"] - wanted["paper"]).mean().item()
    assert change != 0
    assert difference["psnr"].difference == pytest.approx(change, rel=1e-4)
    assert difference["whole"].count == 4


def test_without_a_raster_one_there_is_no_difference() -> None:
    found = bench_orders(tiny_pair(), {"a": codec_in("block"), "b": codec_in("parallel")}, QUICK)
    details = found.details["decompressor"]
    assert (details["against"], details["differences"]) == (None, None)
    assert details["trained"].keys() == {"a", "b"}


def test_orders_are_compared_at_one_rate_and_host() -> None:
    block = codec_in("block")
    with pytest.raises(InputError, match="b has stride 4 and 4 globals, a has 2 and 4: compare"):
        bench_orders(tiny_pair(), {"a": block, "b": codec_in("raster", stride=4)}, QUICK)
    torch.manual_seed(5)
    other = ImageCodec(ToySingle(rows=8, columns=8), PAIR_SPEC)
    next(other.tokenizer.parameters()).data.add_(1)
    with pytest.raises(InputError, match="b has another host than a"):
        bench_orders(tiny_pair(), {"a": block, "b": other}, QUICK)


def run(*words: object) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output + done.stderr
    return done.stdout


def test_bench_decompressor_takes_plug_ins_and_models(tmp_path: Path) -> None:
    save_tiny_pair(tmp_path)
    codec_in("raster").save_pretrained(tmp_path / "raster")
    given = [tmp_path / "compressed", tmp_path / "raster"]
    words: list[object] = [word for name in given for word in ("--compressed", name)]
    words += ["--dense", tmp_path / "dense", "--batch", 1, "--repeats", 2]
    said = run("bench", "decompressor", *words, "--json", tmp_path / "r.json")
    assert "minus" in said
    details = json.loads((tmp_path / "r.json").read_text())["details"]["decompressor"]
    assert [entry["order"] for entry in details["trained"].values()] == ["block", "raster"]
    assert details["against"] == str(tmp_path / "raster")
    done = CliRunner().invoke(cli.app, ["bench", "generation", *map(str, words)])
    assert done.exit_code == 2
    assert "several --compressed are for bench decompressor" in done.stderr


# Growth


def timed(tokens: int, batch: int, lm: str, dense: float, compressed: float) -> Any:
    result = Result(
        command="bench",
        dense=Figures(tokens_per_image=tokens, generation_seconds=dense),
        compressed=Figures(tokens_per_image=tokens // 4, generation_seconds=compressed),
        details={"generation": {"flops": None}},
    )
    return Shape(batch=batch, lm=lm, tokenizer="host"), result


def test_growth_is_drawn_over_what_varies(tmp_path: Path) -> None:
    measured = [
        timed(tokens, 1, lm, tokens / 256, tokens / 1024)
        for lm in ("small", "large")
        for tokens in (1024, 256)
    ]
    result = growth("generation", measured)
    table = result.as_json()["details"]["generation"]["growth"]
    assert [(row["lm"], row["dense"]["tokens_per_image"]) for row in table][1] == ("small", 256)
    assert result.dense.generation_seconds == 4.0  # the fixed figures are those of the first
    assert growth_lines("generation", table) == (
        "tokens",
        {name: [(256, 1.0, 0.25), (1024, 4.0, 1.0)] for name in ("small", "large")},
    )
    axis, lines = growth_lines("generation", [row for row in table if row["lm"] == "small"])
    assert (axis, list(lines)) == ("tokens", [""])
    by_lm = [row for row in table if row["dense"]["tokens_per_image"] == 256]
    assert growth_lines("generation", by_lm) == (
        "lm",
        {"": [("small", 1.0, 0.25), ("large", 1.0, 0.25)]},
    )
    with pytest.raises(InputError, match="growth is drawn where both sides are timed"):
        growth_lines("decompressor", table)
    pytest.importorskip("matplotlib")
    save_plot(result, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"


def swept(folder: Path, what: str, *words: object) -> list[dict[str, Any]]:
    """What a bench of several shapes wrote."""
    effort = ["--repeats", 1, "--no-counts", "--json", folder / "r.json"]
    assert "compressed / dense" in run("bench", what, "--lm", "tiny", *words, *effort)
    found = json.loads((folder / "r.json").read_text())
    table: list[dict[str, Any]] = found["details"][what]["growth"]
    assert found["dense"] == table[0]["dense"]
    return table


def test_bench_sweeps_image_sizes_with_random_weights(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hosts = [f"toy_single(rows={side}, columns={side})" for side in (8, 10)]
    words = [word for host in hosts for word in ("--tokenizer", host)]
    more = ["--batch", 1, "--cfg", 1, "--plot", tmp_path / "g.png"]
    table = swept(tmp_path, "generation", *words, *more)
    assert [row["tokenizer"] for row in table] == hosts
    assert [row["dense"]["tokens_per_image"] for row in table] == [64, 100]
    for row in table:
        times = [row[side]["generation_seconds"] for side in ("dense", "compressed")]
        assert row["ratio"]["generation_seconds"] == pytest.approx(times[1] / times[0])
        assert row["breakdown"]["compressed"]["decompressor"] > 0
    assert table[1]["dense"]["kv_cache_bytes"] > table[0]["dense"]["kv_cache_bytes"]
    assert (tmp_path / "g.png").stat().st_size > 1000


def test_bench_sweeps_every_combination(tmp_path: Path) -> None:
    words = ["--tokenizer", "toy_single(rows=8, columns=8)", "--lm", "reference"]
    table = swept(tmp_path, "understanding", *words, "--batch", 2, "--batch", 1)
    shapes = [(row["lm"], row["batch"]) for row in table]
    assert shapes == [("tiny", 2), ("tiny", 1), ("reference", 2), ("reference", 1)]
    assert all(row["ratio"]["understanding_seconds"] > 0 for row in table)
