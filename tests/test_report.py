"""The demo end to end on tiny models, its report, and the page of results."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval_pair import SIDE, tiny_pair
from unicompress.checkpoint import write_json
from unicompress.errors import InputError
from unicompress.evals.cost import Effort
from unicompress.evals.demo import DemoSize, run_demo
from unicompress.evals.experiment import write_results_page
from unicompress.evals.report import (
    AskedQuestion,
    Headline,
    Report,
    ShownPicture,
    change,
    charts_of,
    contact_sheet,
    data_uri,
    enlarged,
    render,
    times,
)
from unicompress.evals.result import Breakdown, Figures, Result
from unicompress.evals.results_page import cell, number, table
from unicompress.evals.statistics import Interval

VOID = {"meta", "img", "br", "hr", "link", "input"}
SMALL = DemoSize(
    images=2,
    prompts=2,
    questions=12,
    drawings=3,
    reconstructions=3,
    questions_per_image=2,
    effort=Effort(batch=2, repeats=1, warmup=0, flops=False),
)


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the page refers to."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [str(v) for name, v in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def result(**changes: object) -> Result:
    values: dict[str, object] = {
        "command": "unicompress demo",
        "dense": Figures(
            tokens_per_image=256,
            interface_tokens=258,
            understanding_accuracy=0.95,
            generation_seconds=2.0,
            kv_cache_bytes=1000,
        ),
        "compressed": Figures(
            tokens_per_image=68,
            interface_tokens=71,
            understanding_accuracy=0.94,
            generation_seconds=0.8,
            kv_cache_bytes=300,
        ),
        "dense_breakdown": Breakdown(0.1, 1.5, 0.2, 0.0, 0.1),
        "compressed_breakdown": Breakdown(0.1, 0.4, 0.05, 0.2, 0.1),
        "commit": "abc",
        "hardware": "a processor, 2 cores",
    }
    return Result(**{**values, **changes})  # type: ignore[arg-type]


def report(**changes: object) -> Report:
    grey = data_uri(torch.zeros(3, 4, 4))
    asked = AskedQuestion("is <b>it</b> red?", "yes", "yes", "")
    picture = ShownPicture("a <script>", grey, grey, grey, 20.0, 19.0, True, (asked,))
    values: dict[str, object] = {
        "result": result(),
        "headlines": (Headline("tokens", "256", "68", "3.8x fewer"),),
        "pictures": (picture,),
        "prompts": (),
        "charts": charts_of(result()),
        "notes": ("a note",),
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("jinja2")
    dense, compressed = tiny_pair().dense, tiny_pair().compressed
    assert dense is not None
    assert compressed is not None
    out = tmp_path_factory.mktemp("demo")
    run_demo(dense, compressed, out, size=SMALL, about=("trained on nothing",))
    return out


def test_the_demo_writes_the_fixed_json(demo: Path) -> None:
    value = json.loads((demo / "report.json").read_text())
    assert value["command"] == "unicompress demo"
    for side in ("dense", "compressed"):
        assert None not in value[side].values()
        assert None not in value["breakdown"][side].values()
    assert None not in value["ratio"].values()
    assert value["ratio"]["tokens"] == pytest.approx(20 / 64)
    assert set(value["details"]) == {"understanding", "generation", "reconstruction", "timing"}


def test_the_demo_writes_one_page_that_needs_nothing_else(demo: Path) -> None:
    html = (demo / "report.html").read_text()
    page = Page(html)
    assert page.references
    assert all(r.startswith("data:image/png;base64,") for r in page.references)
    assert "url(" not in html
    assert "<script" not in html
    assert len(page.references) == 2 * 3 + 2 * 2
    for reference in page.references:
        data = base64.b64decode(reference.split(",", 1)[1])
        assert Image.open(io.BytesIO(data)).size == (SIDE, SIDE)
    for words in ("tokens per picture", "trained on nothing", "compressed", "hardware", "PSNR"):
        assert words in page.words
    assert "nan" not in page.words.lower().split()


def test_the_demo_writes_its_pictures(demo: Path) -> None:
    names = {path.name for path in (demo / "pictures").iterdir()}
    assert {"reconstructions.png", "drawings.png", "01-original.png"} <= names
    assert len(names) == 2 + 2 * 4 + 2 * 2


def test_the_demo_refuses_models_on_the_wrong_side(tmp_path: Path) -> None:
    dense, compressed = tiny_pair().dense, tiny_pair().compressed
    assert dense is not None
    assert compressed is not None
    with pytest.raises(InputError, match="without a codec"):
        run_demo(compressed, dense, tmp_path, size=SMALL)
    with pytest.raises(InputError, match="at least one image"):
        DemoSize(images=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        run_demo(dense, compressed, tmp_path / "file", size=SMALL)


# The page


def test_every_text_is_escaped_and_marked() -> None:
    pytest.importorskip("jinja2")
    html = render(report())
    assert "a &lt;script&gt;" in html
    assert "is &lt;b&gt;it&lt;/b&gt; red?" in html
    page = Page(html)
    assert "(nothing)" in page.words
    assert re.search(r'class="right">yes', html)
    assert re.search(r'class="wrong">\(nothing\)', html)
    assert "never seen in training" in page.words


def test_bars_are_as_long_as_the_times() -> None:
    (chart,) = charts_of(result())
    dense, compressed = chart.bars
    assert dense.end == pytest.approx(100)
    assert compressed.end == pytest.approx(40)
    assert compressed.text == "800 ms (0.40 x)"
    widths = {segment.part: segment.width for segment in dense.segments}
    assert widths["lm_steps"] == pytest.approx(75)
    assert widths["other"] == pytest.approx(5)
    starts = [segment.start for segment in compressed.segments]
    assert starts == sorted(starts)


def test_what_was_not_timed_has_no_chart() -> None:
    pytest.importorskip("jinja2")
    untimed = result(compressed=Figures(tokens_per_image=68))
    assert charts_of(untimed) == ()
    Page(render(report(result=untimed, charts=())))


def test_words_for_ratios_and_differences() -> None:
    said = [times(ratio, less="less", more="more") for ratio in (0.25, 1.0, 2.0, None)]
    assert said == ["4.0x less", "the same", "2.0x more", ""]
    assert change(0.9, 0.88, "points", 100) == "-2.0 points"
    assert change(20.0, 20.04, "dB") == "equal"
    assert change(None, 1.0, "dB") == ""


def test_pictures_are_png_and_sheets_have_room() -> None:
    white = torch.ones(2, 3, 4, 4)
    image = Image.open(io.BytesIO(base64.b64decode(data_uri(white[0]).split(",")[1])))
    assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (4, 4), (255, 255, 255))
    assert enlarged(white[0], 3).shape == (12, 12, 3)
    assert contact_sheet([white, -white], gap=1).shape == (3, 12, 12)


# The page of results


def with_scores(accuracy: float, **extra: object) -> Result:
    score = {
        "questions": 100,
        "accuracy": {
            "overall": Interval(accuracy, accuracy - 0.02, accuracy + 0.02, 100),
            "by_kind": {"colour": Interval(0.9, 0.8, 1.0, 50)},
        },
        "question_only": {"overall": Interval(0.3, 0.2, 0.4, 100), "by_kind": {}},
    }
    difference = {"difference": -0.01, "low": -0.03, "high": 0.01}
    details = {
        "understanding": {"dense": score, "compressed": score, "difference": difference},
        **extra,
    }
    return result(
        compressed=Figures(
            tokens_per_image=68, understanding_accuracy=accuracy, generation_seconds=0.8
        ),
        details=details,
    )


def test_the_results_page_is_made_of_the_files(tmp_path: Path) -> None:
    with_scores(0.94, title="The reference", note="One seed.").write(tmp_path / "reference.json")
    out = tmp_path / "README.md"
    write_results_page([tmp_path / "reference.json"], out)
    page = out.read_text()
    assert "## The reference\n\nOne seed." in page
    assert "`unicompress demo`; commit `abc`; a processor, 2 cores" in page
    assert "| tokens per image | 256 | 68 | 0.266 |" in page
    assert "| all | 0.940 [0.920, 0.960] | 0.940 [0.920, 0.960] | -0.010 [-0.030, +0.010] |" in page
    assert "| colour | 0.900 [0.800, 1.000] |" in page
    assert "| drawing, time | - | - | 0.400 |" in page


def test_absolute_seconds_are_shown_for_a_gpu(tmp_path: Path) -> None:
    result(hardware="GPU NVIDIA H200; a processor").write(tmp_path / "gpu.json")
    write_results_page([tmp_path / "gpu.json"], tmp_path / "page.md")
    assert "| drawing, seconds | 2 | 0.800 | 0.400 |" in (tmp_path / "page.md").read_text()


def test_seeds_are_joined_with_their_spread(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        with_scores(accuracy).write(tmp_path / f"reference-seed{seed}.json")
    write_results_page(sorted(tmp_path.glob("*.json")), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.count("## reference") == 1
    assert "0.920 +- 0.020" in page
    assert "3 files" in page


def test_ablations_and_own_tables_have_their_place(tmp_path: Path) -> None:
    for count in (0, 4):
        details = {"axis": "global tokens", "setting": f"N_g = {count}", "figures": {"gap": 0.5}}
        with_scores(0.9, ablation=details).write(tmp_path / f"globals-{count}.json")
    own = {"title": "Wall clock", "columns": ["minutes", "dense"], "rows": [[5, 0.25], [9, None]]}
    with_scores(0.9, tables=[own]).write(tmp_path / "main.json")
    write_results_page(list(tmp_path.glob("*.json")), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Ablation: global tokens" in page
    assert page.index("N_g = 0 |") < page.index("N_g = 4 |")
    assert "### Wall clock" in page
    assert "| 5 | 0.250 |" in page
    assert "| 9 | - |" in page


def test_mistakes_of_the_results_page_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no result files"):
        write_results_page([], tmp_path / "page.md")
    write_json({"schema": 7}, tmp_path / "old.json")
    with pytest.raises(InputError, match=r"old\.json is not a unicompress result"):
        write_results_page([tmp_path / "old.json"], tmp_path / "page.md")


def test_numbers_and_tables() -> None:
    assert [number(x) for x in (0.5, 256, 28.123, 1.0, 0.00001, 0)] == [
        "0.500", "256", "28.12", "1.000", "1.00e-05", "0.000",
    ]  # fmt: skip
    assert cell([]) == "-"
    assert cell(["words"]) == "words"
    assert table(["a", "b", "c"], [["x", "-", "1|2"]]) == "| a | c |\n| --- | --- |\n| x | 1/2 |\n"
