"""The main job: unseen pictures and prompts through a dense and a compressed model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unicompress.data.images import save_png
from unicompress.data.scenes import SceneSample
from unicompress.errors import InputError
from unicompress.evals.cost import (
    Effort,
    Pair,
    bench_generation,
    bench_training,
    bench_understanding,
)
from unicompress.evals.generation import (
    DEFAULT_SAMPLING,
    GenerationScore,
    draw_all,
    judge,
    real_pictures,
    score_drawings,
    unseen_scenes,
)
from unicompress.evals.image_metrics import psnr
from unicompress.evals.reconstruction import (
    DECOMPRESSED,
    HOST,
    NEAREST,
    Reconstructions,
    reconstruct,
    score_reconstructions,
)
from unicompress.evals.report import (
    AskedQuestion,
    Headline,
    Report,
    ShownPicture,
    ShownPrompt,
    change,
    charts_of,
    contact_sheet,
    data_uri,
    enlarged,
    times,
    write_report,
)
from unicompress.evals.result import Progress, Result
from unicompress.evals.understanding import QuestionSet, UnderstandingScore, evaluate_understanding
from unicompress.generate import Sampling
from unicompress.registry import require
from unicompress.unified import UnifiedModel

FIRST_PROMPT = 500_000  # index of the first scene that is drawn: none of them is also asked about
DEFAULT_EFFORT = Effort(batch=8, repeats=3, warmup=1, flops=False)
SCALE = 4  # of the picture files


@dataclass(frozen=True)
class DemoSize:
    """How much the demo shows and measures; the defaults suit two slow cores."""

    images: int = 8  # shown
    prompts: int = 9  # shown, three to a row
    questions: int = 240
    drawings: int = 32  # drawn and checked, the shown ones among them
    reconstructions: int = 64
    questions_per_image: int = 4  # shown
    effort: Effort = DEFAULT_EFFORT
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.images, self.prompts, self.questions) < 1:
            raise InputError("the demo needs at least one image, one prompt and one question")


@dataclass(frozen=True)
class _Run:
    """What the models did, before it is put into words."""

    tests: QuestionSet
    samples: Sequence[SceneSample]
    dense: Reconstructions
    compressed: Reconstructions
    answers: dict[str, UnderstandingScore]
    drawn: Sequence[SceneSample]
    drawings: dict[str, Tensor]
    scores: dict[str, GenerationScore]


def run_demo(
    dense: UnifiedModel,
    compressed: UnifiedModel,
    out_dir: Path | str,
    *,
    size: DemoSize | None = None,
    about: Sequence[str] = (),
    command: str = "unicompress demo",
    progress: Progress | None = None,
) -> Result:
    """Reconstruct, ask, draw and time both models; write report.html, report.json and pictures.

    `about` are further notes for the report, for example how the models were trained. Raises
    InputError where a model is on the wrong side.
    """
    if dense.codec is not None or compressed.codec is None:
        raise InputError("the demo compares a model without a codec (dense) with one that has it")
    size, out = size or DemoSize(), Path(out_dir)
    _check_output(out)
    run = _use(dense, compressed, size, progress)
    result = _measure(Pair(dense, compressed), size, run, command, progress)
    report = Report(
        result=result,
        headlines=_headlines(result, run),
        pictures=_shown_pictures(run, size),
        prompts=_shown_prompts(run, size),
        charts=charts_of(result),
        notes=_notes(size, run, about),
    )
    _write_pictures(run, size, out / "pictures")
    result.write(out / "report.json")
    write_report(report, out / "report.html")
    return result


def _check_output(out: Path) -> None:
    """Fail before the work rather than after it."""
    require("jinja2", extra="demo")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror}): choose another folder"
        ) from error


def _use(
    dense: UnifiedModel, compressed: UnifiedModel, size: DemoSize, progress: Progress | None
) -> _Run:
    """Both models on the same pictures, questions and prompts."""
    side = dense.tokenizer.spec.image_size
    samples = unseen_scenes(max(size.images, size.reconstructions), size=side)
    pixels = real_pictures(samples)
    tests = QuestionSet.scenes(size.questions, size=side)
    drawn = unseen_scenes(max(size.prompts, size.drawings), size=side, first=FIRST_PROMPT)
    captions = [sample.caption for sample in drawn]
    models = {"dense": dense, "compressed": compressed}

    def told(side: str) -> Progress | None:
        if progress is None:
            return None
        return lambda label, done, total: progress(f"{side}: {label}", done, total)

    drawings = {
        name: draw_all(model, captions, sampling=size.sampling, seed=size.seed, progress=told(name))
        for name, model in models.items()
    }
    return _Run(
        tests=tests,
        samples=samples,
        dense=reconstruct(dense.tokenizer, None, pixels, progress=told("dense")),
        compressed=reconstruct(
            compressed.tokenizer, compressed.codec, pixels, progress=told("compressed")
        ),
        answers={
            name: evaluate_understanding(model, tests, progress=told(name))
            for name, model in models.items()
        },
        drawn=drawn,
        drawings=drawings,
        scores={name: score_drawings(pictures, drawn) for name, pictures in drawings.items()},
    )


def _measure(
    pair: Pair, size: DemoSize, run: _Run, command: str, progress: Progress | None
) -> Result:
    """Times first, then everything into the fixed shape."""
    drawing = bench_generation(pair, size.effort, sampling=size.sampling, progress=progress)
    asking = bench_understanding(pair, size.effort, progress=progress)
    training = bench_training(pair, size.effort, progress=progress)
    host = score_reconstructions(run.dense, run.samples, similarity=False)
    plugin = score_reconstructions(run.compressed, run.samples, similarity=False)
    quality = {"dense": host[HOST], "compressed": plugin[DECOMPRESSED]}
    figures = {
        side: replace(
            getattr(drawing, side),
            understanding_seconds=getattr(asking, side).understanding_seconds,
            training_step_seconds=getattr(training, side).training_step_seconds,
            understanding_accuracy=run.answers[side].accuracy.overall.mean,
            generation_accuracy=run.scores[side].whole.mean,
            psnr=quality[side].psnr.mean,
        )
        for side in ("dense", "compressed")
    }
    asked: dict[str, Any] = {side: score.summary() for side, score in run.answers.items()}
    asked["difference"] = run.answers["compressed"].compared_with(run.answers["dense"])
    drawn: dict[str, Any] = {side: score.summary() for side, score in run.scores.items()}
    drawn["difference"] = run.scores["compressed"].compared_with(run.scores["dense"])
    return replace(
        drawing,
        command=command,
        dense=figures["dense"],
        compressed=figures["compressed"],
        seeds=(size.seed,),
        details={
            "understanding": asked,
            "generation": drawn,
            "reconstruction": {
                "dense": {HOST: host[HOST].summary()},
                "compressed": {name: score.summary() for name, score in plugin.items()},
            },
            "timing": {"effort": size.effort, **_runs(drawing, asking, training)},
        },
    )


def _runs(*results: Result) -> dict[str, Any]:
    """Seconds of every single run."""
    return {name: what["seconds"] for result in results for name, what in result.details.items()}


def _headlines(result: Result, run: _Run) -> tuple[Headline, ...]:
    dense, compressed, ratio = result.dense, result.compressed, result.ratio
    difference = result.details["understanding"]["difference"]
    drawn = result.details["generation"]["difference"]
    return (
        Headline(
            "tokens per picture",
            str(dense.tokens_per_image),
            str(compressed.tokens_per_image),
            times(ratio["tokens"], less="fewer", more="more"),
            f"with delimiters {dense.interface_tokens} and {compressed.interface_tokens}",
        ),
        Headline(
            "time to draw",
            "1",
            f"{ratio['generation_seconds'] or math.nan:.2f}",
            times(ratio["generation_seconds"], less="faster", more="slower"),
            "prompt to pixels, decompressor included",
        ),
        Headline(
            "questions answered right",
            _percent(dense.understanding_accuracy),
            _percent(compressed.understanding_accuracy),
            change(dense.understanding_accuracy, compressed.understanding_accuracy, "points", 100),
            _interval(difference, len(run.tests.questions), "questions"),
        ),
        Headline(
            "prompts drawn right",
            _percent(dense.generation_accuracy),
            _percent(compressed.generation_accuracy),
            change(dense.generation_accuracy, compressed.generation_accuracy, "points", 100),
            _interval(drawn, len(run.drawn), "prompts"),
        ),
        Headline(
            "reconstruction",
            f"{dense.psnr:.1f} dB",
            f"{compressed.psnr:.1f} dB",
            change(dense.psnr, compressed.psnr, "dB"),
            f"PSNR, {len(run.samples)} pictures",
        ),
        Headline(
            "key/value cache",
            _kilobytes(dense.kv_cache_bytes),
            _kilobytes(compressed.kv_cache_bytes),
            times(ratio["kv_cache_bytes"], less="smaller", more="larger"),
            "one picture with its prompt",
        ),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _kilobytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1024:,.0f} KiB"


def _interval(difference: Any, count: int, unit: str) -> str:
    return (
        f"95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}, {count} {unit}"
    )


def _shown_pictures(run: _Run, size: DemoSize) -> tuple[ShownPicture, ...]:
    by_picture: dict[int, list[AskedQuestion]] = {}
    rows = zip(
        run.tests.owners,
        run.tests.questions,
        run.answers["dense"].answers,
        run.answers["compressed"].answers,
        strict=True,
    )
    for owner, question, said, said_compressed in rows:
        asked = AskedQuestion(question.text, question.answer, said, said_compressed)
        by_picture.setdefault(owner, []).append(asked)
    original, host = run.dense.originals, run.dense.pictures[HOST]
    plugin = run.compressed.pictures[DECOMPRESSED]
    losses = [psnr(pictures, original) for pictures in (host, plugin)]
    return tuple(
        ShownPicture(
            caption=sample.caption,
            original=data_uri(original[index]),
            dense=data_uri(host[index]),
            compressed=data_uri(plugin[index]),
            dense_psnr=float(losses[0][index]),
            compressed_psnr=float(losses[1][index]),
            held_out=sample.scene.has_held_out,
            questions=tuple(by_picture.get(index, ())[: size.questions_per_image]),
        )
        for index, sample in enumerate(run.samples[: size.images])
    )


def _shown_prompts(run: _Run, size: DemoSize) -> tuple[ShownPrompt, ...]:
    shown = run.drawn[: size.prompts]
    verdicts = {name: judge(run.drawings[name][: len(shown)], shown) for name in run.drawings}
    return tuple(
        ShownPrompt(
            text=sample.caption,
            dense=data_uri(run.drawings["dense"][index]),
            compressed=data_uri(run.drawings["compressed"][index]),
            dense_right=verdicts["dense"][index].whole,
            compressed_right=verdicts["compressed"][index].whole,
            held_out=sample.scene.has_held_out,
        )
        for index, sample in enumerate(shown)
    )


def _write_pictures(run: _Run, size: DemoSize, folder: Path) -> None:
    """Two contact sheets, and every shown picture as a file of its own."""
    original, host = run.dense.originals, run.dense.pictures[HOST]
    sets = {
        "original": original[: size.images],
        "dense": host[: size.images],
        "compressed": run.compressed.pictures[DECOMPRESSED][: size.images],
        "nearest-expansion": run.compressed.pictures[NEAREST][: size.images],
    }
    drawn = {f"drawn-{name}": pictures[: size.prompts] for name, pictures in run.drawings.items()}
    sheets = {
        "reconstructions": contact_sheet(list(sets.values())),
        "drawings": contact_sheet(list(drawn.values())),
    }
    singles = {
        f"{index:02d}-{name}": picture
        for name, pictures in (sets | drawn).items()
        for index, picture in enumerate(pictures)
    }
    for name, picture in (sheets | singles).items():
        save_png(enlarged(picture, SCALE), folder / f"{name}.png")


def _notes(size: DemoSize, run: _Run, about: Sequence[str]) -> tuple[str, ...]:
    asked = run.answers["compressed"]
    blind = asked.question_only.overall.mean if asked.question_only else math.nan
    other = asked.shuffled_image.overall.mean if asked.shuffled_image else math.nan
    effort = size.effort
    return (
        f"Scenes are generated pictures of one to three shapes, {run.dense.originals.shape[-1]} "
        "pixels wide. They show whether the method works end to end; they say nothing about "
        "photographs or large models.",
        f"{len(run.tests.questions)} questions about {len(run.tests.pictures)} pictures of the "
        "test split, a quarter of them with a colour and shape that training never shows together. "
        f"Without the picture the compressed model answers {100 * blind:.1f} % right, with another "
        f"picture {100 * other:.1f} %.",
        f"{len(run.drawn)} prompts drawn with guidance {size.sampling.cfg:g} and temperature "
        f"{size.sampling.temperature:g}. So few samples leave wide intervals; docs/results has the "
        "full measurement.",
        f"Times are medians of {effort.repeats} runs after {effort.warmup} for warming up, models "
        f"taking turns, {effort.batch} pictures at once; one question per picture; a training step "
        "reads and writes every picture and takes an optimiser step of length zero.",
        "The ratio of times depends on the machine and on the size of the language model: the "
        "decompressor weighs more beside a small one. Other shapes: unicompress bench generation "
        "--lm llama-3.2-1b.",
        "Not measured here: energy, memory beyond the key/value cache, and what another training "
        "run of the same two models would give.",
        *about,
    )
