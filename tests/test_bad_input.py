"""Everything a user can get wrong at the level of the library: one line, nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicompress.checkpoint import load_safetensors, load_training_state, save_training_state
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.code_file import CodeFile, load_codes, save_codes
from unicompress.data.images import load_image
from unicompress.errors import UnicompressError
from unicompress.tokenizers.io import load_tokenizer, save_tokenizer
from unicompress.tokenizers.toy import ToySingle

SPEC = CodecSpec(width=16, depth=1, heads=2, global_count=1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def text(path: Path) -> None:
    path.write_text("<!DOCTYPE html><title>404: not found</title>" * 9)


def removed(path: Path) -> None:
    path.unlink()


def plug_in(folder: Path) -> tuple[Path, Callable[[], object]]:
    host = ToySingle.tiny()
    ImageCodec(host, SPEC).save_pretrained(folder)
    return folder / "model.safetensors", lambda: ImageCodec.from_pretrained(folder, host)


def host(folder: Path) -> tuple[Path, Callable[[], object]]:
    save_tokenizer(ToySingle.tiny(), folder)
    return folder / "tokenizer.safetensors", lambda: load_tokenizer(folder)


def codes(folder: Path) -> tuple[Path, Callable[[], object]]:
    codec = ImageCodec(ToySingle.tiny(), SPEC)
    grid = codec.tokenizer.spec.grid
    content = CodeFile(("a",), torch.zeros(1, 7, 1, dtype=torch.long), 2, 1, grid)
    save_codes(content, folder / "codes", codec)
    return folder / "codes", lambda: load_codes(folder / "codes", codec)


def training_state(folder: Path) -> tuple[Path, Callable[[], object]]:
    save_training_state({"weight": torch.ones(99)}, folder / "checkpoint")
    path = folder / "checkpoint" / "state.pt"
    return path, lambda: load_training_state(folder / "checkpoint")


@pytest.mark.parametrize("damage", [flip, cut, empty, pickled, text, removed])
@pytest.mark.parametrize("kind", [plug_in, host, codes, training_state])
def test_every_kind_of_damage_to_every_kind_of_file(
    tmp_path: Path,
    kind: Callable[[Path], tuple[Path, Callable[[], object]]],
    damage: Callable[[Path], None],
) -> None:
    path, load = kind(tmp_path)
    load()
    damage(path)
    with pytest.raises(UnicompressError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    assert len(message) < 300 + len(str(path))


def test_errors_of_users_are_value_errors_and_one_family() -> None:
    with pytest.raises(ValueError, match="stride must be"):
        CodecSpec(stride=0)
    with pytest.raises(UnicompressError):
        load_image("absent.png", 8)


def test_options_in_a_damaged_config_do_not_matter(tmp_path: Path) -> None:
    """The copy for people may be lost or edited; the weights file alone decides."""
    path, load = plug_in(tmp_path)
    (tmp_path / "config.json").write_text("{")
    codec = load()
    assert isinstance(codec, ImageCodec)
    assert codec.spec == SPEC
    assert load_safetensors(path)[1]["format"] == "unicompress-codec-1"
