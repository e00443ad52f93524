"""Files of compressed pictures: what comes back, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tiny_hosts import tiny
from unicompress.checkpoint import load_safetensors, save_safetensors
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.data.code_file import (
    CodeFile,
    load_codes,
    output_path,
    save_codes,
    unique_names,
)
from unicompress.errors import CheckpointError, HostMismatchError, InputError
from unicompress.tokenizers.base import tokenizers
from unicompress.tokenizers.toy import ToyMulti, ToySingle

SPEC = CodecSpec(width=16, depth=1, heads=2, global_count=2, strides=(4,))


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    torch.manual_seed(0)
    return ImageCodec(ToySingle.tiny(), SPEC).eval()


def content(codec: ImageCodec, stride: int = 2) -> CodeFile:
    grid = codec.tokenizer.spec.grid
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return CodeFile(("a", "b c"), codec.encode(pixels, stride=stride), stride, 2, grid)


@pytest.mark.parametrize("name", tokenizers.names())
@pytest.mark.parametrize("stride", [2, 4])
def test_codes_come_back_with_everything_needed(tmp_path: Path, name: str, stride: int) -> None:
    host = tiny(name)
    codec = ImageCodec(host, SPEC).eval()
    count = codec.tokens_per_image(stride)
    shape = (2, count, host.spec.codes_per_token)
    codes = torch.randint(host.spec.codebook_size, shape)
    wanted = CodeFile(("a", "b"), codes, stride, 2, host.spec.grid)
    save_codes(wanted, tmp_path / "codes", codec)
    found = load_codes(tmp_path / "codes", codec)
    assert torch.equal(found.codes, codes)
    assert dataclasses.replace(found, codes=codes) == wanted
    assert found.codes.dtype == torch.int64
    decoded = codec.decode(
        found.codes, stride=found.stride, global_count=found.global_count, grid=found.grid
    )
    assert decoded.shape[0] == 2


def test_codes_of_other_weights_are_refused(tmp_path: Path, codec: ImageCodec) -> None:
    save_codes(content(codec), tmp_path / "codes", codec)
    torch.manual_seed(1)
    with pytest.raises(HostMismatchError, match="written with another compression plug-in"):
        load_codes(tmp_path / "codes", ImageCodec(codec.tokenizer, SPEC))
    for other in (ToySingle(seed=9), ToyMulti()):
        with pytest.raises(HostMismatchError, match="written with another tokenizer") as error:
            load_codes(tmp_path / "codes", ImageCodec(other, SPEC))
        assert "\n" not in str(error.value)


def test_damage_is_noticed(tmp_path: Path, codec: ImageCodec) -> None:
    path = tmp_path / "codes"
    save_codes(content(codec), path, codec)
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    with pytest.raises(CheckpointError, match="again"):
        load_codes(path, codec)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_codes(path, codec)
    torch.save({"codes": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_codes(path, codec)
    save_safetensors({"codes": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no codes"):
        load_codes(path, codec)


def forge(path: Path, codec: ImageCodec, **changes: str) -> None:
    """A file whose digest is right but whose contents are not: what an attacker would send."""
    save_codes(content(codec), path, codec)
    tensors, notes = load_safetensors(path)
    if "codes" in changes:
        tensors["codes"][0, -1] = int(changes.pop("codes"))
    save_safetensors(tensors, path, {**notes, **changes})


@pytest.mark.parametrize("value", ["-1", "16", "30000"])
def test_codes_out_of_range_are_refused(tmp_path: Path, codec: ImageCodec, value: str) -> None:
    forge(tmp_path / "codes", codec, codes=value)
    with pytest.raises(InputError, match=f"local codes must lie from 0 to 15, got .*{value}"):
        load_codes(tmp_path / "codes", codec)


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x" * 201, "a\0b", "a\nb", "C:x", " a"],
)
def test_names_cannot_leave_the_folder(tmp_path: Path, codec: ImageCodec, name: str) -> None:
    forge(tmp_path / "codes", codec, names=json.dumps(["fine", name]))
    with pytest.raises(InputError, match="is no plain file name, so nothing was written") as error:
        load_codes(tmp_path / "codes", codec)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        output_path(tmp_path, name)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"names": '["a"]'}, "names 1 images but holds 2"),
        ({"names": '["a", "A"]'}, "two images have the same name"),
        ({"names": "["}, "is incomplete"),
        ({"names": "[1, 2]"}, "no plain file name"),
        ({"stride": "x"}, "is incomplete"),
        ({"stride": "3"}, "built for stride 2, 4, got 3"),
        ({"stride": "4"}, "do not fit stride 4"),
        ({"global_count": "7"}, "do not fit"),
        ({"grid": "[4]"}, "is incomplete"),
        ({"grid": "[0, 6]"}, "at least one row"),
        ({"grid": "[99, 6]"}, "do not fit"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, codec: ImageCodec, changes: dict[str, str], text: str
) -> None:
    forge(tmp_path / "codes", codec, **changes)
    with pytest.raises((InputError, CheckpointError)) as error:
        load_codes(tmp_path / "codes", codec)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_wrong_is_written(tmp_path: Path, codec: ImageCodec) -> None:
    good = content(codec)
    for changes in (
        {"names": ("a",)},
        {"names": ("a", "../b")},
        {"codes": good.codes + 100},
        {"codes": good.codes[:, 1:]},
    ):
        with pytest.raises(InputError):
            save_codes(dataclasses.replace(good, **changes), tmp_path / "codes", codec)
    assert not list(tmp_path.iterdir())


def test_every_image_gets_a_name_of_its_own() -> None:
    paths = ["x/cat.png", "y/cat.jpg", "Cat.gif", "z/...", "a:b?.png", "n" * 300 + ".png"]
    names = unique_names(paths)
    assert names[:3] == ["cat", "cat-2", "Cat-3"]
    assert names[3:5] == ["image", "a_b_"]
    assert len(names[5]) < 200
    for name in names:
        assert output_path("out", name) == Path("out") / f"{name}.png"
