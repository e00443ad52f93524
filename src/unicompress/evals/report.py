"""The demo's report: one HTML file that needs nothing beside it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from unicompress.checkpoint import atomic_write
from unicompress.data.images import to_uint8
from unicompress.evals.result import Breakdown, Result
from unicompress.registry import require

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
PART_NAMES = {
    "prefill": "reading the prompt",
    "lm_steps": "language model",
    "head": "choosing codes",
    "decompressor": "decompressor",
    "image_decoder": "image decoder",
    "other": "other",
}


@dataclass(frozen=True)
class AskedQuestion:
    """One row of the question table."""

    text: str
    truth: str
    dense: str
    compressed: str

    @property
    def dense_right(self) -> bool:
        """Whether the dense model said the truth."""
        return self.dense == self.truth

    @property
    def compressed_right(self) -> bool:
        """Whether the compressed model said the truth."""
        return self.compressed == self.truth


@dataclass(frozen=True)
class ShownPicture:
    """A picture, its reconstructions (all as data URIs), and what was asked about it."""

    caption: str
    original: str
    dense: str
    compressed: str
    dense_psnr: float
    compressed_psnr: float
    held_out: bool
    questions: tuple[AskedQuestion, ...]


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt with both drawings and whether the checker reads the whole caption off them."""

    text: str
    dense: str
    compressed: str
    dense_right: bool
    compressed_right: bool
    held_out: bool


@dataclass(frozen=True)
class Headline:
    """One figure of both models, with what the eye should take from it."""

    label: str
    dense: str
    compressed: str
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Segment:
    """A coloured piece of a bar; `start` and `width` in percent of the longest bar."""

    part: str
    start: float
    width: float


@dataclass(frozen=True)
class Bar:
    """One bar: which model, its pieces, and the text at its end."""

    label: str
    segments: tuple[Segment, ...]
    text: str

    @property
    def end(self) -> float:
        """Where the bar ends, in percent."""
        return max((s.start + s.width for s in self.segments), default=0.0)


@dataclass(frozen=True)
class Chart:
    """Two bars for one use of the model."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    result: Result
    headlines: tuple[Headline, ...]
    pictures: tuple[ShownPicture, ...]
    prompts: tuple[ShownPrompt, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]


def write_report(report: Report, path: Path | str) -> None:
    """Render the page and write it atomically; raises MissingDependencyError without jinja2."""
    html = render(report)
    atomic_write(path, lambda file: file.write(html.encode()))


def render(report: Report) -> str:
    """The page as HTML; every text is escaped."""
    jinja2 = require("jinja2", extra="demo")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    parts = [
        name for name in PART_NAMES if any(s.part == name for c in report.charts for s in _all(c))
    ]
    text: str = template.render(report=report, part_names=PART_NAMES, parts=parts)
    return text


def _all(chart: Chart) -> list[Segment]:
    return [segment for bar in chart.bars for segment in bar.segments]


def enlarged(pixels: Float[Tensor, "3 h w"], scale: int) -> UInt8[ndarray, "h2 w2 3"]:
    """A picture in [-1, 1] as uint8, every pixel repeated `scale` times."""
    return to_uint8(pixels).repeat(scale, axis=0).repeat(scale, axis=1)


def data_uri(pixels: Float[Tensor, "3 h w"]) -> str:
    """A picture in [-1, 1] as a PNG that can stand inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def contact_sheet(
    rows: Sequence[Float[Tensor, "n 3 h w"]], *, gap: int = 4
) -> Float[Tensor, "3 h2 w2"]:
    """Rows of pictures as one picture, on white."""
    lines = []
    for pictures in rows:
        padded = torch.nn.functional.pad(pictures, (gap, gap, gap, gap), value=1.0)
        lines.append(torch.cat(list(padded), dim=-1))
    return torch.cat(lines, dim=-2)


def times(ratio: float | None, *, less: str, more: str) -> str:
    """A ratio compressed / dense in words, such as `3.8x fewer`; within 5 % it is `the same`."""
    if ratio is None or ratio <= 0:
        return ""
    if ratio < 0.95:
        return f"{1 / ratio:.1f}x {less}"
    return "the same" if ratio <= 1.05 else f"{ratio:.1f}x {more}"


def change(dense: float | None, compressed: float | None, unit: str, factor: float = 1.0) -> str:
    """A difference such as `-1.3 points`, or `equal` where it rounds to nothing."""
    if dense is None or compressed is None:
        return ""
    difference = round(factor * (compressed - dense), 1)
    return f"{difference:+.1f} {unit}" if difference else "equal"


def charts_of(result: Result) -> tuple[Chart, ...]:
    """A chart for every time that was measured on both sides."""
    charts = [
        _chart("Drawing", result, "generation_seconds", parts=True),
        _chart("Answering", result, "understanding_seconds"),
        _chart("One training step", result, "training_step_seconds"),
    ]
    return tuple(chart for chart in charts if chart is not None)


def _chart(title: str, result: Result, figure: str, *, parts: bool = False) -> Chart | None:
    seconds = {side: getattr(getattr(result, side), figure) for side in ("dense", "compressed")}
    if None in seconds.values():
        return None
    longest = max(seconds.values())
    bars = []
    for side, total in seconds.items():
        pieces = (
            _pieces(getattr(result, f"{side}_breakdown"), total) if parts else {"lm_steps": total}
        )
        start, segments = 0.0, []
        for part, spent in pieces.items():
            width = 100 * spent / longest
            segments.append(Segment(part, start, width))
            start += width
        ratio = "" if side == "dense" else f" ({total / seconds['dense']:.2f} x)"
        bars.append(Bar(side, tuple(segments), f"{_time(total)}{ratio}"))
    return Chart(title, tuple(bars))


def _pieces(breakdown: Breakdown, total: float) -> dict[str, float]:
    """Parts and the rest; medians of parts may exceed the median of the whole by a little."""
    known = {field.name: getattr(breakdown, field.name) or 0.0 for field in fields(breakdown)}
    known["other"] = max(0.0, total - sum(known.values()))
    scale = total / max(sum(known.values()), 1e-12)
    return {part: spent * scale for part, spent in known.items() if spent > 0}


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
