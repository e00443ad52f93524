"""The JSON shape that `demo`, `evaluate` and `bench` write: dense beside compressed, and ratios."""

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unicompress.checkpoint import read_json, write_json
from unicompress.errors import InputError

SCHEMA = 1
GPU = "GPU "  # how the hardware line begins where one was used
Progress = Callable[[str, int, int], None]  # told what is going on, how much is done, of how much
# key of "ratio" -> the figure it divides, compressed / dense
RATIOS = {
    "tokens": "tokens_per_image",
    "generation_seconds": "generation_seconds",
    "understanding_seconds": "understanding_seconds",
    "training_step_seconds": "training_step_seconds",
    "kv_cache_bytes": "kv_cache_bytes",
}


@dataclass(frozen=True)
class Figures:
    """What is measured of one model; None is a figure that was not measured.

    Accuracies are fractions, times are medians in seconds, `psnr` is in dB against the original.
    """

    tokens_per_image: int | None = None
    interface_tokens: int | None = None  # with the delimiters of the image
    understanding_accuracy: float | None = None
    generation_accuracy: float | None = None  # whole captions
    psnr: float | None = None
    generation_seconds: float | None = None  # of one batch, pixels included
    understanding_seconds: float | None = None
    training_step_seconds: float | None = None
    kv_cache_bytes: int | None = None


@dataclass(frozen=True)
class Breakdown:
    """Where the generation time goes, medians in seconds; None is a part not measured."""

    prefill: float | None = None
    lm_steps: float | None = None
    head: float | None = None
    decompressor: float | None = None
    image_decoder: float | None = None


@dataclass(frozen=True)
class Result:
    """Everything one command measured; `details` holds what goes beyond the fixed keys."""

    command: str
    dense: Figures = field(default_factory=Figures)
    compressed: Figures = field(default_factory=Figures)
    dense_breakdown: Breakdown = field(default_factory=Breakdown)
    compressed_breakdown: Breakdown = field(default_factory=Breakdown)
    seeds: tuple[int, ...] = (0,)
    commit: str = field(default_factory=lambda: commit())
    hardware: str = field(default_factory=lambda: hardware())
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> dict[str, float | None]:
        """Compressed / dense; None where either was not measured or dense is zero."""
        return {
            key: ratio(getattr(self.compressed, name), getattr(self.dense, name))
            for key, name in RATIOS.items()
        }

    def as_json(self) -> dict[str, Any]:
        """The fixed shape as plain values; numbers that are not finite become null."""
        value = {
            "schema": SCHEMA,
            "commit": self.commit,
            "command": self.command,
            "hardware": self.hardware,
            "seeds": list(self.seeds),
            "dense": asdict(self.dense),
            "compressed": asdict(self.compressed),
            "ratio": self.ratio,
            "breakdown": {
                "compressed": asdict(self.compressed_breakdown),
                "dense": asdict(self.dense_breakdown),
            },
            "details": self.details,
        }
        return plain(value)

    def write(self, path: Path | str) -> None:
        """Write the JSON atomically."""
        write_json(self.as_json(), path)

    @classmethod
    def from_json(cls, value: object) -> "Result":
        """Read `as_json` back; unknown keys of the figures are dropped, missing ones become None.

        Raises InputError for another schema.
        """
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise InputError(
                f"not a unicompress result: needed a JSON object with schema {SCHEMA}; "
                "make it with unicompress demo, evaluate or bench and --json"
            )
        breakdown = value.get("breakdown") or {}
        return cls(
            command=str(value.get("command", "")),
            dense=_read(Figures, value.get("dense")),
            compressed=_read(Figures, value.get("compressed")),
            dense_breakdown=_read(Breakdown, breakdown.get("dense")),
            compressed_breakdown=_read(Breakdown, breakdown.get("compressed")),
            seeds=tuple(value.get("seeds") or ()),
            commit=str(value.get("commit", "unknown")),
            hardware=str(value.get("hardware", "unknown")),
            details=value.get("details") or {},
        )

    @classmethod
    def load(cls, path: Path | str) -> "Result":
        """Read a result file; raises CheckpointError (damaged) or InputError (another schema)."""
        value = read_json(path)
        try:
            return cls.from_json(value)
        except InputError as error:
            raise InputError(f"{path} is {error}") from error

    def with_command(self, command: str) -> "Result":
        """The same measurements under the command line that made them."""
        return replace(self, command=command)


def ratio(compressed: float | None, dense: float | None) -> float | None:
    """Compressed / dense, or None where there is nothing to divide."""
    if compressed is None or not dense:
        return None
    return compressed / dense


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences, numpy and torch values as JSON; infinities become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    return str(value)


def module_command(module: str, arguments: Sequence[str] | None) -> str:
    """`python -m module ...` as it was typed; None: with the arguments of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def _read(kind: type[Any], value: object) -> Any:
    known = value if isinstance(value, dict) else {}
    return kind(**{f.name: known.get(f.name) for f in fields(kind)})


def commit() -> str:
    """The git commit of this source tree (`-dirty` after changes), else the package's version."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository, so ask whether git tracks it.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        head = _git(here.parent, "rev-parse", "HEAD")
        if head:
            changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
            return f"{head}-dirty" if changed else head
    try:
        return f"version {version('unicompress')}"
    except PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git is absent or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(device: torch.device | str = "cpu") -> str:
    """One line: the accelerator if one is used, processor, cores, torch and its threads."""
    device = torch.device(device)
    parts = [GPU + torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    parts.append(f"{_processor()}, {_cores()} cores")
    parts.append(f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    parts.append(platform.system())
    return "; ".join(parts)


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Model name and, where the processor has it, its fast bfloat16 unit."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    entries = {key.strip(): value.strip() for key, value in known.items()}
    name = entries.get("model name") or platform.processor() or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in entries.get("flags", "").split() else name
