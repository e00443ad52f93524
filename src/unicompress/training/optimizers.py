"""The optimisers that a recipe can ask for: AdamW, or Muon for the matrices inside the layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicompress.errors import RecipeError
from unicompress.training.recipe import LoopRecipe

Group = dict[str, Any]


class Optimizers:
    """One or two optimisers that step together; each trains its own weights."""

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members

    @property
    def param_groups(self) -> list[Group]:
        """The groups of all members; to set a learning rate, or to walk over what is trained."""
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        """One step of each."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for the same recipe and weights."""
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state_dict(own)


def build_optimizers(objective: nn.Module, recipe: LoopRecipe) -> Optimizers:
    """What trains the objective's weights that want gradients.

    AdamW decays matrices only. `muon` hands the weights of linear layers to torch's Muon, scaled
    so that AdamW's learning rate fits both (Liu et al. 2025, "Muon is scalable for LLM training"),
    and leaves embeddings, output heads, convolutions and vectors to AdamW, as its author advises.
    Raises RecipeError where nothing is to be trained.
    """
    inner = list(_inner_matrices(objective)) if recipe.optimizer == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for p in objective.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[Group] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    members: list[torch.optim.Optimizer] = []
    if groups:
        members.append(torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True))
    if inner:
        decay = recipe.weight_decay
        members.append(
            torch.optim.Muon(
                inner, lr=recipe.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if not members:
        raise RecipeError("nothing to train: every weight is frozen under this recipe")
    return Optimizers(*members)


def _inner_matrices(objective: nn.Module) -> Iterator[nn.Parameter]:
    """Trained weights of linear layers, but not of the layer that ends in the vocabulary."""
    done = {id(weight) for weight in _output_weights(objective)}
    for module in objective.modules():
        if not isinstance(module, nn.Linear) or id(module.weight) in done:
            continue
        done.add(id(module.weight))
        if isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
            yield module.weight


def _output_weights(objective: nn.Module) -> Iterator[Tensor]:
    for module in objective.modules():
        if isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Linear):
                yield head.weight
