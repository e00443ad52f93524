"""Pictures from files, whatever their state: a uint8 array, or one line that says what is wrong."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unicompress.checkpoint import atomic_write
from unicompress.errors import InputError, first_line

# Others stay closed: EPS, for one, starts an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 80_000_000  # below the mark where Pillow itself suspects a decompression bomb
BACKGROUND = (255, 255, 255)  # behind transparent pixels
# What Pillow's decoders raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
)


def load_image(
    source: Path | str | bytes, size: int | tuple[int, int] | None = None, *, name: str = ""
) -> UInt8[ndarray, "h w 3"]:
    """Read a file (or its bytes), upright, in RGB, cropped about the center and resized.

    `size` is the side of a square or (height, width); None keeps what the file has. Transparent
    pixels stand on white, 16-bit values are scaled, of an animation the first frame counts, and a
    damaged EXIF block counts as none. `name` is what errors call the picture.

    Raises InputError, in one line with file and remedy, for everything that cannot be read.
    """
    if isinstance(source, bytes):
        name = name or "the image"
        empty, opened = not source, io.BytesIO(source)
        return _read(opened, name, size, empty=empty)
    path = Path(source)
    name = name or str(path)
    if path.is_dir():
        raise InputError(f"{name} is a folder: name the image files in it")
    try:
        if not path.exists():
            raise InputError(f"{name} does not exist: check the path")
        if not path.is_file():
            raise InputError(f"{name} is no regular file: pass an image file")
        with open(path, "rb") as file:
            return _read(file, name, size, empty=path.stat().st_size == 0)
    except OSError as error:
        raise InputError(f"cannot read {name} ({error.strerror}): check its permissions") from error


def to_tensor(pixels: UInt8[ndarray, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """uint8 rows to the [-1, 1] floats that tokenizers read."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1.0


def to_uint8(pixels: Float[Tensor, "*b 3 h w"]) -> UInt8[ndarray, "*b h w 3"]:
    """The inverse of `to_tensor`, for one picture or a batch; values outside are cut off."""
    scaled = (pixels.detach().float() + 1.0) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


def save_png(pixels: UInt8[ndarray, "h w 3"], path: Path | str) -> None:
    """Write a picture atomically."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def _read(
    file: Any, name: str, size: int | tuple[int, int] | None, *, empty: bool
) -> UInt8[ndarray, "h w 3"]:
    if empty:
        raise InputError(f"{name} is empty (0 bytes): download or save it again")
    height, width = (size, size) if isinstance(size, int) else size or (1, 1)
    if height < 1 or width < 1:
        raise InputError(f"an image size must be at least 1x1, got {height}x{width}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = _open(file, name)
        try:
            image.load()
        except DAMAGE as error:
            raise InputError(
                f"{name} is damaged or cut off ({first_line(error)}): download or save it again"
            ) from error
        image = _upright(image)
    if size is not None:
        image = image.crop(_center(image.width, image.height, width / height))
    image = _rgb(image, name)
    if size is not None and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def _open(file: Any, name: str) -> Image.Image:
    """Read the header only, and judge the size before anything is decoded."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is no image that can be read: convert it to one of {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name} is too large ({first_line(error).split(' exceeds')[0].lower()}; at most "
            f"{MAX_PIXELS:,} pixels): make it smaller"
        ) from error
    except DAMAGE as error:
        raise InputError(
            f"{name} is damaged ({first_line(error)}): download or save it again"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large ({image.width}x{image.height}; at most {MAX_PIXELS:,} pixels): "
            "make it smaller"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image  # the pixels are whole; only the note on how the camera was held is not


def _center(width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """The largest centered box of this width / height.

    Cropped before resizing: a strip of 1x20,000 pixels would not fit in memory once enlarged.
    """
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise InputError(f"{name} has values outside 16 bit: save it with 8 or 16 bit")
        # Pillow's own conversion cuts at 255 and leaves a white picture.
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise InputError(f"{name} has floating-point values of unknown range: save it with 8 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert("RGB")
