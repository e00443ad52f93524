"""The small trained pair that ships with the package: `load("dense")` and `load("compressed")`."""

from pathlib import Path
from typing import Literal

import torch

from unicompress.errors import CheckpointError, InputError
from unicompress.unified import UnifiedModel

NAMES = ("dense", "compressed")
ABOUT = (
    "The two models were trained from scratch by recipes/reference/ with equal data order, steps "
    "and seed, one run each: 21,000 steps of 8 samples, which took about three hours of one "
    "processor core for the dense and two for the compressed one. They answer most questions; "
    "their drawings of several objects are still mostly wrong. Numbers: docs/results.",
)
WEIGHTS = Path(__file__).parent / "weights"


def folder(name: str) -> Path:
    """Where a reference model lies; raises InputError (unknown) or CheckpointError (not there)."""
    if name not in NAMES:
        raise InputError(f"unknown reference model {name!r}: use one of {', '.join(NAMES)}")
    path = WEIGHTS / name
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the reference model {name!r} is not in {path}: reinstall unicompress, or train it "
            "with the recipes in recipes/reference/"
        )
    return path


def available() -> bool:
    """Whether both reference models are there."""
    return all((WEIGHTS / name / "config.json").is_file() for name in NAMES)


def load(
    name: Literal["dense", "compressed"], *, device: torch.device | str = "cpu"
) -> UnifiedModel:
    """A reference model in float32 (it is stored in bfloat16), ready for use."""
    model: UnifiedModel = UnifiedModel.from_pretrained(folder(name))
    return model.float().to(device).eval()


def load_any(name: str, *, device: torch.device | str = "cpu") -> UnifiedModel:
    """A model that ships, by name, unless a folder has that name; otherwise a folder or hub id."""
    if name in NAMES and not Path(name).is_dir():
        return load(name, device=device)  # type: ignore[arg-type]
    model: UnifiedModel = UnifiedModel.from_pretrained(name)
    return model.to(device).eval()
