"""PPE (Positional Preservation Embedding): a merged token carries several members' positions.

A wrapper around a merger. RoPE turns pairs of channels; of a merged token, pair i is turned by the
position of member i mod K, so that up to K original positions stay visible, without any
parameter. Members are the first K tokens of the group in raster order, repeated where there are
fewer. The official code does this for Qwen2.5-VL's three-axis RoPE with K = 8 on DPC-KNN clusters;
which pairs go to which member is not documented, and interleaving is our choice. Hosts apply it at
the prompt; as a function it returns `members`. tokens [b, n, d] -> [b, k, d].
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import Keep, Reducer, Reduction, Signals, Step, reducers
from unicompress.tokens import Grid


@reducers.register("ppe")
class PPE(Reducer):
    """`inner` is the spec of a merger; positions are always kept."""

    def __init__(self, *, keep: Keep = 0.25, inner: str = "dpc_knn", members: int = 8):
        if members < 1:
            raise InputError(f"members must be at least 1, got {members}")
        self.keep = keep
        self.inner = inner
        self.members = members
        self.wrapped = reducers.build(inner, keep=keep)
        self.needs = self.wrapped.needs
        self.positions = "keep"
        for name in ("content_only", "merges", "source"):
            setattr(self, name, getattr(self.wrapped, name))

    def steps(self, depth: int) -> tuple[Step, ...]:
        steps = self.wrapped.steps(depth)
        if len(steps) > 1 or steps[0].reducer is not self.wrapped:
            raise InputError(f"{self.inner!r} cuts several times: PPE wraps mergers that cut once")
        return (replace(steps[0], reducer=self),)

    def merged_by_block(self, total: int, depth: int) -> tuple[int, ...]:
        return self.wrapped.merged_by_block(total, depth)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        result = self.wrapped(tokens, grid, signals, count=count)
        return replace(result, positions="keep", members=first_members(result, self.members))


def first_members(result: Reduction, most: int) -> Int[Tensor, "b k m"]:
    """Up to `most` original tokens of every group in raster order, repeated in turn."""
    b, count = result.indices.shape
    group = result.assignment.masked_fill(result.assignment < 0, count)  # dropped ones last
    order = group.argsort(dim=1, stable=True)  # by group, raster order within
    sizes = result.sizes
    first = sizes.cumsum(dim=1) - sizes
    turn = torch.arange(most, device=group.device) % sizes.clamp(min=1, max=most)[..., None]
    return order.gather(1, (first[..., None] + turn).flatten(1)).view(b, count, most)
