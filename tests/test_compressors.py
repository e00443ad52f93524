import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import equations

from unicompress.compressors import compressors
from unicompress.errors import InputError
from unicompress.tokens import Grid

NAMES = compressors.names()
LEARNED = ["strided_conv", "gated", "mixer"]


def build(name, dim=6, stride=2):
    torch.manual_seed(0)
    return compressors.build(name, dim=dim, stride=stride)


@pytest.mark.parametrize("name", NAMES)
def test_stride_one_is_the_identity(name):
    dense = torch.randn(2, 15, 6)
    assert torch.equal(build(name, stride=1)(dense, Grid(3, 5)), dense)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    stride=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 3),
)
def test_any_grid_gives_one_token_per_cell(name, rows, columns, stride, batch):
    grid = Grid(rows, columns)
    compressor = build(name, stride=stride)
    dense = torch.randn(batch, grid.length, 6)
    pooled = compressor(dense, grid)
    assert pooled.shape == (batch, grid.pooled(stride).length, 6)
    assert bool(pooled.isfinite().all())
    alone = torch.cat([compressor(one[None], grid) for one in dense])
    torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["average", "max", "top_k"])
@pytest.mark.parametrize(
    ("rows", "columns", "stride"), [(4, 4, 2), (5, 3, 2), (7, 9, 4), (3, 5, 8)]
)
def test_eq_3_and_its_variants_are_the_reference(name, rows, columns, stride):
    dense = torch.randn(2, rows * columns, 6, dtype=torch.float64)
    pooled = build(name, stride=stride)(dense, Grid(rows, columns))
    for mine, field in zip(pooled, dense, strict=True):
        expected = equations.pool(field.numpy(), rows, columns, stride, name)
        np.testing.assert_allclose(mine.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(5, 3)])
def test_learned_compressors_start_as_the_mean_and_learn(name, grid):
    dense = torch.randn(2, grid.length, 6)
    compressor = build(name)
    torch.testing.assert_close(compressor(dense, grid), build("average")(dense, grid))
    compressor(dense, grid).square().sum().backward()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter -= 0.1 * parameter.grad
    assert not torch.allclose(compressor(dense, grid), build("average")(dense, grid), atol=1e-4)


def test_top_k_keeps_tokens_as_they_are():
    dense = torch.randn(1, 16, 6)
    kept = build("top_k")(dense, Grid(4, 4))[0]
    assert all(any(torch.equal(token, old) for old in dense[0]) for token in kept)


def test_the_spec_rebuilds_it():
    assert str(build("mixer")) == "mixer(dim=6, stride=2, width=128)"
    assert str(compressors.build(str(build("gated")))) == str(build("gated"))


def test_mistakes_are_named():
    with pytest.raises(InputError, match="stride must be at least 1, got 0"):
        build("average", stride=0)
    with pytest.raises(InputError, match="built for tokens of width 6, got 5"):
        build("average")(torch.zeros(1, 4, 5), Grid(2, 2))
    with pytest.raises(InputError, match="a 2x2 grid needs tokens"):
        build("average")(torch.zeros(1, 5, 6), Grid(2, 2))
