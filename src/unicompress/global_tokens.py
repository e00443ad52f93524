"""Global tokens: a few learned queries that read the whole field (eq. 1-2), and variants."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.layers import (
    MLP,
    Attention,
    GridMixer,
    check_field,
    grid_coordinates,
    position_features,
)
from unicompress.registry import Family, Member
from unicompress.tokens import Grid

QUERY_STD = 0.05  # small beside the attention output, so that eq. 2 keeps what the image says


class GlobalTokens(nn.Module, Member, ABC):
    """Reads X and returns G; X itself passes through unchanged.

    A subclass writes `read`, which returns G before its normalisation, and `rescale`.
    """

    def __init__(self, *, dim: int, count: int):
        super().__init__()
        if count < 0:
            raise InputError(f"the number of global tokens must not be negative, got {count}")
        self.dim = dim
        self.count = count
        # The slots' own position embedding. It enters before the normalisation of eq. 2, where
        # `calibrate` also uses it to take away what a slot says about every image alike.
        self.slots = nn.Parameter(torch.zeros(count, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, dense: Float[Tensor, "b t d"], grid: Grid, count: int | None = None
    ) -> Float[Tensor, "b g d"]:
        """X to the first `count` global tokens (all by default), so that one model serves any.

        Raises InputError if tokens and grid disagree or more globals are asked for than exist.
        """
        self._check(dense, grid)
        count = self.count if count is None else count
        if not 0 <= count <= self.count:
            raise InputError(f"this model has {self.count} global tokens, {count} were asked for")
        if count == 0:
            return dense[:, :0]
        return self.norm(self.read(dense, grid) + self.slots)[:, :count]

    @abstractmethod
    def read(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b g d"]:
        """G of all slots, before slot embedding and normalisation."""

    @abstractmethod
    def rescale(self, factor: Float[Tensor, " d"]) -> None:
        """Multiply, in the weights, the channels of what `read` takes from the image."""

    @abstractmethod
    def standardize(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        """Fold (X - mean) / std into the weights that read X."""

    @torch.no_grad()
    def calibrate(self, dense: Float[Tensor, "b t d"], grid: Grid) -> None:
        """Start from globals that differ between images and lie where the codebook has its rows.

        Call once before training with the X of many images (64 is plenty, 2 the least). It folds
        X's scale into the input weights, brings the image-dependent part to unit variance, centers
        each slot, and gives G the per-channel mean and deviation of X. Without it, all images got
        the same code in the trials.
        """
        self._check(dense, grid)
        if dense.shape[0] < 2:
            raise InputError("calibration compares images: pass at least 2, better 64")
        if self.count == 0:
            return
        mean = dense.mean(dim=(0, 1))
        std = dense.std(dim=(0, 1)).clamp(min=1e-6)
        self.standardize(mean, std)
        spread = self.read(dense, grid).var(dim=0).mean(dim=0).sqrt()  # over images; [d]
        self.rescale(1.0 / spread.clamp(min=1e-6))
        self.slots.copy_(-self.read(dense, grid).mean(dim=0))
        self.norm.weight.copy_(std)
        self.norm.bias.copy_(mean)

    def _check(self, dense: Tensor, grid: Grid) -> None:
        check_field(dense, grid)
        if dense.shape[-1] != self.dim:
            raise InputError(
                f"these global tokens read tokens of width {self.dim}, got {dense.shape[-1]}"
            )


global_tokens: Family[GlobalTokens] = Family("global token kind", home="unicompress.global_tokens")


@torch.no_grad()
def fold_standardization(linear: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Change `linear` so that linear(x) becomes what linear((x - mean) / std) was."""
    linear.weight.div_(std)
    linear.bias.sub_(linear.weight @ mean)


