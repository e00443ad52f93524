"""Stage two (section 3.5): trains the language model on understanding and generation, mixed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicompress.codec import ImageCodec
from unicompress.losses import LossOutput
from unicompress.tokenizers.io import load_tokenizer
from unicompress.tokens import EncodedImages
from unicompress.training.feed import Batch, Batches, Place, seed_of, shares
from unicompress.training.language import add_lora, language_model
from unicompress.training.loop import LoopResult, Objective, fit
from unicompress.training.packed import check_packed, to_images
from unicompress.training.recipe import PackedData, SceneData, StageTwoRecipe
from unicompress.training.samples import Mixture, Sample, mixture, to_pixels
from unicompress.unified import DESCRIBE, UnifiedModel

FINAL = "final"
CHUNK = 16  # images in a validation batch


@dataclass(frozen=True, kw_only=True)
class UnifiedBatch(Batch):
    """Images with questions about them, and other images with the captions to draw them from."""

    # Pixels [b, 3, h, w] in [-1, 1], or packed; None where the recipe or the split leaves none.
    read: Tensor | EncodedImages | None
    questions: list[list[str]]
    answers: list[list[str]]
    drawn: Tensor | EncodedImages | None
    captions: list[str]

    def to(self, device: torch.device) -> "UnifiedBatch":
        read, drawn = (None if t is None else t.to(device) for t in (self.read, self.drawn))
        return replace(self, read=read, drawn=drawn)


class UnifiedBatches(Batches[UnifiedBatch]):
    """`understanding_share` of every step's samples are read, the rest are drawn.

    The order rests on the recipe's seed alone, so that dense and compressed models see the same.
    """

    def __init__(self, recipe: StageTwoRecipe, size: int, place: Place):
        self.recipe = recipe
        self.place = place
        self.read_count = round(recipe.batch * recipe.understanding_share)
        self.drawn_count = recipe.batch - self.read_count
        self.read = self._mixture(size, "questions") if self.read_count else None
        self.drawn = self._mixture(size, "captions") if self.drawn_count else None

    def _mixture(self, size: int, need: str) -> Mixture:
        recipe = self.recipe
        if need == "questions" and recipe.describe:
            need = "texts"  # a captioned image can be asked for its caption
        return mixture(
            recipe.data,
            size=size,
            seed=recipe.seed,
            place=self.place,
            questions=recipe.questions_per_image,
            need=need,
        )

    def at(self, step: int) -> list[UnifiedBatch]:
        parts = [
            shares(count, accumulate=self.recipe.accumulate, place=self.place, late=late)
            for count, late in ((self.read_count, False), (self.drawn_count, True))
        ]
        return [self._batch(step, read, drawn) for read, drawn in zip(*parts, strict=True)]

    def _batch(self, step: int, read: list[int], drawn: list[int]) -> UnifiedBatch:
        # Even places are read, odd ones drawn: no image serves both.
        places = [2 * (step * self.read_count + i) for i in read]
        indices = [2 * (step * self.drawn_count + i) + 1 for i in drawn]
        reading = [self.read.at(i) for i in places] if self.read else []
        drawing = [self.drawn.at(i) for i in indices] if self.drawn else []
        pairs = [question_pairs(sample, self.recipe.describe) for sample in reading]
        batch = UnifiedBatch(
            step=step,
            read=self._images(reading) if reading else None,
            questions=[[question for question, _ in own] for own in pairs],
            answers=[[answer for _, answer in own] for own in pairs],
            drawn=self._images(drawing) if drawing else None,
            captions=[self._caption(s, i) for s, i in zip(drawing, indices, strict=True)],
        )
        return replace(batch, counts=self._counts(batch))

    def _images(self, samples: list[Sample]) -> Tensor | EncodedImages:
        packed = any(isinstance(entry, PackedData) for entry in self.recipe.data)
        return to_images(samples) if packed else to_pixels(samples)

    def _caption(self, sample: Sample, index: int) -> str:
        draw = np.random.default_rng(seed_of(self.recipe.seed, index, 4)).random()
        return "" if draw < self.recipe.caption_dropout else sample.caption or ""

    def _counts(self, batch: UnifiedBatch) -> dict[str, float]:
        """What the losses' means run over; needed only where a step is split."""
        if self.recipe.accumulate * self.place.count == 1:
            return {}
        return {
            "understanding": float(sum(map(len, batch.answers))),
            "generation": float(len(batch.captions)),
        }

    def state(self) -> dict[str, Any]:
        states = {
            name: part.state()
            for name, part in (("read", self.read), ("drawn", self.drawn))
            if part is not None
        }
        return states if any(states.values()) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, part in (("read", self.read), ("drawn", self.drawn)):
            if part is not None and state[name]:
                part.restore(state[name])

    def skipped(self) -> list[str]:
        return [line for part in (self.read, self.drawn) if part for line in part.skipped()]


