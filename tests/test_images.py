"""Reading pictures in any state: either the right pixels, or one line of explanation."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unicompress.data.images import FORMATS, load_image, save_png, to_tensor, to_uint8
from unicompress.errors import InputError


def picture(width: int = 12, height: int = 8) -> np.ndarray:
    """Red grows to the right, green downwards; blue is even."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([20 * columns, 30 * rows, np.full_like(rows, 90)], -1).astype(np.uint8)


def refusal(path: Path, size: int | None = 8) -> str:
    with pytest.raises(InputError) as error:
        load_image(path, size)
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    Image.fromarray(picture()).save(path, kind, lossless=True)
    found = load_image(path)
    assert found.dtype == np.uint8
    assert np.array_equal(found, picture())
    assert np.array_equal(load_image(path.read_bytes()), picture())
    assert np.array_equal(load_image(str(path), (8, 12)), picture())


def test_the_center_is_kept_and_resized(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(picture(12, 8), path)
    assert np.array_equal(load_image(path, 8), picture(12, 8)[:, 2:10])
    half = load_image(path, 4)
    assert half.shape == (4, 4, 3)
    assert abs(int(half[1, 1, 0]) - picture()[2:4, 4:6, 0].mean()) <= 3
    assert load_image(path, (3, 20)).shape == (3, 20, 3)
    with pytest.raises(InputError, match="at least 1x1, got 0x0"):
        load_image(path, 0)


def test_extreme_shapes_need_no_extreme_memory(tmp_path: Path) -> None:
    for width, height in ((1, 1), (1, 20_000), (20_000, 1)):
        path = tmp_path / "a.png"
        Image.new("RGB", (width, height), (1, 2, 3)).save(path)
        found = load_image(path, 64)
        assert found.shape == (64, 64, 3)
        assert (found == (1, 2, 3)).all()
    assert load_image(tmp_path / "a.png").shape == (1, 20_000, 3)


def test_cmyk_palette_gray_and_bilevel(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert (np.abs(load_image(tmp_path / "cmyk.jpg").astype(int) - (255, 0, 0)) <= 4).all()
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert (load_image(tmp_path / "cmyk.tif") == (255, 0, 0)).all()
    Image.fromarray(picture()).quantize(96).save(tmp_path / "palette.png")
    assert np.array_equal(load_image(tmp_path / "palette.png"), picture())
    Image.new("L", (2, 2), 77).save(tmp_path / "gray.png")
    assert (load_image(tmp_path / "gray.png") == 77).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert (load_image(tmp_path / "bits.png") == 255).all()


def test_transparent_pixels_stand_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert tuple(found[0, 0]) == (10, 20, 30)
    assert abs(int(found[0, 1, 0]) - 127) <= 1
    assert (found[1] == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert load_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert load_image(tmp_path / name)[..., 0].tolist() == [[0, 100], [200, 255]]
    Image.fromarray(values.astype(np.int32) * 2).save(tmp_path / "b.tif")
    assert "outside 16 bit" in refusal(tmp_path / "b.tif")
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "c.tif")
    assert "save it with 8 bit" in refusal(tmp_path / "c.tif")


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (load_image(tmp_path / name) == (255, 0, 0)).all(), name


def test_pictures_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(picture(), -1))
    Image.fromarray(picture()).save(tmp_path / "b.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(load_image(tmp_path / "b.png"), picture())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused_everywhere(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "cut.img"
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        text = refusal(path)
        assert "again" in text or "no image that can be read" in text


def test_flipped_bytes_give_pixels_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "flipped.png"
    save_png(picture(), path)
    good = path.read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        problem = ""
        try:
            assert load_image(path, 8).shape == (8, 8, 3)
        except InputError as error:
            problem = str(error)
        assert "\n" not in problem


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data: what a decompression bomb looks like."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_100, 9_460, 12_000, 30_000])
def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def decoded(*_args: object) -> None:
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    text = refusal(path)
    assert "too large" in text
    assert "at most 80,000,000 pixels" in text
    assert "make it smaller" in text
    assert not recwarn.list


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(path)
    path.write_text("not a picture at all")
    assert f"convert it to one of {', '.join(FORMATS)}" in refusal(path)
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "no image that can be read" in refusal(path)  # EPS would start an interpreter
    assert "does not exist" in refusal(tmp_path / "absent.png")
    assert "is a folder" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"row 7 is empty"):
        load_image(b"", 8, name="row 7")
    with pytest.raises(InputError, match="the image is no image"):
        load_image(b"xyz", 8)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        assert "no regular file" in refusal(tmp_path / "pipe.png")


def test_every_value_survives_the_way_to_floats_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    tensor = to_tensor(values)
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_uint8(tensor), values)
    assert np.array_equal(to_uint8(torch.stack([tensor, tensor]))[1], values)
    assert to_uint8(torch.tensor([-9.0, 9.0]).expand(3, 1, 2)).tolist() == [[[0] * 3, [255] * 3]]


def test_a_png_is_saved_whole(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "deep" / "a.png")
    assert np.array_equal(load_image(tmp_path / "deep" / "a.png"), picture())
    assert os.listdir(tmp_path / "deep") == ["a.png"]
