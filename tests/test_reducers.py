"""Every registered reducer keeps the family's promises; the special cases follow."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals, count_kept, reducers
from unicompress.reducers.clustering import density_peaks
from unicompress.reducers.controls import AveragePool
from unicompress.reducers.cost import (
    BAGEL,
    FLUX_ENCODER,
    average_kept,
    cached_tokens,
    image_tokens,
    saving,
)
from unicompress.reducers.debias import Debias, trend_of
from unicompress.reducers.divprune import DivPrune
from unicompress.reducers.fastv import FastV
from unicompress.reducers.g2tr import G2TR, anchors_of, balanced, cell_of
from unicompress.reducers.ivc_prune import IVCPrune
from unicompress.reducers.ppe import PPE
from unicompress.reducers.pyramid_drop import PyramidDrop
from unicompress.reducers.selection import cells, centers, top, top_by_window, windows
from unicompress.reducers.sparsevlm import SparseVLM
from unicompress.reducers.todre import ToDRE
from unicompress.reducers.tome import ToMe
from unicompress.reducers.visionzip import VisionZip
from unicompress.reducers.vscan import VScan
from unicompress.tokens import Grid

NAMES = reducers.names()
# A variant of a method that looks at more than its default does keeps the same promises.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsevlm_plus": ("sparsevlm", {"version": "plus"}),
}
CASES = [*NAMES, *VARIANTS]
GRIDS = [Grid(1, 7), Grid(5, 3), Grid(4, 6)]
D, T, HEADS = 12, 5, 4


def tokens_of(grid: Grid, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, grid.length, D, generator=torch.Generator().manual_seed(seed))


def signals_of(grid: Grid, batch: int = 2, seed: int = 1) -> Signals:
    """Every signal there is, at random; one row has less text than the other."""
    n, draws = grid.length, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draws)

    anchor_grid = grid.pooled(2)
    valid = torch.ones(batch, T, dtype=torch.bool)
    valid[-1, -2:] = False
    return Signals(
        attention=normal(n).softmax(-1),
        shallow_attention=normal(n).softmax(-1),
        image_attention=normal(n).softmax(-1),
        text_attention=normal(HEADS, T, n).softmax(-1),
        keys=normal(n, 6),
        text_keys=normal(T, 6),
        values=normal(HEADS, n, 4),
        text_values=normal(HEADS, T, 4),
        text=normal(T, D),
        text_valid=valid,
        relevance=normal(n),
        cosines=normal(n, 4).cos(),
        sines=normal(n, 4).sin(),
        anchors=normal(anchor_grid.length, 9),
        anchor_tokens=normal(anchor_grid.length, D),
        anchor_grid=anchor_grid,
        text_cosines=normal(T, 4).cos(),
        text_sines=normal(T, 4).sin(),
    )


def permuted(signals: Signals, order: Tensor) -> Signals:
    """The signals of the tokens in another order."""
    values: dict[str, Any] = {}
    for name in signals.given():
        value = getattr(signals, name)
        if name in ("values",):
            value = value[:, :, order]
        elif name == "text_attention":
            value = value[..., order]
        elif not name.startswith(("text", "anchor")):
            value = value[:, order]
        values[name] = value
    return Signals(**values)


def make(name: str, **options: Any) -> Reducer:
    name, variant = VARIANTS.get(name, (name, {}))
    member, options = reducers.get(name), {**variant, **options}
    if "window" in inspect.signature(member.__init__).parameters:
        options.setdefault("window", 2)  # several in the tiny grids used here
    return member(**options)


def equal(a: Any, b: Any) -> bool:
    same = torch.equal(a.indices, b.indices) and torch.equal(a.assignment, b.assignment)
    return same and torch.allclose(a.tokens, b.tokens, atol=1e-6)


# Promises of every method


@pytest.mark.parametrize("name", CASES)
def test_ratio_one_is_the_identity_and_needs_no_signals(name: str) -> None:
    tokens = tokens_of(Grid(4, 6))
    for keep in (1.0, 1, 24, 99):
        result = make(name, keep=keep)(tokens, Grid(4, 6))
        assert torch.equal(result.tokens, tokens)
        assert torch.equal(result.indices, torch.arange(24).expand(2, -1))
        assert torch.equal(result.assignment, result.indices)
        assert torch.equal(result.expand(), tokens)
    assert all(step.keep == 1 for step in make(name, keep=1.0).steps(8))


@pytest.mark.parametrize("name", CASES)
def test_every_budget_is_met_on_every_grid(name: str) -> None:
    for grid in GRIDS:
        tokens, signals = tokens_of(grid), signals_of(grid)
        reducer = make(name)
        for count in range(1, grid.length):
            result = reducer(tokens, grid, signals, count=count)
            assert result.indices.shape == (2, count)
            assert result.tokens.shape == (2, count, D)
            assert torch.isfinite(result.tokens).all()
            indices = result.indices
            assert (indices[:, 1:] > indices[:, :-1]).all(), "sorted, each once"
            assert indices.min() >= 0
            assert indices.max() < grid.length
            assert result.assignment.shape == (2, grid.length)
            assert result.assignment.min() >= -1
            assert result.assignment.max() < count
            own = result.assignment.gather(1, indices)
            assert torch.equal(own, torch.arange(count).expand(2, -1)), "a kept token is its own"
            assert (result.sizes >= 1).all()


@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_its_images_give_alone(name: str) -> None:
    grid = Grid(5, 3)
    tokens, signals = tokens_of(grid), signals_of(grid)
    whole = make(name, keep=6)(tokens, grid, signals)
    for row in range(2):
        one = make(name, keep=6)(tokens[row, None], grid, signals.of(row))
        assert torch.equal(one.indices[0], whole.indices[row])
        assert torch.equal(one.assignment[0], whole.assignment[row])
        torch.testing.assert_close(one.tokens[0], whole.tokens[row])


@pytest.mark.parametrize("name", CASES)
def test_only_methods_that_look_at_content_alone_ignore_the_order(name: str) -> None:
    grid = Grid(4, 6)
    tokens, signals = tokens_of(grid), signals_of(grid)
    order = torch.randperm(grid.length, generator=torch.Generator().manual_seed(3))
    reducer = make(name, keep=9)
    plain = reducer(tokens, grid, signals)
    turned = reducer(tokens[:, order], grid, permuted(signals, order))
    same = torch.equal(order[turned.indices].sort(dim=1).values, plain.indices)
    assert same == reducer.content_only


@pytest.mark.parametrize("name", CASES)
def test_equal_tokens_are_chosen_the_same_way_each_time(name: str) -> None:
    grid = Grid(4, 6)
    tokens, given = torch.ones(2, 24, D), signals_of(grid)
    values = {n: getattr(given, n) for n in given.given()}
    flat = {n: torch.ones_like(v) if torch.is_tensor(v) else v for n, v in values.items()}
    # IVC-Prune refuses equal positions.
    flat["cosines"] = values["cosines"][:1].expand(2, -1, -1)
    results = [make(name, keep=7)(tokens, grid, Signals(**flat)) for _ in range(2)]
    assert equal(*results)
    assert torch.equal(results[0].indices[0], results[0].indices[1])


@pytest.mark.parametrize("name", CASES)
def test_mergers_keep_the_mean_weighted_by_size(name: str) -> None:
    grid = Grid(4, 6)
    tokens = tokens_of(grid)
    reducer = make(name, keep=7)
    result = reducer(tokens, grid, signals_of(grid))
    total = (result.tokens * result.sizes[..., None]).sum(dim=1)
    kept_all = torch.allclose(total, tokens.sum(dim=1), atol=1e-4)
    assert kept_all == (
        bool((result.assignment >= 0).all()) and name != "visionzip" and name != "visiondrop"
    )
    assert not reducer.merges or kept_all


@pytest.mark.parametrize("name", CASES)
def test_declared_needs_are_the_real_ones(name: str) -> None:
    """Nothing else is looked at, and without each of them there is one line that names it."""
    grid = Grid(4, 6)
    tokens, signals = tokens_of(grid), signals_of(grid)
    reducer = make(name, keep=7)
    optional = {"tome": ("keys",), "ppe": (), "debias": ("real",)}.get(name, ())
    only = {n: getattr(signals, n) for n in (*reducer.needs, *optional) if n in signals.given()}
    assert equal(reducer(tokens, grid, Signals(**only)), reducer(tokens, grid, signals))
    for missing in reducer.needs:
        rest = {n: v for n, v in only.items() if n != missing}
        with pytest.raises(InputError, match=f"{reducer.name}' needs {missing}: pass Signals"):
            reducer(tokens, grid, Signals(**rest))


@pytest.mark.parametrize("name", CASES)
def test_the_spec_rebuilds_a_reducer(name: str) -> None:
    reducer = make(name, keep=0.25)
    assert str(reducers.build(str(reducer))) == str(reducer)
    if "positions" in inspect.signature(type(reducer).__init__).parameters:
        grid = Grid(4, 6)
        for policy in ("keep", "reindex"):
            result = make(name, positions=policy)(tokens_of(grid), grid, signals_of(grid))
            assert result.positions == policy
        with pytest.raises(InputError, match="positions must be keep or reindex, got 'move'"):
            make(name, positions="move")


# Bad input


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, r"a keep ratio must lie in \(0, 1\], got 0.0"),
        (1.2, r"a keep ratio must lie in \(0, 1\], got 1.2"),
        (0, r"a ratio in \(0, 1\] or a count from 2 on, got 0"),
        (True, "got True"),
    ],
)
def test_a_budget_out_of_range_is_refused(keep: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DivPrune(keep=keep)(tokens_of(Grid(4, 6)), Grid(4, 6))


def test_wrong_grids_and_signals_are_refused() -> None:
    grid = Grid(4, 6)
    with pytest.raises(InputError, match="24 tokens do not fill a 5x5 grid of 25"):
        DivPrune()(tokens_of(grid), Grid(5, 5))
    with pytest.raises(InputError, match=r"attention of shape \[2, 15\] do not belong to 2 images"):
        FastV()(tokens_of(grid), grid, signals_of(Grid(5, 3)))
    signals = signals_of(grid)
    wrong = Signals(anchor_tokens=signals.anchor_tokens, anchor_grid=Grid(2, 2))
    with pytest.raises(InputError, match="6 anchors do not fill a grid of 2x2"):
        G2TR()(tokens_of(grid), grid, wrong)
    narrow = Signals(anchor_tokens=signals.anchors, anchor_grid=signals.anchor_grid)
    with pytest.raises(InputError, match="anchor_tokens are 9 wide and tokens 12"):
        G2TR()(tokens_of(grid), grid, narrow)
    with pytest.raises(InputError, match="'tome' does not rank by attention"):
        Debias(inner="tome")
    same = Signals(**{n: torch.ones_like(v) if n in ("cosines", "sines") else v
                      for n in signals.given() for v in [getattr(signals, n)]})  # fmt: skip
    with pytest.raises(InputError, match=r"use ivc_prune\(places='grid'\)"):
        IVCPrune()(tokens_of(grid), grid, same)
    assert IVCPrune(places="grid", keep=6)(tokens_of(grid), grid, same).indices.shape == (2, 6)


# Budgets and cells


def test_counts_round_down_and_never_to_nothing() -> None:
    assert count_kept(0.5, 729) == 364  # the published G2TR count on 27 x 27
    assert count_kept(0.5, 3150) == 1575
    assert count_kept(0.1, 5) == 1
    assert count_kept(1 / 3, 9) == 3
    assert count_kept(64, 576) == 64
    assert count_kept(1, 576) == 576


def test_cells_are_those_of_pooling_where_the_grid_divides() -> None:
    index = torch.arange(24)
    expected = index // 6 // 2 * 3 + index % 6 // 2
    assert torch.equal(cells(Grid(4, 6), 6), expected)
    for grid in GRIDS:
        for count in range(1, grid.length + 1):
            cell = cells(grid, count)
            sizes = torch.bincount(cell, minlength=count)
            assert len(sizes) == count
            assert sizes.min() >= 1
            middle = centers(grid, cell, count)
            assert torch.equal(cell[middle], torch.arange(count))


def test_average_pooling_is_the_mean_of_the_cells() -> None:
    tokens = tokens_of(Grid(4, 6))
    result = AveragePool(keep=0.25)(tokens, Grid(4, 6))
    field = tokens.transpose(1, 2).unflatten(-1, (4, 6))
    expected = torch.nn.functional.avg_pool2d(field, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(result.tokens, expected)
    assert result.sizes.eq(4).all()


def test_windows_keep_equally_many() -> None:
    grid = Grid(5, 6)
    window = windows(grid, 2)
    assert window.max() == 8
    scores = torch.randn(2, 30)
    for count in (9, 18):
        kept = top_by_window(scores, window, count)
        shares = torch.stack([torch.bincount(window[row], minlength=9) for row in kept])
        assert (shares == count // 9).all()
    assert torch.equal(top(torch.zeros(1, 5), 2), torch.tensor([[0, 1]]))


# G2TR


def test_anchors_are_pooled_patches() -> None:
    latent = torch.randn(2, 3, 8, 12)
    anchors, grid = anchors_of(latent)
    assert (tuple(grid), anchors.shape) == ((2, 3), (2, 6, 12))
    # Channel 0 of a patch is its upper left place: the mean over 2 x 2 patches, every second place.
    expected = latent[:, 0, :4:2, :4:2].mean(dim=(1, 2))
    torch.testing.assert_close(anchors[:, 0, 0], expected)
    plain, grid = anchors_of(torch.ones(1, 4, 5, 7), patch=1)
    assert (tuple(grid), plain.shape) == ((3, 4), (1, 12, 4))
    torch.testing.assert_close(plain, torch.ones(1, 12, 4))
    assert tuple(anchors_of(torch.ones(1, 2, 7, 9))[1]) == (2, 3)  # an odd edge is repeated


def test_tokens_belong_to_cells_by_relative_position() -> None:
    """70 tokens on 32 anchors: two or three per side, as in the published masks."""
    sides = torch.bincount(cell_of(Grid(70, 1), Grid(32, 1)))
    assert set(sides.tolist()) == {2, 3}
    cell = cell_of(Grid(45, 70), Grid(21, 32))
    assert torch.bincount(cell, minlength=672).min() >= 4
    finer = cell_of(Grid(2, 2), Grid(4, 4))
    assert finer.tolist() == [0, 2, 8, 10]


def test_every_cell_keeps_its_best_token_and_the_rest_goes_by_rank() -> None:
    grid, anchor_grid = Grid(6, 8), Grid(3, 4)
    cell = cell_of(grid, anchor_grid)
    scores = torch.randn(2, 48)
    for count in (12, 20, 47):
        kept = balanced(scores, cell, count)
        for row in range(2):
            mine = set(kept[row].tolist())
            best = {
                max((i for i in range(48) if cell[i] == c), key=lambda i, r=row: scores[r, i])
                for c in range(12)
            }
            others = sorted(set(range(48)) - best, key=lambda i, r=row: -scores[r, i])
            assert mine == best | set(others[: count - 12])
    few = balanced(scores, cell, 5)
    for row in range(2):
        best_scores = scores[row, few[row]]
        assert len(set(cell[few[row]].tolist())) == 5
        ranked = torch.stack([scores[row][cell == c].max() for c in range(12)])
        torch.testing.assert_close(best_scores.sort().values, ranked.sort().values[-5:])


def test_scores_agree_with_their_formulas() -> None:
    grid = Grid(4, 6)
    tokens, signals = tokens_of(grid), signals_of(grid)
    anchor_grid = Grid(2, 3)
    cell = cell_of(grid, anchor_grid)
    anchors, projected = signals.anchors, signals.anchor_tokens
    assert anchors is not None
    assert projected is not None
    plain = G2TR(center=False).scores(tokens, cell, signals)
    expected = torch.cosine_similarity(tokens, projected[:, cell], dim=-1)
    torch.testing.assert_close(plain, expected)
    shifted = Signals(anchor_tokens=projected + 5, anchor_grid=anchor_grid)
    torch.testing.assert_close(
        G2TR().scores(tokens + 7, cell, shifted), G2TR().scores(tokens, cell, signals),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    detail = G2TR(score="detail").scores(tokens, cell, signals)
    means = anchors.mean(dim=1)
    torch.testing.assert_close(detail[0, 7], (anchors[0, cell[7]] - means[0]).norm())
    relational = G2TR(score="relational").scores(tokens, cell, signals)
    b, i = 1, 9
    rows = torch.stack([tokens[b][cell == c].mean(dim=0) for c in range(6)])
    own = torch.cosine_similarity(tokens[b, i, None], rows, dim=-1)
    theirs = torch.cosine_similarity(anchors[b, cell[i], None], anchors[b], dim=-1)
    torch.testing.assert_close(relational[b, i], torch.corrcoef(torch.stack([own, theirs]))[0, 1])


@pytest.mark.parametrize("merge", ["mean", "cosine", "softmax", "none"])
@pytest.mark.parametrize("scope", ["cell", "neighbors", "image"])
def test_merging_stays_within_its_scope_and_the_hull(merge: str, scope: str) -> None:
    grid = Grid(4, 6)
    tokens, signals = tokens_of(grid), signals_of(grid)
    cell = cell_of(grid, Grid(2, 3))
    result = G2TR(merge=merge, scope=scope)(tokens, grid, signals)
    assert result.tokens.shape[1] == 12
    low, high = tokens.amin(dim=1, keepdim=True), tokens.amax(dim=1, keepdim=True)
    assert ((result.tokens >= low - 1e-6) & (result.tokens <= high + 1e-6)).all()
    if merge == "none":
        assert torch.equal(result.tokens[0], tokens[0, result.indices[0]])
        return
    assert (result.assignment >= 0).all()
    home = cell[result.indices.gather(1, result.assignment)]
    if scope == "cell":
        assert torch.equal(home, cell.expand(2, -1))
    if scope == "neighbors":
        rows, columns = (home // 3 - cell // 3).abs(), (home % 3 - cell % 3).abs()
        assert max(rows.max(), columns.max()) <= 1
        assert (home != cell).any()
    same = G2TR(merge=merge, scope=scope)(torch.ones_like(tokens), grid, signals)
    torch.testing.assert_close(same.tokens, torch.ones(2, 12, D))


def test_g2tr_takes_any_anchor_grid_and_width() -> None:
    grid = Grid(5, 3)
    for anchor_grid in (Grid(1, 1), Grid(3, 2), Grid(9, 9)):
        for width in (1, 40):
            anchors = torch.randn(2, anchor_grid.length, width)
            signals = Signals(anchors=anchors, anchor_grid=anchor_grid)
            for score in ("relational", "detail"):
                result = G2TR(score=score, keep=4)(tokens_of(grid), grid, signals)
                assert result.tokens.shape == (2, 4, D)
                assert torch.isfinite(result.tokens).all()


# The others, each against the obvious


def test_tome_merges_the_most_similar_pair_first() -> None:
    tokens = torch.eye(6)[None] + 0.01
    tokens[0, 3] = tokens[0, 2] * 2
    result = ToMe(keep=5)(tokens, Grid(2, 3))
    assert result.assignment.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert result.indices.tolist() == [[0, 1, 3, 4, 5]]
    torch.testing.assert_close(result.tokens[0, 2], tokens[0, 2] * 1.5)


def test_attention_methods_keep_the_largest() -> None:
    grid = Grid(2, 3)
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.05, 0.05]])
    for name in ("fastv", "pyramid_drop", "fastervlm"):
        result = make(name, keep=3)(tokens_of(grid, 1), grid, Signals(attention=attention))
        assert result.indices.tolist() == [[1, 2, 3]]


def test_vscan_looks_locally_and_globally() -> None:
    grid = Grid(4, 4)
    shallow = torch.zeros(1, 16)
    shallow[0, [0, 2, 8, 10]] = 1.0  # one per 2 x 2 window
    late = torch.zeros(1, 16)
    late[0, [0, 12, 13, 14, 15]] = torch.tensor([9.0, 4, 3, 2, 1])
    result = VScan(keep=8, window=2)(
        tokens_of(grid, 1), grid, Signals(attention=late, shallow_attention=shallow)
    )
    assert result.indices.tolist() == [[0, 2, 8, 10, 12, 13, 14, 15]]
    assert (result.assignment >= 0).all()


def test_visionzip_adds_the_mean_of_those_that_joined() -> None:
    tokens = torch.tensor([[[1.0, 0], [0, 1], [0, 3], [0, 5], [2, 0], [4, 0]]])
    attention = torch.tensor([[9.0, 0, 0, 0, 0, 0]])
    options = {"keep": 3, "contextual": 0.7}
    signals = Signals(attention=attention, keys=tokens)
    summed = VisionZip(**options)(tokens, Grid(2, 3), signals)
    assert summed.indices.tolist() == [[0, 1, 3]]  # targets at even distances: 1 and 3 of 1..5
    assert summed.assignment.tolist() == [[0, 1, 1, 2, 1, 1]]
    torch.testing.assert_close(summed.tokens[0, 1], torch.tensor([2.0, 2.0]))
    mean = VisionZip(**options, merge="mean")(tokens, Grid(2, 3), signals)
    torch.testing.assert_close(mean.tokens[0, 1], torch.tensor([1.5, 1.0]))


def test_diversity_starts_at_the_loneliest_and_spreads() -> None:
    angles = torch.tensor([0.0, 0.05, 0.1, 1.5, 1.55, 3.1])
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    for reducer in (DivPrune(keep=3), ToDRE(keep=3)):
        kept = reducer(tokens, Grid(1, 6)).indices[0].tolist()
        assert kept[-1] == 5
        assert kept[0] == 0
        assert kept[1] in (3, 4)
    sums = ToDRE(keep=2, variant="max_sum")(tokens, Grid(1, 6)).indices.tolist()
    assert sums == [[0, 5]]


def test_cdpruner_prefers_relevant_and_different_tokens() -> None:
    tokens = torch.tensor([[[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 0, 1]]])
    relevance = torch.tensor([[0.9, 1.0, 0.8, 0.0]])
    result = make("cdpruner", keep=2, negated=False)(
        tokens, Grid(2, 2), Signals(relevance=relevance)
    )
    assert result.indices.tolist() == [[1, 2]]
    kept = make("cdpruner", keep=2)(tokens, Grid(2, 2), Signals(relevance=-relevance))
    assert kept.indices.tolist() == [[1, 2]]


def test_sparsevlm_counts_raters_and_recycles() -> None:
    grid = Grid(4, 6)
    tokens, signals = tokens_of(grid), signals_of(grid)
    result = SparseVLM(keep=8)(tokens, grid, signals)
    assert int((result.sizes > 1).sum()) > 0, "some of the dropped tokens come back in a mean"
    plus = SparseVLM(keep=8, version="plus")(tokens, grid, signals)
    assert plus.sizes.eq(1).all()
    assert (plus.positions, result.positions) == ("keep", "reindex")


def test_ivc_prune_keeps_places_with_the_largest_cosines_and_sines() -> None:
    grid = Grid(4, 6)
    signals = signals_of(grid)
    cosines, sines = torch.zeros(2, 24, 4), torch.zeros(2, 24, 4)
    cosines[:, 3], sines[:, 17] = 5, 5
    given = {n: getattr(signals, n) for n in signals.given()}
    result = IVCPrune(keep=6)(
        tokens_of(grid), grid, Signals(**{**given, "cosines": cosines, "sines": sines})
    )
    assert {3, 17} <= set(result.indices[0].tolist())


def test_debiasing_takes_the_trend_out() -> None:
    grid = Grid(1, 8)
    rising = torch.linspace(1, 8, 8)
    trend = trend_of(rising.expand(5, -1), degree=1)
    attention = rising.clone()[None]
    attention[0, [0, 2]] *= 2  # early, but more than is usual there
    plain = make("fastervlm", keep=2)
    wrapped = Debias(keep=2, trend=trend)
    tokens = tokens_of(grid, 1)
    assert plain(tokens, grid, Signals(attention=attention)).indices.tolist() == [[6, 7]]
    assert wrapped(tokens, grid, Signals(attention=attention)).indices.tolist() == [[0, 2]]
    real = torch.tensor([[0.2, 1, 1, 1, 1, 1, 1, 1]])
    padded = Debias(keep=2, trend=trend)(tokens, grid, Signals(attention=attention, real=real))
    assert 0 not in padded.indices[0].tolist()
    with pytest.raises(InputError, match="a trend of 8 places does not fit 24 tokens"):
        wrapped(tokens_of(Grid(4, 6)), Grid(4, 6), signals_of(Grid(4, 6)))


def test_ppe_names_members_of_the_group_alone() -> None:
    grid = Grid(4, 6)
    for inner in ("dpc_knn", "average_pool", "tome", "visionzip"):
        result = PPE(keep=5, inner=inner, members=3)(tokens_of(grid), grid, signals_of(grid))
        assert result.members is not None
        assert result.positions == "keep"
        for row in range(2):
            for number, members in enumerate(result.members[row].tolist()):
                group = (result.assignment[row] == number).nonzero()[:, 0].tolist()
                want = [group[:3][i % len(group[:3])] for i in range(3)]
                assert members == want


def test_density_peaks_find_well_separated_groups() -> None:
    draws = torch.Generator().manual_seed(5)
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    group = torch.arange(18) % 3
    points = middles[group] + 0.1 * torch.randn(18, 2, generator=draws)
    _, cluster = density_peaks(points[None], 3)
    for number in range(3):
        assert len(set(cluster[0][group == number].tolist())) == 1


# Cost


def test_the_counter_reproduces_published_figures() -> None:
    done = saving(G2TR(keep=0.5), BAGEL, tokens=729, text=37)
    assert round(done.dense_prefill / 1e12, 3) == 4.132
    assert round(done.reduced_prefill / 1e12, 3) == 2.134
    assert round(done.prefill_ratio, 2) == 1.94
    # The encoder of the latents is extra, and the paper leaves it out.
    honest = saving(G2TR(keep=0.5), BAGEL, tokens=729, text=37, extra=FLUX_ENCODER[512])
    assert honest.prefill_ratio == done.prefill_ratio
    assert round(honest.honest_ratio, 2) == 1.53
    assert done.dense_cache - done.reduced_cache == 365 * 57_344
    assert round(average_kept(FastV(keep=0.5), 576, 28), 3) == 0.536
    assert round(average_kept(PyramidDrop(keep=0.5), 576, 32), 3) == 0.469


def test_the_counter_knows_schedules() -> None:
    assert image_tokens(ToDRE(keep=0.1, exit=0.75), 100, 8) == [10] * 6 + [0] * 2
    assert image_tokens(VScan(keep=96), 576, 4) == [96, 96, 32, 32]
    assert image_tokens(IVCPrune(keep=0.5), 100, 4) == [100, 100, 50, 50]
    assert cached_tokens(IVCPrune(keep=0.5), 100, 4) == [50] * 4
    assert [s.layer for s in SparseVLM().steps(32)] == [2, 6, 15]
    assert [round(float(s.keep) * 576) for s in SparseVLM(keep=1 / 3).steps(32)] == [300, 200, 110]
    assert image_tokens(make("visiondrop", keep=48), 576, 32)[::8] == [48, 35, 26, 19]
