import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import training_toy as toy
from unicompress.errors import RecipeError
from unicompress.training.optimizers import build_optimizers


def language_model(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def owners(model: nn.Module, name: str) -> dict[str, str]:
    """Which optimiser trains each weight."""
    built = build_optimizers(model, toy.recipe("unused", optimizer=name))
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: type(member).__name__
        for member in built.members
        for group in member.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tied: bool) -> None:
    model = language_model(tied=tied)
    found = owners(model, "muon")
    assert set(found) == {name for name, _ in model.named_parameters()}
    inner = {name for name, owner in found.items() if owner == "Muon"}
    assert inner == {n for n in found if "_proj.weight" in n}


def test_adamw_takes_everything() -> None:
    assert set(owners(language_model(), "adamw").values()) == {"AdamW"}


def test_what_is_frozen_is_left_alone() -> None:
    model = language_model()
    model.model.layers[0].requires_grad_(False)
    assert not [name for name in owners(model, "muon") if "layers.0." in name]
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing to train"):
        owners(model, "muon")


def test_both_step_with_the_rate_that_is_set() -> None:
    torch.manual_seed(0)
    model = language_model()
    built = build_optimizers(model, toy.recipe("unused", optimizer="muon"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for rate in (0.0, 0.01):
        for group in built.param_groups:
            group["lr"] = rate
        ids = torch.arange(12)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        built.step()
        built.zero_grad()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == (set(before) if rate else set())
    assert all(p.grad is None for p in model.parameters())
