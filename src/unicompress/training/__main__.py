"""`accelerate launch -m unicompress.training STAGE RECIPE [key=value ...] [--resume]`."""

import argparse
import sys

from unicompress.errors import UnicompressError
from unicompress.training.run import STAGES, ending, exit_code, train


def main(arguments: list[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m unicompress.training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    given = parser.parse_intermixed_args(arguments)
    try:
        result = train(given.stage, given.recipe, given.overrides, resume=given.resume)
    except UnicompressError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if result.main_process:
        sys.stderr.write(f"{ending(result)}\n")
    return exit_code(result)


if __name__ == "__main__":
    sys.exit(main())
