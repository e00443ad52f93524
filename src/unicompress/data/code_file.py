"""Compressed pictures on disk: the codes of several images, and which codec they belong to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from unicompress.checkpoint import fingerprint, load_safetensors, save_safetensors
from unicompress.codec import ImageCodec
from unicompress.errors import CheckpointError, HostMismatchError, InputError
from unicompress.tokens import Grid

FORMAT = "unicompress-codes-1"
NAME_LIMIT = 200  # characters; file systems take 255 bytes
FORBIDDEN = set('/\\:*?"<>|') | {chr(i) for i in range(32)}


@dataclass(frozen=True)
class CodeFile:
    """What such a file holds, checked against the codec that reads it."""

    names: tuple[str, ...]  # plain file names without folder or ending, all different
    codes: Int[Tensor, "b n c"]  # globals first
    stride: int
    global_count: int
    grid: Grid  # of the dense tokens


def unique_names(paths: Sequence[Path | str]) -> list[str]:
    """One name per image: its file name without ending, cleaned; equal ones are numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = "".join("_" if c in FORBIDDEN else c for c in Path(path).stem)
        stem = stem.strip(". ")[: NAME_LIMIT - 10] or "image"
        name, number = stem, 1
        while name.casefold() in taken:  # some file systems do not tell a from A
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def save_codes(content: CodeFile, path: Path | str, codec: ImageCodec) -> None:
    """Write codes with the fingerprints of host and plug-in; raises InputError if they misfit."""
    _check_names(content.names)
    if len(content.names) != len(content.codes):
        raise InputError(f"{len(content.codes)} images were given {len(content.names)} names")
    codec.check_codes(
        content.codes,
        stride=content.stride,
        global_count=content.global_count,
        grid=content.grid,
    )
    notes = {
        "format": FORMAT,
        "names": json.dumps(content.names),
        "stride": str(content.stride),
        "global_count": str(content.global_count),
        "grid": json.dumps(list(content.grid)),
        "host": str(codec.tokenizer),
        "host_fingerprint": fingerprint(codec.tokenizer),
        "plug_in_fingerprint": fingerprint(codec),
    }
    small = max(codec.codebook_sizes) <= torch.iinfo(torch.int16).max + 1
    codes = content.codes.to(torch.int16 if small else torch.int32)
    save_safetensors({"codes": codes}, path, notes)


def load_codes(path: Path | str, codec: ImageCodec) -> CodeFile:
    """Read codes for this codec.

    Raises CheckpointError for damaged and foreign files, HostMismatchError for codes of another
    host or plug-in, InputError for codes out of range and for names that would leave a folder.
    """
    tensors, notes = load_safetensors(path)
    if notes.get("format") != FORMAT or set(tensors) != {"codes"}:
        raise CheckpointError(f"{path} holds no codes: pass a file that `encode` wrote")
    for key, module in (("host", codec.tokenizer), ("plug_in", codec)):
        written, found = notes.get(f"{key}_fingerprint", "none"), fingerprint(module)
        if written != found:
            kind = "tokenizer" if key == "host" else "compression plug-in"
            raise HostMismatchError(
                f"{path} was written with another {kind} (fingerprint {written[:12]}, here "
                f"{found[:12]}): decode it with the model that encoded it"
            )
    try:
        names = json.loads(notes["names"])
        _check_names(names)
        content = CodeFile(
            names=tuple(names),
            codes=tensors["codes"].long(),
            stride=int(notes["stride"]),
            global_count=int(notes["global_count"]),
            grid=Grid(*json.loads(notes["grid"])),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete ({error}): encode the images again") from error
    if len(content.names) != len(content.codes):
        raise CheckpointError(
            f"{path} names {len(content.names)} images but holds {len(content.codes)}: "
            "encode the images again"
        )
    codec.check_codes(
        content.codes,
        stride=content.stride,
        global_count=content.global_count,
        grid=content.grid,
    )
    return content


def output_path(folder: Path | str, name: str, ending: str = ".png") -> Path:
    """Where a decoded image goes: directly inside `folder`, or InputError."""
    _check_names([name])
    return Path(folder) / f"{name}{ending}"


def _check_names(names: Sequence[object]) -> None:
    """Refuse names that are no plain file name: a file from elsewhere may hold any."""
    for name in names:
        plain = isinstance(name, str) and 0 < len(name) <= NAME_LIMIT
        if not plain or set(str(name)) & FORBIDDEN or str(name).strip(". ") != name:
            raise InputError(
                f"{str(name)[:60]!r} is no plain file name, so nothing was written: names may hold "
                "no folder, no control character, and no dot or space at either end"
            )
    folded = [str(name).casefold() for name in names]
    if len(set(folded)) != len(folded):
        raise InputError("two images have the same name, so one would replace the other")
