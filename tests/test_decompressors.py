import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import equations
from torch.nn import functional as F

from unicompress.decompressors import HEADS, ORDERS, Decompressor, code_rows
from unicompress.errors import InputError
from unicompress.tokens import Grid

SIZE = 7  # rows of the codebook
PAIRS = list(itertools.product(ORDERS, HEADS))


def table(chunks, width=2):
    """One code table per place; a token is their concatenation, so its width is chunks * width."""
    return torch.randn(chunks, SIZE, width, generator=torch.Generator().manual_seed(5))


def embedder(tables):
    place = torch.arange(len(tables))
    return lambda codes: tables[place, codes].flatten(-2)


def build(order, head, chunks=1, dtype=torch.float64, **options):
    torch.manual_seed(0)
    tables = table(chunks).to(dtype)
    embed = embedder(tables)
    defaults = {"strides": (1, 2, 4), "width": 16, "depth": 2, "heads": 2, "max_globals": 4}
    if options.get("residual") and head == "codes":
        options["rows"] = code_rows(embed, chunks, SIZE)
    module = Decompressor(
        code_dim=2 * chunks,
        codes_per_token=chunks,
        codebook_size=SIZE,
        order=order,
        head=head,
        **{**defaults, **options},
    )
    return module.to(dtype), embed


def streams(grid, stride, count, width, batch=2, dtype=torch.float64):
    globals_ = torch.randn(batch, count, width, dtype=dtype)
    locals_ = torch.randn(batch, grid.pooled(stride).length, width, dtype=dtype)
    return globals_, locals_, torch.randn(batch, grid.length, width, dtype=dtype)


class Recorded(Decompressor):
    """Keeps what was predicted at each step."""

    def _predict(self, hidden, parents, unit):
        cells = super()._predict(hidden, parents, unit)
        self.__dict__.setdefault("seen", []).append(cells)
        return cells


def test_raster_regression_is_eq_7():
    grid, stride = Grid(3, 5), 2
    literal = {"parent": False, "summary": False, "strides": (2,)}
    module, _ = build("raster", "regression", chunks=2, **literal)
    globals_, locals_, target = streams(grid, stride, 3, 4)
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    found = module(globals_, locals_, grid, stride, target).detach().numpy()
    for image in range(2):
        expected = equations.raster_decompressor(
            weights,
            globals_[image].numpy(),
            locals_[image].numpy(),
            target[image].numpy(),
            grid=tuple(grid),
            stride=stride,
            heads=2,
        )
        np.testing.assert_allclose(found[image], expected, atol=1e-5)  # float32 positions


@pytest.mark.parametrize(("order", "head"), PAIRS)
@settings(max_examples=8)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    stride=st.sampled_from([1, 2, 4]),
    count=st.sampled_from([0, 1, 4]),
    chunks=st.sampled_from([1, 4, 8]),
    residual=st.booleans(),
)
def test_any_shape(order, head, rows, columns, stride, count, chunks, residual):
    grid = Grid(rows, columns)
    module, embed = build(order, head, chunks, residual=residual, depth=1)
    globals_, locals_, target = streams(grid, stride, count, 2 * chunks)
    predicted = module(globals_, locals_, grid, stride, target)
    tail = (chunks, SIZE) if head == "codes" else (2 * chunks,)
    assert predicted.shape == (2, grid.length, *tail)
    out = module.generate(globals_, locals_, grid, stride, embed)
    assert out.dense.shape == target.shape
    assert out.steps == module.steps(grid, stride)
    if head == "codes":
        assert torch.equal(embed(out.codes), out.dense)
    else:
        assert out.codes is None


