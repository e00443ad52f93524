"""Pictures drawn from captions of unseen scenes, and what the checker reads back from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.data.images import to_tensor, to_uint8
from unicompress.data.scene_checker import SceneScore, score
from unicompress.data.scenes import Scenes, SceneSample
from unicompress.errors import InputError
from unicompress.evals.image_metrics import FID_PROTOCOL, fid
from unicompress.evals.result import Progress
from unicompress.evals.statistics import (
    Interval,
    PairedDifference,
    bootstrap_mean,
    paired_difference,
)
from unicompress.generate import Sampling

# The same for both models of every comparison; chosen on validation prompts of the shipped pair.
DEFAULT_SAMPLING = Sampling(cfg=2.0, top_p=0.95)
ATTRIBUTES = ("colour", "shape", "size", "count", "relation")


@runtime_checkable
class Drawer(Protocol):
    """Anything that draws one picture per prompt, `UnifiedModel` first of all."""

    def draw(
        self,
        prompts: list[str],
        *,
        cfg: float,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Tensor: ...


@dataclass(frozen=True)
class GenerationScore:
    """What the checker reads off one model's drawings."""

    whole: Interval  # everything the caption says is right
    attributes: dict[str, Interval]
    seen: Interval | None  # whole captions whose attributes all occur together in training
    held_out: Interval | None
    fid: float | None  # against real pictures of the same scenes, under `FID_PROTOCOL`
    fid_floor: float | None  # of real pictures of other scenes: what a perfect model reaches
    correct: tuple[bool, ...]

    def compared_with(self, dense: "GenerationScore", *, seed: int = 0) -> PairedDifference:
        """This model's whole-caption accuracy minus the dense model's on the same prompts."""
        return paired_difference(dense.correct, self.correct, seed=seed)

    def summary(self) -> dict[str, object]:
        """For JSON; per-prompt correctness is one string of 0 and 1."""
        return {
            "prompts": len(self.correct),
            "whole": self.whole,
            "attributes": self.attributes,
            "seen": self.seen,
            "held_out": self.held_out,
            FID_PROTOCOL: self.fid,
            f"{FID_PROTOCOL}_of_other_real_pictures": self.fid_floor,
            "correct": "".join(str(int(right)) for right in self.correct),
        }


def unseen_scenes(
    count: int, *, split: str = "test", seed: int = 0, size: int = 64, first: int = 0
) -> list[SceneSample]:
    """Scenes `first` to `first + count - 1` of a split; every fourth has a held-out combination."""
    if count < 1:
        raise InputError(f"at least one scene is needed, got {count}")
    data = Scenes(split, seed=seed, size=size)
    return [data[index] for index in range(first, first + count)]


def evaluate_generation(
    model: Drawer,
    samples: Sequence[SceneSample],
    *,
    others: Sequence[SceneSample] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
) -> GenerationScore:
    """Draw the captions of `samples` and score them; `others` give the floor of the FID."""
    prompts = [sample.caption for sample in samples]
    drawings = draw_all(
        model, prompts, sampling=sampling, seed=seed, batch=batch, progress=progress
    )
    return score_drawings(drawings, samples, others=others)


@torch.no_grad()
def draw_all(
    model: Drawer,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch: int = 32,
    label: str = "drawing",
    progress: Progress | None = None,
) -> Float[Tensor, "n 3 h w"]:
    """One picture in [-1, 1] per prompt, on the CPU; prompt i draws with `seed + i`."""
    if not prompts:
        raise InputError("nothing to draw: give at least one prompt")
    options = asdict(sampling or DEFAULT_SAMPLING)
    parts: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        parts.append(model.draw(part, **options, seed=seed + start).float().cpu())
        if progress:
            progress(label, start + len(part), len(prompts))
    return torch.cat(parts)


def score_drawings(
    drawings: Float[Tensor, "n 3 h w"],
    samples: Sequence[SceneSample],
    *,
    others: Sequence[SceneSample] = (),
) -> GenerationScore:
    """Read every drawing and compare it with the scene whose caption was its prompt."""
    verdicts = judge(drawings, samples)
    correct = [verdict.whole for verdict in verdicts]
    unseen = [sample.scene.has_held_out for sample in samples]
    distance = floor = None
    if len(samples) > 1:
        real = real_pictures(samples)
        distance = fid(drawings, real)
        floor = fid(real_pictures(others), real) if len(others) > 1 else None
    return GenerationScore(
        whole=bootstrap_mean(correct),
        attributes=attribute_accuracies(verdicts),
        seen=_part(correct, [not held for held in unseen]) if any(unseen) else None,
        held_out=_part(correct, unseen),
        fid=distance,
        fid_floor=floor,
        correct=tuple(correct),
    )


def judge(pictures: Float[Tensor, "n 3 h w"], samples: Sequence[SceneSample]) -> list[SceneScore]:
    """The checker's verdicts on pictures that should show the scenes of `samples`."""
    if len(pictures) != len(samples):
        raise InputError(f"{len(pictures)} pictures cannot be judged by {len(samples)} scenes")
    return [
        score(to_uint8(picture), sample.scene)
        for picture, sample in zip(pictures, samples, strict=True)
    ]


def attribute_accuracies(verdicts: Sequence[SceneScore]) -> dict[str, Interval]:
    """Mean of every attribute's score over the pictures whose caption tells it."""
    told = {
        name: [float(value) for v in verdicts if (value := getattr(v, name)) is not None]
        for name in ATTRIBUTES
    }
    return {name: bootstrap_mean(values) for name, values in told.items() if values}


def real_pictures(samples: Sequence[SceneSample]) -> Float[Tensor, "n 3 h w"]:
    """The samples' own pictures in [-1, 1]."""
    return torch.stack([to_tensor(sample.pixels) for sample in samples])


def _part(correct: list[bool], mask: list[bool]) -> Interval | None:
    chosen = [right for right, wanted in zip(correct, mask, strict=True) if wanted]
    return bootstrap_mean(chosen) if chosen else None
