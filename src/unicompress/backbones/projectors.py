"""The way from the image's token field into the language model (understanding)."""

import itertools
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unicompress.attention_projection import EPS, AttentionProjection
from unicompress.errors import InputError
from unicompress.layers import grid_coordinates, position_features, to_image
from unicompress.registry import Family, Member
from unicompress.tokens import Grid


class Projector(nn.Module, Member, ABC):
    """Maps global and local tokens of width `dim` to the language model's width `hidden`."""

    def __init__(self, *, dim: int, hidden: int):
        super().__init__()
        self.dim = dim
        self.hidden = hidden

    @abstractmethod
    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first; `grid` is that of the local tokens."""

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Tokens projected one by one, as drawing does; InputError where that is not possible."""
        raise InputError(
            f"the projector {self.name} looks at the whole image, and this backbone needs one "
            "that takes tokens one by one: use mlp or linear"
        )


projectors: Family[Projector] = Family("projector", home="unicompress.backbones.projectors")


@projectors.register("linear")
class LinearProjector(Projector):
    """One linear map for both streams (section 3.1 of the paper)."""

    def __init__(self, *, dim: int, hidden: int):
        super().__init__(dim=dim, hidden=hidden)
        self.project = nn.Linear(dim, hidden)

    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first."""
        return self.each(torch.cat([globals_, locals_], dim=1))

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Tokens of either stream."""
        return self.project(tokens)


class Mixer(nn.Module):
    """Residual block: every token looks at its eight neighbours."""

    def __init__(self, width: int):
        super().__init__()
        # One group: normalises the whole field, which keeps contrasts between tokens.
        self.norm = nn.GroupNorm(1, width)
        self.neighbours = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, field: Float[Tensor, "b d H W"]) -> Float[Tensor, "b d H W"]:
        """The field plus what its neighbourhood adds."""
        return field + self.mix(nn.functional.gelu(self.neighbours(self.norm(field))))


@projectors.register("local")
class LocalProjector(Projector):
    """Mixes neighbouring local tokens and adds 2-D positions before the linear map.

    A small language model learns shapes from a field in about a tenth of the samples when
    neighbours are mixed first.
    """

    def __init__(self, *, dim: int, hidden: int, width: int = 128, depth: int = 3):
        super().__init__(dim=dim, hidden=hidden)
        self.width = width
        self.depth = depth
        self.widen = nn.Conv2d(dim, width, 1)
        self.blocks = nn.ModuleList(Mixer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, hidden)
        self.positions = nn.Linear(width, hidden, bias=False)
        self.global_norm = nn.LayerNorm(dim)
        self.project_globals = nn.Linear(dim, hidden)
        for linear in (self.project, self.positions):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first."""
        # Contiguous: group normalisation is several times slower on channels-last memory.
        field = self.widen(to_image(locals_, grid).contiguous())
        for block in self.blocks:
            field = block(field)
        places = position_features(grid_coordinates(grid), self.width).to(locals_)
        mixed = self.project(self.norm(field.flatten(2).transpose(1, 2))) + self.positions(places)
        return torch.cat([self.project_globals(self.global_norm(globals_)), mixed], dim=1)


@projectors.register("mlp")
class MLPProjector(Projector):
    """Linear maps with GELU between them, as in LLaVA, Janus and VILA-U; first normed in UniTok."""

    def __init__(self, *, dim: int, hidden: int, depth: int = 2, normed: bool = False):
        super().__init__(dim=dim, hidden=hidden)
        self.depth = depth
        self.normed = normed
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()
        widths = [dim, *[hidden] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first."""
        return self.each(torch.cat([globals_, locals_], dim=1))

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Tokens of either stream."""
        first, *rest = self.layers
        tokens = first(self.norm(tokens))
        for layer in rest:
            tokens = layer(nn.functional.gelu(tokens))
        return tokens


@projectors.register("unitok")
class UniTokProjector(Projector):
    """Attention widens the tokens `heads` times before the MLP.

    The local tokens of an image that is read are projected as a whole, and so are the globals, each
    token after its predecessors; tokens that are drawn one by one. So do the published scripts (see
    backbones/unitok.py).
    """

    def __init__(self, *, dim: int, hidden: int, heads: int = 16):
        super().__init__(dim=dim, hidden=hidden)
        self.heads = heads
        self.widen = AttentionProjection(dim, heads * dim, causal=True)
        self.mlp = MLPProjector(dim=heads * dim, hidden=hidden, normed=True)
        self.mlp.norm = nn.LayerNorm(heads * dim, eps=EPS)

    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first; each attends to those of its stream before it."""
        wide = torch.cat([self.widen(globals_), self.widen(locals_)], dim=1)
        return self.mlp.each(wide)

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Tokens projected one by one."""
        return self.mlp.each(self.widen.each(tokens))
