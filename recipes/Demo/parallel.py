"""The demo's little language in three languages: English as in `grammar.py`, with German and French beside it.

A translation follows from the English sentence alone, and is not word for word: German puts the verb second after a
time word and the particle of a separable verb last, and declines the article of a place; French puts the colour after
the noun, in its gender, gives people an article, and says "never" in two words.
"""

LANGUAGES = ("en", "de", "fr")

_NUMBER = {
    "two": ("zwei", "deux"),
    "three": ("drei", "trois"),
    "four": ("vier", "quatre"),
    "five": ("fünf", "cinq"),
    "six": ("sechs", "six"),
    "seven": ("sieben", "sept"),
    "eight": ("acht", "huit"),
    "nine": ("neun", "neuf"),
    "ten": ("zehn", "dix"),
}
# German plural; French masculine and feminine plural.
_COLOUR = {
    "red": ("rote", "rouges", "rouges"),
    "green": ("grüne", "verts", "vertes"),
    "blue": ("blaue", "bleus", "bleues"),
    "yellow": ("gelbe", "jaunes", "jaunes"),
    "white": ("weiße", "blancs", "blanches"),
    "black": ("schwarze", "noirs", "noires"),
    "orange": ("orange", "orange", "orange"),
    "purple": ("lila", "violets", "violettes"),
}
# German; French with its gender.
_OBJECT = {
    "boxes": ("Kisten", "cartons", "m"),
    "apples": ("Äpfel", "pommes", "f"),
    "tables": ("Tische", "tables", "f"),
    "windows": ("Fenster", "fenêtres", "f"),
    "letters": ("Briefe", "lettres", "f"),
    "flowers": ("Blumen", "fleurs", "f"),
    "bottles": ("Flaschen", "flacons", "m"),
    "pictures": ("Bilder", "tableaux", "m"),
    "hammers": ("Hämmer", "marteaux", "m"),
    "candles": ("Kerzen", "bougies", "f"),
}
# German with its gender; French with its gender (l: elision).
_PLACE = {
    "garden": ("Garten", "m", "jardin", "m"),
    "kitchen": ("Küche", "f", "cuisine", "f"),
    "river": ("Fluss", "m", "rivière", "f"),
    "market": ("Markt", "m", "marché", "m"),
    "station": ("Bahnhof", "m", "gare", "f"),
    "castle": ("Schloss", "n", "château", "m"),
    "school": ("Schule", "f", "école", "l"),
    "village": ("Dorf", "n", "village", "m"),
}
# German before a masculine or neuter, and before a feminine; French up to its article.
_RELATION = {
    "from": ("aus dem", "aus der", "de"),
    "near": ("beim", "bei der", "près de"),
    "behind": ("hinter dem", "hinter der", "derrière"),
    "under": ("unter dem", "unter der", "sous"),
}
_TIME = {
    "today": ("heute", "aujourd'hui"),
    "yesterday": ("gestern", "hier"),
    "sometimes": ("manchmal", "parfois"),
    "never": ("nie", "jamais"),
    "tomorrow": ("morgen", "demain"),
    "often": ("oft", "souvent"),
}
# German verb and particle; French.
_COMMAND = {
    "take": ("nimm", "mit", "prenez"),
    "bring": ("bring", "", "apportez"),
    "move": ("stell", "um", "déplacez"),
    "paint": ("mal", "an", "peignez"),
    "count": ("zähl", "", "comptez"),
    "hide": ("versteck", "", "cachez"),
    "clean": ("putz", "", "nettoyez"),
    "sell": ("verkauf", "", "vendez"),
}
# German, French, whether plural.
_PERSON = {
    "anna": ("Anna", "Anna", False),
    "peter": ("Peter", "Pierre", False),
    "martin": ("Martin", "Martin", False),
    "susan": ("Susanne", "Suzanne", False),
    "doctors": ("Ärzte", "les médecins", True),
    "farmers": ("Bauern", "les fermiers", True),
    "teachers": ("Lehrer", "les professeurs", True),
    "children": ("Kinder", "les enfants", True),
    "sailors": ("Matrosen", "les marins", True),
}
# German singular, plural and particle; French participle.
_ACTION = {
    "found": ("fand", "fanden", "", "trouvé"),
    "wanted": ("wollte", "wollten", "", "voulu"),
    "carried": ("trug", "trugen", "", "porté"),
    "lost": ("verlor", "verloren", "", "perdu"),
    "bought": ("kaufte", "kauften", "ein", "acheté"),
    "watched": ("sah", "sahen", "an", "regardé"),
    "opened": ("machte", "machten", "auf", "ouvert"),
    "followed": ("verfolgte", "verfolgten", "", "suivi"),
}
_TABLES = {
    "N": _NUMBER,
    "C": _COLOUR,
    "O": _OBJECT,
    "R": _RELATION,
    "P": _PLACE,
    "T": _TIME,
    "V": _COMMAND,
    "S": _PERSON,
    "A": _ACTION,
}
_SLOT_OF = {word: slot for slot, table in _TABLES.items() for word in table}


