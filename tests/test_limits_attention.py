"""Attention allocation: exact where it can be known, blind to padding, and without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from unicompress.cli import app
from unicompress.errors import InputError
from unicompress.evals.results_page import load as load_results
from unicompress.evals.results_page import results_page
from unicompress.limits.attention import PADDING, SEGMENTS, Pass, attention_allocation
from unicompress.limits.plots import plot_allocations
from unicompress.limits.segments import Example, file_passes, unified_passes
from unicompress.tokenizers.base import tokenizers
from unicompress.unified import UnifiedModel
from unified_toy import LONG, SPEC, pictures, text_tokenizer, tiny_lm, tiny_model

LABELS = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, 3, 3]])


def lm(kind: str = "llama", **options: Any) -> PreTrainedModel:
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        **options,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()


def one_pass(model: PreTrainedModel, labels: Tensor = LABELS, **inputs: Any) -> Pass:
    ids = torch.arange(labels.shape[1]).expand(labels.shape[0], -1) % 40
    return Pass(lambda: model(ids, **inputs), labels)


def from_maps(model: PreTrainedModel, labels: Tensor, sink: bool) -> Tensor:
    """The definition, on stored maps: for every query the sum over a segment, then the mean."""
    eager = type(model)(model.config)
    eager.load_state_dict(model.state_dict())
    eager.eval().set_attn_implementation("eager")
    ids = torch.arange(labels.shape[1])[None] % 40
    maps = torch.stack(eager(ids, output_attentions=True).attentions)[:, 0].double()  # [l n q k]
    queries = range(labels.shape[1])
    if not sink:
        maps[..., 0] = 0
        maps = maps / maps.sum(-1, keepdim=True)
        queries = range(1, labels.shape[1])
    count = int(labels.max()) + 1
    table = torch.zeros(*maps.shape[:2], count, count, dtype=torch.float64)
    for s in range(count):
        rows = [i for i in queries if labels[0, i] == s]
        for t in range(count):
            columns = [j for j in range(labels.shape[1]) if labels[0, j] == t]
            table[:, :, s, t] = maps[:, :, rows][..., columns].sum(-1).mean(-1)
    return table


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("block", [3, 256])
def test_streamed_tables_equal_the_definition(kind: str, attention: str, block: int) -> None:
    model = lm(kind, attn_implementation=attention)
    found = attention_allocation(model, [one_pass(model)], SEGMENTS, block=block)
    with torch.no_grad():
        torch.testing.assert_close(found.mass, from_maps(model, LABELS, True), atol=1e-6, rtol=1e-5)
        # Where next to nothing is left beside the sink, the quotient of stored maps is coarse.
        wanted = from_maps(model, LABELS, False)
        torch.testing.assert_close(found.without_sink, wanted, atol=1e-4, rtol=1e-3)
    assert found.queries.tolist() == [2, 3, 1, 4]
    assert found.queries_without_sink.tolist() == [1, 3, 1, 4]
    for mass in (found.mass, found.without_sink):
        torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_uniform_attention_has_its_closed_form() -> None:
    """Zero queries: query i gives 1 / (i + 1) to each key up to itself."""
    model = lm()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.q_proj.weight)
    found = attention_allocation(model, [one_pass(model)], SEGMENTS)
    n = LABELS.shape[1]
    first = [0, 2, 5, 6, n]  # of every segment

    def share(query: int, segment: int, skip: int) -> float:
        keys = range(max(first[segment], skip), min(first[segment + 1], query + 1))
        return len(keys) / (query + 1 - skip)

    for sink, skip in ((True, 0), (False, 1)):
        output = [[share(i, s, skip) for s in range(4)] for i in range(6, n)]
        wanted = torch.tensor(output, dtype=torch.float64).mean(0).expand(3, 4)
        torch.testing.assert_close(found.share("output", sink=sink), wanted, rtol=0, atol=1e-7)
        everything = [[share(i, s, skip) for s in range(4)] for i in range(skip, n)]
        wanted = torch.tensor(everything, dtype=torch.float64).mean(0).expand(3, 4)
        torch.testing.assert_close(found.share("all", sink=sink), wanted, rtol=0, atol=1e-7)
    heads = found.by_head("instruction")
    assert heads.shape == (3, 4, 4)
    torch.testing.assert_close(heads.mean(1), found.share("instruction"))


def test_padding_is_never_counted_and_batches_are_the_mean_of_their_rows() -> None:
    model = lm()
    short = LABELS[:, 3:]
    padded = torch.cat([torch.full((1, 3), PADDING), short], dim=1)
    ids = torch.cat([torch.arange(10), torch.tensor([7, 7, 7, *range(7)])]).view(2, 10)
    seen = torch.ones(2, 10, dtype=torch.long)
    seen[1, :3] = 0
    places = torch.stack([torch.arange(10), torch.arange(-3, 7).clamp(min=0)])
    labels = torch.cat([LABELS, padded])

    def both() -> None:
        model(ids, attention_mask=seen, position_ids=places)

    joined = attention_allocation(model, [Pass(both, labels)])
    apart = attention_allocation(
        model, [one_pass(model), Pass(lambda: model(torch.arange(7)[None]), short)]
    )
    assert joined.queries.tolist() == apart.queries.tolist() == [2, 5, 2, 8]
    torch.testing.assert_close(joined.mass, apart.mass, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined.without_sink, apart.without_sink, atol=1e-6, rtol=1e-5)


def test_no_trace_is_left_and_outputs_are_those_of_sdpa() -> None:
    model = lm(attn_implementation="sdpa")
    ids = torch.arange(10)[None]
    outputs = []
    before = model(ids).logits
    attention_allocation(model, [Pass(lambda: outputs.append(model(ids).logits), LABELS)])
    assert torch.equal(outputs[0], before)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError):
        attention_allocation(model, [Pass(lambda: 1 / 0, LABELS)])
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_first_layer_of_redundancy() -> None:
    model = lm()
    found = attention_allocation(model, [one_pass(model)])
    mass = torch.zeros_like(found.mass)
    mass[..., 1] = torch.tensor([0.5, 0.05, 0.2])[:, None, None]
    staged = type(found)(found.names, mass, mass, found.queries, found.queries_without_sink)
    assert staged.redundant_from("image", below=0.3) == 1
    assert staged.redundant_from("image", below=0.1) is None
    assert staged.redundant_from("image", below=0.6) == 0


EXAMPLES = [
    Example(picture, (("how many objects?", "two"), (LONG, "red")), caption)
    for picture, caption in zip(pictures(2), ["a red circle", LONG], strict=True)
]


@pytest.mark.parametrize("spec", [None, SPEC], ids=["dense", "compressed"])
def test_unified_models_are_measured_on_both_tasks(spec: Any) -> None:
    model = tiny_model(spec=spec)
    tokens = model.tokens_per_image
    words = {
        text: len(model.text(text, add_special_tokens=False)["input_ids"])
        for text in ("how many objects?", LONG, "two", "red", "a red circle")
    }
    reading = attention_allocation(
        model.lm, unified_passes(model, EXAMPLES, "understanding", batch=1)
    )
    delimiters = model.layout.delimiters
    asked = words["how many objects?"] + words[LONG] + 2 * len(model._ids("\n"))
    wanted = [delimiters, tokens, asked, words["two"] + words["red"]]
    assert reading.queries.tolist() == [2 * count for count in wanted]
    drawing = attention_allocation(model.lm, unified_passes(model, EXAMPLES, "generation"))
    told = words["a red circle"] + words[LONG]
    assert drawing.queries.tolist() == [2 * (delimiters - 1), 0, told, 2 * tokens]
    for found in (reading, drawing):
        for sink in (True, False):
            shares = found.share("output", sink=sink)
            torch.testing.assert_close(shares.sum(-1), torch.ones(2).double())
    # Questions do not see each other: all answers see the same image, so batches change nothing.
    again = attention_allocation(model.lm, unified_passes(model, EXAMPLES, "understanding"))
    torch.testing.assert_close(again.mass, reading.mass, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="no query to measure in image"):
        drawing.share("image")


def test_plots_and_summary(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = lm()
    found = attention_allocation(model, [one_pass(model)])
    plot_allocations({"a": found, "b": found}, tmp_path / "a.png", focus={"b": "image"})
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    summary = json.loads(json.dumps(found.summary()))
    assert len(summary["by_layer"]["without_sink"]) == 3
    assert len(summary["by_head"]["with_sink"][0]) == 4
    with pytest.raises(InputError, match=r"must end in \.png"):
        plot_allocations({"a": found}, tmp_path / "a.jpg")


def test_files_of_segments(tmp_path: Path) -> None:
    model, path = lm(vocab_size=300), tmp_path / "segments.json"
    parts = [
        {"segment": "system", "ids": [1, 2]},
        {"segment": "question", "text": "how many objects?"},
        {"segment": "system", "ids": [3]},
    ]
    path.write_text(json.dumps([parts, parts[:2]]))
    names, passes = file_passes(path, model, text_tokenizer())
    assert names == ("system", "question")
    found = attention_allocation(model, passes, names)
    count = len(text_tokenizer()("how many objects?", add_special_tokens=False)["input_ids"])
    assert found.queries.tolist() == [5, 2 * count]
    for wrong, message in (
        ("[]", "at least one sequence"),
        ('[[{"segment": "a"}]]', "needs `segment` and either `text` or `ids`"),
        ('[[{"segment": "a", "ids": "x"}]]', "ids must be a list of token numbers"),
        ('[[{"segment": "a", "ids": []}]]', "a sequence without tokens"),
        ('[[{"segment": "a", "ids": [300]}]]', "token 300 is not in the vocabulary of 300"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match=message):
            file_passes(path, model, text_tokenizer())


def test_the_command_measures_models_and_files(tmp_path: Path) -> None:
    tokenizer = tokenizers.build("toy_single(rows=8, columns=8)")
    UnifiedModel.from_parts(
        tokenizer=tokenizer, lm=tiny_lm(512), text_tokenizer=text_tokenizer()
    ).save_pretrained(tmp_path / "model")
    run, out = CliRunner(), tmp_path / "out.json"
    given = ["analyze", "attention", str(tmp_path / "model"), "--pictures", "2", "--device", "cpu"]
    done = run.invoke(app, [*given, "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "Attention in generation, without the first token" in done.output
    value = json.loads(out.read_text())
    assert value["dense"]["tokens_per_image"] == 64
    for task in ("understanding", "generation"):
        for kind in ("with_sink", "without_sink"):
            for layer in value["details"]["attention"][task]["by_layer"][kind]:
                assert sum(layer) == pytest.approx(1)
    assert "### Attention in understanding, all tokens" in results_page(load_results([out]))
    assert run.invoke(app, [*given[:3], "--pictures", "0"]).exit_code != 0
    lm("qwen2", vocab_size=300).save_pretrained(tmp_path / "lm")
    text_tokenizer().save_pretrained(tmp_path / "lm")
    parts = [{"segment": "a", "text": "how many"}, {"segment": "b", "text": "objects?"}]
    (tmp_path / "parts.json").write_text(json.dumps([parts]))
    given = ["analyze", "attention", str(tmp_path / "lm"), "--queries", "b", "--device", "cpu"]
    done = run.invoke(app, [*given, "--segments", str(tmp_path / "parts.json")])
    assert done.exit_code == 0, done.output
    assert "Attention in text, all tokens" in done.output


def test_mistakes_are_named() -> None:
    model = lm()
    with pytest.raises(InputError, match="no sequence was measured"):
        attention_allocation(model, [])
    found = attention_allocation(model, [one_pass(model)])
    with pytest.raises(InputError, match="unknown segment 'answer': use all, system, image"):
        found.share("answer")
    with pytest.raises(InputError, match="9 to 9 tokens where 10 have labels"):
        attention_allocation(model, [Pass(lambda: model(torch.arange(9)[None]), LABELS)])
    with pytest.raises(InputError, match="does not attend through transformers' attention"):
        attention_allocation(model, [Pass(lambda: None, LABELS)])
    accelerated = tiny_model()
    accelerated.accelerate(["himix"])
    with pytest.raises(InputError, match="accelerates understanding with himix"):
        next(unified_passes(accelerated, EXAMPLES, "understanding"))


def test_other_architectures_can_be_measured() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    found = attention_allocation(gpt.eval(), [one_pass(gpt)])
    assert found.mass.shape == (2, 2, 4, 4)
