import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import equations

from unicompress.codebook import Codebook, code_usage, distinct_codes_per_slot, straight_through
from unicompress.errors import InputError


def build(**options):
    torch.manual_seed(0)
    return Codebook(**{"size": 11, "dim": 8, **options})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_eq_4_finds_the_nearest_row(metric, chunks):
    book = build(metric=metric, chunks=chunks).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    codes, embeds = book.quantize(tokens)
    rows = book.rows.detach().numpy()
    for image in range(2):
        for place in range(5):
            for chunk, part in enumerate(tokens[image, place].view(chunks, -1).numpy()):
                expected = equations.nearest_code(part, rows[chunk], metric)
                assert int(codes[image, place, chunk]) == expected
    assert torch.equal(book.embed(codes), embeds)


@settings(max_examples=15, deadline=None)
@given(
    chunks=st.sampled_from([1, 2, 8]),
    metric=st.sampled_from(["l2", "cosine"]),
    batch=st.integers(1, 3),
    count=st.integers(0, 5),
)
def test_looking_up_and_quantising_again_changes_nothing(chunks, metric, batch, count):
    book = build(chunks=chunks, metric=metric)
    if chunks == 8 and metric == "cosine":
        return  # one channel per chunk has only two unit vectors
    codes = torch.randint(11, (batch, count, chunks))
    again, embeds = book.quantize(book.embed(codes))
    assert torch.equal(again, codes)
    assert embeds.shape == (batch, count, 8)


def test_straight_through_gives_value_and_gradient():
    tokens = torch.randn(3, 2, requires_grad=True)
    quantized = torch.randn(3, 2)
    out = straight_through(tokens, quantized)
    torch.testing.assert_close(out, quantized)
    out.sum().backward()
    assert torch.equal(tokens.grad, torch.ones(3, 2))


def test_rows_follow_the_optimizer_or_the_moving_average():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    learned, averaged = build(decay=0.0), build(decay=0.9)
    learned(tokens).loss.backward()
    assert learned.rows.grad is not None
    assert not averaged.rows.requires_grad
    before = averaged.rows.clone()
    codes, _ = averaged.quantize(tokens)
    averaged.update(tokens, codes, seeded())
    used = codes.unique()
    assert bool((averaged.rows[0, used] != before[0, used]).any())
    with pytest.raises(InputError, match="do not call update"):
        learned.update(tokens, codes, seeded())


def test_training_finds_the_clusters_and_revives_dead_rows():
    centers = 5 * torch.randn(11, 8, generator=seeded(1))
    book = build(decay=0.8)
    book.rows.data[:] = 100.0  # far from everything: all but one row dead
    revived = 0
    for step in range(60):
        draw = seeded(step)
        pick = torch.randint(11, (4, 32), generator=draw)
        tokens = centers[pick] + 0.01 * torch.randn(4, 32, 8, generator=draw)
        revived += book.update(tokens, book.quantize(tokens)[0], draw)
    codes, embeds = book.quantize(centers[None])
    assert revived > 0
    assert code_usage(codes, 11).usage > 0.6
    assert float((embeds[0] - centers).square().mean()) < 4.0


def test_equal_generators_give_equal_codebooks():
    tokens = torch.randn(2, 3, 8)  # fewer tokens than rows
    first, second = build(), build()
    for book in (first, second):
        book.initialize(tokens, seeded(3))
        book.update(tokens, book.quantize(tokens)[0], seeded(4))
    assert torch.equal(first.rows, second.rows)


def test_initialize_lowers_the_error():
    tokens = 3 + torch.randn(4, 30, 8)
    book = build()
    before = book(tokens).loss
    book.initialize(tokens, seeded())
    assert float(book(tokens).loss) < 0.5 * float(before)


def test_usage_and_perplexity():
    even = code_usage(torch.arange(8).view(2, 4, 1), 8)
    assert (even.usage, round(even.perplexity, 6)) == (1.0, 8.0)
    collapsed = code_usage(torch.zeros(2, 4, 1, dtype=torch.int64), 8)
    assert (collapsed.usage, round(collapsed.perplexity, 6)) == (1 / 8, 1.0)
    mixed = code_usage(torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]]), 8)
    assert math.isclose(mixed.usage, (1 / 8 + 2 / 8) / 2)
    assert math.isclose(mixed.perplexity, (1.0 + 2.0) / 2)


def test_distinct_codes_per_slot():
    codes = torch.tensor([[[0, 5], [1, 1]], [[0, 6], [1, 1]], [[0, 7], [2, 1]]])
    assert distinct_codes_per_slot(codes).tolist() == [[1, 3], [2, 1]]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="codes must lie in 0 to 10, got 0 to 11"):
        build().embed(torch.tensor([[[0], [11]]]))
    with pytest.raises(InputError, match="cannot be cut into 3"):
        build(chunks=3)
    with pytest.raises(InputError, match="this codebook holds 8 channels, got 7"):
        build().quantize(torch.zeros(1, 1, 7))
    with pytest.raises(InputError, match="metric must be one of l2, cosine"):
        build(metric="l1")
    with pytest.raises(InputError, match="decay must lie in"):
        build(decay=1.0)
