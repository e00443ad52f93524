"""The smallest stage two: a host and a plug-in on disk, a tiny language model, and their recipe."""

from pathlib import Path
from typing import Any

import torch

from unicompress.codec import CodecSpec, ImageCodec
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.io import save_tokenizer
from unicompress.training.recipe import StageTwoRecipe

LM = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def saved_parts(folder: Path) -> tuple[Path, Path]:
    """Folders of a host of 8 x 8 tokens and of a plug-in around it: 64 tokens become 2 + 16."""
    host = tokenizers.build("toy_single(rows=8, columns=8)")
    save_tokenizer(host, folder / "host")
    torch.manual_seed(0)
    spec = CodecSpec(width=16, depth=1, heads=2, global_count=2)
    ImageCodec(host, spec).save_pretrained(folder / "codec")
    return folder / "host", folder / "codec"


def recipe(out: Path, parts: tuple[Path, Path], **changes: Any) -> StageTwoRecipe:
    """Three steps of four samples on scenes."""
    values = {
        "tokenizer": str(parts[0]),
        "codec": str(parts[1]),
        "lm": {"config": LM, "vocab_size": 300},
        "projector": "linear",
        "steps": 3,
        "batch": 4,
        "lr": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "validate_images": 4,
        "tensorboard": False,
        "cpu": True,
        "precision": "fp32",
    }
    return StageTwoRecipe(out=str(out), **{**values, **changes})
