"""The little language of the demo corpus: some 70 words, a few sentence patterns.

The patterns are split in two wordings. ``NARROW`` is what the speech of train, dev-clean,
test-clean and test-other is made of; ``WIDE`` holds the wordings that only the out-of-domain set speaks.
The decoder reads text of both, as a language model has read more than any speech corpus contains,
but no evaluation sentence (:func:`draw_texts` keeps the sets apart).
"""

import random
from collections.abc import Iterable

NUMBER = "two three four five six seven eight nine ten".split()
COLOUR = "red green blue yellow white black orange purple".split()
OBJECT = "boxes apples tables windows letters flowers bottles pictures hammers candles".split()
RELATION = "from near behind under".split()
PLACE = "garden kitchen river market station castle school village".split()
TIME = "today yesterday sometimes never tomorrow often".split()
COMMAND = "take bring move paint count hide clean sell".split()
PERSON = "anna peter martin susan doctors farmers teachers children sailors".split()
ACTION = "found wanted carried lost bought watched opened followed".split()

_CLASSES = {
    "N": NUMBER,
    "C": COLOUR,
    "O": OBJECT,
    "R": RELATION,
    "P": PLACE,
    "T": TIME,
    "V": COMMAND,
    "S": PERSON,
    "A": ACTION,
}

# One letter per word class; a lower-case word stands for itself. Weighted by repetition.
NARROW = (
    "V N C O R the P",
    "V N C O R the P",
    "V N O R the P",
    "S A N C O R the P",
    "T S A N C O",
    "T S A N O R the P",
)
WIDE = (
    "T V N C O R the P",
    "T S A N C O R the P",
    "S A N C O T",
    "V N C O",
)
WORDINGS = {"narrow": NARROW, "wide": WIDE}

VOCABULARY = sorted({word for words in _CLASSES.values() for word in words} | {"the"})


def sentence(rng: random.Random, wording: str = "narrow") -> str:
    """Draw one sentence of a wording.

    Arguments
    ---------
    rng : random.Random
        Source of randomness; equal states give equal sentences.
    wording : str
        ``narrow`` (the speech corpus) or ``wide`` (the out-of-domain set).

    Returns
    -------
    str
        Lower-case words joined by single spaces.

    Example
    -------
    >>> sentence(random.Random(3), "narrow")
    'move seven purple candles from the garden'
    """
    pattern = rng.choice(WORDINGS[wording])
    return " ".join(rng.choice(_CLASSES[t]) if t in _CLASSES else t for t in pattern.split())


def draw_texts(
    sizes: dict[str, tuple[str, int]], seed: int, exclude: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Draw lists of sentences that share no sentence.

    Arguments
    ---------
    sizes : dict
        Name of a list -> (wording, number of sentences). The order matters: lists drawn
        first do not change when a later one grows.
    seed : int
        Seed of the draw.
    exclude : iterable of str
        Sentences that may not occur in any list.

    Returns
    -------
    dict
        Name -> list of distinct sentences; no sentence occurs twice, in one list or in two.

    Example
    -------
    >>> texts = draw_texts({"test": ("narrow", 3), "train": ("narrow", 5)}, seed=1)
    >>> len(set(texts["test"]) | set(texts["train"]))
    8
    """
    rng = random.Random(seed)
    seen = set(exclude)
    texts: dict[str, list[str]] = {}
    for name, (wording, count) in sizes.items():
        texts[name] = []
        while len(texts[name]) < count:
            candidate = sentence(rng, wording)
            if candidate not in seen:
                seen.add(candidate)
                texts[name].append(candidate)
    return texts