def slots(english: str) -> dict[str, str]:
    """The words of a sentence of the grammar by their class (one letter, as in `grammar.py`).

    Arguments
    ---------
    english : str
        A lower-case sentence of :func:`recipes.Demo.grammar.sentence`.

    Returns
    -------
    dict
        Class -> English word, in the order of the sentence; the article is left out.

    Example
    -------
    >>> slots("move seven purple candles from the garden")
    {'V': 'move', 'N': 'seven', 'C': 'purple', 'O': 'candles', 'R': 'from', 'P': 'garden'}
    """
    found: dict[str, str] = {}
    for word in english.split():
        if word == "the":
            continue
        if word not in _SLOT_OF or _SLOT_OF[word] in found:
            raise ValueError(f"{english!r} is no sentence of the demo's grammar (at {word!r})")
        found[_SLOT_OF[word]] = word
    return found


def translate(english: str, language: str) -> str:
    """Write a sentence of the grammar as a translation corpus does: in the language, with case and full stop.

    Arguments
    ---------
    english : str
        A lower-case English sentence of the grammar.
    language : str
        ``en``, ``de`` or ``fr``.

    Returns
    -------
    str
        The sentence.

    Example
    -------
    >>> english = "yesterday doctors bought six white tables"
    >>> translate(english, "en"), translate(english, "de")
    ('Yesterday doctors bought six white tables.', 'Gestern kauften Ärzte sechs weiße Tische ein.')
    >>> translate(english, "fr")
    'Hier les médecins ont acheté six tables blanches.'
    """
    writer = {"en": _english, "de": _german, "fr": _french}[language]
    words = [word for word in writer(slots(english)) if word]
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}."


def spoken(sentence: str) -> str:
    """What is said of a written sentence: lower case, no full stop.

    Example
    -------
    >>> spoken("Hier Anna a ouvert six tables.")
    'hier anna a ouvert six tables'
    """
    return sentence.rstrip(".").lower()


# ------------------------------------------------------------------------------------- the languages
def _english(found: dict[str, str]) -> list[str]:
    words = []
    for slot, word in found.items():
        if slot == "P":
            words.append("the")
        words.append(word.title() if slot == "S" and not _PERSON[word][2] else word)
    return words


def _german(found: dict[str, str]) -> list[str]:
    thing = [_NUMBER[found["N"]][0]]
    if "C" in found:
        thing.append(_COLOUR[found["C"]][0])
    thing.append(_OBJECT[found["O"]][0])
    if "P" in found:
        place, gender = _PLACE[found["P"]][:2]
        thing += [_RELATION[found["R"]][gender == "f"], place]
    time = _TIME[found["T"]][0] if "T" in found else ""
    if "V" in found:
        verb, particle = _COMMAND[found["V"]][:2]
        return [verb, time, *thing, particle]
    person, _, plural = _PERSON[found["S"]]
    verb, particle = _ACTION[found["A"]][int(plural)], _ACTION[found["A"]][2]
    if time and next(iter(found)) == "T":
        return [time, verb, person, *thing, particle]  # the verb stays second
    return [person, verb, time, *thing, particle]


def _french(found: dict[str, str]) -> list[str]:
    noun, gender = _OBJECT[found["O"]][1:]
    thing = [_NUMBER[found["N"]][1], noun]
    if "C" in found:
        thing.append(_COLOUR[found["C"]][1 + (gender == "f")])
    if "P" in found:
        thing.append(_french_place(found["R"], found["P"]))
    time = _TIME[found["T"]][1] if "T" in found else ""
    if "V" in found:
        return [time, _COMMAND[found["V"]][2], *thing]
    _, person, plural = _PERSON[found["S"]]
    auxiliary = "ont" if plural else "a"
    if found.get("T") == "never":
        auxiliary = f"n'{auxiliary}"
    clause = [person, auxiliary, _ACTION[found["A"]][3], *thing]
    return [time, *clause] if next(iter(found)) == "T" else [*clause, time]


def _french_place(relation: str, place: str) -> str:
    noun, gender = _PLACE[place][2:]
    before = _RELATION[relation][2]
    if gender == "l":
        return f"{before} l'{noun}"
    if gender == "m" and before.endswith("de"):
        return f"{before.removesuffix('de')}du {noun}"
    return f"{before} {'la' if gender == 'f' else 'le'} {noun}"
