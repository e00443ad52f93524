"""What a model costs: time, memory and arithmetic, dense beside compressed in one process.

The two models take turns, warm-up rounds are thrown away, and medians are reported: what else the
machine does then hits both alike. Drawing is timed from prompt to pixels, so the decompressor and
the image decoder are inside.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unicompress.codec import ImageCodec
from unicompress.data.images import to_tensor
from unicompress.data.scenes import Scenes, SceneSample
from unicompress.engine import current_engine
from unicompress.errors import InputError
from unicompress.evals.generation import DEFAULT_SAMPLING
from unicompress.evals.janus_baseline import janus_task
from unicompress.evals.meter import count_flops, meter
from unicompress.evals.result import Breakdown, Figures, Progress, Result, hardware
from unicompress.generate import Sampling, Timings, now, write_answers
from unicompress.sequence import pack_text
from unicompress.unified import UnifiedModel

__all__ = ["BENCHES", "Effort", "Pair", "count_flops", "kv_cache_bytes", "take_turns"]

SIDES = ("dense", "compressed")
QUESTION = 32  # tokens of the question whose prefill is timed
BASELINE = "transformers_janus"
PARTS = tuple(field.name for field in fields(Breakdown))


@dataclass(frozen=True)
class Effort:
    """How much is measured; more repeats give steadier medians."""

    batch: int = 8
    repeats: int = 5
    warmup: int = 1
    flops: bool = True  # arithmetic and memory are counted in one extra run of each model

    def __post_init__(self) -> None:
        if min(self.batch, self.repeats) < 1 or self.warmup < 0:
            raise InputError(
                f"batch and repeats must be at least 1 and warmup at least 0, got {self.batch}, "
                f"{self.repeats} and {self.warmup}"
            )


@dataclass(frozen=True)
class Pair:
    """The two models of every comparison; either may be missing, then its figures are null."""

    dense: UnifiedModel | None
    compressed: UnifiedModel | None

    def __iter__(self) -> Iterator[tuple[str, UnifiedModel]]:
        sides = zip(SIDES, (self.dense, self.compressed), strict=True)
        return ((side, model) for side, model in sides if model is not None)

    @property
    def any(self) -> UnifiedModel:
        """One of the two, for what they share; raises InputError without any."""
        for _, model in self:
            return model
        raise InputError("there is no model to measure: give a dense or a compressed one")


def take_turns(
    tasks: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    label: str = "timing",
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run of every task; the tasks alternate, and so does who goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(warmup + repeats):
        order = list(tasks)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            start = now()
            tasks[name]()
            spent = now() - start
            if turn >= warmup:
                seconds[name].append(spent)
        if progress:
            progress(label, turn + 1, warmup + repeats)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of every task."""
    return {name: statistics.median(values) for name, values in seconds.items()}


# The four measurements


