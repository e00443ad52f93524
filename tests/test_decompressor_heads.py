import itertools

import pytest
import torch

from unicompress.decompressor_heads import CodesHead, RegressionHead, Sampling, code_rows
from unicompress.errors import InputError

SIZE = 7


def test_code_rows_are_embeddings_with_the_other_places_at_their_mean():
    tables = torch.randn(3, SIZE, 2)
    rows = code_rows(lambda codes: tables[torch.arange(3), codes].flatten(-2), 3, SIZE)
    for place, code in itertools.product(range(3), range(SIZE)):
        expected = tables.mean(dim=1)
        expected[place] = tables[place, code]
        torch.testing.assert_close(rows[place, code], expected.flatten())


def test_one_code_per_token_gives_the_table():
    table = torch.randn(SIZE, 5)
    assert torch.equal(code_rows(lambda codes: table[codes[..., 0]], 1, SIZE)[0], table)


def test_logits_start_as_a_gaussian_around_the_parent():
    rows = torch.randn(2, SIZE, 4)
    head = CodesHead(8, 4, 2, SIZE, rows)
    torch.nn.init.zeros_(head.out.weight)
    parents = torch.randn(1, 3, 4)
    shares = head(torch.randn(1, 3, 1, 8), parents, torch.zeros(4), torch.ones(4)).softmax(-1)
    distance = (parents[0, :, None, None] - rows).square().sum(-1)  # [n, c, v]
    expected = (-distance * head.log_precision.exp()[:, None]).softmax(-1)
    torch.testing.assert_close(shares[0, :, 0], expected)


def test_regression_starts_at_the_parent_and_speaks_in_the_scale_of_dense_tokens():
    children, parents = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 5)
    mean, scale = torch.randn(5), torch.rand(5)
    residual = RegressionHead(8, 5, residual=True)(children, parents, mean, scale)
    assert torch.equal(residual, parents[:, :, None].expand(-1, -1, 4, -1))
    plain = RegressionHead(8, 5, residual=False)
    expected = mean + plain.out(children) * scale
    torch.testing.assert_close(plain(children, parents, mean, scale), expected)


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"rows must have shape \[2, 7, 4\], got \[1, 7, 4\]"):
        CodesHead(8, 4, 2, SIZE, torch.randn(1, SIZE, 4))
    for temperature, generator in ((1.0, None), (-1.0, torch.Generator())):
        sampling = Sampling(lambda codes: codes, generator, temperature)
        with pytest.raises(InputError, match="it must be positive, and a generator"):
            sampling.draw(torch.zeros(1, 1, SIZE))
