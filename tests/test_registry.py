"""Families, specs, entry points, and `require`."""

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from unicompress import registry
from unicompress.errors import InputError, MissingDependencyError
from unicompress.registry import Family, Member, require


class Cake(Member):
    def __init__(self, *, layers: int = 1, filling: str = "plum", oven: object = None):
        self.layers, self.filling, self.oven = layers, filling, oven


class Bread(Member):
    pass


@pytest.fixture
def family() -> Family[Member]:
    made: Family[Member] = Family("pastry", home="unicompress.errors")
    made.register("cake")(type("Cake", (Cake,), {}))
    made.register("bread")(type("Bread", (Bread,), {}))
    return made


def test_names_and_get(family: Family[Member]) -> None:
    assert family.names() == ["bread", "cake"]
    assert family.get("cake").name == "cake"


@pytest.mark.parametrize("spec", ["bread", "cake(layers=3, filling='cream', oven=None)"])
def test_spec_round_trip(family: Family[Member], spec: str) -> None:
    built = family.build(spec)
    assert str(built) == spec
    assert str(family.build(str(built))) == spec


def test_parts_are_passed_beside_options(family: Family[Member]) -> None:
    part = object()
    cake: Any = family.build("cake(layers=2)", oven=part)
    assert (cake.layers, cake.oven) == (2, part)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("cak", "unknown pastry 'cak'. Did you mean 'cake'? Known: bread, cake"),
        ("zzzzzz", "unknown pastry 'zzzzzz'. Known: bread, cake"),
        ("cake(layer=2)", "pastry 'cake' has no option 'layer'; it takes: layers, filling, oven"),
        ("cake(2)", "'cake(2)' is not a pastry: write name or name(option=value)"),
        ("cake(", "'cake(' is not a pastry: write name or name(option=value)"),
        ("cake(layers=open('x'))", None),
        ("a.b()", None),
        ("", None),
        ("cake; bread", None),
    ],
)
def test_mistakes_are_named(family: Family[Member], spec: str, sentence: str | None) -> None:
    with pytest.raises(InputError) as caught:
        family.build(spec)
    expected = sentence or f"{spec!r} is not a pastry: write name or name(option=value)"
    assert str(caught.value) == expected


def test_a_name_is_given_once(family: Family[Member]) -> None:
    with pytest.raises(ValueError, match="pastry 'cake' is already registered by Cake"):
        family.register("cake")(Bread)


class FakePoint:
    name, value = "tart", "bakery:Tart"

    def __init__(self, load: Callable[[], object]):
        self.load = load


def test_other_packages_add_members(
    family: Family[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = FakePoint(lambda: family.register("tart")(type("Tart", (Member,), {})))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert family.names() == ["bread", "cake", "tart"]


def test_a_broken_plug_in_is_reported_by_name(
    family: Family[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint(name="tart", value="no_such_bakery:Tart", group=family.home)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(MissingDependencyError, match=r"plug-in 'tart' \(no_such_bakery:Tart\)"):
        family.names()


@pytest.mark.parametrize(
    "path", ["compressors.compressors", "global_tokens.global_tokens", "tokenizers.base.tokenizers"]
)
def test_real_families_have_members_with_specs(path: str) -> None:
    module, name = path.rsplit(".", 1)
    family = getattr(importlib.import_module(f"unicompress.{module}"), name)
    assert family.names()
    for member in family.names():
        assert family.get(member).name == member


def test_require_returns_the_module() -> None:
    assert require("json", extra="none").dumps({}) == "{}"


@pytest.mark.parametrize("error", [ImportError("gone"), RuntimeError("operator does not exist")])
def test_require_says_which_extra(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError) as caught:
        require("datasets", extra="train")
    assert str(caught.value) == (
        f"this needs datasets: pip install 'unicompress[train]' (import failed with: {error})"
    )
