"""The stage-free training loop: step after step, to be stopped and resumed at will.

Nothing random has a history: the samples of a step and every draw within it depend on (seed, step,
process) alone. A checkpoint therefore needs the step, the weights, the optimiser and, for streamed
data, the place in the stream; a run that was interrupted ends as if it had not been.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn

from unicompress.checkpoint import current_folder, load_training_state, save_training_state
from unicompress.errors import CheckpointError, RecipeError, UnicompressError
from unicompress.training.feed import B, Batches, Feed, Place, seed_of
from unicompress.training.optimizers import build_optimizers
from unicompress.training.progress import Journal, Meter, StopSignal, bf16_is_fast, learning_rate
from unicompress.training.recipe import FREE, LoopRecipe

CHECKPOINT = "checkpoint"
FORMAT = 2  # of checkpoints
Status = Literal["done", "interrupted", "paused"]


class Objective(nn.Module, ABC, Generic[B]):
    """What a stage minimises; holds the modules it trains and those it only uses."""

    @abstractmethod
    def forward(
        self, batch: B, progress: float, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, detached logs) of a micro-batch.

        `progress` in [0, 1] is the share of the run behind us. A mean over `batch.counts[name]`
        elements must be multiplied by `shares[name]`, which is 1 where nothing is split.
        """

    def changing_state(self) -> dict[str, Tensor]:
        """The weights and buffers that training changes: what a checkpoint holds."""
        return self.state_dict()

    def after_step(self, step: int) -> None:
        """Called after every optimiser step, for what moves without gradients."""

    def report(self, batch: B) -> dict[str, float]:
        """More to log at log points, measured on the last micro-batch of the main process."""
        return {}

    def validate(self) -> dict[str, float]:
        """Measured on held-out data, on the main process; logged under `val/`."""
        return {}


@dataclass(frozen=True)
class LoopResult:
    """How a run ended: `done`, `interrupted` by the user, or `paused` by max_minutes."""

    status: Status
    step: int
    seconds: float  # of training, over all sessions
    main_process: bool = True


