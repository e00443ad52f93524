"""Short stage-one trainings that differ in one option each, scored on validation scenes.

`python -m unicompress.training.ablation recipes/reference/ablation.yaml [key=value ...]` trains
every setting for the same steps on the same images and writes one result file per setting, which
`docs/results/README.md` is made from. Settings whose file exists are left alone, so an interrupted
ablation goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from unicompress.codec import ImageCodec
from unicompress.data.scenes import Scenes
from unicompress.errors import UnicompressError
from unicompress.evals.reconstruction import (
    DECOMPRESSED,
    HOST,
    NEAREST,
    ReconstructionScore,
    evaluate_reconstruction,
)
from unicompress.evals.result import Figures, Result
from unicompress.tokenizers.io import load_tokenizer
from unicompress.training.experiment import plain_name, read_command
from unicompress.training.recipe import StageOneRecipe, parse_recipe
from unicompress.training.stage_one import FINAL, codec_spec, train_stage_one

MODULE = "unicompress.training.ablation"


class AblationRecipe(BaseModel):
    """Which settings are tried, and on how many validation scenes they are scored."""

    model_config = ConfigDict(extra="forbid")

    stage_one: dict[str, Any]  # a stage-one recipe; every setting changes its `codec`
    axes: dict[str, dict[str, dict[str, Any]]]  # axis -> setting -> fields of the codec
    pictures: int = Field(default=300, gt=1)
    results: str = "docs/results"


def run_ablation(recipe: AblationRecipe, source: str, command: str) -> list[Path]:
    """Train and score all settings; returns the result files, old ones included."""
    written = []
    settings = [(axis, s, c) for axis, group in recipe.axes.items() for s, c in group.items()]
    for axis, setting, changes in tqdm(settings, unit="setting"):
        path = Path(recipe.results) / f"ablation-{plain_name(axis)}-{plain_name(setting)}.json"
        written.append(path)
        if path.exists():
            continue
        values = {**recipe.stage_one, "codec": {**recipe.stage_one.get("codec", {}), **changes}}
        values["out"] = str(Path(values["out"]) / path.stem)
        one = parse_recipe(StageOneRecipe, values, source)
        _measure(one, recipe.pictures, axis, setting, command).write(path)
    return written


def _measure(
    recipe: StageOneRecipe, pictures: int, axis: str, setting: str, command: str
) -> Result:
    """Train one setting and score it; the identity has nothing to train."""
    host = load_tokenizer(recipe.tokenizer).freeze()
    spec = codec_spec(recipe)
    codec = ImageCodec(host, spec)
    gap = None
    scenes = Scenes("val", size=host.spec.image_size)
    samples = [scenes[i] for i in range(pictures)]
    if not spec.identity:
        train_stage_one(recipe)
        codec = ImageCodec.from_pretrained(Path(recipe.out) / FINAL, host)
        if spec.global_count:
            from unicompress.evals.generation import real_pictures

            gap = codec.shuffled_global_gap(real_pictures(samples[:64]))
    scores = evaluate_reconstruction(host, codec, samples)
    final = scores.get(DECOMPRESSED, scores[HOST])
    return Result(
        command=command,
        dense=Figures(tokens_per_image=host.spec.grid.length, psnr=scores[HOST].psnr.mean),
        compressed=Figures(
            tokens_per_image=codec.tokens_per_image(),
            interface_tokens=codec.interface_tokens(),
            psnr=final.psnr.mean,
        ),
        seeds=(recipe.seed,),
        details={
            "ablation": {"axis": axis, "setting": setting, "figures": _figures(scores, gap)},
            "reconstruction": {"compressed": {n: s.summary() for n, s in scores.items()}},
            "steps": recipe.steps,
            "batch": recipe.batch,
            "codec": spec.to_dict(),
        },
    )


def _figures(scores: dict[str, ReconstructionScore], gap: float | None) -> dict[str, object]:
    final = scores.get(DECOMPRESSED, scores[HOST])
    return {
        "whole caption read back": final.whole,
        "dense tokens right": final.token_accuracy,
        "loss increase, G shuffled": gap,
        "nearest expansion, PSNR (dB)": scores[NEAREST].psnr,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ablation of a recipe; returns the exit code."""
    try:
        for path in run_ablation(*read_command(MODULE, __doc__, AblationRecipe, arguments)):
            print(path)
    except UnicompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
