"""What several reducers share: ranking with fixed ties, cells of a grid, assigning and merging."""

from math import ceil, sqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.reducers.base import Positions, Reduction
from unicompress.tokens import Grid


def ranking(scores: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Indices from the highest score to the lowest; of equal ones the first comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def top(scores: Float[Tensor, "b n"], count: int) -> Int[Tensor, "b k"]:
    """Sorted indices of the highest scores."""
    return ranking(scores)[:, :count].sort(dim=-1).values


def places(ranked: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The rank of every index: the inverse permutation."""
    order = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    return torch.empty_like(ranked).scatter_(1, ranked, order.contiguous())


def chosen(indices: Int[Tensor, "b k"], total: int) -> Bool[Tensor, "b n"]:
    """Mask of the given indices."""
    mask = torch.zeros(len(indices), total, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, torch.ones_like(indices, dtype=torch.bool))


def at(tokens: Float[Tensor, "b n d"], indices: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens at the indices."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def kept(
    tokens: Float[Tensor, "b n d"], indices: Int[Tensor, "b k"], positions: Positions
) -> Reduction:
    """A reduction that drops all tokens but those at the sorted indices."""
    assignment = torch.full(tokens.shape[:2], -1, dtype=torch.long, device=tokens.device)
    numbers = torch.arange(indices.shape[1], device=tokens.device).expand_as(indices)
    assignment.scatter_(1, indices, numbers.contiguous())
    return Reduction(indices, at(tokens, indices), assignment, positions)


def cosine(a: Float[Tensor, "b n d"], b: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """Cosine similarity of every pair; zero vectors are similar to nothing."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def nearest(
    features: Float[Tensor, "b n d"],
    indices: Int[Tensor, "b k"],
    allowed: Bool[Tensor, "b n k"] | None = None,
) -> Int[Tensor, "b n"]:
    """Number of the most similar kept token for each token (cosine); a kept one is its own.

    `allowed` restricts the pairs; a token that may go nowhere goes to the nearest of all.
    """
    similarity = cosine(features, at(features, indices))
    if allowed is not None:
        free = allowed | ~allowed.any(dim=-1, keepdim=True)
        similarity = similarity.masked_fill(~free, -torch.inf)
    numbers = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    return similarity.argmax(dim=-1).scatter(1, indices, numbers.contiguous())


def weighted_mean(
    tokens: Float[Tensor, "b n d"],
    assignment: Int[Tensor, "b n"],
    count: int,
    weights: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b k d"]:
    """Mean of the tokens assigned to each kept one; -1 takes no part."""
    # Sums and counts of many tokens need more than half precision.
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    weights = torch.ones_like(wide[..., 0]) if weights is None else weights.to(wide)
    weights = weights * (assignment >= 0)
    index = assignment.clamp(min=0)
    zeros = wide.new_zeros(len(wide), count, wide.shape[-1])
    sums = zeros.scatter_add(1, index[..., None].expand_as(wide), wide * weights[..., None])
    mass = wide.new_zeros(len(wide), count).scatter_add(1, index, weights)
    return (sums / mass.clamp(min=torch.finfo(wide.dtype).tiny)[..., None]).to(tokens)


def merged(
    tokens: Float[Tensor, "b n d"],
    indices: Int[Tensor, "b k"],
    assignment: Int[Tensor, "b n"],
    positions: Positions,
    weights: Float[Tensor, "b n"] | None = None,
) -> Reduction:
    """A reduction whose kept tokens are the mean of all that is assigned to them."""
    values = weighted_mean(tokens, assignment, indices.shape[1], weights)
    return Reduction(indices, values, assignment, positions)


def bands(length: int, parts: int) -> Int[Tensor, " l"]:
    """Number of the part of each of `length` places; sizes differ by one at most."""
    return torch.arange(length) * parts // length


def cells(grid: Grid, count: int) -> Int[Tensor, " n"]:
    """Cell of every token when the grid is cut into exactly `count` nearly square cells.

    Bands of rows, each cut into columns. Where count is (H / s) * (W / s), these are the s x s
    cells of average pooling.
    """
    rows, columns = grid
    wanted = round(sqrt(count * rows / columns))
    strips = min(max(wanted, ceil(count / columns), 1), rows, count)
    row_of = bands(rows, strips)
    per_strip = torch.bincount(bands(count, strips), minlength=strips)
    first = per_strip.cumsum(0) - per_strip
    places = [first[s] + bands(columns, int(per_strip[s])) for s in row_of.tolist()]
    return torch.cat(places)


def centers(grid: Grid, cell: Int[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    """The token nearest to the middle of each cell, the first of equal ones."""
    index = torch.arange(grid.length)
    where = torch.stack([index // grid.columns, index % grid.columns], dim=1).double()
    sums = torch.zeros(count, 2, dtype=torch.double).index_add_(0, cell, where)
    middle = sums / torch.bincount(cell, minlength=count)[:, None]
    distance = (where - middle[cell]).square().sum(dim=1)
    order = distance.argsort(stable=True)
    order = order[cell[order].argsort(stable=True)]  # by cell, nearest first
    sizes = torch.bincount(cell, minlength=count)
    return order[sizes.cumsum(0) - sizes]


def windows(grid: Grid, size: int) -> Int[Tensor, " n"]:
    """Number of the size x size window of each token; windows at odd edges are smaller."""
    index = torch.arange(grid.length)
    across = ceil(grid.columns / size)
    return index // grid.columns // size * across + index % grid.columns // size


def top_by_window(
    scores: Float[Tensor, "b n"], window: Int[Tensor, " n"], count: int
) -> Int[Tensor, "b k"]:
    """The best of each window in turn: all first places, then all second places, and so on.

    So that windows keep equally many; what is left of the last round goes to the highest scores.
    """
    window = window.to(scores.device)
    rank = places(ranking(scores))  # 0 is the best
    # Sort by window, then by rank; the place within its window follows.
    key = window * scores.shape[1] + rank
    order = key.argsort(dim=-1)
    sizes = torch.bincount(window)
    first = (sizes.cumsum(0) - sizes)[window[order]]
    spot = torch.arange(scores.shape[1], device=scores.device) - first
    round_ = torch.empty_like(rank).scatter_(1, order, spot)
    final = round_ * scores.shape[1] + rank
    return final.argsort(dim=-1)[:, :count].sort(dim=-1).values
