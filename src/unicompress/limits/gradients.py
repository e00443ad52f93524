"""Do understanding and generation pull the shared weights the same way?

The hypothesis of arXiv 2606.01503, section 6.3, which the paper does not measure: that accelerating
each task in its own way makes their gradients incompatible.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unicompress.errors import InputError

Gradient = dict[str, Tensor]  # by name of the parameter; missing: none reached it
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Agreement:
    """Two tasks on one group of weights.

    `cosine` is between the tasks' whole gradients; `within` between two halves of the data of one
    task, which says how much of the disagreement is noise. None where a gradient is zero.
    """

    cosine: float | None
    within: tuple[float | None, float | None]
    weights: int  # entries in the group
    reached: tuple[float, float, float]  # shares of them with a gradient of task 1, 2, and both

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cosine": self.cosine,
            "cosine_within_understanding": self.within[0],
            "cosine_within_generation": self.within[1],
            "weights": self.weights,
            "reached_by_understanding": self.reached[0],
            "reached_by_generation": self.reached[1],
            "reached_by_both": self.reached[2],
        }


def compare_tasks(
    module: nn.Module, first: tuple[Sequence[Loss], ...], second: tuple[Sequence[Loss], ...]
) -> dict[str, Agreement]:
    """Compare two tasks on all trainable weights, by `group_of` and over all (`all`).

    Each task comes as two halves of its losses; a half's gradient is the mean over its losses.
    The module's own gradients are not touched.
    """
    if not all(len(task) == 2 and all(task) for task in (first, second)):
        raise InputError("each task needs two halves of at least one loss")
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    halves = [[_gradient(parameters, losses) for losses in task] for task in (first, second)]
    wholes = [_sum(task) for task in halves]
    groups: dict[str, list[str]] = {"all": list(parameters)}
    for name in parameters:
        groups.setdefault(group_of(name), []).append(name)
    return {
        group: Agreement(
            cosine=_cosine(wholes[0], wholes[1], names),
            within=(
                _cosine(halves[0][0], halves[0][1], names),
                _cosine(halves[1][0], halves[1][1], names),
            ),
            weights=sum(parameters[name].numel() for name in names),
            reached=_reached(parameters, wholes, names),
        )
        for group, names in groups.items()
    }


def group_of(name: str) -> str:
    """`layer 3`, `image projections`, `vocabulary`, or `other` for a parameter of a backbone."""
    if "image_projections" in name:
        return "image projections"
    layer = re.search(r"\blayers\.(\d+)\.", name) if "projector" not in name else None
    if layer:
        return f"layer {layer[1]}"
    if "embed_tokens" in name or "lm_head" in name:
        return "vocabulary"
    return "projector" if "projector" in name else "other"


def _gradient(parameters: Mapping[str, nn.Parameter], losses: Sequence[Loss]) -> Gradient:
    """Of the mean of some losses, in float64."""
    total: Gradient = {}
    for loss in losses:
        found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0) + gradient.detach().double() / len(losses)
    return total


def _sum(parts: Sequence[Gradient]) -> Gradient:
    names = {name for part in parts for name in part}
    return {name: torch.stack([p[name] for p in parts if name in p]).sum(0) for name in names}


def _cosine(one: Gradient, two: Gradient, names: Sequence[str]) -> float | None:
    shared = [name for name in names if name in one and name in two]
    dot = sum(float((one[name] * two[name]).sum()) for name in shared)
    norms = [
        sum(float(g[name].square().sum()) for name in names if name in g) ** 0.5 for g in (one, two)
    ]
    return dot / (norms[0] * norms[1]) if norms[0] and norms[1] else None


def _reached(
    parameters: Mapping[str, nn.Parameter], wholes: Sequence[Gradient], names: Sequence[str]
) -> tuple[float, float, float]:
    counts = [0, 0, 0]
    for name in names:
        marks = [g[name] != 0 if name in g else torch.zeros(1).bool() for g in wholes]
        for place, mark in enumerate((*marks, marks[0] & marks[1])):
            counts[place] += int(mark.sum())
    total = sum(parameters[name].numel() for name in names)
    first, second, both = (count / total for count in counts)
    return first, second, both
