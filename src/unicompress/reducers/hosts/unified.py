"""unicompress's own UnifiedModel: image first, then the question.

Its image tokenizer is the generation branch as well, so the latents that G2TR asks for are its own
dense tokens, and its projection into the language model is the embedding of codes. The tokenizer
has no attending encoder: where a reducer asks for the encoder's attention or keys, those of the
image's tokens among each other in the first layer of the language model stand in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals
from unicompress.reducers.g2tr import anchors_of
from unicompress.reducers.hosts.base import Host, ImageField, Prompt, hosts
from unicompress.tokens import EncodedImages, Grid


@hosts.register("unified")
class Unified(Host):
    """Local tokens are reduced; global tokens and delimiters stay."""

    kinds = ("UnifiedModel",)
    gives = frozenset(
        {"attention", "shallow_attention", "keys", "anchors", "anchor_tokens", "anchor_grid"}
    )

    def trunk(self, model: Any) -> nn.Module:
        return model.backbone.inner.base_model

    @contextmanager
    def watch(
        self, model: Any, reducer: Reducer, tracker: Any, grids: list[Grid] | None
    ) -> Iterator[None]:
        if "understanding" in model.backbone.accelerators:
            raise InputError(
                "this model's accelerator already treats image tokens in its own way: reducers act "
                "on models without one"
            )
        needed = set().union(*(step.reducer.needs for step in reducer.steps(tracker.depth)))
        seen: dict[str, Any] = {}
        original = model._image_embeds

        def image_embeds(images: Tensor | EncodedImages) -> Tensor:
            encoder = Signals()
            if any(name.startswith("anchor") for name in needed):
                if isinstance(images, EncodedImages):
                    raise InputError(
                        f"the reducer {reducer.name!r} needs the tokenizer's field, which packed "
                        "images do not have: pass pixels"
                    )
                dense = model._dense(images)
                encoder = self._anchors(model, dense)
                # Understanding reads the same field, unless it has an encoder of its own.
                images = dense if model.understanding is None else images
            embeds = original(images)
            seen.update(embeds=embeds, encoder=encoder)
            return embeds

        def announce(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not seen:
                return
            embeds, mask, positions = args[0], args[1], args[2]
            width = seen["embeds"].shape[1]
            found = embeds.shape[1] > width and torch.equal(
                embeds[:, :width], seen["embeds"].to(embeds)
            )
            if found:
                text = self._text(width, mask, positions, embeds.shape[1], reducer, tracker.depth)
                tracker.announce(self._prompt(model, width, seen.pop("encoder"), text))
            seen.clear()

        hook = model.backbone.register_forward_pre_hook(announce)
        vars(model)["_image_embeds"] = image_embeds
        try:
            yield
        finally:
            hook.remove()
            del vars(model)["_image_embeds"]

    def _prompt(self, model: Any, width: int, encoder: Signals, text: Tensor) -> Prompt:
        layout = model.understanding_layout
        # The image stands last among its embeddings, behind what opens a prompt.
        columns = torch.tensor(layout.local_places, device=text.device) + width - layout.length
        fields = tuple(
            ImageField(row, columns, layout.grid, encoder.of(row)) for row in range(len(text))
        )
        order = torch.arange(text.shape[1], device=text.device)
        last = (order * text).amax(dim=1)
        return Prompt(fields, text, last)

    def _text(
        self,
        width: int,
        mask: Tensor | None,
        positions: Tensor,
        length: int,
        reducer: Reducer,
        depth: int,
    ) -> Tensor:
        """Columns of the question; several of one picture only suit reducers that ignore them."""
        b = len(positions)
        order = torch.arange(length, device=positions.device)
        text = (order >= width).expand(b, -1)
        if mask is None:
            return text
        seen = mask if mask.dtype == torch.bool else mask >= 0
        block = seen.expand(b, -1, -1, -1)[:, 0, :, width] & text  # with the first token of text
        start = positions[:, width, None]
        others = text & ~block & (positions > start)
        if bool(others.any()) and self.reads_text(reducer, depth):
            raise InputError(
                f"the reducer {reducer.name!r} chooses tokens for one question at a time: pass "
                "each picture with a single question"
            )
        return block

    @staticmethod
    def reads_text(reducer: Reducer, depth: int) -> bool:
        """Whether the choice depends on the question."""
        return any(
            (step.reducer.source != "encoder" and "attention" in step.reducer.needs)
            or any(n.startswith("text") or n == "relevance" for n in step.reducer.needs)
            for step in reducer.steps(depth)
        )

    @torch.no_grad()
    def _anchors(self, model: Any, dense: Float[Tensor, "b t d"]) -> Signals:
        """The tokenizer's field in code space, and its codes as the language model writes them."""
        grid = model.tokenizer.spec.grid
        latent = model.tokenizer.dense_target(dense)
        # A compressed model's anchors come from its own, compressed codes.
        codes = model._codes(dense)[:, model.layout.global_count :]
        embedded = model.backbone.embed_codes(codes, "local")
        tokens, anchor_grid = pooled(embedded, model.layout.grid)
        anchors, _ = pooled(latent, grid, anchor_grid)
        return Signals(anchors=anchors, anchor_tokens=tokens, anchor_grid=anchor_grid)


def pooled(tokens: Tensor, grid: Grid, to: Grid | None = None) -> tuple[Tensor, Grid]:
    """Tokens [b, n, d] of a grid averaged 2 x 2, or to another grid."""
    field = tokens.transpose(1, 2).unflatten(-1, tuple(grid))
    if to is None:
        return anchors_of(field, patch=1)
    smaller = nn.functional.adaptive_avg_pool2d(field, (to.rows, to.columns))
    return smaller.flatten(2).transpose(1, 2), to
