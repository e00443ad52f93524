"""`analyze attention`: where a model's attention goes, layer by layer."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    LOOK,
    MODEL_HELP,
    Device,
    Json,
    check_png,
    device_named,
    load_model,
)
from unicompress.console import command_line, write_result
from unicompress.errors import InputError

if TYPE_CHECKING:
    from unicompress.limits.attention import Allocation
    from unicompress.unified import UnifiedModel

analyze = typer.Typer(help="What a model does with its image tokens.", no_args_is_help=True)
app.add_typer(analyze, name="analyze", rich_help_panel=LOOK)


@analyze.callback()
def group() -> None:
    """What a model does with its image tokens."""


class Kind(str, Enum):
    """What the model is doing while it is measured."""

    both = "both"
    understanding = "understanding"
    generation = "generation"


@analyze.command()
def attention(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    task: Annotated[Kind, typer.Option(metavar="NAME", help=", ".join(Kind))] = Kind.both,
    pictures: Annotated[int, typer.Option(help="Validation scenes to measure on.")] = 32,
    queries: Annotated[str, typer.Option(help="Whose attention: a segment, or all.")] = "output",
    segments: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='MODEL is any causal language model; JSON: [[{"segment": NAME, "text": ...}]].',
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also draw the shares.")] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Shares of attention by layer, head and segment, with and without the first token."""
    from unicompress.evals.result import Figures, Result, hardware
    from unicompress.limits.plots import plot_allocations
    from unicompress.limits.report import allocation_details

    check_png(plot)
    place = device_named(device)
    figures: dict[str, Any] = {}
    if segments is not None:
        found = {"text": _of_file(model, segments, device)}
    else:
        loaded = load_model(model, device)
        found = _of_model(loaded, task, pictures)
        tokens = Figures(
            tokens_per_image=loaded.tokens_per_image, interface_tokens=loaded.interface_tokens
        )
        figures = {"dense" if loaded.codec is None else "compressed": tokens}
    details = {"model": model, **allocation_details(found, queries)}
    for table in details["tables"]:
        typer.echo(table["title"])
        typer.echo("  ".join(f"{column:>11}" for column in table["columns"]))
        for layer, *shares in table["rows"]:
            typer.echo("  ".join([f"{layer:>11}", *(f"{share:>11.3f}" for share in shares)]))
    if plot is not None:
        focus = {"understanding": "image", "generation": "output"}
        plot_allocations(found, plot, asked=queries, focus=focus)
        typer.echo(f"plot: {plot}")
    result = Result(
        command=command_line(), seeds=(), hardware=hardware(place), details=details, **figures
    )
    write_result(json, result)


def _of_model(model: "UnifiedModel", task: Kind, pictures: int) -> "dict[str, Allocation]":
    from unicompress.data.images import to_tensor
    from unicompress.data.scenes import Scenes
    from unicompress.limits.attention import attention_allocation
    from unicompress.limits.segments import Example, unified_passes
    from unicompress.unified import DESCRIBE

    if pictures < 1:
        raise InputError(f"pictures must be at least 1, got {pictures}")
    scenes = Scenes("val", size=model.tokenizer.spec.image_size)
    examples = []
    for sample in (scenes[index] for index in range(pictures)):
        asked = [(question.text, question.answer) for question in sample.questions]
        pairs = (*asked, (DESCRIBE, sample.caption))
        examples.append(Example(to_tensor(sample.pixels), pairs, sample.caption))
    lm = model.backbone.inner
    found = {}
    if task is not Kind.generation:
        found["understanding"] = attention_allocation(
            lm, unified_passes(model, examples, "understanding")
        )
    if task is not Kind.understanding:
        found["generation"] = attention_allocation(
            lm, unified_passes(model, examples, "generation")
        )
    return found


def _of_file(name: str, path: Path, device: str) -> "Allocation":
    from unicompress.limits.attention import attention_allocation
    from unicompress.limits.segments import file_passes
    from unicompress.training.language import language_model
    from unicompress.training.recipe import LanguageModelRecipe

    lm, text = language_model(LanguageModelRecipe(name=name), (), seed=0)
    lm = lm.to(device_named(device))
    names, passes = file_passes(path, lm, text)
    return attention_allocation(lm, passes, names)
