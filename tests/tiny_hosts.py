"""The small host of every registered tokenizer; one whose optional package is absent is skipped."""

import pytest

from unicompress.errors import MissingDependencyError
from unicompress.tokenizers.base import ImageTokenizer, tokenizers


def tiny(name: str) -> ImageTokenizer:
    try:
        return tokenizers.get(name).tiny()
    except MissingDependencyError as error:
        pytest.skip(str(error))
