import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import equations

from unicompress.errors import InputError
from unicompress.layers import (
    Attention,
    Block,
    GridMixer,
    StepDecoder,
    cell_mask,
    from_cells,
    grid_coordinates,
    parent_index,
    position_features,
    to_cells,
)
from unicompress.tokens import Grid


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_the_reference(causal):
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    tokens = torch.randn(1, 7, 12, dtype=torch.float64)
    q, k, v = (p[0].detach().numpy() for p in attention.project(tokens).chunk(3, dim=-1))
    mixed = torch.from_numpy(equations.multi_head_attention(q, k, v, 3, causal))
    torch.testing.assert_close(attention(tokens, causal=causal)[0], attention.out(mixed))


def test_cross_attention_is_the_reference():
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    tokens, memory = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    q = attention.project(tokens)[0, :, :8].detach().numpy()
    k, v = attention.project(memory)[0, :, 8:].detach().chunk(2, dim=-1)
    mixed = torch.from_numpy(equations.multi_head_attention(q, k.numpy(), v.numpy(), 2))
    found = attention.attend(tokens, attention.keys_values(memory))
    torch.testing.assert_close(found[0], attention.out(mixed))


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
def test_steps_give_what_the_causal_mask_gives(cross):
    torch.manual_seed(0)
    block = Block(16, 4, cross=cross).double()
    tokens, memory = torch.randn(2, 6, 16).double(), torch.randn(2, 3, 16).double()
    read = block.cross_attention.keys_values(memory) if cross else None
    decoder = StepDecoder([block], [read] if cross else None, tokens, 6)
    steps = [decoder.step(tokens[:, i : i + 1], i) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(tokens, memory=read, causal=True))


def test_width_must_fit_the_heads():
    with pytest.raises(InputError, match="width 10 is not a multiple of heads 4"):
        Attention(10, 4)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    stride=st.sampled_from([1, 2, 3, 4, 8]),
    trailing=st.sampled_from([(3,), (2, 3)]),
)
def test_cells_come_back_as_the_field(rows, columns, stride, trailing):
    grid = Grid(rows, columns)
    field = torch.randn(2, grid.length, int(np.prod(trailing)))
    cells = to_cells(field, grid, stride)
    assert cells.shape[:3] == (2, grid.pooled(stride).length, stride**2)
    assert int(cell_mask(grid, stride).sum()) == grid.length
    back = from_cells(cells.unflatten(-1, trailing), grid, stride)
    assert torch.equal(back.flatten(2), field)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), stride=st.integers(1, 5))
def test_parent_index_names_the_cell_of_every_place(rows, columns, stride):
    grid = Grid(rows, columns)
    places = torch.arange(1, grid.length + 1).float().view(1, -1, 1)  # 0 is beyond the edge
    cells = to_cells(places, grid, stride)[0, :, :, 0]
    for place, cell in enumerate(parent_index(grid, stride).tolist()):
        assert place + 1 in cells[cell].tolist()


def test_positions_are_the_reference_and_know_the_stride():
    grid = Grid(3, 5)
    assert grid_coordinates(grid, 2).tolist()[:2] == [[0.5, 0.5], [0.5, 2.5]]
    features = position_features(grid_coordinates(grid, 2).double(), 18)
    for place, row in zip(grid_coordinates(grid, 2).tolist(), features, strict=True):
        np.testing.assert_allclose(row.numpy(), equations.position(*place, 18), atol=1e-6)


def test_grid_mixer_starts_as_the_identity_and_then_sees_neighbors_only():
    torch.manual_seed(0)
    mixer = GridMixer(4, 1)
    grid, tokens = Grid(5, 7), torch.randn(1, 35, 4)
    assert torch.equal(mixer(tokens, grid), tokens)
    for convolution in mixer.outer:
        torch.nn.init.normal_(convolution.weight)
    changed = tokens.clone()
    changed[0, 0] += 1.0
    moved = (mixer(changed, grid) - mixer(tokens, grid)).abs().sum(-1).view(5, 7) > 1e-6
    assert bool(moved[:3, :3].any())
    assert not bool(moved[3:].any())
    assert not bool(moved[:, 3:].any())


def test_a_field_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(InputError, match=r"a 2x3 grid needs tokens of shape \[batch, 6, width\]"):
        to_cells(torch.zeros(1, 5, 2), Grid(2, 3), 2)
