"""Folders of weights from the Hugging Face hub and back, with errors of one line."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from unicompress.errors import CheckpointError, first_line

# The HTTP library below huggingface_hub changes; its errors share a base with the hub's own.
NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])

HUB_ERRORS: tuple[type[BaseException], ...] = (HFValidationError, *NETWORK_ERRORS)


def fetch_folder(source: Path | str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder `source`, or a local copy of `files` of the hub repository with that id.

    Raises CheckpointError naming what to fetch where the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file: pass the folder that holds {files[0]}")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(files)))
    except HFValidationError as error:
        raise CheckpointError(f"{source} is neither a folder nor a hub id (owner/name)") from error
    except NETWORK_ERRORS as error:
        raise CheckpointError(
            f"{source} is no folder here, and the hub did not deliver it "
            f"({first_line(error)}): fetch {' and '.join(files)} of {source} elsewhere and "
            "pass the folder they are in"
        ) from error


def upload_folder(
    folder: Path | str, hub_id: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """Create the model repository if need be and upload a folder to it; returns its address."""
    api = HfApi()
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, revision=revision)
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"cannot upload to {hub_id} ({first_line(error)}): check the name, the network, "
            "and that you are logged in (hf auth login)"
        ) from error
    return str(address)
