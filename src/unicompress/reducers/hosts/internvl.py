"""transformers' InternVL: square tiles, 2 x 2 patches joined into a token."""

from typing import Any

from unicompress.reducers.hosts.base import hosts
from unicompress.reducers.hosts.encoder import EncoderProbe
from unicompress.reducers.hosts.placeholders import PlaceholderHost


@hosts.register("internvl")
class InternVL(PlaceholderHost):
    """Every tile is a field of its own, and so has its own budget."""

    kinds = ("InternVLForConditionalGeneration",)
    gives = frozenset({"attention", "shallow_attention", "keys"})

    def probe(self, model: Any) -> EncoderProbe:
        return EncoderProbe(
            [layer.attention for layer in self.inner(model).vision_tower.encoder.layer],
            class_token=model.config.vision_feature_select_strategy == "default",
            pool=round(1 / model.config.downsample_ratio),
        )
