"""Bootstrap intervals: against theory, deterministic, honest about questions on one picture."""

import numpy as np
import pytest

from unicompress.errors import InputError
from unicompress.evals.statistics import bootstrap_mean, paired_difference


def test_the_interval_of_a_mean_is_the_one_of_theory() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 900)
    interval = bootstrap_mean(values)
    margin = 1.96 * values.std() / np.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - margin, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + margin, abs=0.03)
    assert interval.count == 900


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        interval = bootstrap_mean(draws.random(150) < 0.8, resamples=400)
        covered += interval.low <= 0.8 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_seed_means_the_same_interval() -> None:
    values = [0, 1, 1, 0, 1, 1, 1]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(np.linspace(0, 1, 50), seed=3) != bootstrap_mean(
        np.linspace(0, 1, 50), seed=4
    )


def test_chunks_do_not_change_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 1, 40)
    whole = bootstrap_mean(values, resamples=50)
    monkeypatch.setattr("unicompress.evals.statistics.CHUNK", 40 * 7)
    assert bootstrap_mean(values, resamples=50) == whole


def test_questions_about_one_picture_count_as_one_draw() -> None:
    right = np.repeat(np.random.default_rng(0).random(100) < 0.5, 6)  # all or nothing per picture
    owners = np.repeat(np.arange(100), 6)
    alone = bootstrap_mean(right)
    grouped = bootstrap_mean(right, groups=owners)
    assert grouped.mean == pytest.approx(alone.mean)
    widths = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert widths == pytest.approx(np.sqrt(6), rel=0.12)


def test_groups_of_unequal_size_keep_the_mean_of_the_values() -> None:
    interval = bootstrap_mean([1, 1, 1, 0], groups=[7, 7, 7, 2])
    assert interval.mean == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_pairing_removes_what_is_hard_for_both() -> None:
    draws = np.random.default_rng(5)
    hard = draws.normal(0, 10, 400)
    dense = hard + draws.normal(0, 0.1, 400)
    compressed = hard + 0.5 + draws.normal(0, 0.1, 400)
    found = paired_difference(dense, compressed)
    assert 0.45 < found.low < found.difference < found.high < 0.55
    assert found.p_value < 0.01


def test_equal_models_differ_by_nothing() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_single_value_has_an_interval_of_no_width() -> None:
    interval = bootstrap_mean([0.25])
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_mean([]), "at least one value"),
        (lambda: bootstrap_mean([1.0], groups=[1, 2]), "as many groups"),
        (lambda: bootstrap_mean([1.0], level=1.5), "level"),
        (lambda: bootstrap_mean([1.0], resamples=0), "resamples"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "same questions"),
    ],
)
def test_mistakes_are_named(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