def bench_generation(
    pair: Pair,
    effort: Effort | None = None,
    *,
    sampling: Sampling | None = None,
    baseline: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Time from prompts to pixels of one batch, with its breakdown.

    `baseline` lets transformers' own Janus take part, with the dense model's language model. On a
    GPU the parts are timed in runs of their own, since timing them makes the host wait.
    """
    effort, sampling = effort or Effort(), sampling or DEFAULT_SAMPLING
    prompts = [sample.caption for sample in _samples(pair.any, effort.batch)]
    tokens = pair.any.text(prompts, add_special_tokens=False)["input_ids"]
    longest = max(len(ids) for ids in tokens)
    parts: dict[str, list[Timings]] = {side: [] for side, _ in pair}

    def task(side: str, model: UnifiedModel, timed: bool) -> Callable[[], object]:
        def run() -> object:
            timings = Timings() if timed else None
            if timings is not None:
                parts[side].append(timings)
            return model.draw(prompts, **asdict(sampling), seed=0, timings=timings)

        return run

    waits = pair.any.device.type == "cuda"
    tasks = {side: task(side, model, not waits) for side, model in pair}
    if baseline and pair.dense is not None:
        tasks[BASELINE] = janus_task(
            pair.dense, prompts=effort.batch, length=longest + 2, sampling=sampling
        )
    turns: dict[str, Any] = {
        "repeats": effort.repeats,
        "warmup": effort.warmup,
        "progress": progress,
    }
    seconds = take_turns(tasks, label="drawing", **turns)
    if waits:
        timed = {side: task(side, model, True) for side, model in pair}
        take_turns(timed, label="drawing in parts", **turns)
    found = medians(seconds)
    kept = slice(effort.warmup, effort.warmup + effort.repeats)
    return _result(
        pair,
        effort,
        "generation",
        {side: {"generation_seconds": found[side]} for side, _ in pair},
        {side: _breakdown(parts[side][kept]) for side, _ in pair},
        prompt_tokens=longest,
        details={
            "medians": found,
            "seconds": seconds,
            **_counted(tasks, pair, effort),
            "sampling": sampling,
            "engine": current_engine(),
        },
    )


def bench_understanding(
    pair: Pair, effort: Effort | None = None, *, progress: Progress | None = None
) -> Result:
    """Time to answer one question about each picture of a batch, pictures encoded anew.

    Beside it the prefill alone: the language model on an image and a question of 32 tokens.
    """
    effort = effort or Effort()
    samples = _samples(pair.any, effort.batch)
    pixels, questions = _pixels(samples), [sample.questions[0].text for sample in samples]
    tasks: dict[str, Callable[[], object]] = {}
    for side, model in pair:
        images = pixels.to(model.device)
        tasks[side] = partial(model.answer, images, questions, max_new_tokens=4)
        tasks[f"{side}_prefill"] = _prefill(model, images)
    seconds = take_turns(
        tasks, repeats=effort.repeats, warmup=effort.warmup, label="answering", progress=progress
    )
    found = medians(seconds)
    return _result(
        pair,
        effort,
        "understanding",
        {side: {"understanding_seconds": found[side]} for side, _ in pair},
        {side: Breakdown(prefill=found[f"{side}_prefill"]) for side, _ in pair},
        details={"medians": found, "seconds": seconds, **_counted(tasks, pair, effort)},
    )


@torch.no_grad()
def _prefill(model: UnifiedModel, images: Tensor) -> Callable[[], object]:
    """One pass of the language model over images that are embedded already, and a question."""
    embeds = model._image_embeds(images)
    words = [index % model.backbone.space.text_size for index in range(QUESTION)]
    text = pack_text([[(words, [])]] * len(images), model.device)
    return partial(write_answers, model.backbone, embeds, text, count=1, end=-1)


def bench_training(
    pair: Pair, effort: Effort | None = None, *, progress: Progress | None = None
) -> Result:
    """Time of one stage-two step: both losses, backward, and an optimiser step of length zero."""
    effort = effort or Effort()
    samples = _samples(pair.any, effort.batch, split="train")
    pixels = _pixels(samples)
    with _trainers(pair) as optimisers:

        def task(side: str, model: UnifiedModel) -> Callable[[], object]:
            return lambda: _training_step(model, optimisers[side], pixels, samples)

        tasks = {side: task(side, model) for side, model in pair}
        seconds = take_turns(
            tasks, repeats=effort.repeats, warmup=effort.warmup, label="training", progress=progress
        )
        counted = _counted(tasks, pair, effort)
    found = medians(seconds)
    return _result(
        pair,
        effort,
        "training",
        {side: {"training_step_seconds": found[side]} for side in found},
        details={"medians": found, "seconds": seconds, **counted},
    )


def bench_decompressor(
    pair: Pair, effort: Effort | None = None, *, progress: Progress | None = None
) -> Result:
    """Time of the decompressor alone: as trained, without its cache, and in the other orders.

    The other orders and heads have random weights: their time does not depend on them.
    """
    effort = effort or Effort()
    model = pair.compressed
    if model is None or model.codec is None:
        raise InputError("there is no decompressor to time: give a compressed model")
    trained = model.codec
    codes = trained.encode(_pixels(_samples(model, effort.batch)).to(model.device))
    dense = trained.decompress(codes)
    tasks: dict[str, Callable[[], object]] = {
        "trained": lambda: trained.decompress(codes),
        "trained_without_cache": lambda: trained.decompress(codes, use_cache=False),
        "image_decoder": lambda: model.tokenizer.decode(dense),
    }
    sizes: dict[str, int] = {}
    for order in ("raster", "block", "parallel"):
        for head in ("codes", "regression"):
            variant = _untrained(trained, order, head)
            tasks[f"{order}/{head}"] = partial(variant.decompress, codes)
            sizes[f"{order}/{head}"] = decompressor_size(variant)
    with torch.no_grad():
        seconds = take_turns(
            tasks,
            repeats=effort.repeats,
            warmup=effort.warmup,
            label="decompressor",
            progress=progress,
        )
    found = medians(seconds)
    breakdown = Breakdown(decompressor=found["trained"], image_decoder=found["image_decoder"])
    return _result(
        pair,
        effort,
        "decompressor",
        {},
        {"compressed": breakdown},
        details={"medians": found, "seconds": seconds, "parameters": sizes},
    )


BENCHES: dict[str, Callable[..., Result]] = {
    "generation": bench_generation,
    "understanding": bench_understanding,
    "training": bench_training,
    "decompressor": bench_decompressor,
}


# What they are made of


def kv_cache_bytes(model: UnifiedModel, prompt_tokens: int = 0) -> int:
    """Keys and values of one picture with its prompt, without a second branch for guidance."""
    config = model.backbone.inner.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = next(model.backbone.parameters()).element_size()
    positions = prompt_tokens + model.interface_tokens
    return int(2 * config.num_hidden_layers * heads * head_dim * item * positions)


def _counted(
    tasks: Mapping[str, Callable[[], object]], pair: Pair, effort: Effort
) -> dict[str, Any]:
    """Arithmetic and memory of each task, or nulls where they were not asked for."""
    if not effort.flops:
        return {"flops": None, "peak_bytes": None}
    found = {name: meter(task, pair.any.device) for name, task in tasks.items()}
    return {
        "flops": {name: each.flops for name, each in found.items()},
        "peak_bytes": {name: each.peak_bytes for name, each in found.items()},
    }


def decompressor_size(codec: ImageCodec) -> int:
    """Parameters of a codec's decompressor; 0 without one."""
    parts = [] if codec.decompressor is None else codec.decompressor.parameters()
    return sum(parameter.numel() for parameter in parts)


def _samples(model: UnifiedModel, count: int, split: str = "test") -> list[SceneSample]:
    data = Scenes(split, size=model.tokenizer.spec.image_size)
    return [data[index] for index in range(count)]


def _pixels(samples: Iterable[SceneSample]) -> Tensor:
    return torch.stack([to_tensor(sample.pixels) for sample in samples])


def _breakdown(timings: Sequence[Timings]) -> Breakdown:
    return Breakdown(
        **{part: statistics.median(getattr(t, part) for t in timings) for part in PARTS}
    )


@contextmanager
def _trainers(pair: Pair) -> Iterator[dict[str, torch.optim.Optimizer]]:
    """Optimisers that change nothing, with both models in training mode inside the block only."""
    modes = {side: model.training for side, model in pair}
    try:
        yield {
            # A step of length zero does all the work and leaves every weight as it was.
            side: torch.optim.AdamW(model.train().trainable_parameters(), lr=0.0, weight_decay=0.0)
            for side, model in pair
        }
    finally:
        for side, model in pair:
            model.train(modes[side])
            model.zero_grad(set_to_none=True)


def _training_step(
    model: UnifiedModel,
    optimiser: torch.optim.Optimizer,
    pixels: Tensor,
    samples: Sequence[SceneSample],
) -> None:
    pixels = pixels.to(model.device)
    questions = [[question.text for question in sample.questions] for sample in samples]
    answers = [[question.answer for question in sample.questions] for sample in samples]
    loss = model.understanding_loss(pixels, questions, answers).loss
    loss = loss + model.generation_loss(pixels, [sample.caption for sample in samples]).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _untrained(trained: ImageCodec, order: str, head: str) -> ImageCodec:
    """A codec of the same size around the same host, with another order and head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = ImageCodec(trained.tokenizer, replace(trained.spec, order=order, head=head))
    return codec.to(trained.tokenizer.device).eval()


def _result(
    pair: Pair,
    effort: Effort,
    what: str,
    figures: Mapping[str, Mapping[str, Any]],
    breakdowns: Mapping[str, Breakdown] | None = None,
    *,
    prompt_tokens: int = 0,
    details: Mapping[str, Any],
) -> Result:
    """The measured figures in the fixed shape, with what is known without measuring."""
    sides = {
        side: Figures(
            tokens_per_image=model.tokens_per_image,
            interface_tokens=model.interface_tokens,
            kv_cache_bytes=kv_cache_bytes(model, prompt_tokens),
            **figures.get(side, {}),
        )
        for side, model in pair
    }
    parts = breakdowns or {}
    return Result(
        command=f"unicompress bench {what}",
        dense=sides.get("dense", Figures()),
        compressed=sides.get("compressed", Figures()),
        dense_breakdown=parts.get("dense", Breakdown()),
        compressed_breakdown=parts.get("compressed", Breakdown()),
        hardware=hardware(pair.any.device),
        details={what: {"effort": effort, "prompt_tokens": prompt_tokens, **details}},
    )
