"""The tree of errors, which the command line relies on."""

import inspect

import pytest

from unicompress import errors
from unicompress.errors import UnicompressError, first_line

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", CLASSES)
def test_all_are_caught_together_and_explain_themselves(error: type[Exception]) -> None:
    assert issubclass(error, UnicompressError)
    assert error.__doc__
    assert str(error("a sentence")) == "a sentence"


def test_they_are_also_what_python_programmers_expect() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.RecipeError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert issubclass(errors.HostMismatchError, errors.CheckpointError)


def test_of_other_errors_one_short_line_is_passed_on() -> None:
    assert first_line(OSError("\nno disk\nat all")) == "no disk"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(OSError("x" * 161)) == "x" * 157 + "..."
    assert first_line(OSError("x" * 160)) == "x" * 160
