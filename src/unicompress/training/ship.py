"""Writes a trained model for release: in bfloat16, with a refined decompressor if there is one.

`python -m unicompress.training.ship MODEL OUT [--refined PLUG_IN]`
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unicompress.codec import ImageCodec
from unicompress.errors import UnicompressError
from unicompress.unified import UnifiedModel


def ship(model: Path | str, out: Path | str, refined: Path | str | None = None) -> None:
    """Load, join and write; the release takes half the bytes of the training's own result."""
    whole: UnifiedModel = UnifiedModel.from_pretrained(model)
    if refined is not None:
        whole.use_decompressor(ImageCodec.from_pretrained(refined, whole.tokenizer))
    whole.save_pretrained(out, dtype=torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m unicompress.training.ship", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--refined", metavar="PLUG_IN")
    given = parser.parse_args(arguments)
    try:
        ship(given.model, given.out, given.refined)
    except UnicompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
