"""Tiny vision-language models of transformers with random weights, and prompts for them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE, PAD = 50, 0
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}


@dataclass(frozen=True)
class Tiny:
    """A model, and how many tokens each of its images has."""

    model: Any
    tokens: int  # per image, or per tile
    side: int  # pixels
    pixels: str = "pixel_values"

    def prompt(self, texts: list[list[int]], images: list[int], seed: int = 0) -> dict[str, Tensor]:
        """Left-padded prompts: the images of the row, each after token 3, then its text."""
        rows = [
            [3, *[IMAGE] * self.tokens] * count + text
            for text, count in zip(texts, images, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        draws = torch.Generator().manual_seed(seed)
        shape = (sum(images), 3, self.side, self.side)
        pixels = torch.rand(shape, generator=draws) * 2 - 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if isinstance(self.model, Qwen2_5_VLForConditionalGeneration):
            patches = self.side // 4
            grid = torch.tensor([[1, patches, patches]] * sum(images))
            flat = torch.rand(sum(images) * patches**2, 3 * 2 * 16, generator=draws)
            kinds = (ids == IMAGE).int()
            return {
                **inputs, "pixel_values": flat, "image_grid_thw": grid, "mm_token_type_ids": kinds
            }  # fmt: skip
        if isinstance(self.model, LlavaNextForConditionalGeneration):
            sizes = torch.tensor([[self.side, self.side]] * sum(images))
            tiles = torch.rand(sum(images), 5, 3, 16, 16, generator=draws) * 2 - 1
            return {**inputs, "pixel_values": tiles, "image_sizes": sizes}
        return {**inputs, self.pixels: pixels}


def llama(**options: Any) -> dict[str, Any]:
    return LlamaConfig(**{**TEXT, **options}).to_dict()


def sharper(model: Any) -> Any:
    """Larger weights in the encoder, so that different pixels give different tokens."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" not in name and "lm_head" not in name and weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=draws) * 0.3)
    return model.eval()


def clip(side: int = 32) -> dict[str, Any]:
    return CLIPVisionConfig(**VISION, num_hidden_layers=3, image_size=side, patch_size=4).to_dict()


@cache
def tiny(name: str, attention: str = "sdpa") -> Tiny:
    """One of llava, llava_next, internvl, janus, qwen2_5_vl."""
    torch.manual_seed(0)
    made = BUILDERS[name]()
    made.model.set_attn_implementation(attention)
    return Tiny(sharper(made.model), made.tokens, made.side)


def _llava() -> Tiny:
    config = LlavaConfig(vision_config=clip(), text_config=llama(), image_token_id=IMAGE)
    return Tiny(LlavaForConditionalGeneration(config), tokens=64, side=32)


def _llava_next() -> Tiny:
    config = LlavaNextConfig(
        vision_config=clip(16),
        text_config=llama(),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 32]],
    )
    # 4 x 4 small tokens, and 8 x (8 + 1) large ones.
    return Tiny(LlavaNextForConditionalGeneration(config), tokens=16 + 72, side=32)


def _internvl() -> Tiny:
    vision = {**VISION, "num_hidden_layers": 3, "image_size": [32, 32], "patch_size": [2, 2]}
    config = InternVLConfig(
        vision_config={"model_type": "internvl_vision", **vision},
        text_config=llama(),
        image_token_id=IMAGE,
        image_seq_length=64,
    )
    return Tiny(InternVLForConditionalGeneration(config), tokens=64, side=32)


def _janus() -> Tiny:
    vision = {**VISION, "num_hidden_layers": 3, "image_size": 32, "patch_size": 4, "mlp_ratio": 1.5}
    config = JanusConfig(
        text_config=llama(),
        vision_config={**vision, "projection_dim": 32, "hidden_dropout_rate": 0.0},
        vq_config={
            "embed_dim": 4, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32,
            "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "num_patches": 8,
            "projection_dim": 32, "hidden_size": 32, "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    return Tiny(JanusForConditionalGeneration(config), tokens=64, side=32)


def _qwen() -> Tiny:
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                        "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    )  # fmt: skip
    return Tiny(Qwen2_5_VLForConditionalGeneration(config), tokens=64, side=64)


BUILDERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "internvl": _internvl,
    "janus": _janus,
    "qwen2_5_vl": _qwen,
}
