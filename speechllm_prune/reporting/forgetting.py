"""What pruning forgets: error rates by kind of word and of utterance at every depth. No torch here.

All of it is computed again from `hyps.jsonl`. A word error belongs to the reference word that was substituted or
deleted, an insertion to the inserted word: so the groups of words add up to the WER.
"""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechllm_prune.evaluation.statistics import bootstrap_interval, corpus_score
from speechllm_prune.experiment import HEAL_MODES, read_json, sha256_file
from speechllm_prune.reporting.analysis import Result, choose_blocks
from speechllm_prune.reporting.collect import ExperimentData, Point, failure_reason
from speechllm_prune.reporting.tables import Table, fixed, span
from speechllm_prune.reporting.utterances import (
    Aligned,
    Utterance,
    Worst,
    align_point,
    num_errors,
    words_of,
    worst_utterances,
)
from speechllm_prune.runtime import UserError

MOST_HEALED_FIRST = HEAL_MODES[::-1]
SCORE = {"wer": "WER %", "bleu": "BLEU"}
NUMBERS = "numbers"
OTHER = "words other than numbers"
BINS = (
    (0, "words not in the training text"),
    (9, "words seen 1 to 9 times"),
    (99, "words seen 10 to 99 times"),
    (999, "words seen 100 to 999 times"),
)
"""(largest count in the training text, name of the group)"""
OFTEN = "words seen 1,000 times or more"


@dataclass(frozen=True)
class Group:
    """A group of words or utterances."""

    label: str
    size: int
    """How many words or utterances of the reference side are in it."""
    unit: str
    counts: np.ndarray
    """A row per utterance; the column sums give the value."""
    metric: str = "wer"
    """How they give it. `wer`: 100 times the first sum over the second, also where that is another share."""

    @property
    def value(self) -> float:
        """In percent."""
        return float(corpus_score(self.counts.sum(axis=0), self.metric))


@dataclass
class Forgotten:
    """What one experiment's pruning forgets: tables per evaluation set and healing, utterances per point."""

    tables: list[Table]
    worst: list[Worst]
    problems: list[str]
    """Why something could not be computed."""


