"""Pure functions on scores: relative degradation, bootstrap intervals, the rules that choose a block size.

NumPy only, no torch and no files. A corpus is a matrix with one row per utterance whose column sums give the score:

- `wer`: columns errors, reference words (`corpus_wer`);
- `bleu`: columns matches of 1- to 4-grams, totals of the same, hypothesis length, reference length (`corpus_bleu`).

So one bootstrap serves both, and a resampled corpus is a weighted sum of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("wer", "bleu")
DRAWS = 1000
ROUNDING_SLACK = 1e-9
"""(3.0 - 2.4) / 2.4 is 0.25000000000000006 in floating point: a value on the tolerance is within it."""


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval; `level` is its coverage."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Paired:
    """What resampling the same utterances for two systems gives: the interval of `system - baseline`, and that of the
    relative degradation (None where the baseline scores 0)."""

    difference: Interval
    degradation: Interval | None


def relative_degradation(baseline: float, value: float, metric: str) -> float | None:
    """Share by which a score got worse: positive is always worse, whatever the metric.

    Arguments
    ---------
    baseline : float
        Score of the unpruned model.
    value : float
        Score of the pruned model.
    metric : str
        `wer` (higher is worse) or `bleu` (lower is worse).

    Returns
    -------
    float or None
        None (undecided) if the baseline is 0: no share of nothing; look at the absolute change.

    Example
    -------
    >>> relative_degradation(2.0, 2.5, "wer"), relative_degradation(40.0, 36.0, "bleu")
    (0.25, 0.1)
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; known: {', '.join(METRICS)}")
    if baseline == 0:
        return None
    return (value - baseline) / baseline if metric == "wer" else (baseline - value) / baseline


def is_within(degradation: float | None, tolerance: float) -> bool:
    """The acceptance rule: relative degradation at most `tolerance`, unrounded; undecided is not accepted."""
    return degradation is not None and degradation <= tolerance + ROUNDING_SLACK


def verdict(interval: Interval | None, tolerance: float) -> str:
    """Whether an interval of the relative degradation lies `within` the tolerance, `exceeds` it, or neither.

    Example
    -------
    >>> verdict(Interval(0.05, 0.31), tolerance=0.25)
    'undecided'
    """
    if interval is None:
        return "undecided"
    if interval.high <= tolerance + ROUNDING_SLACK:
        return "within"
    return "exceeds" if interval.low > tolerance + ROUNDING_SLACK else "undecided"


def largest_blocks(
    tested: Mapping[int, Mapping[str, float | None]], tolerance: float, eval_sets: Sequence[str]
) -> tuple[int | None, int | None]:
    """The largest tested block size within tolerance on every set at once, and the largest safe one.

    Safe: every smaller tested block size passes too, so that a lucky deep point is not mistaken for a trend.

    Arguments
    ---------
    tested : mapping
        {block size: {evaluation set: relative degradation}}.
    tolerance : float
        Largest accepted relative degradation.
    eval_sets : sequence of str
        Sets that all must pass; one that was not evaluated does not pass. Without any, nothing is chosen.

    Returns
    -------
    tuple of (int or None)
        Largest and largest safe block size; None if there is none.

    Example
    -------
    >>> largest_blocks({2: {"a": 0.1}, 4: {"a": 0.3}, 6: {"a": 0.2}}, 0.25, ["a"])
    (6, 2)
    """
    passes = {
        n: bool(eval_sets)
        and all(is_within(degradations.get(name), tolerance) for name in eval_sets)
        for n, degradations in tested.items()
    }
    largest = max((n for n, passed in passes.items() if passed), default=None)
    safe = None
    for n in sorted(passes):
        if not passes[n]:
            break
        safe = n
    return largest, safe


# ------------------------------------------------------------------------------------------ corpus scores
def corpus_wer(sums: np.ndarray) -> np.ndarray:
    """WER in percent from column sums (..., 2): errors, reference words. NaN without reference words."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, 100.0 * sums[..., 0] / sums[..., 1], np.nan)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU in percent from column sums (..., 10), as sacreBLEU computes it with its default smoothing `exp`."""
    matches, totals = sums[..., 0:4].astype(float), sums[..., 4:8].astype(float)
    hyp_length, ref_length = sums[..., 8].astype(float), sums[..., 9].astype(float)
    # Smoothing: the k-th order without a match counts as 1 / 2^k of a match.
    zeros = np.cumsum((matches == 0) & (totals > 0), axis=-1)
    smoothed = np.where(matches == 0, 1.0 / 2.0**zeros, matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.mean(np.log(smoothed / totals), axis=-1))
        brevity = np.where(hyp_length < ref_length, np.exp(1.0 - ref_length / hyp_length), 1.0)
        score = 100.0 * precision * brevity
    defined = (totals > 0).all(axis=-1) & (matches > 0).any(axis=-1) & (hyp_length > 0)
    return np.where(defined, score, 0.0)


def corpus_score(sums: np.ndarray, metric: str) -> np.ndarray:
    """Score in percent from column sums of any leading shape."""
    return {"wer": corpus_wer, "bleu": corpus_bleu}[metric](np.asarray(sums))


