"""Attention debiasing (arXiv 2508.17807): a wrapper that takes position out of attention scores.

Attention falls or rises with a token's place whatever the picture shows, and sinks into padding.
Before the wrapped reducer ranks, each score is divided by the trend of its place. The official code
ships fitted trends per method and benchmark (a spline through the mean attention of a data set; the
paper's is exponential); ours fits a polynomial to attention that you collect (`trend_of`), and
without a trend divides by nothing. On models where all image tokens share one position (BAGEL)
there is nothing to take out.

Tokens whose patch is more than half padding are put last where the caller says so with
`Signals(real=...)`. No host does: their models do not tell where a picture was padded. The official
budget is capped at the number of real patches; ours keeps the budget, and fills it with padding if
it must.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import Keep, Reducer, Reduction, Signals, Step, reducers
from unicompress.tokens import Grid

PADDED = 0.5


def trend_of(attention: Float[Tensor, "m n"], degree: int = 3) -> tuple[float, ...]:
    """The trend of attention along the raster: a polynomial through the mean over m pictures.

    Scaled to mean 1 and kept positive.
    """
    mean = attention.double().mean(dim=0).cpu().numpy()
    place = np.linspace(-1, 1, len(mean))
    fit = np.polynomial.Polynomial.fit(place, mean, min(degree, len(mean) - 1))(place)
    fit = np.maximum(fit, 1e-3 * float(mean.mean()))
    return tuple(float(value) for value in fit / fit.mean())


@reducers.register("debias")
class Debias(Reducer):
    """`inner` is the spec of a reducer that ranks by attention; `trend` has one value per token."""

    def __init__(
        self, *, keep: Keep = 0.5, inner: str = "fastervlm", trend: tuple[float, ...] = ()
    ):
        self.keep = keep
        self.inner = inner
        self.trend = tuple(trend)
        if any(value <= 0 for value in self.trend):
            raise InputError("a trend of attention must be positive everywhere: see trend_of")
        self.wrapped = reducers.build(inner, keep=keep)
        if "attention" not in self.wrapped.needs:
            raise InputError(f"{inner!r} does not rank by attention, so there is nothing to debias")
        self.needs = self.wrapped.needs
        self.positions = self.wrapped.positions
        for name, value in (
            ("source", self.wrapped.source),
            ("content_only", self.wrapped.content_only and not self.trend),
        ):
            setattr(self, name, value)

    def steps(self, depth: int) -> tuple[Step, ...]:
        return tuple(
            replace(step, reducer=self) if step.reducer is self.wrapped else step
            for step in self.wrapped.steps(depth)
        )

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        attention = signals.attention
        assert attention is not None
        if self.trend:
            if len(self.trend) != attention.shape[1]:
                raise InputError(
                    f"a trend of {len(self.trend)} places does not fit {attention.shape[1]} "
                    "tokens: estimate it on images of this grid"
                )
            attention = attention / torch.tensor(self.trend).to(attention)
        if signals.real is not None:
            attention = torch.where(signals.real < PADDED, attention - 1e4, attention)
        return self.wrapped(tokens, grid, replace(signals, attention=attention), count=count)
