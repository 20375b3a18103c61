"""The demo's grammar: deterministic, and no sentence in two lists."""

import random

import pytest

from recipes.Demo import grammar


def test_equal_seeds_draw_equal_texts_and_other_seeds_other_texts():
    sizes = {"test": ("narrow", 50), "ood": ("wide", 50)}
    first = grammar.draw_texts(sizes, seed=1)
    assert first == grammar.draw_texts(sizes, seed=1)
    assert first != grammar.draw_texts(sizes, seed=2)


def test_no_sentence_is_in_two_lists_or_excluded():
    # Few sentences of this pattern exist, so that a draw with repetition would show at once.
    excluded = grammar.draw_texts({"old": ("narrow", 2000)}, seed=3)["old"]
    sizes = {"a": ("narrow", 3000), "b": ("narrow", 3000), "c": ("wide", 2000)}
    texts = grammar.draw_texts(sizes, seed=3, exclude=excluded)
    every = [line for lines in texts.values() for line in lines]
    assert len(every) == 8000
    assert len(set(every)) == len(every)
    assert not set(every) & set(excluded)


def test_first_lists_do_not_change_when_later_ones_grow():
    small = grammar.draw_texts({"test": ("narrow", 20), "train": ("narrow", 10)}, seed=5)
    large = grammar.draw_texts({"test": ("narrow", 20), "train": ("narrow", 500)}, seed=5)
    assert small["test"] == large["test"]
    assert small["train"] == large["train"][:10]


def test_wide_sentences_have_the_same_words_in_other_patterns():
    classes = {word: name for name, words in grammar._CLASSES.items() for word in words}
    assert sum(map(len, grammar._CLASSES.values())) == len(classes), "a word has two classes"
    rng = random.Random(1)

    def patterns(wording):
        sentences = [grammar.sentence(rng, wording).split() for _ in range(2000)]
        assert {word for s in sentences for word in s} <= set(grammar.VOCABULARY)
        return {" ".join(classes.get(word, word) for word in s) for s in sentences}

    assert not patterns("narrow") & patterns("wide")


@pytest.mark.parametrize("wording", ["narrow", "wide"])
def test_neighbouring_words_differ(wording):
    """Equal neighbours cannot be told from one long word, neither in stretched text nor by the projector."""
    rng = random.Random(2)
    for _ in range(2000):
        words = grammar.sentence(rng, wording).split()
        assert all(a != b for a, b in zip(words, words[1:], strict=False))
