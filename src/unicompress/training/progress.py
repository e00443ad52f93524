"""What a run shows, and what steers it: log, bar, learning rate, precision, Ctrl-C."""

import importlib.util
import json
import math
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unicompress.checkpoint import atomic_write
from unicompress.registry import require
from unicompress.training.recipe import LoopRecipe

LOG = "log.jsonl"


def learning_rate(recipe: LoopRecipe, progress: float) -> float:
    """The rate at a share of the run: linear warm-up, then cosine, or constant with a cool-down."""
    if recipe.warmup and progress < recipe.warmup:
        return recipe.lr * (progress + 1 / recipe.steps) / (recipe.warmup + 1 / recipe.steps)
    if recipe.schedule == "cosine":
        left = (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup))) / 2
    else:
        left = min(1.0, (1 - progress) / recipe.cooldown) if recipe.cooldown else 1.0
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * left)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 autocast pays: CUDA that has it, or a CPU with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop; the second one acts as usual."""

    def __init__(self) -> None:
        self.wished = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python allows it there alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _wish(self, number: int, _frame: FrameType | None) -> None:
        self.wished = True
        signal.signal(number, self._before[number])


class Meter:
    """Means of the logged values since they were last read; plain, so that it resumes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, logs: Mapping[str, Tensor | float]) -> None:
        for name, value in logs.items():
            value = torch.as_tensor(value).detach().float()
            known = self.sums.get(name)
            self.sums[name] = value if known is None else known.to(value.device) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The means by name, sorted; starts anew."""
        means = {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Journal:
    """The progress bar, `log.jsonl` and tensorboard of a run; only the main process has one.

    Lines of the log beyond the step that a run resumes from are dropped, they will come again.
    """

    def __init__(self, recipe: LoopRecipe, *, step: int, fresh: bool):
        self.folder = Path(recipe.out)
        self._keep_until(-1 if fresh else step)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=recipe.steps, initial=step, unit="step", mininterval=0.5 if terminal else 30
        )
        self.writer = None
        installed = importlib.util.find_spec("tensorboard") is not None
        if recipe.tensorboard or (recipe.tensorboard is None and installed):
            board = require("torch.utils.tensorboard", extra="train")
            self.writer = board.SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def step(self, loss: float | None = None) -> None:
        """One step further; `loss` is shown where it is known."""
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()

    def write(self, line: Mapping[str, float]) -> None:
        """One line of the log; `line` has at least the step."""
        self.note({key: _short(value) for key, value in line.items()})
        if self.writer is not None:
            for key, value in line.items():
                if key != "step":
                    self.writer.add_scalar(key, value, int(line["step"]))

    def note(self, line: Mapping[str, Any]) -> None:
        """One line of the log that is no curve."""
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _keep_until(self, step: int) -> None:
        path = self.folder / LOG
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a crash
            if entry["step"] <= step:
                kept.append(line + "\n")
        atomic_write(path, lambda file: file.write("".join(kept).encode()))


def _short(value: float) -> float:
    """Six significant digits, whole numbers as they are."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
