"""README and docs are true: their Python runs, their commands and paths exist."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from eval_pair import tiny_pair
from unicompress import cli, reference
from unicompress.compressors import compressors
from unicompress.tokenizers.base import tokenizers

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that ship, or tiny ones in their place while there are none."""
    if not reference.available():
        pair = tiny_pair()
        monkeypatch.setattr(reference, "load", lambda name, device="cpu": dict(pair)[name])


@contextlib.contextmanager
def same_members() -> Iterator[None]:
    """What a block registers is gone afterwards."""
    families = (compressors, tokenizers)
    for family in families:
        family.names()  # a module that a block imports first would not register again
    before = [(family, dict(family._members)) for family in families]
    try:
        yield
    finally:
        for family, members in before:
            family._members = members


@pytest.mark.parametrize(
    ("page", "index"),
    [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))],
)
def test_python_blocks_run(
    page: str, index: int, shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")[index]
    with same_members():
        exec(compile(code, f"{page}, block {index}", "exec"), {"__name__": "readme"})


def command_lines() -> list[str]:
    """Every `unicompress ...` in a block or in backticks."""
    lines: list[str] = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fenced = "\n".join(blocks(page, "bash")).splitlines()
        quoted = re.findall(r"`(unicompress [^`]+)`", text)
        found = [line.split(" #")[0].strip() for line in [*fenced, *quoted]]
        lines += [" ".join(line.split()) for line in found if line.startswith("unicompress ")]
    return lines


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert words[0] in commands, f"no command {words[0]!r}"
    options = {opt for param in commands[words[0]].params for opt in param.opts}
    for word in words[1:]:
        if word.startswith("-"):
            assert word in options, f"{words[0]} has no option {word}"
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


def test_make_goals_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    goals = set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= goals
    for goal in goals:
        assert re.search(rf"^{goal}:", makefile, flags=re.MULTILINE), f"make has no goal {goal}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_results_have_their_place() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("<!-- results -->") < text.index("<!-- /results -->")


def test_every_registered_name_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in compressors.names():
        assert f"`{name}`" in text, f"the README does not list the compressor {name}"
    for name in tokenizers.names():
        if not name.startswith("toy_"):
            assert f"`{name}`" in text, f"the README does not list the tokenizer {name}"


# The scripts in examples/

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(
    path: Path, shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    from unicompress.data.images import save_png
    from unicompress.data.scenes import Scenes

    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    save_png(Scenes("test")[0].pixels, "pictures/a.png")
    arguments = {"train_a_plug_in": ["2"], "compress_a_folder": ["pictures"]}.get(path.stem, [])
    runpy.run_path(str(path))["main"](*arguments)
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
