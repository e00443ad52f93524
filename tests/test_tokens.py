"""Grids, token specs and compressed tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicompress.errors import InputError
from unicompress.tokens import CompressedTokens, Grid, TokenSpec

sides = st.integers(min_value=1, max_value=40)


@given(rows=sides, columns=sides, stride=st.integers(min_value=1, max_value=9))
def test_pooled_grid_counts_the_cells(rows: int, columns: int, stride: int) -> None:
    cells = {(r // stride, c // stride) for r in range(rows) for c in range(columns)}
    pooled = Grid(rows, columns).pooled(stride)
    assert pooled.length == len(cells)
    assert tuple(pooled) == (max(r for r, _ in cells) + 1, max(c for _, c in cells) + 1)


def test_grid_stride_one_is_the_identity() -> None:
    assert Grid(3, 5).pooled(1) == Grid(3, 5)
    assert Grid(3, 5).length == 15


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Grid(0, 4), "a token grid needs at least one row and one column, got 0x4"),
        (lambda: Grid(4, -1), "a token grid needs at least one row and one column, got 4x-1"),
        (lambda: Grid(4, 4).pooled(0), "stride must be at least 1, got 0"),
        (
            lambda: TokenSpec(Grid(4, 4), 8, 8, 1, 16, 16, manifold="l3"),
            "manifold must be one of none, l2, chunk_l2, got 'l3'",
        ),
    ],
)
def test_mistakes_are_named(make: object, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        make()  # type: ignore[operator]
    assert str(caught.value) == sentence


def test_values_are_frozen_and_comparable() -> None:
    spec = TokenSpec(Grid(4, 6), 8, 8, 1, 16, 24)
    assert spec == TokenSpec(Grid(4, 6), 8, 8, 1, 16, 24)
    assert len({Grid(2, 2), Grid(2, 2), Grid(2, 3)}) == 2
    with pytest.raises(AttributeError):
        spec.dim = 9  # type: ignore[misc]


def test_sequence_puts_globals_first() -> None:
    globals_, locals_ = torch.zeros(2, 3, 4), torch.ones(2, 6, 4)
    tokens = CompressedTokens(globals_, locals_, Grid(2, 3), Grid(4, 6), 2)
    assert tokens.length == 9
    torch.testing.assert_close(tokens.sequence[:, :3], globals_)
    torch.testing.assert_close(tokens.sequence[:, 3:], locals_)
