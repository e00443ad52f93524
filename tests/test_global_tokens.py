import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import equations
from torch.nn import functional as F

from unicompress.decompressors import Decompressor
from unicompress.errors import InputError
from unicompress.global_tokens import global_tokens
from unicompress.layers import from_cells, grid_coordinates, position_features, to_cells
from unicompress.tokens import Grid

SPECS = ["meta", "meta(depth=3, mixing=1)", "meta(positions=False)", "mean", "cls"]
SMALL = {"meta": {"width": 16, "heads": 2}, "mean": {}, "cls": {"width": 16, "heads": 2}}


def build(spec, dim=6, count=4):
    torch.manual_seed(0)
    return global_tokens.build(spec, dim=dim, count=count, **SMALL[spec.split("(")[0]])


def fields(images, grid, dim=6):
    """Images that differ: each channel has its own mean and scale, each image its own tint."""
    tint = torch.randn(images, 1, dim)
    noise = torch.randn(images, grid.length, dim)
    return (tint + noise) * torch.linspace(0.1, 3.0, dim) + torch.linspace(-5.0, 5.0, dim)


@pytest.mark.parametrize("positions", [True, False])
def test_meta_is_eq_1_and_2(positions):
    grid, heads = Grid(3, 5), 2
    meta = build(f"meta(positions={positions})").double()
    meta.slots.data.normal_()
    meta.norm.weight.data.normal_()
    dense = torch.randn(2, grid.length, 6, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in meta.state_dict().items()}
    w_in, b_in = w["attention.project.weight"], w["attention.project.bias"]
    field = dense.numpy() @ w["field_in.weight"].T + w["field_in.bias"]
    if positions:
        field = field + position_features(grid_coordinates(grid), 16).numpy()
    queries = w["queries"] @ w["query_in.weight"].T + w["query_in.bias"]
    for image, result in enumerate(meta(dense, grid)):
        q = queries @ w_in[:16].T + b_in[:16]  # Q W_Q
        k = field[image] @ w_in[16:32].T + b_in[16:32]  # X W_K
        v = field[image] @ w_in[32:].T + b_in[32:]  # X W_V
        found = equations.multi_head_attention(q, k, v, heads)
        found = found @ w["attention.out.weight"].T + w["attention.out.bias"]
        for slot in range(4):
            total = w["queries"][slot] + w["out.weight"] @ found[slot] + w["slots"][slot]
            expected = equations.layer_norm(total, w["norm.weight"], w["norm.bias"])
            np.testing.assert_allclose(result[slot].detach().numpy(), expected, atol=1e-6)


def test_mean_is_a_map_of_the_mean():
    mean = build("mean").double()
    dense = torch.randn(1, 6, 6, dtype=torch.float64)
    found = mean(dense, Grid(2, 3))[0]
    for slot in range(4):
        row = dense[0].mean(0).numpy() @ mean.maps[slot].detach().numpy()
        expected = equations.layer_norm(row, np.ones(6), np.zeros(6))
        np.testing.assert_allclose(found[slot].detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    count=st.integers(0, 5),
    dim=st.sampled_from([1, 4, 7]),
    batch=st.integers(1, 3),
)
def test_any_grid_gives_count_tokens(spec, rows, columns, count, dim, batch):
    grid = Grid(rows, columns)
    module = build(spec, dim=dim, count=count)
    dense = torch.randn(batch, grid.length, dim)
    found = module(dense, grid)
    assert found.shape == (batch, count, dim)
    alone = torch.cat([module(one[None], grid) for one in dense])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_smaller_count_is_a_prefix(spec):
    module, grid = build(spec), Grid(3, 3)
    dense = torch.randn(2, 9, 6)
    for count in range(5):
        assert torch.equal(module(dense, grid, count), module(dense, grid)[:, :count])
    with pytest.raises(InputError, match="this model has 4 global tokens, 5 were asked for"):
        module(dense, grid, 5)


@pytest.mark.parametrize("spec", SPECS)
def test_calibration_makes_globals_vary_like_the_field(spec):
    grid = Grid(4, 5)
    module, dense = build(spec), fields(200, grid)
    module.calibrate(dense, grid)
    found = module(dense, grid)
    scale = dense.std(dim=(0, 1))
    # Each slot varies over images about as much as X does, in every channel, around X's mean.
    assert bool((found.std(dim=0) / scale > 0.5).all())
    assert bool((found.std(dim=0) / scale < 1.5).all())
    assert bool(((found.mean(dim=0) - dense.mean(dim=(0, 1))).abs() / scale < 0.5).all())


@pytest.mark.parametrize("spec", ["meta", "cls", "mean"])
def test_calibration_undoes_the_scale_of_the_field(spec):
    grid = Grid(4, 5)
    dense = fields(64, grid)
    plain, scaled = build(spec), build(spec)
    plain.calibrate(dense, grid)
    scaled.calibrate(7 * dense + 3, grid)
    torch.testing.assert_close(
        scaled(7 * dense + 3, grid), 7 * plain(dense, grid) + 3, atol=0.02, rtol=1e-3
    )


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_every_weight(spec):
    module, grid = build(spec), Grid(4, 5)
    module.calibrate(fields(8, grid), grid)
    weights = torch.randn(3, 4, 6)
    (module(fields(3, grid), grid) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        dead = name.startswith("mixer.inner")  # behind convolutions that start at zero
        assert dead or float(parameter.grad.abs().sum()) > 0, name


def test_the_field_passes_through_unchanged():
    dense = fields(2, Grid(2, 2))
    before = dense.clone()
    build("meta")(dense, Grid(2, 2))
    assert torch.equal(dense, before)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="pass at least 2"):
        build("meta").calibrate(torch.zeros(1, 4, 6), Grid(2, 2))
    with pytest.raises(InputError, match="must not be negative, got -1"):
        build("mean", count=-1)
    with pytest.raises(InputError, match="read tokens of width 6, got 5"):
        build("mean")(torch.zeros(1, 4, 5), Grid(2, 2))
    with pytest.raises(InputError, match="depth must be at least 1"):
        build("meta(depth=0)")


def test_globals_learn_what_pooling_loses():
    """Each image repeats one of four zero-mean patterns, which the mean of a cell cannot show."""
    grid, patterns = Grid(4, 4), torch.randn(4, 4, 4)
    patterns = patterns - patterns.mean(dim=1, keepdim=True)
    extractor = build("meta", dim=4, count=2)
    decompressor = Decompressor(
        code_dim=4, codes_per_token=1, codebook_size=1, order="parallel", head="regression",
        width=32, depth=1, heads=2, residual=True,
    )  # fmt: skip

    def images(count):
        cells = torch.randn(count, 4, 1, 4) + patterns[torch.randint(4, (count, 1))]
        return from_cells(cells, grid, 2)

    def losses(dense):
        locals_ = to_cells(dense, grid, 2).mean(dim=2)
        globals_ = extractor(dense, grid)
        rolled = globals_.roll(1, dims=0)
        return [F.mse_loss(decompressor(g, locals_, grid, 2), dense) for g in (globals_, rolled)]

    extractor.calibrate(images(64), grid)
    parameters = [*extractor.parameters(), *decompressor.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    with torch.no_grad():
        before, _ = losses(images(256))
    for _ in range(80):
        optimizer.zero_grad()
        losses(images(32))[0].backward()
        optimizer.step()
    with torch.no_grad():
        after, shuffled = losses(images(256))
    assert float(after) < 0.3 * float(before)
    assert float(shuffled) > 2 * float(after)
