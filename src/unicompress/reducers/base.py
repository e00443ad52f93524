"""The contract of a training-free reducer: tokens and a budget in, a `Reduction` out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import floor
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unicompress.errors import InputError
from unicompress.registry import Family, Member
from unicompress.tokens import Grid

Positions = Literal["keep", "reindex"]
Keep = float | int


@dataclass(frozen=True)
class Signals:
    """What a reducer may look at besides the tokens; a host fills what the reducer `needs`.

    n counts the image's tokens in raster order, t text tokens (padded, see `text_valid`), a anchors
    in raster order, p heads.
    """

    attention: Float[Tensor, "b n"] | None = None  # received by each token
    shallow_attention: Float[Tensor, "b n"] | None = None  # the same in an early encoder layer
    image_attention: Float[Tensor, "b n"] | None = None  # received from the image's own tokens
    text_attention: Float[Tensor, "b p t n"] | None = None  # paid by text tokens, by head
    # Of an encoder the mean over heads, of the language model all heads side by side.
    keys: Float[Tensor, "b n k"] | None = None
    text_keys: Float[Tensor, "b t k"] | None = None
    values: Float[Tensor, "b p n v"] | None = None
    text_values: Float[Tensor, "b p t v"] | None = None
    text: Float[Tensor, "b t d"] | None = None  # states of the text tokens
    text_valid: Bool[Tensor, "b t"] | None = None
    relevance: Float[Tensor, "b n"] | None = None  # similarity of each token with the text
    cosines: Float[Tensor, "b n r"] | None = None  # rows of the language model's RoPE table
    sines: Float[Tensor, "b n r"] | None = None
    text_cosines: Float[Tensor, "b t r"] | None = None
    text_sines: Float[Tensor, "b t r"] | None = None
    # Number of the group that each token merged into inside the encoder, by first member.
    encoder_groups: Int[Tensor, "b n"] | None = None
    anchors: Float[Tensor, "b a w"] | None = None  # latents of the generation branch
    anchor_tokens: Float[Tensor, "b a d"] | None = None  # the same in the space of the tokens
    anchor_grid: Grid | None = None
    # Share of each token's patch that is no padding; no host knows it, a caller may.
    real: Float[Tensor, "b n"] | None = None

    def of(self, index: int) -> "Signals":
        """Those of one image of the batch, as a batch of one."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.given()}
        values = {n: v[index, None] if isinstance(v, Tensor) else v for n, v in values.items()}
        return Signals(**values)

    def given(self) -> set[str]:
        """Names of the signals that are there."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}


@dataclass(frozen=True)
class Reduction:
    """Which tokens are left, what they hold, and where the others went."""

    indices: Int[Tensor, "b k"]  # of the kept tokens (or of a merged one's representative), sorted
    tokens: Float[Tensor, "b k d"]
    assignment: Int[Tensor, "b n"]  # number of the kept token that stands for it; -1: dropped
    positions: Positions = "reindex"
    members: Int[Tensor, "b k m"] | None = None  # tokens whose positions a kept one carries (PPE)

    @property
    def sizes(self) -> Int[Tensor, "b k"]:
        """How many of the original tokens each kept token stands for, itself included."""
        kept = torch.zeros_like(self.indices)
        there = (self.assignment >= 0).to(kept)
        return kept.scatter_add(1, self.assignment.clamp(min=0), there)

    def expand(self) -> Float[Tensor, "b n d"]:
        """The original number of tokens: each gets the token that stands for it, else zero."""
        index = self.assignment.clamp(min=0)[..., None].expand(-1, -1, self.tokens.shape[-1])
        return self.tokens.gather(1, index) * (self.assignment >= 0)[..., None]


@dataclass(frozen=True)
class Step:
    """One reduction on the way through a model: before layer `layer` of the language model."""

    layer: int  # 0: before the language model
    reducer: "Reducer"
    keep: Keep  # of the tokens that the image had at the beginning; 0 drops all that are left


def count_kept(keep: Keep, total: int) -> int:
    """Tokens that a budget leaves: a count, or a ratio in (0, 1] rounded down, at least one.

    One rule for all methods. Official codes differ by one token: FastV and DivPrune round to the
    nearest, PyramidDrop, ToMe and G2TR (its 27 x 27 tokens become 364) round down.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"keep must be a ratio in (0, 1] or a count, got {keep!r}")
    if isinstance(keep, int):
        # 1 is the ratio one: nobody asks for a single token, and 1 and 1.0 should not differ.
        if keep < 1:
            raise InputError(f"keep must be a ratio in (0, 1] or a count from 2 on, got {keep}")
        return total if keep == 1 else min(keep, total)
    if not 0 < keep <= 1:
        raise InputError(f"a keep ratio must lie in (0, 1], got {keep}")
    return max(1, floor(keep * total + 1e-9))


