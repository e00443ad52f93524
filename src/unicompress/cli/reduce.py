"""`reduce`: which tokens of a picture a training-free method keeps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicompress.cli.app import app
from unicompress.cli.options import (
    LOOK,
    MODEL_HELP,
    Device,
    Json,
    check_png,
    load_model,
    read_picture,
)
from unicompress.console import write_values

if TYPE_CHECKING:
    import numpy as np


@app.command(rich_help_panel=LOOK)
def reduce(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="A reducer, with options as in 'fastv(layer=1)'.")
    ] = "g2tr",
    keep: Annotated[float, typer.Option(help="Share of tokens, or a count from 2 on.")] = 0.5,
    question: Annotated[
        str, typer.Option(help="For methods that go by the text.")
    ] = "what is in the picture?",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="PNG: dropped tokens dark.")
    ] = Path("reduced.png"),
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Draw which tokens of IMAGE a training-free reducer keeps in MODEL."""
    from unicompress.data.images import save_png, to_uint8
    from unicompress.reducers.base import reducers

    check_png(output)
    budget = int(keep) if keep > 1 and keep == int(keep) else keep
    reducer = reducers.build(method, keep=budget)
    loaded = load_model(model, device)
    pixels = read_picture(image, loaded)[None]
    (dense_answer,) = loaded.answer(pixels, [question])
    with reducer.on(loaded) as tracker:
        (answer,) = loaded.answer(pixels, [question])
    (field,) = tracker.last.prompt.fields
    cuts = tracker.last.reductions[0]
    left = list(range(field.grid.length))
    stages = []
    for cut in cuts:
        left = [left[index] for index in cut.indices[0].tolist()]
        stages.append(left)
    # A method may drop all tokens in the end; the picture shows what its last choice kept.
    kept = stages[-1] if stages else left
    save_png(shade(to_uint8(pixels)[0], tuple(field.grid), kept), output)
    typer.echo(f"{len(kept)} of {field.grid.length} tokens kept, drawn in {output}")
    typer.echo(f"answer with all tokens: {dense_answer}; with those kept: {answer}")
    write_values(
        json,
        {
            "model": model,
            "image": str(image),
            "method": str(reducer),
            "grid": list(field.grid),
            "tokens": field.grid.length,
            "kept": kept,
            "stages": stages,
            "question": question,
            "answer": answer,
            "answer_with_all_tokens": dense_answer,
            "picture": str(output),
        },
    )


def shade(pixels: "np.ndarray", grid: tuple[int, int], kept: list[int]) -> "np.ndarray":
    """The picture [h, w, 3] with the cells of dropped tokens dark, enlarged to 256 or more."""
    import numpy as np

    rows, columns = grid
    shown = np.zeros(rows * columns, dtype=bool)
    shown[kept] = True
    factor = max(1, -(-256 // min(pixels.shape[:2])))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    down = np.arange(large.shape[0]) * rows // large.shape[0]
    across = np.arange(large.shape[1]) * columns // large.shape[1]
    mask = shown.reshape(rows, columns)[down][:, across]
    return np.where(mask[..., None], large, large // 5)
