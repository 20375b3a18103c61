"""The parallel grammar: every sentence has one translation, no two the same, and it is not word for word."""

import random

import pytest

from recipes.Demo import grammar, parallel


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(1)
    drawn = (grammar.sentence(rng, wording) for _ in range(8000) for wording in ("narrow", "wide"))
    return sorted(set(drawn))


def test_every_word_of_the_grammar_has_a_class_and_every_class_the_grammar_words():
    for slot, words in grammar._CLASSES.items():
        assert set(words) == set(parallel._TABLES[slot])


@pytest.mark.parametrize("language", parallel.LANGUAGES)
def test_no_two_sentences_are_written_alike(sentences, language):
    written = {parallel.translate(sentence, language) for sentence in sentences}
    assert len(written) == len(sentences)
    assert all(text[0].isupper() and text.endswith(".") and "  " not in text for text in written)
    assert len({parallel.spoken(text) for text in written}) == len(sentences)


def test_spoken_english_is_the_sentence_of_the_grammar(sentences):
    """The English encoder and the ASR corpus know these very words."""
    for sentence in sentences:
        assert parallel.spoken(parallel.translate(sentence, "en")) == sentence


@pytest.mark.parametrize(
    ("english", "german", "french"),
    [
        (  # verb second after a time word; colour after the noun, feminine
            "tomorrow susan found two green letters",
            "Morgen fand Susanne zwei grüne Briefe.",
            "Demain Suzanne a trouvé deux lettres vertes.",
        ),
        (  # separable verb, plural; masculine colour; contraction in both
            "sailors opened six green boxes near the market",
            "Matrosen machten sechs grüne Kisten beim Markt auf.",
            "Les marins ont ouvert six cartons verts près du marché.",
        ),
        (  # separable imperative; dative feminine; elision
            "take ten white candles from the school",
            "Nimm zehn weiße Kerzen aus der Schule mit.",
            "Prenez dix bougies blanches de l'école.",
        ),
        (  # negation in two words
            "never children lost nine apples under the castle",
            "Nie verloren Kinder neun Äpfel unter dem Schloss.",
            "Jamais les enfants n'ont perdu neuf pommes sous le château.",
        ),
        (  # a time word at the end in English
            "peter watched three black hammers often",
            "Peter sah oft drei schwarze Hämmer an.",
            "Pierre a regardé trois marteaux noirs souvent.",
        ),
    ],
)
def test_translation_is_not_word_for_word(english, german, french):
    assert parallel.translate(english, "de") == german
    assert parallel.translate(english, "fr") == french


def test_word_order_differs_in_most_sentences(sentences):
    """Somewhere a word stands at another place than its translation, or several words stand for one."""

    def lengths_or_order_differ(sentence, language):
        english = sentence.replace(" the ", " ").split()
        other = parallel.spoken(parallel.translate(sentence, language)).split()
        if len(english) != len(other):
            return True
        numbers = [parallel._NUMBER[w][language == "fr"] for w in english if w in parallel._NUMBER]
        place = next(i for i, word in enumerate(english) if word in parallel._NUMBER)
        return other[place] not in numbers

    for language in ("de", "fr"):
        share = sum(lengths_or_order_differ(s, language) for s in sentences) / len(sentences)
        assert share > 0.5


@pytest.mark.parametrize("text", ["take two red zebras", "take two two boxes", "Take two boxes."])
def test_what_is_no_sentence_of_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="no sentence"):
        parallel.translate(text, "de")
