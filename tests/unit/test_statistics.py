"""Statistics against closed forms, naive loops and sacreBLEU. All numbers here are made up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from speechllm_prune.evaluation.agreement import (
    mean_absolute_difference,
    path_agreement,
    spearman_without_row_means,
)
from speechllm_prune.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    corpus_bleu,
    corpus_wer,
    is_within,
    largest_blocks,
    mean_difference,
    paired_bootstrap,
    relative_degradation,
    verdict,
)


def made_up_rows(num_utterances: int, rate: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    words = generator.integers(3, 15, size=num_utterances)
    return np.stack([generator.binomial(words, rate), words], axis=1)


# ------------------------------------------------------------------------------- degradation and its rule
def test_degradation_is_positive_when_worse_for_both_metrics():
    assert relative_degradation(2.0, 3.0, "wer") == pytest.approx(0.5)
    assert relative_degradation(2.0, 1.0, "wer") == pytest.approx(-0.5)
    assert relative_degradation(40.0, 30.0, "bleu") == pytest.approx(0.25)
    assert relative_degradation(40.0, 50.0, "bleu") == pytest.approx(-0.25)


def test_degradation_of_a_perfect_baseline_is_undecided():
    assert relative_degradation(0.0, 1.0, "wer") is None
    assert not is_within(None, 0.25)


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="cer"):
        relative_degradation(1.0, 2.0, "cer")


def test_tolerance_includes_its_bound_in_floating_point_and_nothing_that_rounds_to_it():
    on_the_bound = relative_degradation(2.4, 3.0, "wer")
    assert on_the_bound > 0.25  # 0.25000000000000006
    assert is_within(on_the_bound, 0.25)
    assert not is_within(0.25001, 0.25)


def test_largest_and_safe_block():
    tested = {
        1: {"a": 0.0, "b": 0.1},
        2: {"a": 0.3, "b": 0.1},
        3: {"a": 0.2, "b": 0.2},
        4: {"a": 0.1, "b": 0.26},
        5: {"a": 0.1},
        6: {"a": 0.1, "b": None},
    }
    assert largest_blocks(tested, 0.25, ["a", "b"]) == (3, 1)
    assert largest_blocks(tested, 0.25, ["a"]) == (6, 1)
    assert largest_blocks({2: {"a": 0.9}}, 0.25, ["a"]) == (None, None)
    assert largest_blocks({}, 0.25, ["a"]) == (None, None)
    assert largest_blocks({1: {"dev": 9.0}, 10: {"dev": 9.0}}, 0.25, []) == (None, None)


def test_verdict_of_an_interval():
    assert verdict(Interval(-0.1, 0.25), 0.25) == "within"
    assert verdict(Interval(0.26, 0.4), 0.25) == "exceeds"
    assert verdict(Interval(0.1, 0.3), 0.25) == "undecided"
    assert verdict(Interval(0.3, math.inf), 0.25) == "exceeds"
    assert verdict(None, 0.25) == "undecided"


# ----------------------------------------------------------------------------------------- corpus scores
def test_corpus_wer_weighs_words_and_not_utterances():
    rows = np.array([[1, 1], [0, 99]])
    assert corpus_wer(rows.sum(axis=0)) == pytest.approx(1.0)
    assert math.isnan(corpus_wer(np.array([3, 0])))


@pytest.mark.parametrize("hyps", ["same", "near", "short", "unrelated", "empty"])
def test_corpus_bleu_is_sacrebleu(hyps):
    from sacrebleu.metrics import BLEU

    refs = ["the small dog runs over the green hill today", "one two three four five six"]
    made = {
        "same": refs,
        "near": ["the small dog runs over a green hill", "one two four five six seven"],
        "short": ["the small", "one two"],
        "unrelated": ["the cat", "none of these words at all"],
        "empty": ["", ""],
    }[hyps]
    bleu = BLEU(effective_order=True)
    rows = []
    for hyp, ref in zip(made, refs, strict=True):
        score = bleu.sentence_score(hyp, [ref])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    expected = BLEU().corpus_score(made, [refs]).score
    assert float(corpus_bleu(np.array(rows).sum(axis=0))) == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------------------------------------- bootstrap
def test_interval_has_the_width_of_the_closed_form():
    rows = made_up_rows(800, 0.1, seed=1)
    rows[:, 1] = 10  # equal lengths: WER is a mean, whose standard error is known
    interval = bootstrap_interval(rows, draws=4000)
    error = 100 * rows[:, 0].std() / 10 / math.sqrt(len(rows))
    mean = 100 * rows[:, 0].mean() / 10
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_interval_is_the_naive_one():
    rows = made_up_rows(30, 0.2, seed=2)
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(210):
        drawn = [rows[index] for index in generator.integers(30, size=30)]
        scores.append(100 * sum(row[0] for row in drawn) / sum(row[1] for row in drawn))
    scores.sort()
    interval = bootstrap_interval(rows, draws=210, seed=0)
    assert interval.low == pytest.approx(scores[5])  # 2.5 % of 210 is 5.25: the 6th
    assert interval.high == pytest.approx(scores[204])


def test_interval_covers_the_true_rate_about_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        interval = bootstrap_interval(made_up_rows(100, 0.15, seed=100 + trial), draws=300)
        covered += interval.low <= 15.0 <= interval.high
    assert 180 <= covered <= 199


def test_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="row per utterance"):
        bootstrap_interval(np.zeros((0, 2)))


def test_paired_interval_is_narrower_and_ignores_order():
    baseline = made_up_rows(300, 0.1, seed=3)
    system = baseline.copy()
    system[::5, 0] += 1  # always worse, in the same utterances
    ids = [f"u{index}" for index in range(300)]
    paired = paired_bootstrap(ids, baseline, ids, system)
    shuffle = np.random.default_rng(4).permutation(300)
    again = paired_bootstrap(ids, baseline, [ids[i] for i in shuffle], system[shuffle])
    assert again == paired
    assert 0 < paired.difference.low < paired.difference.high
    alone = bootstrap_interval(system)
    assert paired.difference.high - paired.difference.low < 0.6 * (alone.high - alone.low)
    value = 100 * (system[:, 0].sum() - baseline[:, 0].sum()) / baseline[:, 0].sum() / 100
    assert paired.degradation.low < value < paired.degradation.high


def test_paired_interval_matches_ids_and_not_positions():
    baseline = made_up_rows(200, 0.2, seed=5)
    ids = [f"u{index:03d}" for index in range(200)]
    same = paired_bootstrap(ids, baseline, ids[::-1], baseline[::-1])
    assert (same.difference.low, same.difference.high) == (0.0, 0.0)


def test_lower_bleu_is_a_positive_degradation():
    good = np.tile([9, 8, 7, 6, 10, 9, 8, 7, 10, 10], (40, 1))
    bad = np.tile([5, 3, 2, 1, 10, 9, 8, 7, 10, 10], (40, 1))
    ids = [str(index) for index in range(40)]
    paired = paired_bootstrap(ids, good, ids, bad, metric="bleu")
    assert paired.difference.high < 0 < paired.degradation.low


def test_unequal_or_repeated_utterances_are_refused():
    rows = made_up_rows(3, 0.1, seed=6)
    with pytest.raises(ValueError, match=r"different utterances: 2 ids.*'c'"):
        paired_bootstrap(["a", "b", "c"], rows, ["a", "b", "d"], rows)
    with pytest.raises(ValueError, match="twice"):
        paired_bootstrap(["a", "b", "b"], rows, ["a", "b", "c"], rows)


def test_baseline_without_errors_has_a_difference_only():
    rows = np.array([[0, 10]] * 20)
    worse = np.array([[1, 10]] * 20)
    ids = [str(index) for index in range(20)]
    paired = paired_bootstrap(ids, rows, ids, worse)
    assert paired.degradation is None
    assert paired.difference.low == pytest.approx(10.0)


def test_baseline_with_one_error_gives_an_unbounded_degradation():
    rows = np.array([[1, 10]] + [[0, 10]] * 19)
    worse = np.array([[2, 10]] * 20)
    ids = [str(index) for index in range(20)]
    assert paired_bootstrap(ids, rows, ids, worse).degradation.high == math.inf


# ------------------------------------------------------------------------------------- matrices and paths
def triangle(num_layers: int, seed: int, ties: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    matrix = generator.random((num_layers, num_layers)) + np.arange(num_layers)[:, None]
    if ties:
        matrix = np.round(matrix, 1)
    for n in range(1, num_layers + 1):
        matrix[n - 1, num_layers - n + 1 :] = np.nan
    return matrix


def naive_spearman(first: np.ndarray, second: np.ndarray) -> float:
    """By definition, with loops: residuals, ranks by counting, Pearson of the ranks."""

    def residuals(matrix: np.ndarray) -> list[float]:
        values = []
        for row, other in zip(
            matrix, first + second, strict=True
        ):  # the sum is NaN where either is
            kept = [
                value for value, shared in zip(row, other, strict=True) if not math.isnan(shared)
            ]
            values += [round(value - sum(kept) / len(kept), 12) for value in kept]
        return values

    def rank(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(o == value for o in values) + 1) / 2
            for value in values
        ]

    one, two = rank(residuals(first)), rank(residuals(second))
    mean = sum(one) / len(one)
    covariance = sum((a - mean) * (b - mean) for a, b in zip(one, two, strict=True))
    spread = [math.sqrt(sum((value - mean) ** 2 for value in values)) for values in (one, two)]
    return covariance / spread[0] / spread[1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_layers", [3, 8, 12])
def test_spearman_is_the_naive_one(num_layers, ties):
    first, second = triangle(num_layers, 1, ties), triangle(num_layers, 2, ties)
    if num_layers == 8:
        second[2, 1] = np.nan  # undefined in one of them only
    found = spearman_without_row_means(first, second)
    assert found == pytest.approx(naive_spearman(first, second), abs=1e-12)


def test_row_means_do_not_make_unrelated_matrices_correlate():
    first, second = triangle(24, 1), triangle(24, 2)
    defined = ~np.isnan(first)
    raw = np.corrcoef(first[defined], second[defined])[0, 1]
    assert raw > 0.95  # distances grow with block size in both
    assert abs(spearman_without_row_means(first, second)) < 0.2
    assert spearman_without_row_means(first, first * 3 + 1) == pytest.approx(1.0)


def test_constant_rows_have_no_correlation():
    flat = np.where(np.isnan(triangle(5, 1)), np.nan, 0.4)
    assert math.isnan(spearman_without_row_means(flat, triangle(5, 2)))


def test_mean_absolute_difference_skips_what_is_undefined():
    first = np.array([[0.1, 0.2], [0.5, np.nan]])
    second = np.array([[0.2, 0.2], [np.nan, 0.9]])
    assert mean_absolute_difference(first, second) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="shapes"):
        mean_absolute_difference(first, np.zeros((3, 3)))


def test_path_agreement_counts_layers_by_sets():
    first, second = {1: 5, 2: 4, 3: 1, 4: 0, 7: 0}, {1: 5, 2: 2, 3: 2, 4: 3, 7: 0}
    agreement = path_agreement(first, second, num_layers=8)
    overlaps = []
    for n in (1, 2, 3, 4):
        one, two = (set(range(path[n], path[n] + n)) for path in (first, second))
        overlaps.append(len(one & two) / n)
    assert agreement.num_compared == 4  # n = 7 leaves one possible block: no choice
    assert agreement.exact_share == 0.25
    assert agreement.mean_offset == pytest.approx((0 + 2 + 1 + 3) / 4)
    assert agreement.overlap == pytest.approx(sum(overlaps) / 4)
    assert "no information" not in agreement.statement


def test_two_tail_paths_say_that_agreement_means_nothing():
    tail = {n: 12 - 1 - n for n in range(1, 12)}
    agreement = path_agreement(tail, dict(tail), num_layers=12)
    assert agreement.exact_share == 1.0
    assert "agreement carries no information" in agreement.statement
    nearly = {**tail, 3: 2}
    assert "weak evidence" in path_agreement(nearly, nearly, num_layers=12).statement


def test_paths_without_a_common_choice_are_refused():
    with pytest.raises(ValueError, match="no block size"):
        path_agreement({1: 0}, {2: 0}, num_layers=8)


def test_statistics_is_deterministic():
    rows = made_up_rows(50, 0.1, seed=7)
    first, second = (bootstrap_interval(rows, seed=seed) for seed in itertools.repeat(1, 2))
    assert first == second
    assert first != bootstrap_interval(rows, seed=2)


def test_mean_difference_resamples_the_cuts_of_a_set_together():
    generator = np.random.default_rng(0)
    words = np.full(200, 10)

    def rows(rate):
        return np.stack([generator.binomial(10, rate, 200), words], axis=1)

    base, better = rows(0.3), rows(0.2)
    mean, interval = mean_difference({"a": [(base, better)]})
    ids = [f"{index:03d}" for index in range(200)]
    alone = paired_bootstrap(ids, base, ids, better).difference
    assert mean == pytest.approx(float(corpus_wer(better.sum(0)) - corpus_wer(base.sum(0))))
    assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high))
    # The same pair twice is no more evidence; a pair of another set is.
    twice = mean_difference({"a": [(base, better)] * 2})
    assert twice[1] == interval and twice[0] == mean
    more = mean_difference({"a": [(base, better)], "b": [(base, better)]})[1]
    assert more.high - more.low < 0.85 * (interval.high - interval.low)
