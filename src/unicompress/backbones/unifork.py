"""UniFork: a language model whose upper half exists twice, once for reading, once for drawing.

Read from the paper (arXiv 2506.17202) and the model file of its repository, which has neither a
licence nor weights: the lower layers are shared; the upper ones and the last norm have a copy for
generation, equal at the start. Codes enter and leave as in VILA-U, whose tokenizer it uses.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.accelerators.base import ImageColumns
from unicompress.backbones.base import CodeSpace, Prompts, backbones
from unicompress.backbones.projectors import Projector
from unicompress.backbones.vila_u import VilaU
from unicompress.errors import InputError


@backbones.register("unifork")
class UniFork(VilaU):
    """`fork` is the share of the layers, counted from below, that both tasks use."""

    prompts: ClassVar[Prompts] = Prompts(unconditional=" ")

    def __init__(
        self,
        lm: PreTrainedModel,
        space: CodeSpace,
        projector: Projector,
        *,
        code_dim: int = 1024,
        width: int = 896,
        depth: int = 6,
        block_heads: int = 14,
        fork: float = 0.5,
    ):
        super().__init__(
            lm,
            space,
            projector,
            code_dim=code_dim,
            width=width,
            depth=depth,
            block_heads=block_heads,
        )
        trunk: Any = lm.base_model
        if not 0 <= fork < 1 or not hasattr(trunk, "layers") or not hasattr(trunk, "norm"):
            raise InputError(
                f"a fork of {type(lm).__name__} at {fork} is not possible: fork must be from 0 to "
                "below 1, and the model needs `layers` and a last `norm` as Llama and Qwen have"
            )
        self.fork = fork
        self.shared = int(len(trunk.layers) * fork)
        self.generation_layers = nn.ModuleList(copy.deepcopy(list(trunk.layers[self.shared :])))
        self.generation_norm = copy.deepcopy(trunk.norm)

    def forward(
        self,
        embeds: Float[Tensor, "b l h"],
        mask: Bool[Tensor, "b 1 l k"] | None,
        positions: Int[Tensor, "b l"],
        cache: Any = None,
        image: ImageColumns | None = None,
    ) -> Float[Tensor, "b l h"]:
        """Hidden states of the branch that the image's task asks for; text alone reads."""
        if image is None or image.task != "generation":
            return super().forward(embeds, mask, positions, cache, image)
        with self._drawing():
            return super().forward(embeds, mask, positions, cache, image)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """The language model with its other upper half, as long as the block runs."""
        trunk: Any = self.inner.base_model
        layers, norm = trunk.layers, trunk.norm
        trunk.layers = nn.ModuleList([*layers[: self.shared], *self.generation_layers])
        trunk.norm = self.generation_norm
        try:
            yield
        finally:
            trunk.layers, trunk.norm = layers, norm
