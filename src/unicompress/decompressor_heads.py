"""The last maps of the decompressor: to dense tokens, or to logits over the host's codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError

Embed = Callable[[Tensor], Tensor]  # codes [b n c] -> embeddings [b n e], the host's eq. 6

SCATTER = 0.4  # of children around their parent, as a share of the rows' variance; photographs


@dataclass(frozen=True)
class Sampling:
    """How logits become codes, and codes tokens."""

    embed: Embed
    generator: torch.Generator | None
    temperature: float

    def draw(self, logits: Float[Tensor, "*n c v"]) -> Int[Tensor, "*n c"]:
        """The likeliest codes at temperature 0, else random ones; raises InputError."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        if self.temperature < 0 or self.generator is None:
            raise InputError(
                f"temperature {self.temperature} draws codes at random: it must be positive, "
                "and a generator must be passed"
            )
        # Drawn where the generator lives: the same picture on every machine.
        shares = (logits / self.temperature).softmax(-1).to(self.generator.device)
        drawn = torch.multinomial(shares.flatten(0, -2), 1, generator=self.generator)
        return drawn.view(logits.shape[:-1]).to(logits.device)


@dataclass(frozen=True)
class Feedback:
    """What becomes of a step's prediction: settled first, then fed to the next step."""

    sampling: Sampling | None  # None for the regression head
    table: Float[Tensor, "v e"] | None  # scaled embedding of every code, where a token has one
    scale: Callable[[Tensor], Tensor]
    enter: nn.Module  # a unit's tokens to the width of the transformer
    present: Float[Tensor, "1 n k 1"] | None  # None where every child lies on the grid

    def settle(self, predicted: Tensor) -> Tensor:
        """Codes [b n k c] from logits; a regression is settled already."""
        return predicted if self.sampling is None else self.sampling.draw(predicted)

    def fed(self, settled: Tensor, place: int | Int[Tensor, "1"]) -> Float[Tensor, "b 1 w"]:
        """What the step after the unit at `place` is told of it."""
        if self.sampling is None:
            tokens = self.scale(settled)
        elif self.table is not None:
            tokens = F.embedding(settled[..., 0], self.table)
        else:
            rows = self.sampling.embed(settled.flatten(1, 2))
            tokens = self.scale(rows).unflatten(1, settled.shape[1:3])
        if self.present is not None:
            one = slice(place, place + 1) if isinstance(place, int) else place
            tokens = tokens * self.present[:, one]
        return self.enter(tokens.flatten(2))


@torch.no_grad()
def code_rows(
    embed: Embed, codes_per_token: int, codebook_size: int, device: torch.device | None = None
) -> Float[Tensor, "c v e"]:
    """A token's embedding for each code at each place, the other places at their mean.

    Distances to these rows rank the codes of one place correctly wherever embeddings are
    concatenated, and roughly where they are summed.
    """
    codes = torch.zeros(codes_per_token, codebook_size, codes_per_token, dtype=torch.int64)
    for place in range(codes_per_token):
        codes[place, :, place] = torch.arange(codebook_size)
    rows = torch.stack([embed(one[None].to(device))[0] for one in codes])  # others are code 0
    shifts = (rows - rows[:, :1]).mean(dim=1, keepdim=True)  # mean minus code 0, per place
    return rows + (shifts.sum(dim=0, keepdim=True) - shifts)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class RegressionHead(nn.Module):
    """One linear map to the token (the paper); `residual` starts exactly at the parent."""

    def __init__(self, width: int, code_dim: int, *, residual: bool):
        super().__init__()
        self.residual = residual
        self.out = nn.Linear(width, code_dim)
        if residual:
            _zero(self.out)

    def forward(
        self,
        children: Float[Tensor, "b n k w"],
        parents: Float[Tensor, "b n e"],
        mean: Float[Tensor, " e"],
        scale: Float[Tensor, " e"],
    ) -> Float[Tensor, "b n k e"]:
        """Tokens of all children; `mean` and `scale` are those of dense tokens."""
        start = parents.unsqueeze(2) if self.residual else mean
        return start + self.out(children) * scale


class CodesHead(nn.Module):
    """A categorical over the host's codebook for each of a token's D codes.

    The D codes get one linear head each on the same hidden state: they are independent given it.
    With `rows` (see `code_rows`) the logits start as a Gaussian around the parent, whose center and
    width are learned; without, near uniform.
    """

    def __init__(
        self,
        width: int,
        code_dim: int,
        codes_per_token: int,
        codebook_size: int,
        rows: Float[Tensor, "c v e"] | None,
    ):
        super().__init__()
        self.codes_per_token, self.codebook_size = codes_per_token, codebook_size
        self.out = nn.Linear(width, codes_per_token * codebook_size)
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.out.bias)
        self.residual = rows is not None
        if rows is None:
            return
        shape = (codes_per_token, codebook_size, code_dim)
        if tuple(rows.shape) != shape:
            raise InputError(f"rows must have shape {list(shape)}, got {list(rows.shape)}")
        self.rows: Tensor
        self.row_squares: Tensor
        rows = rows.detach().clone()
        self.register_buffer("rows", rows, persistent=False)  # the host's own, not saved
        self.register_buffer("row_squares", rows.square().sum(dim=-1), persistent=False)
        self.center = _zero(nn.Linear(width, code_dim))
        variance = rows.var(dim=1).sum().clamp(min=1e-6)
        precision = code_dim / (2 * SCATTER * variance)  # 1 / (2 sigma^2) of one channel
        self.log_precision = nn.Parameter(precision.log().repeat(codes_per_token))

    def forward(
        self,
        children: Float[Tensor, "b n k w"],
        parents: Float[Tensor, "b n e"],
        mean: Float[Tensor, " e"],
        scale: Float[Tensor, " e"],
    ) -> Float[Tensor, "b n k c v"]:
        """Logits of all children."""
        logits = self.out(children).unflatten(-1, (self.codes_per_token, self.codebook_size))
        if not self.residual:
            return logits
        center = parents.unsqueeze(2) + self.center(children) * scale
        # minus the squared distance, without the part that all codes share
        near = 2 * F.linear(center, self.rows.flatten(0, 1)).view_as(logits) - self.row_squares
        return logits + near * self.log_precision.exp()[:, None]