@pytest.mark.parametrize("chunks", [1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("order", ["raster", "block"])
def test_cached_uncached_and_forced_decoding_agree(order, head, count, chunks):
    grid, stride = Grid(3, 5), 2
    module, embed = build(order, head, chunks, mixing=1, residual=head == "regression")
    module.__class__ = Recorded
    if head == "regression":
        torch.nn.init.normal_(module.predictor.out.weight)  # not only the residual
    globals_, locals_, target = streams(grid, stride, count, 2 * chunks)
    module.calibrate(2 * target + 1)
    with torch.no_grad():
        cached = module.generate(globals_, locals_, grid, stride, embed)
        steps = module.__dict__.pop("seen")
        plain = module.generate(globals_, locals_, grid, stride, embed, use_cache=False)
        module.__dict__.pop("seen")
        module(globals_, locals_, grid, stride, cached.dense)
        (forced,) = module.__dict__.pop("seen")
    assert len(steps) == {"raster": 15, "block": 6}[order]
    torch.testing.assert_close(torch.cat(steps, dim=1), forced)
    torch.testing.assert_close(cached.dense, plain.dense)
    if head == "codes":
        assert torch.equal(cached.codes, plain.codes)


@pytest.mark.parametrize(("order", "head"), PAIRS)
def test_a_batch_is_its_samples(order, head):
    chunks, grid, stride = 4, Grid(5, 3), 2
    module, embed = build(order, head, chunks, parallel_steps=3)
    globals_, locals_, target = streams(grid, stride, 2, 2 * chunks, batch=3)
    whole = module.generate(globals_, locals_, grid, stride, embed)
    forced = module(globals_, locals_, grid, stride, target)
    for i in (0, 2):
        one = slice(i, i + 1)
        alone = module.generate(globals_[one], locals_[one], grid, stride, embed)
        torch.testing.assert_close(alone.dense, whole.dense[one])
        alone = module(globals_[one], locals_[one], grid, stride, target[one])
        torch.testing.assert_close(alone, forced[one])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("order", ["raster", "block"])
def test_the_future_does_not_reach_the_past(order, head):
    grid, stride = Grid(5, 5), 2
    module, _ = build(order, head)
    globals_, locals_, target = streams(grid, stride, 2, 2)
    before = module(globals_, locals_, grid, stride, target)
    row, column = 2, 2  # first child of the fifth cell
    changed = target.clone()
    changed[:, row * 5 + column] += 1.0
    after = module(globals_, locals_, grid, stride, changed)
    moved = (after - before).abs().flatten(2).amax(-1).amax(0) > 1e-9
    for place, hit in enumerate(moved.tolist()):
        r, c = divmod(place, 5)
        later = place > row * 5 + column if order == "raster" else (r // 2, c // 2) > (1, 1)
        assert hit == later


@pytest.mark.parametrize(("order", "head"), PAIRS)
@pytest.mark.parametrize("summary", [True, False])
def test_gradients_reach_globals_locals_and_weights(order, head, summary):
    grid, stride = Grid(4, 4), 2
    module, _ = build(order, head, summary=summary, strides=(2,), parallel_steps=2)
    globals_, locals_, target = streams(grid, stride, 4, 2)
    globals_.requires_grad_()
    locals_.requires_grad_()
    visible = None if module.parallel_steps == 1 else torch.arange(16).expand(2, -1) % 3 == 0
    predicted = module(globals_, locals_, grid, stride, target, visible)
    (predicted * torch.randn_like(predicted)).sum().backward()
    assert bool((globals_.grad.abs().sum(dim=-1) > 0).all())
    assert bool((locals_.grad.abs().sum(dim=-1) > 0).all())
    for name, parameter in module.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("order", ORDERS)
def test_residual_regression_starts_as_nearest_expansion(order):
    grid, stride = Grid(3, 5), 2
    module, _ = build(order, "regression", residual=True)
    globals_, locals_, target = streams(grid, stride, 1, 2)
    module.calibrate(target)
    expanded = module(globals_, locals_, grid, stride, target)
    for row, column in itertools.product(range(3), range(5)):
        parent = locals_[:, (row // 2) * 3 + column // 2]
        torch.testing.assert_close(expanded[:, row * 5 + column], parent)


@pytest.mark.parametrize("chunks", [1, 4])
def test_residual_codes_start_nearest_to_the_local_token(chunks):
    grid, stride = Grid(2, 4), 2
    module, embed = build("block", "codes", chunks, residual=True)
    torch.nn.init.zeros_(module.predictor.out.weight)
    codes = torch.randint(SIZE, (2, 2, chunks))
    found = module.generate(
        torch.zeros(2, 0, 2 * chunks).double(), embed(codes), grid, stride, embed
    )
    assert torch.equal(found.codes, codes[:, [0, 0, 1, 1, 0, 0, 1, 1]])


def test_sampling_follows_its_generator_and_the_distribution():
    grid = Grid(4, 4)
    module, embed = build("parallel", "codes")
    globals_, locals_, _ = streams(grid, 2, 1, 2)
    globals_, locals_ = globals_[:1].repeat(500, 1, 1), locals_[:1].repeat(500, 1, 1)

    def draw(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return module.generate(
            globals_, locals_, grid, 2, embed, generator=generator, temperature=temperature
        ).codes

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    shares = module(globals_[:1], locals_[:1], grid, 2).detach().softmax(-1)[0, :, 0]
    found = F.one_hot(draw(3)[..., 0], SIZE).double().mean(dim=0)
    assert float((found - shares).abs().max()) < 0.1
    likeliest = module.generate(globals_, locals_, grid, 2, embed).codes
    assert torch.equal(draw(4, temperature=1e-6), likeliest)


def test_unmasking_keeps_what_it_has_settled():
    grid = Grid(3, 5)
    module, embed = build("parallel", "codes", parallel_steps=4)
    assert [module._known(done, 15) for done in range(5)] == [0, 2, 5, 10, 15]
    globals_, locals_, _ = streams(grid, 2, 1, 2)
    first = module(globals_, locals_, grid, 2)
    surest = first.softmax(-1)[..., 0, :].amax(-1).argmax(dim=1)
    out = module.generate(globals_, locals_, grid, 2, embed)
    for image, place in enumerate(surest.tolist()):
        assert int(out.codes[image, place, 0]) == int(first[image, place, 0].argmax())


def test_masked_tokens_are_not_seen_and_shown_ones_are():
    grid = Grid(3, 5)
    module, _ = build("parallel", "codes", parallel_steps=2)
    globals_, locals_, target = streams(grid, 2, 1, 2)
    visible = torch.zeros(2, 15, dtype=torch.bool)
    visible[:, 4] = True

    def moved(place):
        changed = target.clone()
        changed[:, place] += 1.0
        pair = [module(globals_, locals_, grid, 2, t, visible) for t in (target, changed)]
        return not torch.allclose(*pair)

    assert moved(4)
    assert not moved(5)


def test_draw_visible_shows_as_many_as_a_pass_would():
    module, _ = build("parallel", "codes", parallel_steps=4)
    visible = module.draw_visible(200, 15, torch.Generator().manual_seed(0))
    assert set(visible.sum(dim=1).tolist()) == {0, 2, 5, 10}
    assert build("parallel", "codes")[0].draw_visible(2, 15, torch.Generator()) is None
    assert (
        build("block", "codes", parallel_steps=4)[0].draw_visible(2, 15, torch.Generator()) is None
    )


@pytest.mark.parametrize("order", ORDERS)
def test_one_module_serves_all_its_strides(order):
    module, embed = build(order, "codes")
    for stride in (1, 2, 4):
        globals_, locals_, _ = streams(Grid(4, 6), stride, 2, 2)
        assert module.generate(globals_, locals_, Grid(4, 6), stride, embed).dense.shape == (
            2,
            24,
            2,
        )
    assert module.steps(Grid(5, 6), 4) == {"raster": 30, "block": 4, "parallel": 1}[order]


def test_state_does_not_hold_the_codebook_of_the_host():
    module, _ = build("block", "codes", residual=True)
    assert not [name for name in module.state_dict() if "rows" in name]


def test_mistakes_are_named():
    grid = Grid(3, 5)
    module, embed = build("block", "codes", strides=(2, 4))
    globals_, locals_, target = streams(grid, 2, 1, 2)
    with pytest.raises(InputError, match="built for strides 2, 4, got 3"):
        module(globals_, locals_, grid, 3, target)
    with pytest.raises(
        InputError, match=r"needs local tokens of shape \[2, 6, 2\], got \[2, 5, 2\]"
    ):
        module(globals_, locals_[:, :5], grid, 2, target)
    with pytest.raises(InputError, match=r"needs a target of shape \[2, 15, 2\], got None"):
        module(globals_, locals_, grid, 2)
    with pytest.raises(InputError, match="at most 4 global tokens, got 5"):
        module(globals_.repeat(1, 5, 1), locals_, grid, 2, target)
    with pytest.raises(InputError, match="global tokens must have shape"):
        module(globals_[..., :1], locals_[..., :1], grid, 2, target[..., :1])
    with pytest.raises(InputError, match="the codes head needs embed"):
        module.generate(globals_, locals_, grid, 2)
    with pytest.raises(InputError, match="a generator must be passed"):
        module.generate(globals_, locals_, grid, 2, embed, temperature=1.0)
    with pytest.raises(InputError, match="order must be one of raster, block, parallel, got 'x'"):
        build("x", "codes")
    with pytest.raises(InputError, match="head must be one of codes, regression"):
        build("block", "x")
    with pytest.raises(InputError, match="strides must be"):
        build("block", "codes", strides=())
    with pytest.raises(InputError, match="residual with the codes head needs rows"):
        Decompressor(code_dim=2, codes_per_token=1, codebook_size=7, residual=True)
