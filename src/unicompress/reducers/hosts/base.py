"""The contract of a host: which columns are image tokens, and what it can tell about them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Int
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals
from unicompress.registry import Family, Member
from unicompress.tokens import Grid

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class ImageField:
    """The tokens of one image (or tile) in a prompt."""

    row: int  # of the batch
    columns: Int[Tensor, " n"]  # of the sequence, raster order
    grid: Grid
    encoder: Signals  # what the encoder tells about them, a batch of one


@dataclass(frozen=True)
class Prompt:
    """What a host says about the sequence that its language model is about to read."""

    fields: tuple[ImageField, ...]
    text: Bool[Tensor, "b l"]  # columns of the question
    last: Int[Tensor, " b"]  # the last column of each row that is no padding


class Host(Member, ABC):
    """Ties the shared machinery in `tracker` to one kind of model.

    A subclass names the model classes it is for, finds the language model, and announces prompts.
    """

    kinds: ClassVar[tuple[str, ...]]  # class names, so that no model is imported to be compared
    gives: ClassVar[frozenset[str]] = frozenset()  # signals of the encoder and of the generator

    @abstractmethod
    def trunk(self, model: Any) -> nn.Module:
        """The language model without its head."""

    @abstractmethod
    def watch(
        self, model: Any, reducer: Reducer, tracker: Any, grids: list[Grid] | None
    ) -> AbstractContextManager[None]:
        """For the length of a block: `tracker.announce` every prompt before it is read."""

    @contextmanager
    def reduced(
        self, model: Any, reducer: Reducer, grids: list[Grid] | None = None
    ) -> Iterator[Any]:
        """Install everything, and remove everything on exit."""
        from unicompress.reducers.hosts.tracker import Tracker

        trunk = self.trunk(model)
        check_trunk(trunk)
        self.check(reducer)
        tracker = Tracker(trunk, reducer)
        # The host's hooks come first: it announces a prompt, then the tracker acts on it.
        with self.watch(model, reducer, tracker, grids), tracker.installed():
            yield tracker

    def check(self, reducer: Reducer) -> None:
        """Raise InputError where the host cannot give what the reducer needs."""
        from unicompress.reducers.hosts.tracker import from_encoder

        for step in reducer.steps(depth=4):
            missing = sorted(from_encoder(step.reducer) - self.gives)
            if missing:
                able = [name for name in hosts.names() if hosts.get(name).gives.issuperset(missing)]
                others = f" (but {' and '.join(able)} models do)" if able else ""
                raise InputError(
                    f"the reducer {reducer.name!r} needs {' and '.join(missing)}, which "
                    f"{self.name} models do not have{others}: choose another reducer or score"
                )


hosts: Family[Host] = Family("host", home="unicompress.reducers.hosts")


def host_of(model: Any) -> Host:
    """The host for a model; raises InputError that names the supported classes."""
    ancestors = {kind.__name__ for kind in type(model).__mro__}
    members = [hosts.get(name) for name in hosts.names()]
    for member in members:
        if ancestors & set(member.kinds):
            return member()
    known = ", ".join(kind for member in members for kind in member.kinds)
    raise InputError(f"no reducer can act on a {type(model).__name__}; supported: {known}")


def check_trunk(trunk: Any) -> None:
    """Raise InputError for a language model whose inside is not what the hooks expect."""
    kind = type(trunk).__name__
    first = trunk.layers[0] if getattr(trunk, "layers", None) else None
    attention = getattr(first, "self_attn", None)
    if not hasattr(trunk, "rotary_emb") or not hasattr(attention, "q_proj"):
        raise InputError(
            f"reducers act on Llama- and Qwen-like language models, not on a {kind}: it has no "
            "layers with self_attn.q_proj and rotary_emb"
        )
    backend = trunk.config._attn_implementation
    if backend not in BACKENDS:
        raise InputError(
            f"the attention backend {backend!r} hides masks from reducers: load the model with "
            "attn_implementation='sdpa'"
        )
    layers = getattr(trunk.config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in layers):
        raise InputError(
            "sliding-window attention counts dropped tokens as if they were there: load the model "
            "with use_sliding_window=False"
        )
