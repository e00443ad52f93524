"""ToMe (arXiv 2210.09461): bipartite matching merges the most similar pairs of tokens.

Tokens alternate between two sets A and B. Each token of A proposes its most similar token of B
(cosine of the keys); the r best proposals are carried out as means weighted by size. One round can
halve the tokens at most, so smaller budgets take several rounds.

There are two places to merge. `inside=True` is the paper's: in every block of the vision encoder,
between attention and MLP, by the keys of that attention (mean over heads), the class token left
alone; from then on attention adds log(size) to a merged token's logits (section 3.2, "proportional
attention"). So the encoder becomes cheaper too. Its blocks must be those of a CLIP, a SigLIP or a
Janus encoder whose patches become tokens one by one (hosts `llava` and `janus`).

`inside=False`, the default, suits every host: one merge after the encoder, in as many rounds as the
budget needs. There is no saving in the encoder, and no log(size), since the language model was not
trained with sizes.

The official code gives r per block, and what is left follows from it; here the budget is exact and
r follows: the same in each block, or rising or falling along them (`inflection`; what a block
cannot merge because it would be more than half goes to the next one, and the last block takes as
many rounds as it needs). The official order of tokens after a merge is A's rest, then B, on which
the next block alternates; ours stays raster order. There the class token counts as one of A, so
that the first patch is in B; here it is in A.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    count_kept,
    reducers,
)
from unicompress.reducers.selection import at, merged, ranking, weighted_mean
from unicompress.tokens import Grid


@reducers.register("tome")
class ToMe(Reducer):
    """Merges tokens [b, n, d] -> [b, k, d].

    Merging here, similarity is that of the tokens themselves, which are what hosts give, or of
    `signals.keys` where a caller passes them; the position of a group is that of its B token. With
    `inside=True` the encoder has merged already: groups are those of `signals.encoder_groups`, and
    the position of a group is that of its first member.

    `inflection` in [-1, 1] says how merges spread over the blocks: 0 evenly, 1 from none in the
    first to twice the mean in the last, -1 the other way round (the paper's decreasing schedule).
    """

    content_only = False  # the two sets are even and odd places

    def __init__(
        self,
        *,
        keep: Keep = 0.5,
        inside: bool = False,
        inflection: float = 0.0,
        positions: str = "reindex",
    ):
        if not -1 <= inflection <= 1:
            raise InputError(f"inflection must lie in [-1, 1], got {inflection}")
        self.keep = keep
        self.inside = inside
        self.inflection = inflection
        self.positions = check_positions(positions)
        self.needs = ("encoder_groups",) if inside else ()
        self.merges = not inside  # a group changes after it has been merged in an encoder

    def merged_by_block(self, total: int, depth: int) -> tuple[int, ...]:
        away = total - count_kept(self.keep, total)
        due, done, found = 0.0, 0, []
        for block in range(depth):
            rise = 2 * block / (depth - 1) - 1 if depth > 1 else 0.0  # from -1 to 1
            due += away * (1 + self.inflection * rise) / depth
            now = min(round(due) - done, (total - done) // 2)
            found.append(now if block < depth - 1 else away - done)
            done += now
        return tuple(found)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        if self.inside:
            assert signals.encoder_groups is not None
            return self._found(tokens, signals.encoder_groups, count)
        metric = (tokens if signals.keys is None else signals.keys).float()
        b, n, _ = tokens.shape
        order = torch.arange(n, device=tokens.device).expand(b, -1)
        owner = order  # token -> its representative
        for merging in halvings(n, count):
            alive = (owner == order).nonzero()[:, 1].view(b, -1)
            source, target = match(weighted_mean(metric, owner, n), alive, merging)
            owner = order.scatter(1, source, target).gather(1, owner)
        indices = (owner == order).nonzero()[:, 1].view(b, count)
        assignment = torch.searchsorted(indices, owner)
        return merged(tokens, indices, assignment, self.positions)

    def _found(
        self, tokens: Float[Tensor, "b n d"], groups: Int[Tensor, "b n"], count: int
    ) -> Reduction:
        """The encoder's groups, of which every member carries the same token."""
        there = groups.amax(dim=1) + 1
        if not bool((there == count).all()):
            raise InputError(
                f"groups of {there.tolist()} tokens do not make {count}: merge with the same keep"
            )
        first = first_of(groups, count)
        return Reduction(first, at(tokens, first), groups, self.positions)


@dataclass(frozen=True)
class Groups:
    """Which tokens of a field have merged so far; groups are in order of their first members."""

    owner: Int[Tensor, "b n"]  # number of the group of each original token
    sizes: Float[Tensor, "b m"]  # of the groups

    @classmethod
    def single(cls, batch: int, total: int, device: torch.device) -> "Groups":
        """Every token by itself."""
        order = torch.arange(total, device=device).expand(batch, -1)
        return cls(order, torch.ones(batch, total, device=device))

    def joined(self, step: Int[Tensor, "b m"], count: int) -> "Groups":
        """After group g has become part of group `step[g]` of `count`."""
        sizes = self.sizes.new_zeros(len(step), count).scatter_add(1, step, self.sizes)
        return Groups(step.gather(1, self.owner), sizes)


def merge_groups(
    tokens: Float[Tensor, "b m d"],
    keys: Float[Tensor, "b m r"],
    groups: Groups,
    count: int,
) -> tuple[Float[Tensor, "b k d"], Groups]:
    """Merge m groups down to `count` by their keys, in as many rounds as it takes.

    Tokens, and keys between rounds, are means weighted by size: the sum of size times token stays
    what it is.
    """
    keys = keys.detach().float()
    for merging in halvings(tokens.shape[1], count):
        left = tokens.shape[1] - merging
        step = next_numbers(keys, merging)
        tokens, keys = (weighted_mean(t, step, left, groups.sizes) for t in (tokens, keys))
        groups = groups.joined(step, left)
    return tokens, groups


def next_numbers(keys: Float[Tensor, "b m r"], merging: int) -> Int[Tensor, "b m"]:
    """New number of each group when the `merging` best pairs become one each.

    Numbers follow the smallest old number in the new group, so order by first member stays.
    """
    b, m, _ = keys.shape
    order = torch.arange(m, device=keys.device).expand(b, -1)
    source, target = match(keys, order, merging)
    joined = order.scatter(1, source, target)  # one of B stands for its group
    first = order.scatter_reduce(1, joined, order.contiguous(), "amin").gather(1, joined)
    leads = (first == order).long().cumsum(dim=1) - 1  # how many groups began before
    return leads.gather(1, first)


def first_of(groups: Int[Tensor, "b n"], count: int) -> Int[Tensor, "b k"]:
    """The first token of every group."""
    b, n = groups.shape
    order = torch.arange(n, device=groups.device).expand(b, -1).contiguous()
    return order.new_full((b, count), n).scatter_reduce(1, groups, order, "amin")


def halvings(total: int, count: int) -> list[int]:
    """How many tokens merge in each round until `count` are left: half at most."""
    rounds = []
    while total > count:
        rounds.append(min(total - count, total // 2))
        total -= rounds[-1]
    return rounds


def match(
    keys: Float[Tensor, "b n r"], alive: Int[Tensor, "b l"], merging: int
) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
    """The `merging` best pairs (source in A, target in B) among the tokens that are left."""
    # With an odd number the last of A has no partner of its own, which is no obstacle.
    first, second = alive[:, ::2], alive[:, 1::2]
    unit = F.normalize(keys, dim=-1)
    best, partner = (at(unit, first) @ at(unit, second).transpose(1, 2)).max(dim=-1)
    chosen = ranking(best)[:, :merging]
    return first.gather(1, chosen), second.gather(1, partner.gather(1, chosen))
