"""Trains a small host tokenizer from scratch, for references and tests."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unicompress.errors import RecipeError
from unicompress.evals.image_metrics import psnr
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.io import save_tokenizer
from unicompress.tokenizers.janus_vq import JanusVQ
from unicompress.training.feed import seed_of
from unicompress.training.images import ImageBatch, ImageBatches
from unicompress.training.loop import LoopResult, Objective, fit
from unicompress.training.recipe import HostRecipe, TokenizerRecipe, check_options, tuples
from unicompress.training.samples import scene_images
from unicompress.training.tokenizer_loss import TokenizerObjective

FINAL = "final"


class TokenizerStage(Objective[ImageBatch]):
    """The loop's view of `TokenizerObjective`."""

    def __init__(self, loss: TokenizerObjective, recipe: TokenizerRecipe):
        super().__init__()
        self.loss = loss
        self.validate_images = recipe.validate_images

    def forward(
        self, batch: ImageBatch, progress: float, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch.pixels, batch.phrases, progress)

    def validate(self) -> dict[str, float]:
        """PSNR of reconstructions of held-out scenes, as the finished host would make them."""
        host = self.loss.tokenizer
        pixels = scene_images(self.validate_images, size=host.spec.image_size).to(host.device)
        found = []
        for part in pixels.split(32):
            dense = host.to_code_space(host.encode(part))
            unit = torch.nn.functional.normalize(self.loss.centre(dense.flatten(0, 1)), dim=-1)
            code = unit
            if self.loss.ready:
                code = host.codebook()[(unit @ host.codebook().T).argmax(-1)]
            found.append(psnr(host.pixels(code.view(*dense.shape)), part))
        return {"psnr": float(torch.cat(found).mean())}


def train_tokenizer(recipe: TokenizerRecipe, *, resume: bool = False) -> LoopResult:
    """Run the stage; a complete run leaves the host in `<out>/final`."""
    host = build_host(recipe.tokenizer, seed=recipe.seed)
    if not isinstance(host, JanusVQ):
        raise RecipeError(f"only janus_vq is trained from scratch, got {recipe.tokenizer.name!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(recipe.seed, 1))  # the objective initialises the convolutions
        loss = TokenizerObjective(host, **recipe.objective.model_dump(), seed=recipe.seed)
    stage = TokenizerStage(loss, recipe)
    size = host.spec.image_size
    result = fit(stage, lambda place: ImageBatches(recipe, size, place), recipe, resume=resume)
    if result.status == "done" and result.main_process:
        save_tokenizer(loss.finish().cpu(), Path(recipe.out) / FINAL)
    return result


def build_host(host: HostRecipe, *, seed: int) -> ImageTokenizer:
    """A host with random weights, the same for the same seed."""
    member = tokenizers.get(host.name)
    check_options(host.options, member, "tokenizer.options")
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, 0))
        return member(**tuples(host.options))
