"""How sure a figure is: bootstrap intervals, and the paired difference of two models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicompress.errors import InputError

Values = Sequence[float] | NDArray[Any]  # correctness as False and True counts as well
RESAMPLES = 2000
CHUNK = 4_000_000  # drawn indices held at once, 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int  # values averaged
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of compressed minus dense on the same questions, with its bootstrap interval."""

    difference: float
    low: float
    high: float
    count: int
    p_value: float  # two-sided: how often the resampled difference changes its sign
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap_mean(
    values: Values,
    *,
    groups: Sequence[int] | NDArray[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Mean and percentile-bootstrap interval of values (correctness as 0 and 1, or scores).

    `groups` names what each value belongs to, for example its picture: groups are drawn instead of
    values, since questions about one picture are not independent. Deterministic by seed.
    Raises InputError for no values, or for groups of another length.
    """
    array = _values(values)
    means = _resampled_means(array, groups, seed, resamples)
    low, high = _ends(means, level)
    return Interval(float(array.mean()), low, high, array.size, level)


def paired_difference(
    dense: Values,
    compressed: Values,
    *,
    groups: Sequence[int] | NDArray[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> PairedDifference:
    """Compressed minus dense where both answered the same questions in the same order.

    Resamples the differences, so that what is hard for both cancels. Raises InputError where the
    two have different lengths.
    """
    first, second = _values(dense), _values(compressed)
    if first.shape != second.shape:
        raise InputError(
            f"a paired difference needs the same questions for both models, got {first.size} and "
            f"{second.size} values: evaluate both on the same samples"
        )
    change = second - first
    means = _resampled_means(change, groups, seed, resamples)
    low, high = _ends(means, level)
    # One is added to both counts, the usual guard against a p of exactly zero.
    below, above = (means <= 0).sum() + 1, (means >= 0).sum() + 1
    p_value = min(1.0, 2 * float(min(below, above)) / (means.size + 1))
    return PairedDifference(float(change.mean()), low, high, change.size, p_value, level)


def _values(values: Values) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise InputError("a mean needs at least one value, got none: evaluate at least one sample")
    return array


def _ends(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(
    values: NDArray[np.float64],
    groups: Sequence[int] | NDArray[Any] | None,
    seed: int,
    resamples: int,
) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement, of values or of whole groups."""
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    if groups is None:
        sums, sizes = values, np.ones_like(values)
    else:
        names = np.asarray(groups).reshape(-1)
        if names.size != values.size:
            raise InputError(f"{values.size} values need as many groups, got {names.size}")
        _, index = np.unique(names, return_inverse=True)
        sums = np.bincount(index, weights=values).astype(np.float64)
        sizes = np.bincount(index).astype(np.float64)
    draws = np.random.default_rng(seed)
    step = max(1, CHUNK // sums.size)
    means = []
    for start in range(0, resamples, step):
        picked = draws.integers(0, sums.size, (min(step, resamples - start), sums.size))
        means.append(sums[picked].sum(axis=1) / sizes[picked].sum(axis=1))
    return np.concatenate(means)
