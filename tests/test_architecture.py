"""Imports point one way: a line of the house imports only from the lines above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Each line may import from the lines above; a folder counts as one unit, and units of one line
# never import each other. docs/architecture.md shows the same picture.
HOUSE = """
errors
tokens registry checkpoint codebook hub decompressor_heads engine
layers accelerators attention_projection
tokenizers global_tokens compressors decompressors backbones reducers feature_taps
codec_spec sequence understanding
requantize
codec_loss codec_stages
codec losses generate export
unified_parts
released
unified_base hosts
unified
data reference
limits evals
training
console
cli
__main__
"""
LINES = [line.split() for line in HOUSE.strip().splitlines()]
RANK = {unit: rank for rank, line in enumerate(LINES) for unit in line}
ROOT = Path(__file__).resolve().parents[1] / "src" / "unicompress"
SOURCES = sorted(ROOT.rglob("*.py"))
OPTIONAL = {
    "datasets", "torchdata", "peft", "tensorboard", "torchmetrics", "torch_fidelity", "lmms_eval",
    "matplotlib", "jinja2", "easy_vqa", "diffusers", "gradio", "beartype", "pytest",
}  # fmt: skip
NEVER = {"torchvision", "timm", "open_clip", "omegaconf", "hydra", "fire"}


def unit_of(path: Path) -> str:
    """`evals` for everything in that folder, `codec` for codec.py, `__init__` for the root."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path, *, top_level: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import statement; `top_level` leaves out those in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found: list[tuple[int, str]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "unicompress":
                found += [(node.lineno, f"unicompress.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, str(node.module)))
    return found


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_imports_point_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        pytest.skip("the public names are loaded lazily, see test_importing_costs_no_torch")
    assert unit in RANK, f"{unit} has no place in the house: put it on a line"
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "unicompress" or len(parts) < 2 or parts[1] in (unit, "__version__"):
            continue
        if RANK[parts[1]] >= RANK[unit]:
            wrong.append(f"{identifier(path)}:{line}: {unit} must not import {parts[1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_optional_packages_stay_optional(path: Path) -> None:
    """They are imported through `require` or inside a function, never when a module is imported."""
    roots = {(line, name.split(".")[0]) for line, name in imports(path, top_level=True)}
    wrong = [f"{identifier(path)}:{line}: {name}" for line, name in roots if name in OPTIONAL]
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            calls = [ast.unparse(n.func) for n in ast.walk(statement) if isinstance(n, ast.Call)]
            if "require" in calls:
                wrong.append(f"{identifier(path)}:{statement.lineno}: require() at import time")
    wrong += [
        f"{identifier(path)}:{line}: {name} is never used"
        for line, name in imports(path)
        if name.split(".")[0] in NEVER
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_only_the_command_line_prints(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if unit_of(path) in ("cli", "console") or 'if __name__ == "__main__"' in text:
        pytest.skip("speaks to people")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    prints = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not prints, f"{identifier(path)} prints on lines {prints}"


def test_pickles_are_refused() -> None:
    """torch.load appears only with weights_only=True, and pickle is never imported as a module."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("weights_only") == "True", f"{identifier(path)}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert "pickle" not in {alias.name for alias in node.names}, identifier(path)


def test_every_module_has_its_sentence() -> None:
    """The first line of a module's docstring says what it is; empty package files excepted."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), f"{identifier(path)} is not ASCII"
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{identifier(path)} says not what it is"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_no_torch() -> None:
    """`import unicompress` and the command line's help load neither torch nor transformers."""
    code = "import sys, unicompress, unicompress.cli; print([m in sys.modules for m in NAMES])"
    assert run_python(f"NAMES = ['torch', 'transformers']; {code}").strip() == "[False, False]"


def test_public_names_exist() -> None:
    import unicompress

    for name in unicompress.__all__:
        assert getattr(unicompress, name) is not None
    assert set(unicompress.__all__) == {*unicompress._HOMES, "__version__"}
    assert dir(unicompress) == sorted(unicompress.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ImageCodek'"):
        unicompress.ImageCodek  # noqa: B018


def test_the_picture_in_the_docs_is_this_house() -> None:
    text = (ROOT.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = (block for block in text.split("```") if "tokens  registry" in block)
    drawn = [line.replace("/", "").split() for line in picture.strip().splitlines()]
    assert [sorted(line) for line in drawn] == [sorted(line) for line in LINES[:-1]]
