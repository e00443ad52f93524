"""The books of a sequence that gets shorter: which columns are left, and what they see from where.

A column is a place in the sequence as the host knows it, a slot is a place in what is left of it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import Reduction
from unicompress.reducers.hosts.attention import LayerView
from unicompress.reducers.hosts.base import Prompt


@dataclass
class Stage:
    """The sequence between two cuts, as columns of the original sequence."""

    first: int  # the layer before which it begins
    columns: Int[Tensor, "b m"]
    valid: Bool[Tensor, "b m"]  # False: padding
    offset: Int[Tensor, "b p"]  # how far the positions of the prompt's columns move up
    shift: Int[Tensor, " b"]  # how far positions after the prompt move up
    # RoPE rows of the prompt's columns, where a reducer chose them (PPE): cosines and sines.
    mixed: tuple[Tensor, Tensor] | None = None

    def own(self) -> Bool[Tensor, "b m"]:
        """Slots that hold their column; the rest are fillers at the beginning of shorter rows."""
        later = self.columns[:, 1:] > self.columns[:, :-1]
        return torch.cat([later, torch.ones_like(later[:, :1])], dim=1)

    def slots(self, length: int) -> Int[Tensor, "b l"]:
        """Where each of `length` original columns stands."""
        b, m = self.columns.shape
        slots = torch.zeros(b, length, dtype=torch.long, device=self.columns.device)
        order = torch.arange(m, device=slots.device).expand(b, -1)
        # Fillers come first and repeat a column: the later, true slot wins by being larger.
        return slots.scatter_reduce(1, self.columns, order.contiguous(), "amax")

    def longer(self, new: Int[Tensor, "b w"], mask: Any) -> "Stage":
        """With the columns of a decoding step; `mask` is the host's, by column."""
        valid = torch.ones_like(new, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -new.shape[1] :].bool().to(valid.device)
        return replace(
            self,
            columns=torch.cat([self.columns, new], dim=1),
            valid=torch.cat([self.valid, valid], dim=1),
        )


@dataclass
class Run:
    """One prompt and all that is decoded after it."""

    prompt: Prompt
    stages: list[Stage]
    alive: list[Int[Tensor, " _"]]  # per image field: which of its tokens are left
    length: int  # columns of the original sequence so far
    reductions: list[list[Reduction]] = field(default_factory=list)  # per field, one per cut

    @classmethod
    def of(cls, prompt: Prompt, embeds: Tensor, mask: Any, cache: Any) -> "Run":
        """The beginning: everything is there. Raises InputError for caches that cannot follow."""
        b, width, _ = embeds.shape
        if cache is not None and cache.get_seq_length() > 0:
            raise InputError(
                "a picture that comes after cached text cannot be reduced: pass the whole prompt "
                "in one call"
            )
        if getattr(cache, "is_compileable", False):
            raise InputError(
                "a static cache has one length for all layers: generate with a dynamic cache"
            )
        valid = torch.ones(b, width, dtype=torch.bool, device=embeds.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask[:, -width:].bool().to(embeds.device)
        columns = torch.arange(width, device=embeds.device).expand(b, -1)
        shift = torch.zeros(b, dtype=torch.long, device=embeds.device)
        start = Stage(0, columns, valid, torch.zeros_like(columns), shift)
        alive = [torch.arange(len(f.columns), device=embeds.device) for f in prompt.fields]
        return cls(prompt, [start], alive, width, [[] for _ in prompt.fields])

    def stage(self, layer: int) -> Stage:
        """The stage that a layer works in."""
        return max((s for s in self.stages if s.first <= layer), key=lambda s: s.first)

    def extend(self, width: int, mask: Any) -> None:
        """Add the columns of a decoding step to every stage."""
        columns = self.stages[0].columns
        new = torch.arange(self.length, self.length + width, device=columns.device)
        self.stages = [stage.longer(new.expand(len(columns), -1), mask) for stage in self.stages]
        self.length += width

    def groups(self) -> list[list[int]]:
        """Images that can be reduced in one batch: of one size, with the same signals."""
        groups: dict[Any, list[int]] = {}
        for number, item in enumerate(self.prompt.fields):
            anchors = item.encoder.anchor_grid
            kind = (len(self.alive[number]), item.grid, anchors, frozenset(item.encoder.given()))
            groups.setdefault(kind, []).append(number)
        return list(groups.values())


@dataclass
class Call:
    """One forward pass of the language model: a prompt or a step after it."""

    run: Run
    prefill: bool
    width: int  # columns that came in
    positions: Int[Tensor, "*axes b l"]  # of the columns that came in
    mask: Tensor | None  # the host's own 4-D mask
    cache: Any = None
    prepared: dict[int, dict[str, Any]] = field(default_factory=dict)
    view: LayerView | None = None  # of the layer before a cut

    def positions_in(self, stage: Stage) -> Int[Tensor, "*axes b m"]:
        """Positions of the columns that are being computed."""
        if not self.prefill:
            return self.positions - stage.shift[:, None]
        columns, original = stage.columns, self.positions
        spread = columns.expand(*original.shape[:-2], *columns.shape)
        original = original.expand(*spread.shape[:-1], original.shape[-1])
        return (original.gather(-1, spread) - stage.offset).clamp(min=0)

    def mask_in(self, stage: Stage, hidden: Tensor, backend: str) -> Tensor | None:
        """Which columns see which, in the form that the attention backend takes."""
        q, keys = hidden.shape[1], stage.columns.shape[1]
        if self.mask is not None:
            seen = self._gathered(self.mask, stage)
            if seen.dtype != torch.bool:
                hole = torch.finfo(seen.dtype).min
                return seen.masked_fill(~stage.valid[:, None, None, :], hole)
            return seen & stage.valid[:, None, None, :]
        plain = bool(stage.valid.all())
        if backend.startswith("flash"):
            return None if plain else stage.valid
        if plain and (q in (1, keys)) and backend == "sdpa":
            return None
        order = torch.arange(keys, device=hidden.device)
        causal = order <= order[keys - q :, None]
        # A padded query sees itself: an empty row of a softmax would be NaN.
        seen = (causal & stage.valid[:, None, :]) | (order == order[keys - q :, None])
        if backend == "sdpa":
            return seen[:, None]
        hole = torch.finfo(hidden.dtype).min
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, hole)[:, None]

    def _gathered(self, mask: Tensor, stage: Stage) -> Tensor:
        """The host's own mask, at the rows and columns that are left."""
        mask = mask.expand(len(stage.columns), -1, -1, -1)
        if self.prefill:
            rows = stage.columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
            mask = mask.gather(2, rows)
        columns = stage.columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        return mask.gather(3, columns)
