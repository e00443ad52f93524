"""Stage one (section 3.5): trains the plug-in around a frozen host on reconstruction (eq. 8)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.codec import PRESETS, CodecLoss, CodecSpec, ImageCodec
from unicompress.codec_spec import OF_THE_CODES
from unicompress.errors import RecipeError
from unicompress.evals.image_metrics import psnr
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokenizers.io import load_tokenizer
from unicompress.training.feed import Place, seed_of
from unicompress.training.images import ImageBatch, ImageBatches
from unicompress.training.loop import LoopResult, Objective, fit
from unicompress.training.recipe import StageOneRecipe, check_keys, tuples
from unicompress.training.samples import scene_images

FINAL = "final"
CALIBRATION = 2**40  # where the calibration images start, far from those trained on
CHUNK = 32  # images decompressed at once in validation


class StageOne(Objective[ImageBatch]):
    """Eq. 8 at the codec's rate, or at a random one of its rates per step."""

    def __init__(self, codec: ImageCodec, recipe: StageOneRecipe):
        super().__init__()
        self.codec = codec
        self.seed = recipe.seed
        self.random_rate = recipe.random_rate
        self.codes_stay = recipe.refine is not None
        self.validate_images = recipe.validate_images
        self.last: CodecLoss | None = None

    def forward(
        self, batch: ImageBatch, progress: float, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Drawn from the step alone: micro-batches and processes train the same rate together.
        draw = torch.Generator().manual_seed(seed_of(self.seed, batch.step, 2))
        stride, count = self.codec.sample_rate(draw) if self.random_rate else (None, None)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.last = self.codec.loss(
            batch.pixels, stride=stride, global_count=count, generator=generator
        )
        return self.last.total, self.last.logs

    def after_step(self, step: int) -> None:
        """Separate codebooks follow their tokens by averages."""
        assert self.last is not None  # forward ran
        if self.codes_stay:
            return
        self.codec.update_codebooks(
            self.last, torch.Generator().manual_seed(seed_of(self.seed, step, 3))
        )
        self.last = None

    def report(self, batch: ImageBatch) -> dict[str, float]:
        """What the globals are worth: the loss increase when they are shuffled across images."""
        if not self.codec.spec.global_count or len(batch.pixels) < 2:
            return {}
        return {"shuffled_global_gap": self.codec.shuffled_global_gap(batch.pixels)}

    def validate(self) -> dict[str, float]:
        """PSNR and token accuracy of decompressed held-out scenes, beside those of the host."""
        host = self.codec.tokenizer
        pixels = scene_images(self.validate_images, size=host.spec.image_size).to(host.device)
        totals: dict[str, Tensor] = {}
        for part in pixels.split(CHUNK):
            for name, values in self._compare(part).items():
                totals[name] = totals.get(name, torch.zeros(())) + values.sum().cpu()
        means = {name: float(total) / len(pixels) for name, total in totals.items()}
        if self.codec.spec.global_count and len(pixels) > 1:
            means["shuffled_global_gap"] = self.codec.shuffled_global_gap(pixels[:CHUNK])
        return means

    def _compare(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, " b"]]:
        host = self.codec.tokenizer
        dense = host.encode(pixels)
        codes, rows = host.quantize(dense)
        expanded = self.codec.expand(self.codec.compress(dense))
        figures = {
            "psnr": psnr(host.decode(expanded.dense), pixels),
            "psnr_dense": psnr(host.decode(rows), pixels),
        }
        if expanded.codes is not None:
            figures["accuracy"] = (expanded.codes == codes).float().mean((1, 2))
        return figures


def train_stage_one(recipe: StageOneRecipe, *, resume: bool = False) -> LoopResult:
    """Run the stage; a complete run leaves the plug-in in `<out>/final`, the host as it was."""
    host = load_tokenizer(recipe.tokenizer, recipe.checkpoint).freeze()
    codec = build_codec(host, recipe) if recipe.refine is None else refined_codec(host, recipe)
    size = host.spec.image_size
    stage = StageOne(codec, recipe)
    result = fit(stage, lambda place: ImageBatches(recipe, size, place), recipe, resume=resume)
    if result.status == "done" and result.main_process:
        codec.cpu().eval().save_pretrained(Path(recipe.out) / FINAL)
    return result


def codec_spec(recipe: StageOneRecipe) -> CodecSpec:
    """The preset with the recipe's changes; RecipeError naming the nearest valid name."""
    if recipe.preset not in PRESETS:
        raise RecipeError(f"unknown preset {recipe.preset!r}: use one of {', '.join(PRESETS)}")
    check_keys(recipe.codec, (field.name for field in dataclasses.fields(CodecSpec)), "codec")
    spec = dataclasses.replace(PRESETS[recipe.preset], **tuples(recipe.codec))
    if recipe.random_rate and len(spec.rates) == 1 and not spec.nested:
        raise RecipeError("random_rate has no choice: set codec.strides or codec.nested")
    return spec


def build_codec(host: ImageTokenizer, recipe: StageOneRecipe) -> ImageCodec:
    """A plug-in with its starting point set from images of the recipe's data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(recipe.seed, 0))
        codec = ImageCodec(host, codec_spec(recipe))
    draw = torch.Generator().manual_seed(seed_of(recipe.seed, 1))
    codec.calibrate(_calibration(host, recipe), draw)
    return codec


def refined_codec(host: ImageTokenizer, recipe: StageOneRecipe) -> ImageCodec:
    """The plug-in `recipe.refine`, with all frozen that its codes depend on.

    So a language model trained on these codes stays valid. The decompressor is the trained one, or
    a new one where the recipe gives it other options. RecipeError for options of the codes.
    """
    assert recipe.refine is not None  # the caller asked
    trained = ImageCodec.from_pretrained(recipe.refine, host)
    check_keys(recipe.codec, (field.name for field in dataclasses.fields(CodecSpec)), "codec")
    spec = dataclasses.replace(trained.spec, **tuples(recipe.codec))
    if not spec.same_codes(trained.spec):
        changed = next(n for n in OF_THE_CODES if getattr(spec, n) != getattr(trained.spec, n))
        raise RecipeError(
            f"codec.{changed} would change the codes, which stay: train a new plug-in"
        )
    codec = trained
    if recipe.codec:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(recipe.seed, 0))
            codec = ImageCodec(host, spec)
        kept = {n: t for n, t in trained.state_dict().items() if not n.startswith("decompressor.")}
        codec.load_state_dict(kept, strict=False)
        codec.calibrate_decompressor(_calibration(host, recipe))
    if codec.decompressor is None:
        raise RecipeError(f"{recipe.refine} compresses nothing: it has no decompressor")
    codec.requires_grad_(False).train()
    codec.decompressor.requires_grad_(True)
    return codec


def _calibration(host: ImageTokenizer, recipe: StageOneRecipe) -> Float[Tensor, "b 3 h w"]:
    images = ImageBatches(recipe, host.spec.image_size, Place())
    return images.some(recipe.calibrate_images, start=CALIBRATION)
