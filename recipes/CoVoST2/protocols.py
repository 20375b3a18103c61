"""The two protocols for CoVoST 2: which rows count, and what their text looks like. Their scores cannot be compared.

`standard` keeps every row as it is: cased, punctuated. `speechbrain` follows the preparation of SpeechBrain's CoVoST
recipe: both sides in lower case without punctuation, and without the rows (of dev and test, too) that then have fewer
than four words on a side or a character outside a small set. That set is the English one for every language but
German, so a French sentence with an accent is left out.
"""

from __future__ import annotations

PROTOCOLS = ("standard", "speechbrain")

CORRUPT_CLIPS = frozenset(
    f"common_voice_{name}.mp3"
    for name in ("en_19817845", "en_19504777", "fr_19528232", "fr_19528233")
)
"""Left out by the recipe where the source is English."""

MIN_WORDS = 4
_BREAKS = ' ",:;!?¡.…()-\u2014\u2013\u2011_\u201c\u201d\u201e/«»'
_APOSTROPHES = "'`´ʻ\u2018\u2019"
_ENGLISH = frozenset(" abcdefghijklmnopqrstuvwxyz1234567890-&'")
_CHARACTERS = {"de": _ENGLISH | frozenset("äöüß")}
_TABLE = str.maketrans(dict.fromkeys(_BREAKS, " ") | dict.fromkeys(_APOSTROPHES, "'"))


def plain_text(text: str, language: str) -> str | None:
    """Lower case without punctuation, or None where a character is left that the language's set lacks.

    Example
    -------
    >>> plain_text("Don't \\u2018shout\\u2019, please\\u2026", "en"), plain_text("Über-Nacht!", "de")
    ("don't shout please", 'über nacht')
    >>> plain_text("Il a été là.", "fr") is None
    True
    """
    words = (word.strip("'").lower() for word in text.translate(_TABLE).split(" "))
    result = " ".join(word for word in words if word.strip()).rstrip()
    return result if set(result) <= _CHARACTERS.get(language, _ENGLISH) else None


def apply_speechbrain(
    clip: str, sentence: str, translation: str, source: str, target: str
) -> tuple[str, str] | str:
    """Both sides of a row as the protocol has them, or the reason why it leaves the row out.

    Example
    -------
    >>> apply_speechbrain("a.mp3", "It's a big house.", "Das ist ein großes Haus.", "en", "de")
    ("it's a big house", 'das ist ein großes haus')
    >>> apply_speechbrain("a.mp3", "Yes, of course.", "Ja, selbstverständlich.", "en", "de")
    'fewer than 4 words'
    """
    if source == "en" and clip in CORRUPT_CLIPS:
        return "corrupt clip"
    spoken, written = plain_text(sentence, source), plain_text(translation, target)
    if spoken is None or written is None:
        return f"character outside the set of {source if spoken is None else target}"
    if min(len(spoken.split(" ")), len(written.split(" "))) < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    return spoken, written
