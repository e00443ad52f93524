"""A folder of images to one file of compressed tokens, and what each rate costs and keeps.

python examples/compress_a_folder.py FOLDER [MODEL]
"""

import sys
from pathlib import Path

import torch

from unicompress import ImageCodec, UnifiedModel, reference
from unicompress.data.code_file import CodeFile, save_codes, unique_names
from unicompress.data.images import load_image, to_tensor
from unicompress.evals.image_metrics import psnr

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def main(folder: str, model: str = "") -> None:
    loaded = UnifiedModel.from_pretrained(model) if model else reference.load("compressed")
    codec = loaded.codec
    if not isinstance(codec, ImageCodec):
        sys.exit("this model has no codec: pass a compressed one")
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in ENDINGS)
    side = codec.tokenizer.spec.image_size
    pixels = torch.stack([to_tensor(load_image(path, side)) for path in paths])

    for count in (codec.spec.global_count, 0):
        codes = codec.encode(pixels, global_count=count)
        quality = psnr(codec.decode(codes, global_count=count), pixels).mean()
        print(f"{count} global tokens: {codes.shape[1]} codes per image, {quality:.2f} dB")

    content = CodeFile(
        names=tuple(unique_names(paths)),
        codes=codec.encode(pixels),
        stride=codec.spec.stride,
        global_count=codec.spec.global_count,
        grid=codec.tokenizer.spec.grid,
    )
    file = Path(folder) / "images.uct"
    save_codes(content, file, codec)
    print(f"{len(paths)} images in {file}, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
