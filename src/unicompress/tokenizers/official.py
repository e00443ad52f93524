"""Released checkpoints into modules of ours: a `Layout` says how their names differ.

An adapter describes the released files once, as a `Layout`, and derives from `ReleasedTokenizer`;
then `load_tokenizer("name", checkpoint=FILE_OR_FOLDER_OR_HUB_ID)` works. What is common to all
lives here: unwrapping, renaming, float32, and one line about everything that does not fit.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from unicompress.errors import CheckpointError
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokenizers.weight_files import config_beside, listed, locate, read_tensors

WRAPPERS = ("model", "state_dict", "module")  # where training scripts put the weights


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the released files of a host look, and how their names map onto a module of ours.

    Patterns are regular expressions that must match at the start of a name. The order is: keep what
    stands under a prefix and strip it, drop `ignore`, apply `renames`, then `adapt`.
    """

    files: tuple[str, ...] = ()  # names in a folder or hub repository, best first
    hub: str = ""  # where they were released, for errors
    inside: tuple[str, ...] = WRAPPERS  # dotted places in a pickle, best first
    prefixes: tuple[str, ...] = ()  # of the host within a larger model; none needs to be there
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for re.sub, one by one
    ignore: tuple[str, ...] = ()  # names that are not needed: optimisers, losses, usage counts
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # what names cannot say

    def ours(self, tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
        """Tensors under our names, floats in float32; CheckpointError where two names collide."""
        result: dict[str, Tensor] = {}
        for name, tensor in _under_prefix(_unwrapped(tensors), self.prefixes).items():
            if _matches(name, self.ignore):
                continue
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            if name in result:
                raise CheckpointError(f"{path} holds {name} twice, under two of its names")
            result[name] = tensor.float() if tensor.is_floating_point() else tensor
        return self.adapt(result) if self.adapt else result

    def wants(self, name: str) -> bool:
        """Whether a name of a large checkpoint may belong to the host: used to skip shards."""
        return not self.prefixes or name.startswith(self.prefixes)


@dataclass(frozen=True)
class ReleasedWeights:
    """A released checkpoint as read: tensors under our names, and the configuration beside it."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]  # of the `config.json` in the same folder; {} for a file on its own


def read_released(
    source: Path | str, layout: Layout, *, revision: str | None = None
) -> ReleasedWeights:
    """Read a released file, folder or hub repository and give its tensors our names.

    Raises CheckpointError, in one line, for what is damaged, half-downloaded, a pickle of more than
    weights, a set of shards with holes, or out of reach.
    """
    path = locate(source, layout.files, hub=layout.hub, revision=revision)
    options: dict[str, Any] = {"inside": layout.inside, "source": source, "revision": revision}
    tensors = read_tensors(path, layout.wants, **options)
    if not tensors and layout.prefixes:  # the host on its own, without a model around it
        tensors = read_tensors(path, **options)
    config = config_beside(source, path, revision=revision)
    return ReleasedWeights(path, layout.ours(tensors, path), config)


def fit(
    module: nn.Module, weights: ReleasedWeights, layout: Layout, *, title: str | None = None
) -> None:
    """Copy released weights into a module; CheckpointError says, in one line, what misfits."""
    wanted, tensors = module.state_dict(), weights.tensors
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {_size(tensor)} for {_size(wanted[name])}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        said = "; ".join(f"{len(n)} {what}: {listed(n)}" for what, n in problems.items() if n)
        advice = f"; get {layout.files[0]} of {layout.hub}" if layout.files and layout.hub else ""
        raise CheckpointError(
            f"{weights.path} does not fit {title or type(module).__name__} ({said}){advice}"
        )
    module.load_state_dict(tensors)


class ReleasedTokenizer(ImageTokenizer):
    """A host with released weights: the subclass says how the files look, and where they go."""

    layout: ClassVar[Layout]

    @property
    def released_part(self) -> nn.Module:
        """The module that holds the released weights; the tokenizer itself unless overridden."""
        return self

    @classmethod
    def options_in(cls, weights: ReleasedWeights) -> dict[str, object]:
        """Constructor options that a released checkpoint implies, from its shapes or config."""
        return {}


def load_released(
    spec: str, source: Path | str, *, revision: str | None = None
) -> ReleasedTokenizer:
    """A host by its spec, `name` or `name(option=value)`, with the weights at `source`.

    Options in the spec win over those the checkpoint implies. Raises as `read_released` and `fit`.
    """
    member = tokenizers.get(spec.partition("(")[0].strip())
    assert issubclass(member, ReleasedTokenizer)  # `load_tokenizer` asked
    weights = read_released(source, member.layout, revision=revision)
    tokenizer = tokenizers.build(spec, **member.options_in(weights))
    assert isinstance(tokenizer, ReleasedTokenizer)
    fit(tokenizer.released_part, weights, member.layout, title=member.name)
    return tokenizer


def _under_prefix(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """What stands under the first prefix that occurs, without it; everything where none does."""
    for prefix in prefixes:
        inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if inner:
            return inner
    return dict(tensors)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that parallel training and compiling put before every name."""
    found = dict(tensors)
    for prefix in ("module.", "_orig_mod."):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
