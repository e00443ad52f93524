"""Fewer image tokens for unified vision-language models (arXiv 2603.11320).

The names below are loaded when they are first used, so that `import unicompress` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unicompress.codec import PRESETS, CodecSpec, ImageCodec
    from unicompress.errors import UnicompressError
    from unicompress.tokenizers.base import ImageTokenizer
    from unicompress.tokens import CompressedTokens, Grid, TokenSpec
    from unicompress.unified import UnifiedConfig, UnifiedModel

# public name -> the module that defines it
_HOMES = {
    "PRESETS": "codec",
    "CodecSpec": "codec",
    "CompressedTokens": "tokens",
    "Grid": "tokens",
    "ImageCodec": "codec",
    "ImageTokenizer": "tokenizers.base",
    "TokenSpec": "tokens",
    "UnicompressError": "errors",
    "UnifiedConfig": "unified",
    "UnifiedModel": "unified",
}

__all__ = [
    "PRESETS",
    "CodecSpec",
    "CompressedTokens",
    "Grid",
    "ImageCodec",
    "ImageTokenizer",
    "TokenSpec",
    "UnicompressError",
    "UnifiedConfig",
    "UnifiedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unicompress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unicompress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
