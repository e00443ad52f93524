"""The smallest thing that `training.loop` can train; also run as a script, once per process."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unicompress.training.feed import Batch, Batches, Place, shares
from unicompress.training.loop import LoopResult, Objective, fit
from unicompress.training.recipe import LoopRecipe


@dataclass(frozen=True, kw_only=True)
class ToyBatch(Batch):
    inputs: Tensor
    targets: Tensor
    kept: Tensor  # which elements count

    def to(self, device: torch.device) -> "ToyBatch":
        return self


class ToyBatches(Batches[ToyBatch]):
    """Sample i of the run is a function of i alone, and has i mod 3 + 1 elements that count."""

    def __init__(self, recipe: LoopRecipe, place: Place):
        self.recipe, self.place = recipe, place

    def indices(self, step: int) -> list[list[int]]:
        batch = self.recipe.batch
        parts = shares(batch, accumulate=self.recipe.accumulate, place=self.place)
        return [[step * batch + i for i in part] for part in parts]

    def at(self, step: int) -> list[ToyBatch]:
        found = []
        for part in self.indices(step):
            rows = np.stack([np.random.default_rng(i).normal(size=(4, 4)) for i in part])
            kept = torch.tensor([[k <= i % 3 for k in range(3)] for i in part])
            values = torch.from_numpy(rows).float()
            batch = ToyBatch(step=step, inputs=values[:, :3], targets=values[:, 3:, :3], kept=kept)
            found.append(replace(batch, counts={"error": float(kept.sum())}))
        return found


class ToyStream(ToyBatches):
    """The same samples, found by counting instead of from the step."""

    def __init__(self, recipe: LoopRecipe, place: Place):
        super().__init__(recipe, place)
        self.next = 0

    def indices(self, step: int) -> list[list[int]]:
        first, self.next = self.next, self.next + self.recipe.batch
        return [list(range(first, self.next))]

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]


class ToyObjective(Objective[ToyBatch]):
    """A little network with dropout and a buffer that counts its steps."""

    steps: Tensor

    def __init__(self, dropout: float = 0.0, at_step: Callable[[int], None] | None = None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        with torch.no_grad():
            for weight in self.net.parameters():
                values = torch.linspace(-1, 1, weight.numel()).sin()
                weight.copy_(values.view_as(weight) / weight.shape[-1])
        self.register_buffer("steps", torch.tensor(0))
        self.at_step = at_step

    def forward(
        self, batch: ToyBatch, progress: float, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.net(batch.inputs)[..., 0] - batch.targets[:, 0]).square()
        loss = error[batch.kept].mean() * shares["error"]
        return loss, {"progress": torch.tensor(progress)}

    def after_step(self, step: int) -> None:
        self.steps += 1
        if self.at_step is not None:
            self.at_step(step)


def recipe(out: Path | str, **changes: Any) -> LoopRecipe:
    values = {
        "steps": 12,
        "batch": 4,
        "lr": 0.05,
        "log_every": 5,
        "save_every": 4,
        "tensorboard": False,
        "cpu": True,
        "precision": "fp32",
    }
    return LoopRecipe(out=str(out), **{**values, **changes})


def run(
    given: LoopRecipe, *, resume: bool = False, stream: bool = False, **options: Any
) -> tuple[LoopResult, dict[str, Tensor]]:
    """Train; returns the result and the weights."""
    objective = ToyObjective(**options)
    kind = ToyStream if stream else ToyBatches
    result = fit(objective, lambda place: kind(given, place), given, resume=resume)
    return result, objective.state_dict()


def interrupt_at(step: int) -> Callable[[int], None]:
    """What Ctrl-C does, during a step."""

    def at_step(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return at_step


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result, weights = run(recipe(sys.argv[1], steps=5, log_every=1))
    if result.main_process:
        torch.save(weights, Path(sys.argv[1]) / "weights.pt")