# ---------------------------------------------------------------------------------------------- bootstrap
@functools.lru_cache(maxsize=4)
def _multiplicities(num_utterances: int, draws: int, seed: int) -> np.ndarray:
    """How often each utterance occurs in each resampled corpus (draws, U). Cached: all points of an evaluation set
    are resampled alike, so their intervals are comparable and the draw is paid once."""
    generator = np.random.default_rng(seed)
    counts = np.empty((draws, num_utterances), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(
            generator.integers(num_utterances, size=num_utterances), minlength=num_utterances
        )
    counts.flags.writeable = False
    return counts


def _resampled_scores(rows: np.ndarray, metric: str, draws: int, seed: int) -> np.ndarray:
    """Score of each resampled corpus (draws,)."""
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"need a row per utterance, got an array of shape {rows.shape}")
    counts = _multiplicities(len(rows), draws, seed)
    # In chunks: the float copy of the multiplicities of a large set would take hundreds of megabytes.
    sums = [counts[start : start + 100].astype(np.float64) @ rows for start in range(0, draws, 100)]
    return corpus_score(np.concatenate(sums), metric)


def _percentiles(samples: np.ndarray, level: float) -> Interval:
    samples = samples[~np.isnan(samples)]
    if samples.size == 0:
        raise ValueError("no resampled corpus has a score (no reference words?)")
    # Order statistics, not interpolation: a sample may be infinite.
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Interval(float(low), float(high), level)


def bootstrap_interval(
    rows: np.ndarray, metric: str = "wer", draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of a corpus score, resampling utterances.

    Arguments
    ---------
    rows : numpy.ndarray
        One row of counts per utterance, columns as in this module's head.
    metric : str
        `wer` or `bleu`.
    draws, level, seed : int, float, int
        Number of resampled corpora, coverage, random seed.

    Example
    -------
    >>> rows = np.array([[0, 5], [1, 5], [2, 5], [0, 5]])
    >>> interval = bootstrap_interval(rows)
    >>> bool(interval.low < corpus_wer(rows.sum(0)) < interval.high)
    True
    """
    return _percentiles(_resampled_scores(rows, metric, draws, seed), level)


def paired_bootstrap(
    baseline_ids: Sequence[str],
    baseline_rows: np.ndarray,
    system_ids: Sequence[str],
    system_rows: np.ndarray,
    metric: str = "wer",
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Intervals of the difference and of the relative degradation of two systems on the same utterances.

    Arguments
    ---------
    baseline_ids, system_ids : sequence of str
        Utterance ids, in any order; rows are matched by them.
    baseline_rows, system_rows : numpy.ndarray
        One row of counts per id.
    metric, draws, level, seed
        As in `bootstrap_interval`.

    Raises
    ------
    ValueError
        If the two sets of utterances differ, or an id occurs twice.
    """
    first, second = aligned(baseline_ids, baseline_rows, system_ids, system_rows)
    before = _resampled_scores(first, metric, draws, seed)
    after = _resampled_scores(second, metric, draws, seed)
    difference = _percentiles(after - before, level)
    if corpus_score(first.sum(axis=0), metric) == 0:
        return Paired(difference, None)
    sign = 1.0 if metric == "wer" else -1.0
    change = sign * (after - before)
    with np.errstate(divide="ignore", invalid="ignore"):
        degradation = np.where(change == 0, 0.0, change / before)  # 0 errors twice is no change
    return Paired(difference, _percentiles(degradation, level))


def aligned(
    baseline_ids: Sequence[str],
    baseline_rows: np.ndarray,
    system_ids: Sequence[str],
    system_rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of two systems in one order of utterances; ValueError if they saw different ones."""
    order = {name: position for position, name in enumerate(system_ids)}
    if len(order) != len(system_ids) or len(set(baseline_ids)) != len(baseline_ids):
        raise ValueError("an utterance id occurs twice")
    if set(order) != set(baseline_ids):
        odd = sorted(set(order) ^ set(baseline_ids))
        raise ValueError(
            f"the systems saw different utterances: {len(odd)} ids are in one only, such as {odd[0]!r}"
        )
    # Sorted by id, so that the interval does not depend on the order in which utterances were decoded.
    names = sorted(order)
    position = {name: index for index, name in enumerate(baseline_ids)}
    first = np.asarray(baseline_rows)[[position[name] for name in names]]
    return first, np.asarray(system_rows)[[order[name] for name in names]]


def mean_difference(
    pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    metric: str = "wer",
    draws: int = DRAWS,
    level: float = 0.95,
) -> tuple[float, Interval]:
    """Mean of `system - baseline` over several cuts and evaluation sets, and its interval.

    The cuts of one set are resampled together, since they were decoded on the same utterances; sets are resampled
    independently of each other.

    Arguments
    ---------
    pairs : mapping
        {evaluation set: [(rows of the baseline, rows of the system), as `aligned` gives them]}.
    metric, draws, level
        As in `bootstrap_interval`.

    Example
    -------
    >>> rows = np.array([[0, 5], [1, 5], [2, 5], [0, 5]])
    >>> mean_difference({"dev": [(rows, rows)]})
    (0.0, Interval(low=0.0, high=0.0, level=0.95))
    """
    samples, values = [], []
    for seed, name in enumerate(sorted(pairs)):
        for first, second in pairs[name]:
            before, after = (
                _resampled_scores(rows, metric, draws, seed) for rows in (first, second)
            )
            samples.append(after - before)
            scores = (
                corpus_score(np.asarray(rows).sum(axis=0), metric) for rows in (second, first)
            )
            values.append(float(np.subtract(*scores)))
    return float(np.mean(values)), _percentiles(np.mean(samples, axis=0), level)
