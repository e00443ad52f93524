"""Is what a language model must know still in the tokens? A small probe reads it off frozen fields.

    python -m unicompress.evals.probe TOKENIZER [PLUG_IN] --json PATH

Trains one probe each on X, on {G, X^} and on X^ alone, all on the same generated scenes, and tells
on unseen scenes which colours are there, and which shape the object of each colour has. A gate
before stage two: what a probe cannot read here, no language model will learn to say.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.backbones.projectors import LocalProjector
from unicompress.codec import ImageCodec
from unicompress.data.images import to_tensor
from unicompress.data.scene_render import COLOURS, HELD_OUT, SHAPES, Scene
from unicompress.data.scenes import Scenes, SceneSample
from unicompress.errors import InputError, UnicompressError
from unicompress.evals.generation import unseen_scenes
from unicompress.evals.progress import progress_bar
from unicompress.evals.result import Figures, Progress, Result, module_command
from unicompress.evals.statistics import Interval, bootstrap_mean
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokenizers.io import load_tokenizer
from unicompress.tokens import Grid

MODULE = "unicompress.evals.probe"
DENSE, COMPRESSED, LOCALS = "X", "{G, X^}", "X^ alone"
ABSENT = len(SHAPES)  # the class of a colour that no object has
WIDTH = 128


@dataclass(frozen=True)
class Field:
    """Tokens of one kind, globals first."""

    globals_: Float[Tensor, "b g d"]
    locals_: Float[Tensor, "b m d"]
    grid: Grid  # of the local tokens


@dataclass(frozen=True)
class ProbeScore:
    """Shares of unseen scenes, or of the objects in them."""

    colours: Interval  # scenes in which exactly the colours that are there were found
    shapes: Interval  # objects whose shape is right, asked for by their colour
    held_out: Interval | None  # the same of objects whose shape and colour never met in training


class Probe(nn.Module):
    """One query for each colour looks at the tokens twice and names a shape, or none.

    Local tokens pass the reference's projector first, so the probe sees what its language model
    sees.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.enter = LocalProjector(dim=dim, hidden=WIDTH, width=WIDTH, depth=2)
        self.queries = nn.Parameter(torch.randn(len(COLOURS), WIDTH))
        layer = nn.TransformerDecoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(WIDTH))
        self.leave = nn.Linear(WIDTH, len(SHAPES) + 1)

    def forward(self, field: Field) -> Float[Tensor, "b c k"]:
        """Scores of every shape, and of none, for every colour."""
        tokens = self.enter(field.globals_, field.locals_, field.grid)
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.leave(self.layers(queries, tokens))


@torch.no_grad()
def fields_of(
    tokenizer: ImageTokenizer, codec: ImageCodec | None, pixels: Float[Tensor, "b 3 h w"]
) -> dict[str, Field]:
    """The continuous tokens that understanding reads, by name."""
    dense = tokenizer.encode(pixels)
    grid = tokenizer.spec.grid
    fields = {DENSE: Field(dense[:, :0], dense, grid)}
    if codec is not None:
        tokens = codec.compress(dense)
        locals_ = tokens.local_tokens
        fields[COMPRESSED] = Field(tokens.global_tokens, locals_, tokens.grid)
        fields[LOCALS] = Field(locals_[:, :0], locals_, tokens.grid)
    return fields


def truth(scenes: Sequence[Scene]) -> Int[Tensor, "b c"]:
    """Which shape the object of each colour has; `ABSENT` where there is none."""
    found = torch.full((len(scenes), len(COLOURS)), ABSENT)
    for row, scene in zip(found, scenes, strict=True):
        for thing in scene.objects:
            row[COLOURS.index(thing.colour)] = SHAPES.index(thing.shape)
    return found


def run_probe(
    tokenizer: ImageTokenizer,
    codec: ImageCodec | None,
    *,
    images: int = 20_000,
    pictures: int = 1000,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, ProbeScore]:
    """Train on `images` training scenes, score on `pictures` test scenes; one score a field.

    All probes see the same scenes in the same order and start from the same seed. InputError for
    fewer than one batch, and for fewer than 2 pictures.
    """
    if images < batch or pictures < 2:
        raise InputError(
            f"a probe needs at least {batch} images and 2 pictures, got {images} and {pictures}"
        )
    size = tokenizer.spec.image_size
    scenes = Scenes("train", seed=seed, size=size, questions_per_image=0)
    steps = images // batch
    warmup = min(100, 1 + steps // 10)
    probes: dict[str, Probe] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(steps):
        samples = [scenes[step * batch + i] for i in range(batch)]
        fields = fields_of(tokenizer, codec, _pixels(samples, tokenizer))
        wanted = truth([sample.scene for sample in samples]).to(tokenizer.device)
        if not probes:
            probes = {name: _new_probe(field, seed) for name, field in fields.items()}
            optimizers = {
                name: torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.01)
                for name, probe in probes.items()
            }
        for name, probe in probes.items():
            for group in optimizers[name].param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup, 2 * (1 - step / steps))
            loss = nn.functional.cross_entropy(probe(fields[name]).flatten(0, 1), wanted.flatten())
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimizers[name].step()
        if progress:
            progress("training the probes", step + 1, steps)
    return _scores(probes, tokenizer, codec, unseen_scenes(pictures, size=size), batch)


