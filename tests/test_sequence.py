"""Eq. 5, packing and masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicompress.sequence import (
    IGNORED,
    PADDING,
    SHARED,
    ImageLayout,
    pack_text,
    pad_left,
    visible,
)
from unicompress.tokens import Grid


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
def test_layout_is_equation_five(count: int, rows: int, columns: int) -> None:
    layout = ImageLayout(count, Grid(rows, columns))
    tokens = torch.arange(layout.tokens)[None, :, None]
    row = layout.arrange(torch.tensor([[-1], [-2], [-3]]), tokens)[0, :, 0].tolist()
    separator = [-2] if count else []
    locals_ = list(range(count, layout.tokens))
    assert row == [-1, *range(count), *separator, *locals_, -3]
    assert len(row) == layout.length
    if count:
        assert row[layout.separator] == -2
    # Every code stands right behind the position that predicts it.
    assert [row[place + 1] for place in layout.predictors] == list(range(layout.tokens))


def test_paper_lengths() -> None:
    dense, compressed = ImageLayout(0, Grid(16, 16)), ImageLayout(4, Grid(8, 8))
    assert (dense.tokens, dense.length) == (256, 258)
    assert (compressed.tokens, compressed.length) == (68, 71)


def test_pack_text_by_hand() -> None:
    packed = pack_text([[([5, 6], [7, 8]), ([9], [3])], [([4], [])]])
    assert packed.ids.tolist() == [[5, 6, 7, 9], [4, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert packed.groups.tolist() == [[1, 1, 1, 2], [1, PADDING, PADDING, PADDING]]
    assert packed.targets.tolist() == [[IGNORED, 7, 8, 3], [IGNORED] * 4]
    assert packed.last.tolist() == [[2, 3], [0, 0]]
    assert packed.lengths.tolist() == [[3, 1], [1, 0]]


def test_visible_by_hand() -> None:
    groups = torch.tensor([[SHARED, 1, 1, 2, PADDING]])
    mask = visible(groups, groups, first=0)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    last = visible(groups[:, 3:], groups, first=3)
    assert last[0, 0].int().tolist() == mask[3:]


@given(st.lists(st.lists(st.integers(SHARED, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_every_query_sees_something(rows: list[list[int]]) -> None:
    groups = torch.tensor(rows) - 1
    assert visible(groups, groups, first=0).any(dim=-1).all()


@pytest.mark.parametrize(
    ("prompts", "ragged"), [([[1, 2], [3]], True), ([[1], [3]], False), ([[], []], False)]
)
def test_pad_left(prompts: list[list[int]], ragged: bool) -> None:
    padded = pad_left(prompts)
    assert padded.ragged == ragged
    assert padded.offsets.tolist() == [len(p) for p in prompts]
    for row, prompt in enumerate(prompts):
        kept = padded.groups[row] == SHARED
        assert padded.ids[row][kept].tolist() == prompt
        assert kept.tolist() == sorted(kept.tolist())
