"""What the loaders share: a model read whole, its text tokenizer, delimiters and projector."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from unicompress.errors import CheckpointError, first_line
from unicompress.registry import require

PROCESSOR = "preprocessor_config.json"
TEXT, PIECES = "tokenizer.json", "tokenizer.model"
LAYER = re.compile(r"(?:(\d+)\.)?(weight|bias)$")


def read_whole(kind: Any, folder: Path) -> Any:
    """A transformers model with every weight it has; one line of CheckpointError otherwise.

    transformers only warns of weights that are absent or misshapen, and draws them at random.
    """
    try:
        model, notes = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, in one line
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder} cannot be read as {kind.__name__} ({first_line(error)}): fetch its files "
            "again, all shards and their index among them"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in notes.get(problem, ()))
        if names:
            raise CheckpointError(
                f"{folder} does not fit {kind.__name__}: {problem.replace('_', ' ')} "
                f"{', '.join(names[:3])} ({len(names)} in all): fetch the complete model"
            )
    return model.eval()


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


def token_ids(
    text: PreTrainedTokenizerFast, names: Sequence[str], folder: Path, model: str
) -> list[int]:
    """Entries of the vocabulary; CheckpointError names the first that is not there, and `model`."""
    ids = [text.convert_tokens_to_ids(name) for name in names]
    for name, entry in zip(names, ids, strict=True):
        if entry is None or entry == text.unk_token_id:
            raise CheckpointError(
                f"the text tokenizer in {folder} lacks {name}: it is not that of {model}"
            )
    return ids


def delimiter_rows(lm: PreTrainedModel, begin: int, end: int) -> Tensor:
    """BOS, SEP, EOS [3, h]: the rows of the entries that delimit an image, and their mean.

    Raises CheckpointError where the language model has no such rows.
    """
    table = lm.get_input_embeddings().weight
    if max(begin, end) >= len(table):
        raise CheckpointError(
            f"an image is delimited by the entries {begin} and {end}, but the language model has "
            f"{len(table)}: it and the text tokenizer are of different models"
        )
    rows = table[torch.tensor([begin, end])].detach()
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