@torch.no_grad()
def _scores(
    probes: dict[str, Probe],
    tokenizer: ImageTokenizer,
    codec: ImageCodec | None,
    samples: Sequence[SceneSample],
    batch: int,
) -> dict[str, ProbeScore]:
    logits: dict[str, list[Tensor]] = {name: [] for name in probes}
    for start in range(0, len(samples), batch):
        pixels = _pixels(samples[start : start + batch], tokenizer)
        for name, field in fields_of(tokenizer, codec, pixels).items():
            logits[name].append(probes[name].eval()(field).cpu())
    wanted = truth([sample.scene for sample in samples])
    return {name: score(torch.cat(parts), wanted) for name, parts in logits.items()}


def score(logits: Float[Tensor, "b c k"], wanted: Int[Tensor, "b c"]) -> ProbeScore:
    """Compare a probe's answers with the truth."""
    there = wanted != ABSENT
    never = torch.zeros(len(COLOURS), len(SHAPES) + 1, dtype=torch.bool)
    for shape, colour in HELD_OUT:
        never[COLOURS.index(colour), SHAPES.index(shape)] = True
    new = never[torch.arange(len(COLOURS)), wanted]  # False where nothing is there
    found = logits.argmax(dim=-1) != ABSENT
    right = logits[..., :ABSENT].argmax(dim=-1) == wanted  # the best shape, given that it is there
    return ProbeScore(
        colours=bootstrap_mean((found == there).all(dim=1).numpy()),
        shapes=bootstrap_mean(right[there].numpy()),
        held_out=bootstrap_mean(right[new].numpy()) if int(new.sum()) > 1 else None,
    )


def _new_probe(field: Field, seed: int) -> Probe:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Probe(field.locals_.shape[-1]).to(field.locals_.device)


def _pixels(samples: Sequence[SceneSample], tokenizer: ImageTokenizer) -> Float[Tensor, "b 3 h w"]:
    return torch.stack([to_tensor(sample.pixels) for sample in samples]).to(tokenizer.device)


def probe_result(
    tokenizer: ImageTokenizer, codec: ImageCodec | None, scores: dict[str, ProbeScore], command: str
) -> Result:
    """The scores in the shape of every result file, with a table for the page."""
    rows = [[name, s.colours, s.shapes, s.held_out] for name, s in scores.items()]
    columns = ["field", "all colours right", "shape right", "the same, held-out combinations"]
    locals_ = 0 if codec is None else tokenizer.spec.grid.pooled(codec.spec.stride).length
    count = 0 if codec is None else codec.spec.global_count + locals_
    return Result(
        command=command,
        dense=Figures(tokens_per_image=tokenizer.spec.grid.length),
        compressed=Figures(tokens_per_image=count or None),
        details={
            "title": "Probes of the tokens that understanding reads",
            "probe": scores,
            "tables": [{"title": "What a small probe reads", "columns": columns, "rows": rows}],
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe a tokenizer, and a plug-in around it; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("codec", metavar="PLUG_IN", nargs="?")
    parser.add_argument("--images", type=int, default=20_000, help="training scenes")
    parser.add_argument("--pictures", type=int, default=1000, help="test scenes")
    parser.add_argument("--json", metavar="PATH", required=True)
    given = parser.parse_args(arguments)
    command = module_command(MODULE, arguments)
    try:
        host = load_tokenizer(given.tokenizer).freeze()
        codec = ImageCodec.from_pretrained(given.codec, host) if given.codec else None
        with progress_bar() as progress:
            scores = run_probe(
                host, codec, images=given.images, pictures=given.pictures, progress=progress
            )
        probe_result(host, codec, scores, command).write(given.json)
    except UnicompressError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for name, score in scores.items():
        print(f"{name}: colours {score.colours}, shapes {score.shapes}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
