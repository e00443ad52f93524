"""What the released models around a Llama share: its text tokenizer, delimiters, projector."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from unicompress.errors import CheckpointError
from unicompress.registry import require

TEXT, PIECES = "tokenizer.json", "tokenizer.model"
LAYER = re.compile(r"(?:(\d+)\.)?(weight|bias)$")


def llama_text(folder: Path) -> PreTrainedTokenizerFast:
    """The text tokenizer in a folder, from tokenizer.json or from SentencePiece's tokenizer.model.

    Raises CheckpointError where there is neither, MissingDependencyError where the second cannot
    be converted for want of a package.
    """
    if (folder / TEXT).is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if not (folder / PIECES).is_file():
        raise CheckpointError(f"{folder} lacks its text tokenizer: put {PIECES} or {TEXT} there")
    for package in ("sentencepiece", "google.protobuf"):
        require(package, extra="hosts")
    return LlamaTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' warnings, where it reads one part of a larger model."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def delimiter_rows(lm: PreTrainedModel, begin: int, end: int) -> Tensor:
    """BOS, SEP, EOS [3, h]: the rows of the entries that delimit an image, and their mean."""
    rows = lm.get_input_embeddings().weight[torch.tensor([begin, end])].detach()
    return torch.stack([rows[0], rows.mean(dim=0), rows[1]])


def mlp_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear maps under the names of `MLPProjector`, which counts them without what lies between.

    `tensors` are named `weight` and `bias`, after a number where there are several.
    """
    parts = {name: match for name in tensors if (match := LAYER.match(name))}
    numbers = sorted({int(match[1] or 0) for match in parts.values()})
    return {
        f"layers.{numbers.index(int(match[1] or 0))}.{match[2]}": tensors[name]
        for name, match in parts.items()
    }


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def section(config: Any, name: str, keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    """A part of a configuration; CheckpointError where it or one of its keys is not there."""
    part = config.get(name) if isinstance(config, dict) else None
    missing = [key for key in keys if not isinstance(part, dict) or part.get(key) is None]
    if not isinstance(part, dict) or missing:
        raise CheckpointError(
            f"{path} does not say {name}.{missing[0]}: it is the configuration of another model"
        )
    return part