# --------------------------------------------------------------------------------------------- reading
def training_words(experiment: ExperimentData) -> Counter[str]:
    """How often every word stands in the training text, words made as in `words_of`.

    Raises
    ------
    ValueError
        If the training manifests are no longer there, or no longer those that were trained on.
    """
    names = experiment.settings.get("train_manifests") or []
    inputs = train_inputs(experiment.folder)
    counts: Counter[str] = Counter()
    for name in names:
        found = [(p, digest) for p, digest in inputs.items() if p.endswith(f"/{name}.csv")]
        file = experiment.folder / found[0][0] if found else None
        if file is None or not file.is_file():
            raise ValueError(f"the training manifest {name} is not there")
        if sha256_file(file) != found[0][1]:
            raise ValueError(f"the training manifest {name} has changed since the training")
        with open(file, encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                counts.update(row["text"].lower().split())
    if not counts:
        raise ValueError("train/hyperparams.yaml names no training manifest")
    metric = experiment.points[0].metric
    words: Counter[str] = Counter()
    for raw, count in counts.items():  # each distinct word once: a corpus has few of them
        for word in words_of(raw, metric):
            words[word] += count
    return words


def train_inputs(folder: Path) -> dict[str, str]:
    """{path: sha256} of the manifests that an experiment was trained with; empty if it does not say."""
    try:
        return dict(read_json(folder / "train" / "DONE.json")["inputs"])
    except (UserError, OSError, KeyError, TypeError):
        return {}


# --------------------------------------------------------------------------------------------- grouping
def word_group(word: str, training: Mapping[str, int] | None) -> str:
    """Group of a word: numbers (it has a digit), else how often it stands in the training text.

    Example
    -------
    >>> word_group("21", {}), word_group("house", {"house": 12}), word_group("house", None)
    ('numbers', 'words seen 10 to 99 times', 'words other than numbers')
    """
    if any(character.isdigit() for character in word):
        return NUMBERS
    if training is None:
        return OTHER
    count = training.get(word, 0)
    return next((label for most, label in BINS if count <= most), OFTEN)


def groups_of(aligned: Aligned, training: Mapping[str, int] | None) -> list[Group]:
    """All groups of a point, the whole corpus first; groups without anything on the reference side are left out.

    Arguments
    ---------
    aligned : Aligned
        The point.
    training : mapping, optional
        {word: how often it stands in the training text}; without it words are only told from numbers.
    """
    utterances, metric = aligned.utterances, aligned.point.metric
    references = np.array([sum(len(ref) for _, ref, _ in u.pieces) for u in utterances])

    def group(label: str, hits: Sequence[int], totals: np.ndarray, unit: str) -> Group:
        return Group(label, int(totals.sum()), unit, np.stack([np.array(hits), totals], axis=1))

    groups = [Group(f"{SCORE[metric]}, all", len(utterances), "utterances", aligned.rows, metric)]
    groups += _by_word(utterances, metric, training) + _by_duration(aligned)
    if metric == "wer":
        for kind in ("substitute", "delete", "insert"):
            hits = [num_errors([p for p in u.pieces if p[0] == kind]) for u in utterances]
            label = f"% of words {kind.rstrip('e')}ed"
            groups.append(group(label, hits, references, "words"))
    else:
        lengths = [sum(len(hyp) for _, _, hyp in u.pieces) for u in utterances]
        groups.append(group("length, % of the reference", lengths, references, "words"))
    ones = np.ones_like(references)
    for label, flags in (
        ("% of utterances with a repetition loop", [u.loop for u in utterances]),
        ("% of utterances cut off at the token limit", [u.capped for u in utterances]),
    ):
        groups.append(group(label, flags, ones, "utterances"))
    return [group for group in groups if group.size]


def _by_word(
    utterances: Sequence[Utterance], metric: str, training: Mapping[str, int] | None
) -> list[Group]:
    words = [OTHER] if training is None else [*(label for _, label in BINS), OFTEN]
    names = [*words, NUMBERS]
    counts = {name: np.zeros((len(utterances), 2), dtype=np.int64) for name in names}
    group = functools.cache(lambda word: word_group(word, training))
    for index, utterance in enumerate(utterances):
        for word, num_wrong, num_spoken in _judged_words(utterance, metric):
            counts[group(word)][index] += (num_wrong, num_spoken)
    kind = SCORE[metric] if metric == "wer" else "% missing"
    return [
        Group(f"{kind}, {name}", int(counts[name][:, 1].sum()), "words", counts[name])
        for name in names
    ]


def _judged_words(utterance: Utterance, metric: str) -> Iterator[tuple[str, int, int]]:
    """Words with how often they are wrong, and how often they stand in the reference."""
    if (
        metric == "bleu"
    ):  # order is free: what counts is whether the translation has the word at all
        spoken = Counter(word for _, ref, _ in utterance.pieces for word in ref)
        missing = spoken - Counter(word for _, _, hyp in utterance.pieces for word in hyp)
        yield from ((word, missing[word], count) for word, count in spoken.items())
        return
    for kind, ref, hyp in utterance.pieces:
        yield from ((word, int(kind != "equal"), 1) for word in ref)
        if kind == "insert":
            yield from ((word, 1, 0) for word in hyp)


def _by_duration(aligned: Aligned) -> list[Group]:
    seconds = np.array([utterance.duration for utterance in aligned.utterances])
    quarter = np.searchsorted(np.quantile(seconds, [0.25, 0.5, 0.75]), seconds)
    groups = []
    for inside in (quarter == index for index in range(4)):
        if inside.any():  # not if many are equally long
            ends = seconds[inside].min(), seconds[inside].max()
            label = f"{SCORE[aligned.point.metric]}, {ends[0]:.1f} to {ends[1]:.1f} s long"
            counts = np.where(inside[:, None], aligned.rows, 0)
            size = int(inside.sum())
            groups.append(Group(label, size, "utterances", counts, aligned.point.metric))
    return groups


# ----------------------------------------------------------------------------------------------- report
def what_pruning_forgets(experiment: ExperimentData, results: Sequence[Result]) -> Forgotten:
    """Tables and worst utterances of all points on the experiment's own path.

    Arguments
    ---------
    experiment, results
        As read by `collect` and judged by `analyse`.
    """
    found = Forgotten([], [], [])
    try:
        training: Counter[str] | None = training_words(experiment)
    except (ValueError, OSError) as error:
        training = None
        found.problems.append(f"words by their frequency in the training text: {error}")
    modes = {
        mode: choose_blocks(experiment, results, 0.0, mode).tested for mode in MOST_HEALED_FIRST
    }
    for eval_set in experiment.eval_sets:
        full = _aligned(experiment.baseline(eval_set), found)
        if full is not None:
            found.worst.append(worst_utterances(full, full))
        for mode, tested in modes.items():
            points = [tested[n][eval_set].point for n in tested if eval_set in tested[n]]
            aligned = [one for p in points if (one := _aligned(p, found)) is not None]
            found.worst += [worst_utterances(one, full) for one in aligned]
            if aligned:
                shown = [*([full] if full else []), *aligned]
                found.tables.append(_table(experiment, eval_set, mode, shown, training))
    return found


def _aligned(point: Point | None, found: Forgotten) -> Aligned | None:
    if point is None:
        return None
    try:
        return align_point(point)
    except (ValueError, KeyError, TypeError) as error:
        found.problems.append(f"{point.variant} on {point.eval_set}: {failure_reason(error)}")
        return None


def _table(
    experiment: ExperimentData,
    eval_set: str,
    mode: str,
    shown: Sequence[Aligned],
    training: Mapping[str, int] | None,
) -> Table:
    columns = ["unpruned" if one.point.is_full else f"n = {one.point.block_size}" for one in shown]
    healing = "no healing" if mode == "none" else f"{mode} healing"
    table = Table(f"{experiment.label}, {eval_set}, {healing}", ["group", "size", *columns])
    table.notes = experiment.notes
    for groups in zip(*(groups_of(one, training) for one in shown), strict=True):
        first, cells = groups[0], []
        for one, group in zip(shown, groups, strict=True):
            interval = bootstrap_interval(group.counts, group.metric)
            cells.append(fixed(group.value) + span(interval))
            record = {
                "experiment": experiment.name,
                "seed": experiment.seed,
                "eval_set": eval_set,
                "variant": one.point.variant,
                "block_size": one.point.block_size,
                "heal_mode": mode,
                "group": group.label,
                "size": group.size,
                "unit": group.unit,
                "value": group.value,
                "value_low": interval.low,
                "value_high": interval.high,
                "note": one.point.note,
            }
            table.records.append(record)
        table.rows.append([first.label, f"{first.size:,} {first.unit}", *cells])
    return table
