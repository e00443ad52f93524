"""G2TR (arXiv 2605.12309): the generation branch's latent says which tokens to keep.

1. Anchors: the latent of the generation branch (posterior mean), 2 x 2 patchified, 2 x 2 averaged.
2. Token (r, c) of a gh x gw field belongs to the anchor cell (floor(r Gh / gh), floor(c Gw / gw)).
3. Score: how consistent a token is with the latent of its anchor.
4. Every cell keeps its best token; the remaining places go to the highest scores of the image.
   With fewer places than cells, the best cells keep theirs.
5. Every dropped token is merged into the most similar kept one; the count stays.
6. The sequence is rebuilt by the host: kept tokens have their own positions or are renumbered.

Steps 2 and 4 and the rounding of K were confirmed on the masks that the authors published; no code
exists. The paper does not give the formulas of steps 3 and 5: `score` and `merge` are our readings,
named in full in the class. The paper's host is BAGEL, where all tokens of an image share one
position, so that step 6 has no effect there. In understanding, the encoder of the latent is extra
work that the paper's 1.94x leaves out (see `cost`).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import (
    at,
    cosine,
    kept,
    merged,
    nearest,
    places,
    ranking,
    weighted_mean,
)
from unicompress.tokens import Grid

SCORES = {
    "projection": ("anchor_tokens", "anchor_grid"),
    "relational": ("anchors", "anchor_grid"),
    "detail": ("anchors", "anchor_grid"),
}
MERGES = ("none", "mean", "cosine", "softmax")
SCOPES = ("cell", "neighbors", "image")


def anchors_of(
    latent: Float[Tensor, "b w H W"], *, patch: int = 2, pool: int = 2
) -> tuple[Float[Tensor, "b a v"], Grid]:
    """Latent (posterior mean) to anchors in raster order and their grid (step 1).

    v = w * patch^2. An edge that does not fill a patch is repeated; edge cells of the pooling
    average over what is there. A latent with 16 pixels per place needs no patches (`patch` 1).
    """
    height, width = latent.shape[-2:]
    if height % patch or width % patch:
        latent = F.pad(latent, (0, -width % patch, 0, -height % patch), mode="replicate")
    patches = F.pixel_unshuffle(latent, patch)
    pooled = F.avg_pool2d(patches, pool, ceil_mode=True, count_include_pad=False)
    grid = Grid(pooled.shape[-2], pooled.shape[-1])
    return pooled.flatten(2).transpose(1, 2), grid


def cell_of(grid: Grid, anchor_grid: Grid) -> Int[Tensor, " n"]:
    """Anchor cell of every token by relative position (step 2); any two grids."""
    rows = torch.arange(grid.rows) * anchor_grid.rows // grid.rows
    columns = torch.arange(grid.columns) * anchor_grid.columns // grid.columns
    return (rows[:, None] * anchor_grid.columns + columns).flatten()


def balanced(
    scores: Float[Tensor, "b n"], cell: Int[Tensor, " n"], count: int
) -> Int[Tensor, "b k"]:
    """Every cell's best token, then the best of the rest (step 4); sorted."""
    n = scores.shape[1]
    rank = places(ranking(scores))
    best = torch.full((len(scores), int(cell.max()) + 1), n, device=scores.device)
    best.scatter_reduce_(1, cell.expand_as(rank), rank, "amin")
    first = rank == best.gather(1, cell.expand_as(rank))  # the best token of its cell
    return torch.where(first, rank, rank + n).argsort(dim=-1)[:, :count].sort(dim=-1).values


