"""Weights on disk: safetensors with a digest, replaced atomically, never unpickled unsafely."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError  # the exception only
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from unicompress.errors import CheckpointError

DIGEST = "sha256"  # metadata key of the digest over names, dtypes, shapes, values and metadata
HEADER_LIMIT = 64 * 2**20  # bytes; a header longer than this is damage or an attack
JSON_LIMIT = 64 * 2**20  # bytes
STATE = "state.pt"
MANIFEST = "manifest.json"
# Types that torch.load(weights_only=True) gives back; np.float64 is a float by isinstance only.
PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)


def atomic_write(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a crash at any moment leaves either the old version or the new one.

    Writes beside the target, syncs, renames, syncs the folder. Raises CheckpointError (full disk,
    no permission) with the old version untouched and the temporary file removed.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, f".{path.name}.tmp-")
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: object, path: Path | str) -> None:
    """Write a JSON file atomically, with sorted keys and a final newline."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises CheckpointError where it is missing, damaged or over 64 MiB."""
    path = Path(path)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT} bytes: not one of our files")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); restore or save it again"
        ) from error


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and a digest of them atomically; tied tensors are stored once per name."""
    plain = _unshared(tensors)
    notes = dict(metadata or {})
    notes[DIGEST] = _digest(plain, notes)
    data = to_safetensors(plain, notes)
    atomic_write(path, lambda file: file.write(data))


def load_safetensors(
    path: Path | str, *, digest_required: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file, after checking its digest.

    Raises CheckpointError for a missing, truncated, bit-flipped or foreign file, and for a pickle.
    `digest_required=False` accepts files that other software wrote, which carry no digest.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}); download or save it again"
        ) from error
    expected = metadata.pop(DIGEST, None)
    if expected is None and digest_required:
        raise CheckpointError(
            f"{path} carries no {DIGEST} digest: damaged, or not saved by unicompress"
        )
    if expected is not None and expected != _digest(tensors, metadata):
        raise CheckpointError(
            f"{path} is damaged: its contents do not match its {DIGEST}; download or save it again"
        )
    return tensors, metadata


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy weights into a module; raises CheckpointError naming one that does not fit."""
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}: {len(missing)} weights missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(extra)} unknown "
            f"({', '.join(extra[:2]) or 'none'})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path} does not fit {type(module).__name__}: {name} has shape "
                f"{tuple(tensor.shape)}, needed {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(dict(tensors))


def fingerprint(module: nn.Module) -> str:
    """Hex digest of all weights; the same for a float32 module and its bfloat16 copy.

    Floats are rounded to bfloat16 first, so that a host shipped in half the bytes is still the
    host that a plug-in was trained around.
    """
    rounded = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    return _digest(rounded, {})


@contextlib.contextmanager
def replaced_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block succeeds.

    The previous version survives a crash at any moment: under its own name, or as `<name>.old`
    in the instant between two renames (`current_folder` finds it there). Every file is listed with
    its size and sha256 in `manifest.json`. Raises CheckpointError where the disk is full.
    """
    folder = Path(folder)
    temporary = folder.parent / f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent, f"{folder.name}.tmp-")
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary)
        _swap(temporary, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def current_folder(folder: Path | str) -> Path | None:
    """Where the last complete version of a replaced folder is; None when there is none."""
    folder = Path(folder)
    for candidate in (folder, folder.with_name(f"{folder.name}.old")):
        if (candidate / MANIFEST).is_file():
            return candidate
    return None


def verify_folder(folder: Path | str) -> None:
    """Compare every file with the manifest; raises CheckpointError naming one that differs."""
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise CheckpointError(
            f"{folder / MANIFEST} is not a manifest; delete {folder} to start anew"
        )
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file() or _file_digest(path) != digest:
            raise CheckpointError(
                f"{path} is missing or damaged (its {DIGEST} differs from the manifest); "
                f"delete {folder} to start anew"
            )


def save_training_state(state: Mapping[str, object], folder: Path | str) -> None:
    """Replace the checkpoint folder with one that holds `state` (tensors and plain values only).

    Raises CheckpointError naming the entry that `load_training_state` could not read back safely.
    """
    _check_plain(state, "state")
    with replaced_folder(folder) as temporary:
        path = temporary / STATE
        try:
            torch.save(dict(state), path)
        except RuntimeError as error:  # torch's zip writer reports a full disk this way
            raise CheckpointError(
                f"cannot write {Path(folder)}: {_first_line(error)}; the previous checkpoint is "
                "untouched: free space, or choose another folder"
            ) from error


def load_training_state(folder: Path | str) -> dict[str, Any]:
    """The state last saved to a folder; tensors on the CPU; no code in the file is ever run."""
    found = current_folder(folder)
    if found is None:
        raise CheckpointError(f"no complete checkpoint in {folder}: start without --resume")
    verify_folder(found)
    try:
        state = torch.load(found / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{found / STATE} cannot be read: {_first_line(error)}") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{found / STATE} holds more than tensors and plain values"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{found / STATE} does not hold a training state")
    return state


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}; the previous version is untouched: "
        "free space, or choose another folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; folders cannot be synced on Windows, where this does nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path, prefix: str) -> None:
    """Remove what killed processes left of earlier writes; those of living processes stay."""
    for leftover in folder.glob(f"{prefix}*"):
        owner = leftover.name.removeprefix(prefix).split("-")[0]
        if not owner.isdecimal() or _alive(int(owner)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, or one that may not be asked: not ours to judge
    return True


def _swap(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, keeping the old version until the new one stands."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = _file_digest(path, sync=True)
    write_json(digests, folder / MANIFEST)


def _file_digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb+" if sync else "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no memory, as the format demands."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if memory in seen or not whole:
            value = value.clone()
        seen.add(memory)
        plain[name] = value
    return plain


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hex sha256 over sorted metadata and sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_header(path: Path) -> None:
    """Refuse what is no safetensors file before any reader opens it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise CheckpointError(
            f"{path} is a pickle, which can run code: refused; get the model's .safetensors file"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"{path} is no complete safetensors file ({size} bytes); download or save it again"
        )


def _check_plain(value: object, where: str) -> None:
    """Refuse values that torch.load(weights_only=True) would refuse, by name."""
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():  # type: ignore[attr-defined]
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for place, entry in enumerate(value):  # type: ignore[arg-type]
            _check_plain(entry, f"{where}[{place}]")
    else:
        raise CheckpointError(
            f"{where} is a {type(value).__qualname__}: a training state holds tensors and plain "
            "values only; convert it first"
        )
