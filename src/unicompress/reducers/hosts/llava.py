"""transformers' LLaVA and LLaVA-Next."""

from typing import Any

import torch

from unicompress.errors import InputError
from unicompress.reducers.hosts.base import hosts
from unicompress.reducers.hosts.encoder import EncoderProbe
from unicompress.reducers.hosts.placeholders import PlaceholderHost
from unicompress.tokens import Grid


def square(count: int, grids: list[Grid] | None, index: int) -> Grid:
    """The grid of an image: as given, else a square one."""
    if grids is not None:
        if index >= len(grids) or grids[index].length != count:
            raise InputError(
                f"image {index} has {count} tokens, which none of the given grids fits: pass one "
                "grid per image, in order"
            )
        return grids[index]
    side = round(count**0.5)
    if side * side != count:
        raise InputError(f"{count} image tokens form no square: pass their grid with on(grids=...)")
    return Grid(side, side)


@hosts.register("llava")
class Llava(PlaceholderHost):
    """A CLIP (with class token) or SigLIP (without) encoder, one square field per image."""

    kinds = ("LlavaForConditionalGeneration",)
    gives = frozenset({"attention", "shallow_attention", "keys"})

    def parts(
        self, model: Any, given: dict[str, Any], output: Any, grids: list[Grid] | None
    ) -> list[Grid]:
        fields = output.pooler_output
        return [square(len(tokens), grids, index) for index, tokens in enumerate(fields)]

    def probe(self, model: Any) -> EncoderProbe:
        tower = self.inner(model).vision_tower
        tower = getattr(tower, "vision_model", tower)
        return EncoderProbe(
            [layer.self_attn for layer in tower.encoder.layers],
            class_token=model.config.vision_feature_select_strategy == "default",
        )


@hosts.register("llava_next")
class LlavaNext(PlaceholderHost):
    """Each picture has two fields: the small one, and the large one with a column of line ends.

    The encoder sees tiles that the model joins and crops afterwards, so its attention is not
    offered.
    """

    kinds = ("LlavaNextForConditionalGeneration",)

    def parts(
        self, model: Any, given: dict[str, Any], output: Any, grids: list[Grid] | None
    ) -> list[Grid]:
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        found = []
        for tokens, size in zip(output.pooler_output, given["image_sizes"], strict=True):
            shape = get_anyres_image_grid_shape(
                size, model.config.image_grid_pinpoints, vision.image_size
            )
            whole = torch.empty(1, shape[0] * side, shape[1] * side)
            rows, columns = unpad_image(whole, size).shape[1:]
            large = Grid(rows, columns + 1)
            if len(tokens) == side * side + large.length:
                found += [Grid(side, side), large]
            else:  # a picture of one tile, with a line end of its own
                found.append(Grid(1, len(tokens)))
        return found
