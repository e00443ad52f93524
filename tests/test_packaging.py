"""What is promised in pyproject.toml, and what ends up in the wheel."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

import unicompress

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORBIDDEN = ("torchvision", "timm", "open-clip-torch", "open_clip_torch", "omegaconf", "fire")


@pytest.fixture(scope="module")
def manifest(project: Path) -> dict:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower() for line in requirements}


def test_extras_of_the_design_exist(manifest: dict) -> None:
    extras = manifest["project"]["optional-dependencies"]
    assert {"train", "eval", "demo", "app", "dev"} <= set(extras)
    assert {"datasets", "torchdata", "peft", "tensorboard"} <= names(extras["train"])
    assert {"matplotlib", "jinja2", "easy-vqa"} <= names(extras["demo"])


def test_nothing_that_breaks_torch_is_required(manifest: dict) -> None:
    project = manifest["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirements in lists:
        assert not names(requirements) & set(FORBIDDEN)


def test_what_make_installs_leaves_torchvision_out(project: Path) -> None:
    """torch-fidelity and lmms-eval bring torchvision, so the Makefile must not ask for `eval`."""
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    extras = re.findall(r'-e "\.\[([^\]]+)\]"', makefile)
    assert extras
    assert all("eval" not in line.split(",") for line in extras)
    assert "torchvision" not in makefile


def test_every_extra_that_errors_name_exists(project: Path, manifest: dict) -> None:
    extras = set(manifest["project"]["optional-dependencies"])
    for path in (project / "src").rglob("*.py"):
        for extra in re.findall(
            r'require\([^)]*extra="([a-z-]+)"', path.read_text(encoding="utf-8")
        ):
            assert extra in extras, f"{path.name} asks for the extra {extra!r}"


def test_version_is_stated_once(project: Path, manifest: dict) -> None:
    assert "version" in manifest["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", unicompress.__version__)
    assert f"version: {unicompress.__version__}" in (project / "CITATION.cff").read_text()
    assert f"## [{unicompress.__version__}]" in (project / "CHANGELOG.md").read_text()


def test_ci_calls_make_test(project: Path) -> None:
    script = project / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    text = script.read_text(encoding="utf-8")
    assert "make test" in text
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("goal", ["demo", "test", "check", "format", "clean", "reference"])
def test_make_knows_its_goals(project: Path, goal: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", goal], cwd=project, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_the_package_ships_its_data(project: Path) -> None:
    """Everything under the package is in the wheel: no ignore rule may swallow weights."""
    ignored = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "src/unicompress"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout.split()
    kept = [name for name in ignored if "__pycache__" not in name]
    assert not kept, f"these files would be missing from a clone and from the wheel: {kept}"


@pytest.mark.slow
@pytest.mark.network
def test_wheel_contents(project: Path, tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "-q",
            "-w",
            str(tmp_path),
            str(project),
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = project / "src" / "unicompress"
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"unicompress/{path.relative_to(package).as_posix()}" in inside
    assert (
        not {name.split("/")[0] for name in inside}
        - {"unicompress"}
        - {name.split("/")[0] for name in inside if ".dist-info/" in name}
    )


def test_the_installed_metadata_agrees(manifest: dict) -> None:
    """Skipped where the sources are used without being installed."""
    try:
        installed = requires("unicompress") or []
    except ModuleNotFoundError:
        pytest.skip("not installed")
    core = [line for line in installed if "extra ==" not in line]
    assert names(core) == names(manifest["project"]["dependencies"])
