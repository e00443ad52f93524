"""Hosts on disk: a folder with `tokenizer.safetensors`, which also says how to build the host."""

import inspect
import json
from pathlib import Path

import torch

from unicompress.checkpoint import (
    fingerprint,
    load_into,
    load_safetensors,
    save_safetensors,
    write_json,
)
from unicompress.errors import CheckpointError, InputError
from unicompress.hub import fetch_folder
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.official import ReleasedTokenizer, load_released

FORMAT = "unicompress-tokenizer-1"
WEIGHTS = "tokenizer.safetensors"
CONFIG = "config.json"  # for people; what is loaded stands in the weights file


def save_tokenizer(
    tokenizer: ImageTokenizer, folder: Path | str, *, dtype: torch.dtype | None = None
) -> None:
    """Write weights, name, options and fingerprint; `dtype=torch.bfloat16` halves the bytes.

    The fingerprint, and so the plug-ins that fit, stays the same in bfloat16.
    """
    notes = {
        "format": FORMAT,
        "name": tokenizer.name,
        "options": json.dumps(_options(tokenizer), sort_keys=True),
        "fingerprint": fingerprint(tokenizer),
    }
    weights = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in tokenizer.state_dict().items()
    }
    save_safetensors(weights, Path(folder) / WEIGHTS, notes)
    write_json({**notes, "options": _options(tokenizer)}, Path(folder) / CONFIG)


def load_tokenizer(
    source: Path | str, checkpoint: Path | str | None = None, *, revision: str | None = None
) -> ImageTokenizer:
    """A host, frozen, from a folder or hub id that `save_tokenizer` filled, or by its name.

    With a registered name such as `llamagen(image_size=384)`, `checkpoint` is what was released for
    that host: a file, a folder or a hub id (`official.py`); for a host without released weights it
    is a safetensors file with its own. Without a checkpoint the weights are random. Raises
    InputError for an unknown name, CheckpointError for damaged, foreign, misfitting or unreachable
    files.
    """
    text = str(source)
    if Path(source).is_dir() or ("/" in text and "(" not in text):
        if checkpoint is not None:
            raise InputError(f"{source} already holds weights: leave out checkpoint={checkpoint}")
        folder = fetch_folder(source, [WEIGHTS, CONFIG], revision=revision)
        return _load_folder(folder)
    if checkpoint is not None and issubclass(_member(text), ReleasedTokenizer):
        return load_released(text, checkpoint, revision=revision).freeze()
    tokenizer = tokenizers.build(text)
    if checkpoint is not None:
        tensors, _ = load_safetensors(checkpoint, digest_required=False)
        load_into(tokenizer, tensors, checkpoint)
    return tokenizer.freeze()


def _member(spec: str) -> type[ImageTokenizer]:
    return tokenizers.get(spec.partition("(")[0].strip())


def _load_folder(folder: Path) -> ImageTokenizer:
    path = folder / WEIGHTS
    tensors, notes = load_safetensors(path)
    if notes.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no {FORMAT}, but {notes.get('format')!r}")
    member = tokenizers.get(notes["name"])
    options = json.loads(notes["options"])
    known = inspect.signature(member.__init__).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CheckpointError(
            f"{path} was saved with the option {unknown[0]!r}, which {notes['name']} "
            "does not have: use the version of unicompress that saved it"
        )
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    tokenizer = member(**lists)
    load_into(tokenizer, tensors, path)
    return tokenizer.freeze()


def _options(tokenizer: ImageTokenizer) -> dict[str, object]:
    """Constructor options, which members keep under their own names."""
    parameters = inspect.signature(type(tokenizer).__init__).parameters.values()
    return {p.name: getattr(tokenizer, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}
