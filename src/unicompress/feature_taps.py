"""Encoders that a model only reads images with: `FeatureTap`, the half of a host without codes.

Models with two encoders (Janus, VARGPT) draw with a tokenizer and read with something else. The
seam is the first half of the tokenizer's: `spec` and `encode`. `understanding.py` pools the field.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVisionConfig
from transformers.models.janus.modeling_janus import JanusVisionModel

from unicompress.registry import Family, Member
from unicompress.tokens import Grid


@dataclass(frozen=True)
class TapSpec:
    """What a tap promises about its tokens."""

    grid: Grid
    dim: int  # channels of X
    image_size: int  # pixels per side


class FeatureTap(nn.Module, Member, ABC):
    """Maps pixels to continuous tokens that are read and never drawn."""

    name: ClassVar[str]
    spec: TapSpec

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        """Pixels in [-1, 1] to X, raster order."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> "FeatureTap":
        """The same architecture with small random weights, for tests."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


taps: Family[FeatureTap] = Family("feature tap", home="unicompress.feature_taps")


@taps.register("janus_siglip")
class JanusSiglip(FeatureTap):
    """The SigLIP of Janus after its last norm: 24 x 24 tokens of 1024 channels at 384 px.

    `vision` holds options of transformers' JanusVisionConfig; `mean` and `std` are the image
    processor's.
    """

    def __init__(
        self,
        *,
        vision: dict[str, Any] | None = None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.vision = dict(vision or {})
        self.mean, self.std = tuple(mean), tuple(std)
        config = JanusVisionConfig(**self.vision)
        config._attn_implementation = "sdpa"
        self.encoder = JanusVisionModel(config)
        side = config.image_size // config.patch_size
        self.spec = TapSpec(Grid(side, side), config.hidden_size, config.image_size)
        for name, values in (("center", self.mean), ("scale", self.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    center: Float[Tensor, "3 1 1"]
    scale: Float[Tensor, "3 1 1"]

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        """The field after the encoder's last norm."""
        normed = ((pixels + 1) / 2 - self.center) / self.scale
        return self.encoder(pixel_values=normed).last_hidden_state

    @classmethod
    def tiny(cls) -> "JanusSiglip":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(
                vision={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 4,
                    "mlp_ratio": 2.0,
                }
            )
