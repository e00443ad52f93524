"""`hosts` names every registered host, and says of each only what its class says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unicompress.cli.app import app
from unicompress.hosts import WHAT, list_hosts
from unicompress.released.base import releases
from unicompress.tokenizers.base import HostFacts, tokenizers

LINES = {(line.kind, line.name): line for line in list_hosts()}


def test_every_host_has_one_line() -> None:
    known = {("tokenizer", n) for n in tokenizers.names() if not n.startswith("toy_")}
    assert set(LINES) == known | {
        ("unified model", loader.title or loader.name)
        for loader in map(releases.get, releases.names())
    }
    assert len(LINES) == len(list_hosts())


@pytest.mark.parametrize("key", sorted(LINES), ids=" ".join)
def test_every_host_says_licence_and_evidence(key: tuple[str, str]) -> None:
    line = LINES[key]
    assert line.licence
    assert line.verified
    assert {getattr(line, what) for what in WHAT} <= {"yes", "no", "after stage two"}
    if line.kind == "tokenizer":  # a tokenizer alone neither answers nor draws
        assert (line.ask, line.draw) == ("after stage two", "after stage two")
    else:
        assert line.weights


def test_facts_stand_with_the_class() -> None:
    line = LINES["tokenizer", "unitok"]
    facts = tokenizers.get("unitok").facts
    assert (line.licence, line.verified, line.limits) == (
        facts.licence,
        facts.verified,
        facts.limits,
    )
    assert line.weights == "FoundationVision/unitok_tokenizer"
    assert facts.licence == "MIT"


def test_a_host_without_facts_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers.get("janus_vq"), "facts", HostFacts())
    (line,) = (line for line in list_hosts() if line.name == "janus_vq")
    assert (line.licence, line.verified) == ("", "contract tests only")


def test_released_models_answer_and_draw_at_once() -> None:
    line = LINES["unified model", "janus"]
    assert {getattr(line, what) for what in WHAT} == {"yes"}
    assert line.weights == "deepseek-community/Janus-Pro-1B"


def test_command_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "hosts.json"
    done = CliRunner().invoke(app, ["hosts", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "unitok" in done.output
    assert "toy_single" not in done.output
    values = json.loads(out.read_text())["hosts"]
    assert {(v["kind"], v["name"]) for v in values} == set(LINES)
    assert {*WHAT, "licence", "verified", "weights", "limits"} <= values[0].keys()
