"""Finding and reading the weight files that other people released, with errors of one line.

A source is a file, a folder, or a hub id. A folder holds safetensors (whole, or in shards beside
an index) or a pickle, which is only ever read with `weights_only=True`. Of a large model only the
shards and tensors that are asked for are read.
"""

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError  # the exception only
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicompress.checkpoint import DIGEST, load_safetensors, read_json
from unicompress.errors import CheckpointError, first_line
from unicompress.hub import NETWORK_ERRORS

STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")
Wanted = Callable[[str], bool]


def everything(_name: str) -> bool:
    """Wants every tensor."""
    return True


def locate(
    source: Path | str,
    files: Sequence[str] = (),
    *,
    hub: str = "",
    revision: str | None = None,
) -> Path:
    """The weight file, or the index of its shards, that `source` means.

    In a folder or hub repository the first of `files` that exists is taken, then the usual names of
    Hugging Face. `hub` is where the files were released, for the error that says what to fetch.
    Raises CheckpointError where nothing is found or the hub cannot be reached.
    """
    path, names = Path(source), (*files, *STANDARD)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{source} holds no weights: put {_want(files, hub)} there")
    if _local(str(source)):
        raise CheckpointError(
            f"there is no file {source}: fetch {_want(files, hub)}, and pass its path"
        )
    for name in names:
        if (found := download(source, name, revision=revision)) is not None:
            return found
    raise CheckpointError(
        f"{source} is no file or folder here, and the hub did not deliver it: "
        f"fetch {_want(files, str(source))} elsewhere, and pass the path of that file or its folder"
    )


def download(source: Path | str, name: str, *, revision: str | None = None) -> Path | None:
    """A file of a hub repository from the cache or the hub; None where neither has it."""
    folder, _, base = name.rpartition("/")
    try:
        return Path(hf_hub_download(str(source), base, subfolder=folder or None, revision=revision))
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(
            f"{source} is neither a file, nor a folder, nor a hub id (owner/name)"
        ) from error
    except NETWORK_ERRORS as error:
        raise CheckpointError(
            f"{source} is no file or folder here, and the hub did not deliver {name} "
            f"({first_line(error)}): fetch https://huggingface.co/{source}/resolve/main/{name} "
            "elsewhere, and pass its path"
        ) from error


def config_beside(
    source: Path | str, weights: Path, *, revision: str | None = None
) -> dict[str, Any]:
    """The configuration that lies in the folder of the weights; {} where there is none.

    A file given by its own path has no configuration: it may lie in any folder.
    """
    path = Path(source)
    if path.is_file():
        return {}
    beside: Path | None = weights.parent / CONFIG
    if not path.is_dir():
        parents = weights.parts[weights.parts.index("snapshots") + 2 : -1]
        beside = download(source, str(PurePosixPath(*parents, CONFIG)), revision=revision)
    if beside is None or not beside.is_file():
        return {}
    config = read_json(beside)
    if not isinstance(config, dict):
        raise CheckpointError(f"{beside} is not a model's configuration")
    return config


def read_tensors(
    path: Path,
    wanted: Wanted = everything,
    *,
    inside: Sequence[str] = (),
    source: Path | str = "",
    revision: str | None = None,
) -> dict[str, Tensor]:
    """The wanted tensors of a weight file, or of the shards of an index, on the CPU.

    `inside` are the dotted places of a pickle where the weights may lie, best first. `source` is
    where missing shards can be downloaded from. Raises CheckpointError naming missing shards and
    damaged, half-downloaded or foreign files.
    """
    if path.suffix != ".json":
        return _read_file(path, wanted, inside)
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    needed = sorted({str(shard) for name, shard in places.items() if wanted(name)})
    if not needed:
        raise CheckpointError(
            f"{path} is of another model: it names no tensor that is needed here, but "
            f"{listed(sorted(places), 2)}"
        )
    shards = {name: path.parent / name for name in needed}
    if "/" in str(source) and not Path(source).exists():
        for name in needed:
            shards[name] = download(source, name, revision=revision) or shards[name]
    missing = [name for name, shard in shards.items() if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {len(needed)} shards: "
            f"fetch {listed(missing, 8)} and put them there"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards.values():
        tensors |= _read_file(shard, wanted, inside)
    return tensors


def listed(names: Sequence[str], limit: int = 5) -> str:
    """`a, b and 3 more`: names in one line."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "") or "none"


def _read_file(path: Path, wanted: Wanted, inside: Sequence[str]) -> dict[str, Tensor]:
    start = _first_bytes(path)
    pickled = start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")
    if pickled:
        return _read_pickle(path, wanted, inside)
    if start[8:9] != b"{":
        what = "a Git LFS pointer" if start.startswith(b"version ") else "no file of weights"
        raise CheckpointError(
            f"{path} is {what} ({path.stat().st_size} bytes): download the file itself"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            ours = DIGEST in (file.metadata() or {})
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            tensors = {} if ours else {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or half-downloaded ({first_line(error)}): download it again"
        ) from error
    if ours:  # saved by this project, with a digest that can be checked
        checked, _ = load_safetensors(path)
        tensors = {name: checked[name] for name in names}
    return tensors


def _read_pickle(path: Path, wanted: Wanted, inside: Sequence[str]) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)
    if _first_bytes(path)[:2] == b"PK" and not zipped:
        raise CheckpointError(f"{path} is damaged or half-downloaded: download it again")
    try:
        # Training scripts leave their arguments in a Namespace, which is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or half-downloaded ({first_line(error)}): download it again"
        ) from error
    except UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds more than weights ({blocked[1] if blocked else 'other objects'}), which "
            "could run code: refused; save its weights alone, or get a safetensors file"
        ) from error
    found = _unwrap(content, inside)
    if found is None:
        raise CheckpointError(f"{path} holds no named weights, but a {type(content).__name__}")
    return {str(name): tensor for name, tensor in found.items() if wanted(str(name))}


def _unwrap(content: object, inside: Sequence[str]) -> dict[str, Tensor] | None:
    """The innermost dictionary of tensors: at the first place of `inside` that exists, or here."""
    for place in inside:
        value = content
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            return {name: v for name, v in value.items() if isinstance(v, Tensor)}
    if isinstance(content, Mapping):
        tensors = {name: v for name, v in content.items() if isinstance(v, Tensor)}
        return tensors or None
    return None


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _local(source: str) -> bool:
    """Whether a path that does not exist was meant as a path here, not as a hub id."""
    return source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith(SUFFIXES)


def _want(files: Sequence[str], hub: str) -> str:
    name = files[0] if files else STANDARD[0]
    return f"https://huggingface.co/{hub}/resolve/main/{name}" if hub else name
