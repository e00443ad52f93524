"""The clients of docs/serving.md, as printed, against servers that speak the same protocol."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from unicompress.codec import CodecSpec
from unicompress.errors import InputError
from unicompress.export import Run, codes_of, runs
from unified_toy import SEPARATE, SPEC, tiny_model

PROMPT = "a large red circle"
# The fields that the servers' request classes have and the clients may use.
VLLM = {
    "model", "prompt", "max_tokens", "temperature", "ignore_eos", "skip_special_tokens",
    "allowed_token_ids",
}  # fmt: skip
SGLANG = {"input_ids", "sampling_params", "custom_logit_processor"}
SAMPLING = {"max_new_tokens", "temperature", "ignore_eos", "skip_special_tokens", "custom_params"}
NO_GLOBALS = CodecSpec(stride=2, global_count=0, width=32, depth=1, heads=2)
Change = Callable[[Tensor], Tensor]


def client(name: str, folder: Path, server: str) -> dict[str, Any]:
    """Run the block that is marked so, with this folder and address; returns its names."""
    page = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
    text = page.read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```python {name}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    block, count = re.subn(r'"http://localhost:\d+"', repr(server), block)
    assert count == 1
    block = block.replace('"plain"', repr(str(folder)))
    found: dict[str, Any] = {"__name__": "client"}
    exec(compile(block, f"serving.md, {name}", "exec"), found)
    return found


class Changed(LogitsProcessor):
    def __init__(self, change: Change):
        self.change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.change(scores.clone())


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Iterator[str]:
    """A server on this machine that answers JSON with JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.dumps(answer(self.path, json.loads(self.rfile.read(length)))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class Served:
    """The exported folder behind either protocol, drawn by stock transformers."""

    def __init__(self, folder: Path):
        self.lm = AutoModelForCausalLM.from_pretrained(folder)
        self.words = AutoTokenizer.from_pretrained(folder)
        self.processors: dict[str, type] = {}
        self.requests = 0

    def write(self, ids: list[int], length: int, change: Change) -> str:
        self.requests += 1
        given = torch.tensor([ids])
        out = self.lm.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
            logits_processor=[Changed(change)],
        )
        text: str = self.words.decode(out[0, len(ids) :], skip_special_tokens=False)
        return text

    def vllm(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        assert path == "/v1/completions"
        assert asked.keys() <= VLLM
        assert asked["ignore_eos"] is True
        assert asked["temperature"] == 0
        hidden = torch.ones(self.lm.config.vocab_size, dtype=torch.bool)
        hidden[asked["allowed_token_ids"]] = False
        text = self.write(
            asked["prompt"],
            asked["max_tokens"],
            lambda scores: scores.masked_fill(hidden, -torch.inf),
        )
        return {"choices": [{"text": text}]}

    def sglang(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        assert path == "/generate"
        assert asked.keys() <= SGLANG
        sampling = asked["sampling_params"]
        assert sampling.keys() <= SAMPLING
        assert sampling["ignore_eos"] is True
        only = self.processors[asked["custom_logit_processor"]]()
        text = self.write(
            asked["input_ids"],
            sampling["max_new_tokens"],
            lambda scores: only(scores, [sampling["custom_params"]]),
        )
        return {"text": text}

    def fake_sglang(self) -> dict[str, ModuleType]:
        """The one name that the client imports, with its way of sending a class."""
        processors = self.processors

        class CustomLogitProcessor:
            @classmethod
            def to_str(cls) -> str:
                processors[cls.__name__] = cls
                return cls.__name__

        name, modules = "", {}
        for part in ("sglang", "srt", "sampling", "custom_logit_processor"):
            name = f"{name}.{part}".strip(".")
            modules[name] = ModuleType(name)
        modules[name].CustomLogitProcessor = CustomLogitProcessor  # type: ignore[attr-defined]
        return modules


@pytest.mark.parametrize("protocol", ["vllm", "sglang"])
@pytest.mark.parametrize("spec", [SPEC, SEPARATE, NO_GLOBALS, None])
def test_the_printed_clients_draw_our_codes(
    protocol: str, spec: CodecSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("toy_single", spec)
    model.export_causal_lm(tmp_path)
    served = Served(tmp_path)
    for name, module in served.fake_sglang().items():
        monkeypatch.setitem(sys.modules, name, module)
    with serving(getattr(served, protocol)) as address:
        written = client(protocol, tmp_path, address)["written"]
    codes = codes_of(torch.tensor([written]), model.layout, model.backbone.space)
    assert torch.equal(codes, model.draw_codes([PROMPT], cfg=1.0, temperature=0))
    assert served.requests == (2 if model.layout.global_count else 1)


def test_runs_are_the_slots() -> None:
    text = "<img:3><img:global:0> <img:15>"
    assert Run(40, 16, 3).read(text) == [43, 40, 55]
    assert Run(40, 16, 3).known == []
    assert Run(9, 1, 2).known == [9, 9]
    for wrong in (text.replace("15", "16"), "<img:3>", "a red circle"):
        with pytest.raises(InputError, match="3 image codes below 16 were asked for, got"):
            Run(40, 16, 3).read(wrong)


def test_runs_of_a_folder(tmp_path: Path) -> None:
    model = tiny_model("toy_single", SEPARATE)
    model.export_causal_lm(tmp_path)
    space, layout = model.backbone.space, model.layout
    assert runs(tmp_path) == [
        Run(space.first("global"), 5, 2),
        Run(space.begin + 1, 1, 1),
        Run(space.first("local"), space.local_size, layout.local_count),
        Run(space.begin + 2, 1, 1),
    ]
    assert sum(run.length for run in runs(tmp_path)) == model.interface_tokens - 1
