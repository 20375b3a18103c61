"""WER and BLEU against fixed pairs, an independent edit distance and scores worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from speechllm_prune.evaluation.scoring import (
    ErrorCounts,
    bleu_tokeniser,
    get_normaliser,
    score_bleu,
    score_wer,
)
from speechllm_prune.runtime import UserError

# (reference, hypothesis, errors, reference words); counted by hand on the normalised text in the comment
GOLDEN = [
    ("HELLO WORLD", "hello world", 0, 2),
    ("THE CAT SAT", "the cat sat down", 1, 3),
    ("THE CAT SAT", "cat sat", 1, 3),
    ("THE CAT SAT", "the dog sat", 1, 3),
    ("THE CAT SAT", "", 3, 3),
    ("THE CAT SAT", "a b c d e", 5, 3),
    ("COLOUR", "color", 0, 1),  # British spelling
    ("HE WON'T GO", "he will not go", 0, 4),  # contraction
    ("MR BROWN", "mister brown", 0, 2),  # title
    ("TWENTY ONE MEN", "21 men", 0, 2),  # number
    ("TWENTY ONE MEN", "twenty two men", 1, 2),
    ("THREE ONE FOUR", "3 1 4", 3, 1),  # ref "314": only spelt digits join
    ("THREE ONE FOUR", "three one five", 1, 1),  # one word, "314" for "315"
    ("UM WELL UH YES", "well yes", 0, 2),  # fillers
    ("YES (LAUGHS) NO", "yes no", 0, 2),  # brackets
    ("IT COST TWO THOUSAND DOLLARS", "it cost $2,000", 0, 3),
    ("CAFÉ", "cafe", 0, 1),  # diacritics
    ("well-known, indeed!", "well known indeed", 0, 3),
    ("ZERO", "oh", 0, 1),
    ("A MAN AND A MAN", "a man a man", 1, 5),
]


def edit_distance(ref: list[str], hyp: list[str]) -> int:
    """Levenshtein distance in words, by the textbook table."""
    table = [[0] * (len(hyp) + 1) for _ in range(len(ref) + 1)]
    for i, j in itertools.product(range(len(ref) + 1), range(len(hyp) + 1)):
        if not i or not j:
            table[i][j] = i + j
        else:
            change = table[i - 1][j - 1] + (ref[i - 1] != hyp[j - 1])
            table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@pytest.mark.parametrize(("ref", "hyp", "errors", "words"), GOLDEN)
def test_golden_pair(ref: str, hyp: str, errors: int, words: int) -> None:
    row = score_wer(["u"], [ref], [hyp]).rows[0]
    assert (row.errors, row.reference_words) == (errors, words)


def test_corpus_wer_is_errors_over_words_not_a_mean_of_rates() -> None:
    refs, hyps, errors, words = (list(column) for column in zip(*GOLDEN, strict=True))
    result = score_wer([str(i) for i in range(len(refs))], refs, hyps)
    assert result.wer == pytest.approx(100 * sum(errors) / sum(words))
    mean = 100 * np.mean([e / w for e, w in zip(errors, words, strict=True)])
    assert abs(result.wer - mean) > 5
    assert "whisper-normalizer 0." in result.text_normaliser


def test_counts_agree_with_an_independent_edit_distance() -> None:
    rng = np.random.default_rng(5)
    words = np.array(["red", "green", "blue", "house", "tree"])
    refs = [list(rng.choice(words, rng.integers(0, 8))) for _ in range(300)]
    hyps = [list(rng.choice(words, rng.integers(0, 8))) for _ in range(300)]
    texts = [[" ".join(side) for side in sides] for sides in (refs, hyps)]
    result = score_wer([str(i) for i in range(300)], *texts)
    assert any(not ref and hyp for ref, hyp in zip(refs, hyps, strict=True))
    for ref, hyp, row in zip(refs, hyps, result.rows, strict=True):
        assert row.errors == edit_distance(ref, hyp)
        assert row.reference_words == len(ref)
        assert row.insertions - row.deletions == len(hyp) - len(ref)
    for name in ("substitutions", "deletions", "insertions", "reference_words"):
        assert getattr(result.total, name) == sum(getattr(row, name) for row in result.rows)


def test_a_reference_without_words_counts_what_was_heard_there() -> None:
    result = score_wer(["a", "b", "c"], ["(laughs)", "yes no", "uh"], ["he laughs", "yes", ""])
    assert result.rows == [ErrorCounts(0, 0, 2, 0), ErrorCounts(0, 1, 0, 2), ErrorCounts()]
    assert result.wer == 150.0
    assert "a: no reference (2 / 0)\nREF: ** ******\nHYP: he laughs\n     I  I" in result.alignment


def test_no_reference_word_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 2 references"):
        score_wer(["a", "b"], ["(noise)", ""], ["x", "y"])


def test_alignment_shows_every_utterance_with_errors_and_no_other() -> None:
    result = score_wer(
        ["good", "bad"], ["red tree", "a red old tree"], ["red tree", "red old three bee"]
    )
    assert result.alignment.startswith(
        "WER 50.00 % (3 errors / 6 words: 1 substitutions, 1 deletions, 1 insertions)"
    )
    assert "good" not in result.alignment.split("\n", 2)[2]
    shown = result.alignment[result.alignment.index("bad:") :].splitlines()
    assert Counter(shown[3].split()) == {"S": 1, "D": 1, "I": 1}
    assert [w for w in shown[1].split()[1:] if set(w) != {"*"}] == "a red old tree".split()
    assert [w for w in shown[2].split()[1:] if set(w) != {"*"}] == "red old 3 bee".split()


def test_lower_normaliser_keeps_digit_strings_apart() -> None:
    result = score_wer(["u"], ["THREE ONE FOUR"], ["three one five"], normaliser="lower")
    assert (result.rows[0].errors, result.rows[0].reference_words) == (1, 3)
    with pytest.raises(UserError, match="unknown text normaliser 'loud'"):
        get_normaliser("loud")


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        score_wer(["a"], ["x", "y"], ["x", "y"])
    with pytest.raises(ValueError):
        score_wer(["a", "b"], ["x", "y"], ["x"])
    with pytest.raises(ValueError):
        score_bleu(["x", "y"], ["x"])


def test_normaliser_is_whispers_own_on_real_transcripts(shared_data: Path) -> None:
    """The copy in transformers is independent of the package; on LibriSpeech text they must agree."""
    import json
    from importlib.resources import files

    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spelling = json.loads(
        files("whisper_normalizer").joinpath("normalizers/english.json").read_text()
    )
    other = EnglishTextNormalizer(spelling)
    normalise, _ = get_normaliser("whisper_english")
    texts = [
        line.split(maxsplit=1)[1]
        for path in sorted((shared_data / "librispeech_mini").rglob("*.trans.txt"))
        for line in path.read_text().splitlines()
    ]
    assert len(texts) == 61
    for text in texts:
        assert normalise(text).split() == other(text).split()


# ------------------------------------------------------------------------------------------- BLEU
def ngram_bleu(refs: list[list[str]], hyps: list[list[str]]) -> float:
    """Corpus BLEU-4 without smoothing, from its definition, on tokens."""
    log_precision = 0.0
    for n in range(1, 5):
        hits = total = 0
        for ref, hyp in zip(refs, hyps, strict=True):
            grams = [
                Counter(zip(*(side[i:] for i in range(n)), strict=False)) for side in (ref, hyp)
            ]
            hits += (grams[0] & grams[1]).total()
            total += grams[1].total()
        log_precision += math.log(hits / total) / 4
    ref_length, hyp_length = sum(map(len, refs)), sum(map(len, hyps))
    return 100 * min(1.0, math.exp(1 - ref_length / hyp_length)) * math.exp(log_precision)


def test_bleu_equals_its_definition() -> None:
    refs = ["Das alte Haus steht am Rand der Stadt .", "Sie kauft sieben grüne Kisten im Laden ."]
    hyps = ["Das alte Haus steht am Ende der Stadt .", "Sie kauft sieben grüne Kisten ."]
    expected = ngram_bleu([ref.split() for ref in refs], [hyp.split() for hyp in hyps])
    result = score_bleu(refs, hyps, "de")
    assert result.bleu == pytest.approx(expected, abs=1e-9) and 20 < expected < 90
    assert result.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_is_cased_and_tokenised_by_target() -> None:
    ref = ["Das alte Haus steht noch immer dort."]
    assert score_bleu(ref, ["das alte haus steht noch immer dort."]).bleu < 60
    chinese = score_bleu(["我们今天去学校上课。"], ["我们今天去学校上学。"], "zh-CN")
    assert "tok:zh" in chinese.signature and 20 < chinese.bleu < 90
    assert [bleu_tokeniser(code) for code in ("ja", "zh-TW", "fr", "sv-SE")] == [
        "ja-mecab",
        "zh",
        "13a",
        "13a",
    ]


@pytest.mark.skipif(find_spec("MeCab") is not None, reason="the Japanese tokeniser is installed")
def test_missing_japanese_tokeniser_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"ja-mecab: pip install 'sacrebleu\[ja\]'$"):
        score_bleu(["猫がいる。"], ["猫がいる。"], "ja")