def scaled(keep: Keep, share: float) -> Keep:
    """A share of a budget; all of everything stays everything."""
    if keep == 1:
        return 1
    return max(2, int(keep * share)) if isinstance(keep, int) else min(1.0, keep * share)


class Reducer(Member, ABC):
    """Chooses or merges tokens of an image without any training.

    A subclass writes `reduce`, which only sees budgets below the number of tokens, and names the
    fields of `Signals` that it `needs`. Tokens of a batch never influence each other.
    """

    needs: tuple[str, ...] = ()
    content_only: ClassVar[bool] = True  # ignores where a token stands
    merges: bool = False  # kept tokens are means over all tokens, weighted by size
    # Where `attention`, `keys` and `values` come from: the vision encoder, or a layer of the
    # language model (the one before the cut, or the one after it).
    source: ClassVar[Literal["encoder", "previous", "next"]] = "encoder"
    retroactive: ClassVar[bool] = False  # earlier layers forget the dropped tokens too

    keep: Keep
    positions: Positions

    def __call__(
        self,
        tokens: Float[Tensor, "b n d"],
        grid: Grid,
        signals: Signals | None = None,
        *,
        count: int | None = None,
    ) -> Reduction:
        """Reduce tokens in raster order; `count` replaces the reducer's own budget.

        Raises InputError for a grid of another size, a budget out of range, or a missing signal.
        """
        b, n, _ = tokens.shape
        if n != grid.length:
            raise InputError(
                f"{n} tokens do not fill a {grid.rows}x{grid.columns} grid of {grid.length}: "
                "pass the grid of these tokens"
            )
        count = count_kept(self.keep, n) if count is None else min(count, n)
        if count == n:
            every = torch.arange(n, device=tokens.device).expand(b, -1)
            return Reduction(every, tokens, every, self.positions)
        signals = signals or Signals()
        missing = [name for name in self.needs if name not in signals.given()]
        if missing:
            raise InputError(
                f"the reducer {self.name!r} needs {' and '.join(missing)}: pass Signals with it"
            )
        self._check(signals, b, n)
        return self.reduce(tokens, grid, signals, count)

    @abstractmethod
    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        """Exactly `count` tokens, 1 <= count < n."""

    def steps(self, depth: int) -> tuple[Step, ...]:
        """What happens where in a language model of `depth` layers; once, before it, by default."""
        return (Step(0, self, self.keep),)

    def merged_by_block(self, total: int, depth: int) -> tuple[int, ...]:
        """How many of `total` tokens merge away in each of an encoder's `depth` blocks.

        Asked of reducers that need `encoder_groups`: a host then merges between attention and MLP,
        and says in that signal which tokens became one. What is left is what `keep` says.
        """
        raise InputError(f"the reducer {self.name!r} does not merge inside an encoder")

    @contextmanager
    def on(self, model: Any, *, grids: list[Grid] | None = None) -> Iterator[Any]:
        """Use this reducer inside `model` for the length of a `with` block.

        Hooks are removed on exit, also after an error; the model is bit-identical afterwards.
        `grids` gives the token grid of each image where the model cannot tell. Raises InputError
        for a model that is not supported, or one that cannot give what the reducer needs.
        """
        from unicompress.reducers.hosts.base import host_of

        with host_of(model).reduced(model, self, grids) as tracker:
            yield tracker

    def _check(self, signals: Signals, b: int, n: int) -> None:
        for name in self.needs:
            value = getattr(signals, name)
            if not isinstance(value, Tensor):
                continue
            per_token = name not in ("anchors", "anchor_tokens") and not name.startswith("text")
            axis = 2 if name == "values" else 1
            if value.shape[0] != b or (per_token and value.shape[axis] != n):
                raise InputError(
                    f"{name} of shape {list(value.shape)} do not belong to {b} images of {n} tokens"
                )


reducers: Family[Reducer] = Family("reducer", home="unicompress.reducers")


def check_positions(positions: str) -> Positions:
    """The position policy; raises InputError for an unknown one."""
    if positions not in ("keep", "reindex"):
        raise InputError(f"positions must be keep or reindex, got {positions!r}")
    return "keep" if positions == "keep" else "reindex"
