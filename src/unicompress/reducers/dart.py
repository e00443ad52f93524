"""DART (arXiv 2502.11494): tokens least like a few pivots, so that duplicates go.

Pivots are the image and text tokens with the largest L1 norm of their keys (4 + 4); each pivot adds
the image tokens that are least similar to it (cosine of states), all pivots equally many. Acts
before layer 5 of the language model with the keys of the layer before; prunes 0.778; positions are
kept. The official code takes floor(N (1 - p) / 8) tokens per pivot, so its count falls short; ours
shares out the whole budget, earlier pivots first. The code was read through a second
implementation only.
"""

import torch
from jaxtyping import Float
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
from unicompress.reducers.selection import at, chosen, cosine, kept, ranking
from unicompress.tokens import Grid


@reducers.register("dart")
class DART(Reducer):
    """Duplication-aware choice. tokens [b, n, d] -> [b, k, d]."""

    needs = ("keys", "text_keys", "text", "text_valid")
    source = "previous"

    def __init__(
        self,
        *,
        keep: Keep = 0.222,
        layer: int = 5,
        image_pivots: int = 4,
        text_pivots: int = 4,
        positions: str = "keep",
    ):
        if layer < 1:
            raise InputError(f"layer must be at least 1 (a layer must run before it), got {layer}")
        if image_pivots < 1 or text_pivots < 0:
            raise InputError(
                f"DART needs image pivots and no negative number of text pivots, got "
                f"{image_pivots} and {text_pivots}"
            )
        self.keep = keep
        self.layer = layer
        self.image_pivots = image_pivots
        self.text_pivots = text_pivots
        self.positions = check_positions(positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        return (Step(self.layer, self, self.keep),)

    def reduce(
        self, tokens: Float[Tensor, "b n d"], grid: Grid, signals: Signals, count: int
    ) -> Reduction:
        keys, text_keys = signals.keys, signals.text_keys
        text, there = signals.text, signals.text_valid
        assert keys is not None
        assert text_keys is not None
        assert text is not None
        assert there is not None
        tokens_, text = tokens.float(), text.float()
        own = ranking(keys.float().norm(p=1, dim=-1))[:, : min(self.image_pivots, count)]
        norms = text_keys.float().norm(p=1, dim=-1).masked_fill(~there, -1)
        # Padding counts as no pivot: where a row has fewer texts, its first pivot stands in.
        best = ranking(norms)[:, : min(self.text_pivots, text.shape[1])]
        best = torch.where(there.gather(1, best), best, best[:, :1])
        pivots = torch.cat([at(tokens_, own), at(text, best)], dim=1)
        likeness = cosine(pivots, tokens_)  # [b, pivots, n]
        taken = chosen(own, tokens.shape[1])
        left, number = count - own.shape[1], pivots.shape[1]
        for pivot in range(number):
            share = left // number + (pivot < left % number)
            if share:
                far = (-likeness[:, pivot]).masked_fill(taken, -torch.inf)
                taken = taken | chosen(ranking(far)[:, :share], tokens.shape[1])
        indices = taken.nonzero()[:, 1].view(len(tokens), count)
        return kept(tokens, indices, self.positions)
