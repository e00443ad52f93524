"""What experiments of many trainings share: their command line, and names of their files."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel

from unicompress.training.recipe import load_recipe

R = TypeVar("R", bound=BaseModel)


def plain_name(text: str) -> str:
    """A part of a file's name: letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def read_command(
    module: str, about: str | None, schema: type[R], arguments: Sequence[str] | None = None
) -> tuple[R, str, str]:
    """Read `python -m module RECIPE.yaml key=value...`.

    Returns the recipe, the name of its file, and the command line that results are kept with.
    Raises RecipeError as `load_recipe` does.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", module, given.recipe, *given.overrides])
    return load_recipe(schema, given.recipe, given.overrides), given.recipe, command
