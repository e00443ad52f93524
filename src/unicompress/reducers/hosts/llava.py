"""transformers' LLaVA and LLaVA-Next."""

from typing import Any

import torch

from unicompress.errors import InputError
from unicompress.reducers.hosts.base import hosts
from unicompress.reducers.hosts.blocks import EncoderBlocks
from unicompress.reducers.hosts.encoder import EncoderProbe
from unicompress.reducers.hosts.placeholders import PlaceholderHost
from unicompress.tokens import Grid


@hosts.register("llava")
class Llava(PlaceholderHost):
    """A CLIP (with class token) or SigLIP (without) encoder, one square field per image."""

    kinds = ("LlavaForConditionalGeneration",)
    gives = frozenset({"attention", "shallow_attention", "keys", "encoder_groups"})

    def probe(self, model: Any) -> EncoderProbe:
        return EncoderProbe(
            [layer.self_attn for layer in self._layers(model)],
            class_token=model.config.vision_feature_select_strategy == "default",
        )

    def blocks(self, model: Any, given: dict[str, Any]) -> EncoderBlocks:
        taken, strategy = (
            getattr(model.config, name) if given.get(name) is None else given[name]
            for name in ("vision_feature_layer", "vision_feature_select_strategy")
        )
        if not isinstance(taken, int):
            raise InputError(
                f"the encoder's layers {list(taken)} differ in length when tokens merge between "
                "them, so their features cannot be joined: use inside=False"
            )
        layers = self._layers(model)
        # State 0 is what enters the first layer; -1 is what leaves the last one.
        taken = taken if taken >= 0 else len(layers) + 1 + taken
        return EncoderBlocks(layers[:taken], class_token=strategy == "default")

    def _layers(self, model: Any) -> list[Any]:
        tower = self.inner(model).vision_tower
        tower = getattr(tower, "vision_model", tower)
        if not hasattr(tower, "encoder"):
            raise InputError(
                f"the inside of a {type(tower).__name__} is not known, only that of CLIP and "
                "SigLIP: choose a reducer that needs nothing of the encoder"
            )
        return list(tower.encoder.layers)


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