def fit(
    objective: Objective[B],
    batches: Callable[[Place], Batches[B]],
    recipe: LoopRecipe,
    *,
    resume: bool = False,
) -> LoopResult:
    """Train `objective` as the recipe says; leaves checkpoint and log in `recipe.out`.

    Raises RecipeError where the folder holds another run, UnicompressError where the loss diverges.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    # Autocast is ours, so that two runs of one process may differ in it; so is accumulation.
    accelerator = Accelerator(
        cpu=recipe.cpu,
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    with _caller_keeps_randomness(), StopSignal() as stop:
        return _Run(objective, batches, recipe, accelerator, stop).train(resume)


@contextmanager
def _caller_keeps_randomness() -> Iterator[None]:
    """Restore the global random states, which the loop seeds at every step."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Run(Generic[B]):
    """One session of a run: from the start or a checkpoint to the end or the next interruption."""

    def __init__(
        self,
        objective: Objective[B],
        batches: Callable[[Place], Batches[B]],
        recipe: LoopRecipe,
        accelerator: Accelerator,
        stop: StopSignal,
    ):
        self.recipe = recipe
        self.accelerator = accelerator
        self.stop = stop
        self.place = Place(accelerator.process_index, accelerator.num_processes)
        _check_split(recipe, self.place)
        self.objective = objective.to(accelerator.device)
        self.optimizer = build_optimizers(self.objective, recipe)
        self.model = accelerator.prepare_model(self.objective)
        self.batches = batches(self.place)
        self.meter = Meter()
        self.step = 0
        self.validated = -1  # step of the last validation
        self.seconds = 0.0  # of earlier sessions
        self.data_state: dict[str, Any] = self.batches.state()
        self.bf16 = recipe.precision == "bf16" or (
            recipe.precision == "auto" and bf16_is_fast(accelerator.device)
        )

    def train(self, resume: bool) -> LoopResult:
        folder = Path(self.recipe.out) / CHECKPOINT
        resumed = resume and current_folder(folder) is not None
        if resumed:
            self._load(folder)
        elif not resume and (current_folder(folder) or (Path(self.recipe.out) / "final").exists()):
            raise RecipeError(
                f"{self.recipe.out} already holds a run: add --resume to go on with it, "
                "or choose another out"
            )
        self.accelerator.wait_for_everyone()
        self.started = self.saved = time.monotonic()
        self.journal = (
            Journal(self.recipe, step=self.step, fresh=not resumed)
            if self.accelerator.is_main_process
            else None
        )
        feed = Feed(self.batches, start=self.step, stop=self.recipe.steps)
        try:
            status = self._steps(feed)
            if status == "done" and self._validation_due(end=True):
                self._validate()
            self._save()
        finally:
            feed.close()
            if self.journal is not None:
                self.journal.close()
        return LoopResult(status, self.step, self._elapsed(), self.accelerator.is_main_process)

    def _steps(self, feed: Feed[B]) -> Status:
        """Optimise until the run is complete or somebody wants it to stop."""
        self.model.train()
        for micro_batches, data_state in feed:
            stop, elapsed, counts = self._agree(micro_batches)
            progress = self.step / self.recipe.steps
            if self.recipe.time_budget_minutes is not None:
                progress = max(progress, elapsed / (60 * self.recipe.time_budget_minutes))
            if progress >= 1:
                break
            if stop:
                return "interrupted"
            limit = self.recipe.max_minutes
            if limit is not None and elapsed - self.seconds >= 60 * limit:
                return "paused"
            loss = self._optimise(micro_batches, progress, counts)
            self.step += 1
            self.data_state = data_state
            if self.step % self.recipe.log_every == 0 or self.step == self.recipe.steps:
                self._log(micro_batches[-1], progress)
            if self.journal is not None:
                self.journal.step(loss)
            if self._validation_due(end=False):
                self._validate()
            # Every process must come to the same verdict, so it rests on the agreed time.
            minutes = (elapsed - self.seconds + self.started - self.saved) / 60
            if self.step % self.recipe.save_every == 0 or minutes >= self.recipe.save_minutes:
                self._save(elapsed)
        return "done"

    def _agree(self, micro_batches: list[B]) -> tuple[bool, float, dict[str, float]]:
        """(stop?, seconds so far, mean count per micro-batch), the same on every process."""
        names = sorted({name for batch in micro_batches for name in batch.counts})
        sums = [sum(batch.counts[name] for batch in micro_batches) for name in names]
        wished = float(self.stop.wished)
        values = torch.tensor([wished, self._elapsed(), *sums], dtype=torch.float64)
        if self.place.count > 1:
            rows = self.accelerator.gather(values[None].to(self.accelerator.device)).cpu()
            values = torch.cat([rows[:, 0].amax()[None], rows[0, 1:2], rows[:, 2:].mean(0)])
        stop, elapsed, *means = values.tolist()
        means = [mean / len(micro_batches) for mean in means]
        return bool(stop), elapsed, dict(zip(names, means, strict=True))

    def _optimise(
        self, micro_batches: list[B], progress: float, counts: Mapping[str, float]
    ) -> float | None:
        """One optimiser step; returns the loss of this process where reading it costs nothing."""
        _seed_everything(seed_of(self.recipe.seed, self.step, self.place.rank))
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            shares = {
                name: count / counts[name] if counts[name] else 0.0
                for name, count in batch.counts.items()
            }
            last = number == len(micro_batches)
            device = self.accelerator.device
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    loss, logs = self.model(batch.to(device), progress, shares)
                self.accelerator.backward(loss / len(micro_batches))
            losses.append(loss.detach())
            self.meter.add({"loss": loss, **logs})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.clip or float("inf"))
        if not torch.isfinite(norm):
            raise UnicompressError(
                f"the gradients are not finite at step {self.step}: lower lr, or raise warmup; "
                f"the last checkpoint in {self.recipe.out} is from before"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(self.step)
        self.meter.add({"gradient_norm": norm})
        return float(torch.stack(losses).mean()) if device.type == "cpu" else None

    def _log(self, batch: B, progress: float) -> None:
        """Means over the interval and over the processes, to the journal."""
        means = self.meter.means()
        values = torch.stack(list(means.values()))
        if self.place.count > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), reduction="mean")
        if self.journal is None:
            return
        self.objective.eval()
        with torch.no_grad():
            more = self.objective.report(batch.to(self.accelerator.device))  # type: ignore[arg-type]
        self.model.train()
        skipped = self.batches.skipped()
        if skipped:
            self.journal.note({"step": self.step, "skipped": skipped})
        self.journal.write(
            {
                **self._where(),
                "lr": learning_rate(self.recipe, progress),
                **dict(zip(means, values.tolist(), strict=True)),
                **more,
            }
        )

    def _validation_due(self, *, end: bool) -> bool:
        every = self.recipe.validate_every
        return self.validated != self.step and (end or bool(every and self.step % every == 0))

    def _validate(self) -> None:
        self.validated = self.step
        if self.journal is not None:
            self.objective.eval()
            with torch.no_grad():
                values = self.objective.validate()
            self.model.train()
            if values:
                named = {f"val/{name}": value for name, value in values.items()}
                self.journal.write({**self._where(), **named})
        self.accelerator.wait_for_everyone()

    def _where(self) -> dict[str, float]:
        return {
            "step": self.step,
            "samples": self.step * self.recipe.batch,
            "seconds": round(self._elapsed(), 2),
        }

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save(self, elapsed: float | None = None) -> None:
        """Replace the checkpoint; on several processes all come here, the main one writes."""
        data = gather_object([self.data_state])
        meters = gather_object([self.meter.state()])
        if self.accelerator.is_main_process:
            state = {
                "format": FORMAT,
                "recipe": self.recipe.model_dump(mode="json"),
                "processes": self.place.count,
                "step": self.step,
                "validated": self.validated,
                "seconds": self._elapsed(),
                "objective": dict(self.objective.changing_state()),
                "optimizer": self.optimizer.state_dict(),
                "data": data,
                "meters": meters,
            }
            save_training_state(state, Path(self.recipe.out) / CHECKPOINT)
        self.accelerator.wait_for_everyone()
        # On the agreed clock where there is one: the next save falls due everywhere at once.
        since = self._elapsed() if elapsed is None else elapsed
        self.saved = self.started + since - self.seconds

    def _load(self, folder: Path) -> None:
        state = load_training_state(folder)
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{folder} is of another version: delete it to start anew")
        _check_same_recipe(state["recipe"], self.recipe)
        if any(state["data"]) and state["processes"] != self.place.count:
            raise CheckpointError(
                f"{folder} was written by {state['processes']} processes on streamed data, resume "
                f"with as many (now {self.place.count})"
            )
        _load_changed(self.objective, state["objective"], folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validated = state["validated"]
        if state["processes"] == self.place.count:
            self.data_state = state["data"][self.place.rank]
            self.meter.restore(state["meters"][self.place.rank])
            if self.data_state:
                self.batches.restore(self.data_state)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _check_split(recipe: LoopRecipe, place: Place) -> None:
    parts = recipe.accumulate * place.count
    if recipe.batch % parts:
        raise RecipeError(
            f"batch {recipe.batch} cannot be split over {place.count} processes x "
            f"{recipe.accumulate} micro-batches: make it a multiple of {parts}"
        )


def _check_same_recipe(before: Mapping[str, Any], recipe: LoopRecipe) -> None:
    """A run goes on under the recipe it started with, but for what leaves the numbers alone."""
    now = recipe.model_dump(mode="json")
    for key in sorted(now.keys() & before.keys()):  # a newer version may know more keys
        if key not in FREE and before[key] != now[key]:
            raise RecipeError(
                f"the run in {recipe.out} was started with {key}={before[key]!r}, not "
                f"{now[key]!r}: resume it as it was, or choose another out"
            )


def _load_changed(objective: Objective[Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    wanted = objective.changing_state()
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape]
    if odd:
        raise CheckpointError(
            f"{folder} does not fit this recipe's model ({len(odd)} weights differ, first "
            f"{odd[0]}): it was trained around other parts; choose another out"
        )
    objective.load_state_dict(dict(tensors), strict=False)
