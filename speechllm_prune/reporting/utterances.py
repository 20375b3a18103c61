"""The utterances of a point: words aligned again from `hyps.jsonl`, repetition loops, the worst ones. No torch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechllm_prune.evaluation.scoring import Piece, align_words, get_normaliser
from speechllm_prune.evaluation.statistics import corpus_score
from speechllm_prune.reporting.analysis import read_rows
from speechllm_prune.reporting.collect import Point
from speechllm_prune.reporting.tables import fixed

LOOP = 3
"""A phrase that follows itself this often, and more often than in the reference, is a repetition loop."""
WORST = 5
"""Utterances shown of each point."""


@dataclass(frozen=True)
class Utterance:
    """One row of hyps.jsonl, its words aligned."""

    id: str
    duration: float
    capped: bool
    pieces: list[Piece]
    loop: bool


@dataclass(frozen=True)
class Aligned:
    """A point with its utterances, and their counts as in `read_rows`."""

    point: Point
    utterances: list[Utterance]
    rows: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """Score of every utterance by itself, in percent."""
        return corpus_score(self.rows, self.point.metric)


@dataclass(frozen=True)
class Worst:
    """The worst utterances of a point, beside what the unpruned model made of them."""

    point: Point
    utterances: list[tuple[Utterance, str]]
    """With what is to be said about each, such as `3 errors in 8 words (unpruned: 0)`."""


def words_of(text: str, metric: str) -> list[str]:
    """The words that are counted: normalised as for the WER; lower case without punctuation for translations.

    Example
    -------
    >>> words_of("It's the COLOUR of twenty-one cars.", "wer")
    ['it', 'is', 'the', 'color', 'of', '21', 'cars']
    >>> words_of("Das Haus, alt.", "bleu")
    ['das', 'haus', 'alt']
    """
    if metric == "bleu":
        return re.findall(r"\w+", text.lower())
    return _normalised(text)


@functools.lru_cache(maxsize=200_000)  # references and correct hypotheses come again at every point
def _normalised(text: str) -> list[str]:
    return get_normaliser("whisper_english")[0](text).split()


def repeats(words: Sequence[str], longest: int = 8) -> int:
    """How often a phrase of at most `longest` words follows itself directly; 1 if none does.

    Example
    -------
    >>> repeats("to be or to be".split()), repeats("and so on and so on and so on".split())
    (1, 3)
    """
    most = 1
    for size in range(1, min(longest, len(words) // 2) + 1):
        run = 0
        for index in range(size, len(words)):
            run = run + 1 if words[index] == words[index - size] else 0
            most = max(most, run // size + 1)
    return most


def has_loop(ref: str, hyp: str, characters: bool = False) -> bool:
    """Whether the hypothesis repeats a phrase `LOOP` times in a row where the reference does not.

    Arguments
    ---------
    ref, hyp : str
        Raw text.
    characters : bool
        Whether to look at characters, for languages written without spaces.

    Example
    -------
    >>> has_loop("very very very good", "very very very good"), has_loop("good", "good good good")
    (False, True)
    """
    pattern = r"\w" if characters else r"\w+"
    words = re.findall(pattern, hyp.lower())
    if len(words) - len(set(words)) < LOOP - 1:  # most hypotheses: no word comes often enough
        return False
    return repeats(words) >= max(LOOP, repeats(re.findall(pattern, ref.lower())) + 1)


def align_point(point: Point) -> Aligned:
    """Read and align the hypotheses of a point.

    Raises
    ------
    ValueError
        If hyps.jsonl is missing or broken, or aligned again gives other errors than it says.
    """
    _, rows = read_rows(point)
    text = (point.folder / "hyps.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line]
    pairs = [(words_of(r["ref"], point.metric), words_of(r["hyp"], point.metric)) for r in lines]
    characters = bool(re.search(r"tok:(zh|ja)", str(point.record.get("signature"))))
    utterances = [
        Utterance(
            str(row["id"]),
            float(row["duration"]),
            bool(row.get("capped")),
            pieces,
            has_loop(row["ref"], row["hyp"], characters),
        )
        for row, pieces in zip(lines, align_words(pairs), strict=True)
    ]
    errors = sum(num_errors(utterance.pieces) for utterance in utterances)
    if point.metric == "wer" and errors != rows[:, 0].sum():
        raise ValueError(
            f"hyps.jsonl aligned again has {errors} errors, its own counts say {rows[:, 0].sum()}"
        )
    return Aligned(point, utterances, rows)


def num_errors(pieces: Sequence[Piece]) -> int:
    """Substituted, deleted and inserted words of an alignment."""
    return sum(max(len(ref), len(hyp)) for kind, ref, hyp in pieces if kind != "equal")


def worst_utterances(aligned: Aligned, full: Aligned | None, count: int = WORST) -> Worst:
    """The utterances with the most word errors, or of translations with the lowest sentence BLEU.

    Arguments
    ---------
    aligned : Aligned
        The point.
    full : Aligned, optional
        The unpruned model on the same utterances.
    count : int
        At most this many; utterances without any error are not shown.
    """
    is_wer = aligned.point.metric == "wer"
    scores = aligned.scores
    # WER: of equally many errors the shorter utterance first. BLEU: of equal scores the longer one first.
    keys = (-scores, -aligned.rows[:, 0]) if is_wer else (-aligned.rows[:, -1], scores)
    bad = aligned.rows[:, 0] > 0 if is_wer else scores < 99.995
    order = [int(index) for index in np.lexsort(keys) if bad[index]][:count]
    before = {u.id: index for index, u in enumerate(full.utterances)} if full else {}

    def told(one: Aligned, index: int) -> str:
        row = one.rows[index]
        return f"{row[0]} errors" if is_wer else f"BLEU {fixed(one.scores[index], 1)}"

    shown = []
    for index in order:
        utterance = aligned.utterances[index]
        text = told(aligned, index) + (f" in {aligned.rows[index][1]} words" if is_wer else "")
        if full is not None and aligned is not full and utterance.id in before:
            text += f"; unpruned: {told(full, before[utterance.id])}"
        text += "; repetition loop" if utterance.loop else ""
        text += "; cut off at the token limit" if utterance.capped else ""
        shown.append((utterance, text))
    return Worst(aligned.point, shown)
