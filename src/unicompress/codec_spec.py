"""The options of the plug-in, validated, and the presets that name two sets of them."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from unicompress.decompressors import HEADS, ORDERS
from unicompress.errors import InputError

CODEBOOKS = ("shared", "separate")
CHOICES = {
    "global_codebook": CODEBOOKS,
    "local_codebook": CODEBOOKS,
    "order": ORDERS,
    "head": HEADS,
}

# What the codes of an image depend on; all else concerns the decompressor or the training alone.
OF_THE_CODES = (
    "stride",
    "global_count",
    "global_kind",
    "compressor",
    "global_codebook",
    "local_codebook",
    "global_codebook_size",
    "local_codebook_size",
    "strides",
)


@dataclass(frozen=True)
class CodecSpec:
    """Everything that decides the plug-in's architecture and loss; `PRESETS` names two of them."""

    stride: int = 2  # s
    global_count: int = 4  # N_g
    global_kind: str = "meta"  # a name or spec of the family global_tokens
    compressor: str = "average"  # a name or spec of the family compressors
    global_codebook: str = "shared"  # with the host, or a separate learned one (eq. 4)
    local_codebook: str = "shared"
    global_codebook_size: int | None = None  # K_g of a separate codebook; None is the host's size
    local_codebook_size: int | None = None  # K_x
    strides: tuple[int, ...] = ()  # further strides that random-rate training covers
    nested: bool = False  # random-rate training also covers prefixes of the globals
    order: str = "block"  # of the decompressor
    head: str = "codes"
    width: int = 256
    depth: int = 4
    heads: int = 4
    parallel_steps: int = 1  # of order parallel
    parent: bool = True  # each step is told which local token it expands
    summary: bool = True  # the globals are also added to every step's input, slot by slot
    residual: bool = False  # predictions start from the nearest expansion of the local tokens
    mixing: int = 0  # convolution blocks on the local tokens before they are attended to
    local_dropout: float = 0.0  # share of local tokens hidden in training, so that globals matter
    teacher_noise: float = 0.0  # on what regression is fed, in deviations of the target
    lambda_reg: float = 0.0  # of L_reg with the codes head; with regression it is 1 (eq. 8)
    lambda_cb: float = 1.0
    lambda_commitment: float = 0.01  # keeps learned tokens near their codebook rows
    lambda_spread: float = 0.1  # keeps each global slot from saying the same of every image
    lambda_pixel: float = 0.0  # L1 through the host's pixel decoder

    def __post_init__(self) -> None:
        _check(vars(self))
        object.__setattr__(self, "strides", tuple(self.strides))

    @property
    def rates(self) -> tuple[int, ...]:
        """All strides this plug-in is built for, ascending."""
        return tuple(sorted({self.stride, *self.strides}))

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of L_reg and L_cb in the loss."""
        return (self.lambda_reg if self.head == "codes" else 1.0), self.lambda_cb

    @property
    def identity(self) -> bool:
        """Whether nothing is compressed: stride 1 and no global tokens."""
        return self.rates == (1,) and self.global_count == 0

    def same_codes(self, other: "CodecSpec") -> bool:
        """Whether both make codes in the same way, whatever expands them."""
        return all(getattr(self, name) == getattr(other, name) for name in OF_THE_CODES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON."""
        return {**asdict(self), "strides": list(self.strides)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CodecSpec":
        """The inverse of `to_dict`; an unknown key raises InputError naming the nearest one."""
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"a codec has no option {key!r}.{hint} Known: {', '.join(known)}")
        _check({entry.name: values.get(entry.name, entry.default) for entry in fields(cls)})
        return cls(**{**values, "strides": tuple(values.get("strides", ()))})


def _check(values: Mapping[str, Any]) -> None:
    """Raise InputError for the first option with a wrong type or outside its range."""
    for name, value in values.items():
        kind = CodecSpec.__annotations__[name]
        if kind in (bool, str) and not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, got {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
        if kind is int:
            _in_range(name, value, 0 if name in ("global_count", "mixing") else 1)
        elif kind is float:
            _in_range(name, value, 0.0, 0.99 if name == "local_dropout" else math.inf)
        elif name.endswith("codebook_size") and value is not None:
            _in_range(name, value, 2)
    if not isinstance(values["strides"], (list, tuple)):
        raise InputError(f"strides must be a list of whole numbers, got {values['strides']!r}")
    for stride in values["strides"]:
        _in_range("every entry of strides", stride, 1)
    if values["width"] % values["heads"]:
        raise InputError(f"width {values['width']} must be a multiple of heads {values['heads']}")


def _in_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Check one finite number; whole numbers where `low` is one (True is no number here)."""
    kinds = (int,) if isinstance(low, int) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        fits = False
    else:
        fits = math.isfinite(value)
    if not fits:
        kind = "a whole number" if isinstance(low, int) else "a number"
        limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise InputError(f"{name} must be {kind} {limit}, got {value!r}")


PRESETS: dict[str, CodecSpec] = {
    # The paper's words, where it has any: raster order, regression, eq. 8 with both terms.
    "paper": CodecSpec(
        order="raster",
        head="regression",
        lambda_cb=0.25,
        lambda_spread=0.0,
        parent=False,
        summary=False,
    ),
    # What measured best on the reference (docs/presets.md): regression as in the paper, but in one
    # pass; learned pooling; codebooks of their own for both streams; a second look for the globals.
    "default": CodecSpec(
        global_kind="meta(depth=2)",
        compressor="mixer",
        global_codebook="separate",
        local_codebook="separate",
        order="parallel",
        head="regression",
    ),
}
