"""What can go wrong, as one small tree; the command line prints these without a traceback."""


class UnicompressError(Exception):
    """Base of every error that unicompress raises on purpose; its text says what to do."""


class InputError(UnicompressError, ValueError):
    """A value, an image or a file given by the user cannot be used."""


class CheckpointError(UnicompressError):
    """A file with weights is damaged, incomplete, of the wrong kind, or unsafe to open."""


class HostMismatchError(CheckpointError):
    """Plug-in weights were trained around another tokenizer than the one at hand."""


class RecipeError(UnicompressError, ValueError):
    """A recipe has an unknown key or a value outside its range."""


class MissingDependencyError(UnicompressError, ImportError):
    """An optional package is absent or broken."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, 160 characters at most; of a mute one its type."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else f"{line[:157]}..."
