"""IVC-Prune (arXiv 2602.03060): values that resemble the question, and positions that anchor space.

1. Rows of the question look for their most similar image values, softmax(V V^T / sqrt d), mean over
   heads and rows: the best 1 % are seeds.
2. Seeds and question together look again: that ranking fills the budget.
3. Beside it, tokens whose RoPE rows have the largest mean cosine, and the largest mean sine, stay.
All layers lose the dropped tokens, those already cached too; positions are kept.

The official code keeps 20 % by value and 5 % + 5 % by position and takes the union, so its count
varies. Ours meets the budget: `spatial` of it goes to each of the two positional choices, the rest
to values. Official layers are 16 (LLaVA, InternVL) and 2 or 22 (Qwen2-VL); ours is the middle.
Where all image tokens share one position (BAGEL), the positional choice is all ties; then
`places='grid'` uses rows and columns in place of RoPE ids, as the published masks on BAGEL suggest.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import (
    Keep,
    Reducer,
    Reduction,
    Signals,
    Step,
    check_positions,
    reducers,
)
from unicompress.reducers.selection import chosen, kept, top
from unicompress.tokens import Grid


@reducers.register("ivc_prune")
class IVCPrune(Reducer):
    """`layer` None is the middle of the language model."""

    needs: tuple[str, ...] = ("values", "text_values", "text_valid", "cosines", "sines")
    source = "next"
    retroactive = True

    def __init__(
        self,
        *,
        keep: Keep = 0.5,
        layer: int | None = None,
        seeds: float = 0.01,
        spatial: float = 1 / 6,
        places: str = "rope",
        positions: str = "keep",
    ):
        if places not in ("rope", "grid"):
            raise InputError(f"places must be rope or grid, got {places!r}")
        if not 0 <= spatial <= 0.5 or not 0 < seeds <= 1:
            raise InputError(
                f"spatial must lie in [0, 0.5] and seeds in (0, 1], got {spatial} and {seeds}"
            )
        self.keep = keep
        self.layer = layer
        self.seeds = seeds
        self.spatial = spatial
        self.places = places
        self.positions = check_positions(positions)
        if places == "grid":
            self.needs = self.needs[:3]

    def steps(self, depth: int) -> tuple[Step, ...]:
        return (Step(depth // 2 if self.layer is None else self.layer, self, self.keep),)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        values, text, there = signals.values, signals.text_values, signals.text_valid
        assert values is not None
        assert text is not None
        assert there is not None
        n = values.shape[2]
        asked = similarity(text, values)  # [b, t, n]
        mean = masked_mean(asked, there)
        seeds = top(mean, max(1, int(self.seeds * n)))
        index = seeds[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[-1])
        again = similarity(values.gather(2, index), values)
        rows = torch.cat([again, asked], dim=1)
        known = torch.cat([torch.ones_like(seeds, dtype=torch.bool), there], dim=1)
        score = masked_mean(rows, known)
        share = int(self.spatial * count)
        taken = torch.zeros_like(score, dtype=torch.bool)
        if share:
            for table in self._tables(grid, signals, tokens):
                best = top(table.masked_fill(taken, -torch.inf), share)
                taken = taken | chosen(best, n)
        # What is taken comes first, then the values' own order.
        score = score.masked_fill(taken, torch.inf)
        return kept(tokens, top(score, count), self.positions)

    def _tables(
        self, grid: Grid, signals: Signals, tokens: Tensor
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Mean cosine and mean sine of every token's position."""
        if self.places == "grid":
            angles = grid_angles(grid).to(tokens.device).expand(len(tokens), -1, -1)
            return angles.cos().mean(dim=-1), angles.sin().mean(dim=-1)
        assert signals.cosines is not None
        assert signals.sines is not None
        cosines = signals.cosines.float()
        if cosines.shape[1] > 1 and bool((cosines == cosines[:, :1]).all()):
            raise InputError(
                "all image tokens share one position, so positions cannot rank them: use "
                "ivc_prune(places='grid')"
            )
        return cosines.mean(dim=-1), signals.sines.float().mean(dim=-1)


def similarity(
    rows: Float[Tensor, "b p t v"], values: Float[Tensor, "b p n v"]
) -> Float[Tensor, "b t n"]:
    """softmax(rows values^T / sqrt d) over the image's tokens, mean over heads."""
    scores = rows.float() @ values.float().transpose(2, 3) / values.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(dim=1)


def masked_mean(rows: Float[Tensor, "b t n"], there: Bool[Tensor, "b t"]) -> Float[Tensor, "b n"]:
    """Mean over the rows that are there."""
    weights = there.to(rows)[..., None]
    return (rows * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def grid_angles(grid: Grid, frequencies: int = 32) -> Float[Tensor, "n f"]:
    """RoPE-like angles of rows and columns, half of the frequencies each."""
    rates = 10000 ** (-torch.arange(frequencies) / frequencies)
    rows = torch.arange(grid.rows).repeat_interleave(grid.columns)
    columns = torch.arange(grid.columns).repeat(grid.rows)
    return torch.cat([rows[:, None] * rates, columns[:, None] * rates], dim=1)