@reducers.register("g2tr")
class G2TR(Reducer):
    """Balanced selection by consistency with the generation branch, then merging.

    `score`:
    * `projection`: cos(u_i, a) in the language model's space, a being the anchor through the
      generation branch's own input projection. `center` subtracts each image's mean from both,
      since two projections share a large common offset (ours).
    * `relational`: for hosts without that projection, the correlation of two rows: similarity of
      token i to the mean token of every cell, and of its anchor to every anchor. Any two spaces.
    * `detail`: |z - mean z| of the anchor, a control that never looks at the tokens.

    `merge`: `mean` (all tokens of a group weigh the same), `cosine` (weight max(0, cos), the kept
    token 1), `softmax` (weight exp(cos)), `none`. `scope`: a token merges within its own `cell`,
    the 3 x 3 cells around (`neighbors`), or the `image`. tokens [b, n, d] -> [b, floor(keep n), d];
    anchors [b, a, any width] on any grid. The default ratio is the paper's.
    """

    content_only = False

    def __init__(
        self,
        *,
        keep: Keep = 0.5,
        score: str = "projection",
        merge: str = "mean",
        scope: str = "cell",
        center: bool = True,
        positions: str = "keep",
    ):
        for name, value, known in (
            ("score", score, tuple(SCORES)),
            ("merge", merge, MERGES),
            ("scope", scope, SCOPES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.keep = keep
        self.score = score
        self.merge = merge
        self.scope = scope
        self.center = center
        self.positions = check_positions(positions)
        self.needs = SCORES[score]

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        anchor_grid = signals.anchor_grid
        assert anchor_grid is not None
        cell = cell_of(grid, anchor_grid).to(tokens.device)
        indices = balanced(self.scores(tokens, cell, signals), cell, count)
        if self.merge == "none":
            return kept(tokens, indices, self.positions)
        allowed = self._allowed(cell, indices, anchor_grid)
        assignment = nearest(tokens.float(), indices, allowed)
        weights = self._weights(tokens, indices, assignment)
        return merged(tokens, indices, assignment, self.positions, weights)

    def scores(
        self, tokens: Float[Tensor, "b n d"], cell: Int[Tensor, " n"], signals: Signals
    ) -> Float[Tensor, "b n"]:
        """Consistency of every token with the latent of its anchor (step 3)."""
        anchors = signals.anchor_tokens if self.score == "projection" else signals.anchors
        assert anchors is not None
        grid = signals.anchor_grid
        assert grid is not None
        if anchors.shape[1] != grid.length:
            raise InputError(
                f"{anchors.shape[1]} anchors do not fill a grid of {grid.rows}x{grid.columns}: "
                "pass the grid of these anchors"
            )
        tokens, anchors = tokens.float(), anchors.float()
        index = cell.expand(len(tokens), -1)
        if self.score == "detail":
            detail = (anchors - anchors.mean(dim=1, keepdim=True)).norm(dim=-1)
            return detail.gather(1, index)
        if self.score == "relational":
            means = weighted_mean(tokens, index, anchors.shape[1])
            filled = torch.bincount(cell, minlength=anchors.shape[1]) > 0
            own = cosine(tokens, means)[:, :, filled]  # [b, n, filled cells]
            theirs = cosine(anchors, anchors)[:, cell][:, :, filled]
            own, theirs = (x - x.mean(dim=-1, keepdim=True) for x in (own, theirs))
            return F.cosine_similarity(own, theirs, dim=-1)
        if anchors.shape[-1] != tokens.shape[-1]:
            raise InputError(
                f"anchor_tokens are {anchors.shape[-1]} wide and tokens {tokens.shape[-1]}: "
                "project them into the same space, or use score='relational'"
            )
        if self.center:
            tokens = tokens - tokens.mean(dim=1, keepdim=True)
            anchors = anchors - anchors.mean(dim=1, keepdim=True)
        return F.cosine_similarity(tokens, at(anchors, index), dim=-1)

    def _allowed(
        self, cell: Int[Tensor, " n"], indices: Int[Tensor, "b k"], grid: Grid
    ) -> Bool[Tensor, "b n k"] | None:
        if self.scope == "image":
            return None
        reach = 0 if self.scope == "cell" else 1
        row, column = cell // grid.columns, cell % grid.columns
        near = [
            (place[:, None] - place[indices][:, None, :]).abs() <= reach for place in (row, column)
        ]
        return near[0] & near[1]

    def _weights(
        self,
        tokens: Float[Tensor, "b n d"],
        indices: Int[Tensor, "b k"],
        assignment: Int[Tensor, "b n"],
    ) -> Float[Tensor, "b n"] | None:
        if self.merge == "mean":
            return None
        similarity = F.cosine_similarity(tokens, at(at(tokens, indices), assignment), dim=-1)
        return similarity.exp() if self.merge == "softmax" else similarity.clamp(min=0)
