"""What a training-free reducer costs itself, beside the prompt that it shortens."""

from typing import Any

import torch

from unicompress.evals.cost import medians, take_turns
from unicompress.evals.language_models import random_lm
from unicompress.evals.reduction import fitted
from unicompress.reducers.base import Reducer, Signals
from unicompress.reducers.g2tr import G2TR
from unicompress.tokens import Grid


@torch.no_grad()
def overhead(lm: str, *, side: int = 24, text: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Seconds of reducers against those of the prompt they shorten, at a real shape.

    One picture of side^2 tokens and random weights, half of the tokens kept. Only methods that need
    no attention are timed; G2TR without the encoder of its latents.
    """
    model = random_lm(lm)
    width, count = model.config.hidden_size, side**2
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, count, width, generator=draws)
    grid, anchor_grid = Grid(side, side), Grid(side, side).pooled(2)
    signals = Signals(
        anchors=torch.randn(1, anchor_grid.length, 64, generator=draws),
        anchor_tokens=torch.randn(1, anchor_grid.length, width, generator=draws),
        anchor_grid=anchor_grid,
    )
    members: dict[str, Reducer] = {
        "g2tr": G2TR(keep=0.5),
        "g2tr(score='relational')": G2TR(keep=0.5, score="relational"),
        **{name: fitted(name, 0.5, 2) for name in ("average_pool", "tome", "divprune")},
    }
    trunk: Any = model.base_model
    prompt = torch.randn(1, count + text, width, generator=draws)
    tasks: dict[str, Any] = {
        "prefill": lambda: trunk(inputs_embeds=prompt, use_cache=False),
        "prefill_reduced": lambda: trunk(
            inputs_embeds=prompt[:, : count // 2 + text], use_cache=False
        ),
    }
    for name, member in members.items():
        tasks[name] = lambda member=member: member(tokens, grid, signals)
    found = medians(take_turns(tasks, repeats=repeats, label="overhead"))
    saved = found["prefill"] - found["prefill_reduced"]
    return {
        "lm": lm,
        "tokens": count,
        "text": text,
        "seconds": found,
        "share_of_prefill": {name: found[name] / found["prefill"] for name in members},
        "share_of_saving": {name: found[name] / saved for name in members},
    }
