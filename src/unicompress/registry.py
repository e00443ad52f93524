"""Finding things by name: one `Family` per extension point, and `require` for optional packages."""

import ast
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType
from typing import ClassVar, Generic, TypeVar

from unicompress.errors import InputError, MissingDependencyError


class Member:
    """Base of everything registered; `str(member)` is the spec that rebuilds it.

    Constructor options are keyword-only and stored under their own name.
    """

    name: ClassVar[str]

    def __str__(self) -> str:
        options = inspect.signature(type(self).__init__).parameters.values()
        kept = [f"{o.name}={getattr(self, o.name)!r}" for o in options if o.kind is o.KEYWORD_ONLY]
        return f"{self.name}({', '.join(kept)})" if kept else self.name


M = TypeVar("M", bound=Member)
C = TypeVar("C", bound=type[Member])


class Family(Generic[M]):
    """Maps a name such as `average` to the class registered under it.

    `home` is the module or package whose import registers the members; other packages add theirs
    through the entry-point group of the same name.
    """

    def __init__(self, kind: str, *, home: str):
        self.kind = kind
        self.home = home
        self._members: dict[str, type[M]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that gives the class its name; a name is given once."""

        def add(cls: C) -> C:
            if name in self._members:
                taken = self._members[name].__qualname__
                raise ValueError(f"{self.kind} {name!r} is already registered by {taken}")
            cls.name = name
            self._members[name] = cls  # type: ignore[assignment]
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted; imports the home package and the entry points."""
        home = importlib.import_module(self.home)
        for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
            importlib.import_module(f"{self.home}.{module.name}")
        for point in entry_points(group=self.home):
            try:
                point.load()
            except (ImportError, AttributeError, RuntimeError) as error:
                raise MissingDependencyError(
                    f"the {self.kind} plug-in {point.name!r} ({point.value}) cannot be loaded: "
                    f"{error}; repair or uninstall the package that provides it"
                ) from error
        return sorted(self._members)

    def get(self, name: str) -> type[M]:
        """The class registered under `name`; raises InputError that names the nearest one."""
        if name not in self._members:
            self._import_namesake(name)
        if name not in self._members:
            known = self.names()
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}")
        return self._members[name]

    def _import_namesake(self, name: str) -> None:
        """Import the module called like the member, if there is one, and spare all the others."""
        home = importlib.import_module(self.home)
        if any(
            module.name == name for module in pkgutil.iter_modules(getattr(home, "__path__", []))
        ):
            importlib.import_module(f"{self.home}.{name}")

    def build(self, spec: str, **parts: object) -> M:
        """Build from `name` or `name(option=value)`; `parts` are passed on beside the options."""
        mistake = InputError(f"{spec!r} is not a {self.kind}: write name or name(option=value)")
        try:
            call = ast.parse(spec, mode="eval").body
            if isinstance(call, ast.Name):
                return self.get(call.id)(**parts)
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise mistake
            options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise mistake from error
        member = self.get(call.func.id)
        allowed = inspect.signature(member.__init__).parameters
        for option in options:
            if option not in allowed:
                raise InputError(
                    f"{self.kind} {call.func.id!r} has no option {option!r}; "
                    f"it takes: {', '.join(o for o in allowed if o != 'self') or 'none'}"
                )
        return member(**{**parts, **options})


def require(package: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Catches RuntimeError as well: a torchvision that does not match torch raises that on import.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"this needs {package}: pip install 'unicompress[{extra}]' "
            f"(import failed with: {error})"
        ) from error