class StageTwo(Objective[UnifiedBatch]):
    """The weighed sum of both losses."""

    def __init__(self, model: UnifiedModel, recipe: StageTwoRecipe):
        super().__init__()
        self.model = model
        self.recipe = recipe

    def forward(
        self, batch: UnifiedBatch, progress: float, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self._terms(batch)
        weights = {
            "understanding": self.recipe.understanding_weight,
            "generation": self.recipe.generation_weight,
        }
        losses = [weights[name] * shares.get(name, 1.0) * term.loss for name, term in terms.items()]
        return torch.stack(losses).sum(), _named(terms)

    def _terms(self, batch: UnifiedBatch) -> dict[str, LossOutput]:
        terms = {}
        if batch.read is not None:
            terms["understanding"] = self.model.understanding_loss(
                batch.read, batch.questions, batch.answers
            )
        if batch.drawn is not None:
            terms["generation"] = self.model.generation_loss(batch.drawn, batch.captions)
        return terms

    def changing_state(self) -> dict[str, Tensor]:
        """What is trained; not the frozen tokenizer stack, nor an adapted model's own weights."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def validate(self) -> dict[str, float]:
        """Both losses and the teacher-forced accuracies on held-out scenes."""
        scenes = [entry for entry in self.recipe.data if isinstance(entry, SceneData)]
        if not scenes:
            return {}
        chunk = min(CHUNK, self.recipe.validate_images)
        held_out = held_out_recipe(self.recipe, batch=chunk)
        batches = UnifiedBatches(held_out, self.model.tokenizer.spec.image_size, Place())
        totals: dict[str, list[float]] = {}
        for step in range(-(-self.recipe.validate_images // chunk)):
            batch = batches.at(step)[0].to(self.model.tokenizer.device)
            for name, value in _named(self._terms(batch)).items():
                totals.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in totals.items()}


def train_stage_two(recipe: StageTwoRecipe, *, resume: bool = False) -> LoopResult:
    """Run the stage; a complete run leaves the whole model in `<out>/final`."""
    model = build_model(recipe)
    check_packed([entry.path for entry in recipe.data if isinstance(entry, PackedData)], model)
    size = model.tokenizer.spec.image_size
    result = fit(
        StageTwo(model, recipe),
        lambda place: UnifiedBatches(recipe, size, place),
        recipe,
        resume=resume,
    )
    if result.status == "done" and result.main_process:
        model.cpu().eval().save_pretrained(Path(recipe.out) / FINAL)
    return result


def build_model(recipe: StageTwoRecipe) -> UnifiedModel:
    """The model before training; the same language model whether dense or compressed."""
    if recipe.start is not None:
        model: UnifiedModel = UnifiedModel.from_pretrained(recipe.start)
        model = model.float().train()
        if recipe.accelerators:
            model.accelerate(recipe.accelerators)
        if recipe.lora is not None:
            add_lora(model, recipe.lora)
        return model
    assert recipe.tokenizer is not None  # the recipe checks both
    assert recipe.lm is not None
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.checkpoint).freeze()
    codec = None if recipe.codec is None else ImageCodec.from_pretrained(recipe.codec, tokenizer)
    lm, text = language_model(recipe.lm, recipe.data, seed=recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(recipe.seed, 1))
        model = UnifiedModel.from_parts(
            tokenizer=tokenizer,
            codec=codec,
            lm=lm,
            text_tokenizer=text,
            projector=recipe.projector,
            understanding_source=recipe.understanding_source,
            code_loss=recipe.code_loss,
            accelerators=recipe.accelerators,
        )
        if recipe.lora is not None:
            add_lora(model, recipe.lora)
    return model


def question_pairs(sample: Sample, describe: bool) -> list[tuple[str, str]]:
    """What is asked about an image, with the answers."""
    asked = list(sample.questions)
    if describe and sample.caption is not None:
        asked.append((DESCRIBE, sample.caption))
    return asked


def held_out_recipe(recipe: StageTwoRecipe, *, batch: int) -> StageTwoRecipe:
    """The recipe of the same tasks on held-out scenes."""
    scenes = tuple(
        entry.model_copy(update={"split": "val"})
        for entry in recipe.data
        if isinstance(entry, SceneData)
    )
    return recipe.model_copy(
        update={"batch": batch, "accumulate": 1, "data": scenes, "caption_dropout": 0.0}
    )


def _named(terms: Mapping[str, LossOutput]) -> dict[str, Tensor]:
    """Logs of both terms as `understanding/...` and `generation/...`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, term in terms.items()
        for key, value in term.logs.items()
    }