class Refinement(nn.Module):
    """Cross-attention and MLP, pre-norm: one extra look of the queries at the field."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, queries: Float[Tensor, "b g w"], field: Float[Tensor, "b t w"]
    ) -> Float[Tensor, "b g w"]:
        """Queries after reading the field; slots do not see each other, so prefixes nest."""
        keys_values = self.attention.keys_values(field)
        queries = queries + self.attention.attend(self.attention_norm(queries), keys_values)
        return queries + self.mlp(self.mlp_norm(queries))


@global_tokens.register("meta")
class Meta(GlobalTokens):
    """Learned queries, one-way cross-attention (eq. 1-2): G = LN(Q + MHA(Q W_Q, X W_K, X W_V)).

    `width` is the attention's, since some hosts have d = 4. `positions` adds 2-D position features
    to the projected field. Beyond the paper: `depth` - 1 rounds of cross-attention and MLP before
    the last one, and `mixing` 3x3-convolution blocks over the field that the queries read.
    """

    def __init__(
        self,
        *,
        dim: int,
        count: int,
        width: int = 128,
        heads: int = 4,
        depth: int = 1,
        mixing: int = 0,
        positions: bool = True,
    ):
        super().__init__(dim=dim, count=count)
        if depth < 1:
            raise InputError(f"depth must be at least 1, got {depth}")
        self.width, self.heads, self.depth = width, heads, depth
        self.mixing, self.positions = mixing, positions
        self.queries = nn.Parameter(QUERY_STD * torch.randn(count, dim))
        self.query_in = nn.Linear(dim, width)
        # The queries are small in eq. 2's sum but must still tell the slots apart here.
        nn.init.normal_(self.query_in.weight, std=1.0 / (QUERY_STD * dim**0.5))
        self.field_in = nn.Linear(dim, width)
        self.mixer = GridMixer(width, mixing)
        self.refinements = nn.ModuleList(Refinement(width, heads) for _ in range(depth - 1))
        self.attention = Attention(width, heads)
        self.out = nn.Linear(width, dim, bias=False)  # a bias would repeat `slots`

    def read(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b g d"]:
        """Q + MHA(...), with the maps between d and the attention width."""
        field = self.field_in(dense)
        if self.positions:
            field = field + position_features(grid_coordinates(grid), self.width).to(field)
        if self.mixing:
            field = self.mixer(field, grid)
        queries = self.query_in(self.queries).expand(dense.shape[0], -1, -1)
        refined = queries
        for refinement in self.refinements:
            refined = refinement(refined, field)
        found = self.attention.attend(refined, self.attention.keys_values(field))
        # Without refinements the difference is zero, and this is eq. 1 to the letter.
        return self.queries + self.out(found + (refined - queries))

    @torch.no_grad()
    def rescale(self, factor: Float[Tensor, " d"]) -> None:
        """Scale what attention found; Q stays."""
        self.out.weight.mul_(factor[:, None])

    def standardize(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        """The field enters through one map."""
        fold_standardization(self.field_in, mean, std)


@global_tokens.register("mean")
class Mean(GlobalTokens):
    """The mean of X through one linear map per slot; the ablation without attention."""

    def __init__(self, *, dim: int, count: int):
        super().__init__(dim=dim, count=count)
        self.maps = nn.Parameter(torch.eye(dim) + torch.randn(count, dim, dim) / dim**0.5)

    def read(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b g d"]:
        """One map of the mean per slot."""
        return torch.einsum("bd,gde->bge", dense.mean(dim=1), self.maps)

    @torch.no_grad()
    def rescale(self, factor: Float[Tensor, " d"]) -> None:
        """Scale the output channels of the maps."""
        self.maps.mul_(factor)

    @torch.no_grad()
    def standardize(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        """The mean itself goes into the slots, which `calibrate` centers afterwards."""
        self.maps.div_(std[:, None])


@global_tokens.register("cls")
class Cls(GlobalTokens):
    """Tokens like an encoder's CLS: rows of one self-attention block over [CLS; X].

    Only the CLS rows are computed, since nothing else is read from the block.
    """

    def __init__(
        self, *, dim: int, count: int, width: int = 128, heads: int = 4, positions: bool = True
    ):
        super().__init__(dim=dim, count=count)
        self.width, self.heads, self.positions = width, heads, positions
        self.tokens = nn.Parameter(torch.randn(count, width))
        self.field_in = nn.Linear(dim, width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.out = nn.Linear(width, dim, bias=False)

    def read(self, dense: Float[Tensor, "b t d"], grid: Grid) -> Float[Tensor, "b g d"]:
        """The CLS rows after the block, mapped back to the width of X."""
        field = self.field_in(dense)
        if self.positions:
            field = field + position_features(grid_coordinates(grid), self.width).to(field)
        tokens = self.tokens.expand(dense.shape[0], -1, -1)
        everything = self.attention_norm(torch.cat([tokens, field], dim=1))
        keys_values = self.attention.keys_values(everything)
        tokens = tokens + self.attention.attend(everything[:, : self.count], keys_values)
        return self.out(tokens + self.mlp(self.mlp_norm(tokens)))

    @torch.no_grad()
    def rescale(self, factor: Float[Tensor, " d"]) -> None:
        """Scale the output channels."""
        self.out.weight.mul_(factor[:, None])

    def standardize(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        """The field enters through one map."""
        fold_standardization(self.field_in, mean, std)
