"""WER with the Whisper English text normaliser, and BLEU by sacreBLEU. No torch here.

Both take raw text, so that every score can be computed again from `hyps.jsonl`. Three normalisers are called "Whisper
English"; this is the one of Whisper itself (package whisper-normalizer), and results name it. It writes numbers as
digits and joins spelt digits ("three one four" becomes the one word "314"), drops what stands in brackets, and unifies
spellings and contractions; it is applied to both sides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from speechllm_prune.runtime import UserError

NORMALISERS = ("whisper_english", "lower")
"""Text normalisers: Whisper's English one (the paper's), or lower case alone (for what the first would merge)."""


@dataclass(frozen=True)
class ErrorCounts:
    """Word errors of one utterance, or of many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_words: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class WerResult:
    """Corpus-level word error rate.

    Arguments
    ---------
    wer : float
        Percent: all errors over all reference words.
    total : ErrorCounts
        Sums over the corpus.
    rows : list of ErrorCounts
        Counts of each utterance, in the order given.
    alignment : str
        Readable text: the summary, then each utterance with errors, aligned.
    text_normaliser : str
        Package, version and class of the normaliser.
    """

    wer: float
    total: ErrorCounts
    rows: list[ErrorCounts]
    alignment: str
    text_normaliser: str


@dataclass(frozen=True)
class BleuResult:
    """Corpus BLEU (0 to 100) with the signature that sacreBLEU gives it."""

    bleu: float
    signature: str


# -------------------------------------------------------------------------------------------- WER
def score_wer(
    ids: Sequence[str],
    refs: Sequence[str],
    hyps: Sequence[str],
    normaliser: str = "whisper_english",
) -> WerResult:
    """Corpus-level WER of raw transcripts.

    A reference that is empty after normalisation has no words, but what was heard there counts as insertions.

    Arguments
    ---------
    ids : sequence of str
        Utterance ids, for the alignment text.
    refs : sequence of str
        References as in the corpus.
    hyps : sequence of str
        Hypotheses as decoded.
    normaliser : str
        One of `NORMALISERS`.

    Returns
    -------
    WerResult

    Raises
    ------
    UserError
        If no reference has any word, so that there is no rate.

    Example
    -------
    >>> result = score_wer(["a", "b"], ["THE COLOUR IS RED", "YES"], ["the color is", "yes"])
    >>> result.wer, result.total
    (20.0, ErrorCounts(substitutions=0, deletions=1, insertions=0, reference_words=5))
    >>> print(result.alignment)
    WER 20.00 % (1 errors / 5 words: 0 substitutions, 1 deletions, 0 insertions)...
    a: 25.00 % (1 / 4)
    REF: the color is red
    HYP: the color is ***
                      D
    """
    normalise, name = get_normaliser(normaliser)
    pairs = [
        (normalise(ref).split(), normalise(hyp).split())
        for ref, hyp in zip(refs, hyps, strict=True)
    ]
    aligned = align_words(pairs)
    rows = [_count(pieces) for pieces in aligned]
    total = ErrorCounts(
        sum(row.substitutions for row in rows),
        sum(row.deletions for row in rows),
        sum(row.insertions for row in rows),
        sum(row.reference_words for row in rows),
    )
    if not total.reference_words:
        raise UserError(
            f"WER is undefined: none of the {len(rows)} references has a word after normalisation ({name})"
        )
    wer = 100 * total.errors / total.reference_words
    head = (
        f"WER {wer:.2f} % ({total.errors} errors / {total.reference_words} words: {total.substitutions} substitutions, "
        f"{total.deletions} deletions, {total.insertions} insertions)\n{len(rows)} utterances, "
        f"{sum(row.errors == 0 for row in rows)} without an error (not shown below); text normaliser: {name}\n"
    )
    shown = [
        _render(utterance, row, pieces)
        for utterance, row, pieces in zip(ids, rows, aligned, strict=True)
        if row.errors
    ]
    return WerResult(wer, total, rows, "\n".join([head, *shown]), name)


