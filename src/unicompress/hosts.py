"""The list of hosts: what each can do follows from its kind, the rest it says itself (`facts`)."""

from dataclasses import asdict, dataclass
from typing import Any

from unicompress.released.base import releases
from unicompress.tokenizers.base import HostFacts, ImageTokenizer, tokenizers

YES, TRAINED = "yes", "after stage two"
WHAT = ("encode", "decode", "stage_one", "stage_two", "ask", "draw")


@dataclass(frozen=True)
class HostLine:
    """One host; `ask` and `draw` say whether its released weights do, or only trained ones."""

    name: str
    kind: str  # tokenizer, or unified model
    encode: str
    decode: str
    stage_one: str
    stage_two: str
    ask: str
    draw: str
    weights: str  # where they were released; empty: there are none
    licence: str
    verified: str
    limits: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def list_hosts() -> list[HostLine]:
    """All unified models, then all tokenizers, by name; toys for tests are left out."""
    models = [
        _line(loader.title or loader.name, "unified model", loader.hub, loader.facts, YES)
        for loader in map(releases.get, releases.names())
    ]
    known = [name for name in tokenizers.names() if not name.startswith("toy_")]
    return models + [_tokenizer(name, tokenizers.get(name)) for name in known]


def _tokenizer(name: str, member: type[ImageTokenizer]) -> HostLine:
    layout = getattr(member, "layout", None)
    return _line(name, "tokenizer", "" if layout is None else layout.hub, member.facts, TRAINED)


def _line(name: str, kind: str, weights: str, facts: HostFacts, used: str) -> HostLine:
    """A tokenizer must encode and decode by its contract, and training needs nothing else."""
    can = dict.fromkeys(WHAT, YES) | {"ask": used, "draw": used}
    return HostLine(
        name=name,
        kind=kind,
        weights=weights,
        licence=facts.licence,
        verified=facts.verified or "contract tests only",
        limits=facts.limits,
        **can,
    )
