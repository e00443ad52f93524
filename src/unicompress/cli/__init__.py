"""The command line: reads options and calls the library; nothing heavy is imported before use.

One module per group of commands; each registers with `app.app` when it is imported here.
"""

import importlib
import pkgutil

from unicompress.cli.app import app, main

__all__ = ["app", "main"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