def wer_by_source(
    ids: Sequence[str], rows: Sequence[Mapping[str, int]], patterns: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """WER of each source of a mixed corpus, where the utterance id tells the source.

    Arguments
    ---------
    ids : sequence of str
        Utterance ids.
    rows : sequence of mapping
        Fields of `ErrorCounts` of each utterance.
    patterns : mapping
        {source: regular expression of its whole ids}, the first match counts; other ids are of the source `other`.

    Returns
    -------
    dict
        {source: value (percent, None without reference words), num_utterances, and the counts}.

    Example
    -------
    >>> rows = [dict(substitutions=1, deletions=0, insertions=0, reference_words=4)] * 3
    >>> found = wer_by_source(["84-1-1", "84-1-2", "x"], rows, {"librispeech": r"\\d+-\\d+-\\d+"})
    >>> [(name, facts["value"], facts["num_utterances"]) for name, facts in found.items()]
    [('librispeech', 25.0, 2), ('other', 25.0, 1)]
    """
    groups: dict[str, list[Mapping[str, int]]] = {name: [] for name in (*patterns, "other")}
    for utterance, row in zip(ids, rows, strict=True):
        name = next((name for name in patterns if re.fullmatch(patterns[name], utterance)), "other")
        groups[name].append(row)
    found: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        if not members:
            continue
        fields = ("substitutions", "deletions", "insertions", "reference_words")
        counts = {key: sum(row[key] for row in members) for key in fields}
        words = counts["reference_words"]
        value = 100 * sum(counts[key] for key in fields[:3]) / words if words else None
        found[name] = {"value": value, "num_utterances": len(members), **counts}
    return found


def manifest_facts(
    summary: Mapping[str, Any], ids: Sequence[str], rows: Sequence[Mapping[str, int]]
) -> dict[str, Any]:
    """What a manifest's json adds to the results on it: its protocol, and the WER of each source in it.

    Example
    -------
    >>> manifest_facts({"protocol": "standard"}, ["a"], [{}])
    {'protocol': 'standard'}
    """
    facts: dict[str, Any] = {}
    if summary.get("protocol"):
        facts["protocol"] = summary["protocol"]
    if summary.get("source_patterns") and all(rows):
        facts["by_source"] = wer_by_source(ids, rows, summary["source_patterns"])
    return facts


Piece = tuple[str, list[str], list[str]]
"""A stretch of an alignment: equal, substitute, delete or insert, and the words of both sides."""


def align_words(pairs: Sequence[tuple[list[str], list[str]]]) -> list[list[Piece]]:
    """Minimum-edit alignments by jiwer; references without words, which it refuses, are insertions."""
    import jiwer

    spoken = [pair for pair in pairs if pair[0]]
    chunks: Iterator[list[jiwer.AlignmentChunk]] = iter(())
    if spoken:
        output = jiwer.process_words(
            [" ".join(ref) for ref, _ in spoken], [" ".join(hyp) for _, hyp in spoken]
        )
        chunks = iter(output.alignments)
    aligned: list[list[Piece]] = []
    for ref, hyp in pairs:
        if not ref:
            aligned.append([("insert", [], hyp)] if hyp else [])
            continue
        aligned.append(
            [
                (
                    chunk.type,
                    ref[chunk.ref_start_idx : chunk.ref_end_idx],
                    hyp[chunk.hyp_start_idx : chunk.hyp_end_idx],
                )
                for chunk in next(chunks)
            ]
        )
    return aligned


def _count(pieces: Sequence[Piece]) -> ErrorCounts:
    lengths = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
    for kind, ref, hyp in pieces:
        lengths[kind] += max(len(ref), len(hyp))
    return ErrorCounts(
        lengths["substitute"],
        lengths["delete"],
        lengths["insert"],
        lengths["equal"] + lengths["substitute"] + lengths["delete"],
    )


def _render(utterance: str, row: ErrorCounts, pieces: Sequence[Piece]) -> str:
    """One utterance as three lines: reference, hypothesis, and S, D, I below the errors."""
    columns: list[tuple[str, str, str]] = []
    for kind, ref, hyp in pieces:
        mark = "" if kind == "equal" else kind[0].upper()
        for index in range(max(len(ref), len(hyp))):
            columns.append((ref[index] if ref else "", hyp[index] if hyp else "", mark))
    lines = ["REF:", "HYP:", "    "]
    for ref_word, hyp_word, mark in columns:
        width = max(len(ref_word), len(hyp_word))
        for line, cell in enumerate((ref_word or "*" * width, hyp_word or "*" * width, mark)):
            lines[line] += " " + cell.ljust(width)
    rate = (
        f"{100 * row.errors / row.reference_words:.2f} %" if row.reference_words else "no reference"
    )
    head = f"{utterance}: {rate} ({row.errors} / {row.reference_words})"
    return "\n".join([head, *(line.rstrip() for line in lines)]) + "\n"


@functools.cache
def get_normaliser(name: str) -> tuple[Callable[[str], str], str]:
    """A text normaliser, and how results name it.

    Example
    -------
    >>> normalise, _ = get_normaliser("whisper_english")
    >>> normalise("Mr. Brown won't pay twenty-one dollars (he said)")
    'mister brown will not pay $21'
    """
    if name == "whisper_english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return (
            EnglishTextNormalizer(),
            f"whisper-normalizer {version('whisper-normalizer')} EnglishTextNormalizer",
        )
    if name == "lower":
        return str.lower, "lower case only"
    raise UserError(f"unknown text normaliser '{name}'; there are {', '.join(NORMALISERS)}")


# ------------------------------------------------------------------------------------------- BLEU
def score_bleu(refs: Sequence[str], hyps: Sequence[str], target_language: str = "de") -> BleuResult:
    """Corpus BLEU of raw (cased, punctuated) translations.

    Arguments
    ---------
    refs : sequence of str
        One reference for each hypothesis.
    hyps : sequence of str
        Translations as decoded.
    target_language : str
        Code of the target language; chooses the tokeniser (zh, ja-mecab, else 13a).

    Returns
    -------
    BleuResult

    Example
    -------
    >>> result = score_bleu(["Das Haus ist alt."], ["Das Haus ist alt."])
    >>> round(result.bleu, 2), result.signature.rsplit("|", 1)[0]
    (100.0, 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp')
    """
    from sacrebleu.metrics import BLEU

    if len(refs) != len(hyps) or not refs:
        raise ValueError(
            f"{len(refs)} references and {len(hyps)} hypotheses: one each is needed, and at least one"
        )
    tokeniser = bleu_tokeniser(target_language)
    try:
        metric = BLEU(tokenize=tokeniser)
    except (ImportError, RuntimeError):
        raise UserError(
            f"BLEU into '{target_language}' needs sacreBLEU's tokeniser {tokeniser}: pip install 'sacrebleu[ja]'"
        ) from None
    return BleuResult(
        metric.corpus_score(list(hyps), [list(refs)]).score, str(metric.get_signature())
    )


def bleu_tokeniser(target_language: str) -> str:
    """sacreBLEU's tokeniser for a target language; CoVoST 2 writes codes such as zh-CN.

    Example
    -------
    >>> bleu_tokeniser("zh-CN"), bleu_tokeniser("ja"), bleu_tokeniser("de")
    ('zh', 'ja-mecab', '13a')
    """
    return {"zh": "zh", "ja": "ja-mecab"}.get(
        target_language.lower().replace("_", "-").split("-")[0], "13a"
    )
