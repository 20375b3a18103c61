"""What the stand-in decoder reads: a tokenizer, sentences, and the SLAM layout made of text alone.

A SpeechLLM's decoder sees ``[speech] [prompt] [target]``. A large pretrained LLM copes with the speech part
because it can copy, and because it has seen everything. The stand-in learns just that, from text:
``<words, stretched like speech> <prompt> <target> <eos>``.
"""

import random
from collections.abc import Callable, Iterable

IGNORED = -100
PAUSE = ","


def train_tokenizer(words: Iterable[str], prompt: str, family: str, vocab_size: int):
    """A byte-level BPE tokenizer in which every frequent word is one token.

    It is a ``Qwen2Tokenizer`` also in a Llama folder: the generic tokenizer class would come back
    from ``AutoTokenizer`` as another class that splits words differently, without an error.

    Arguments
    ---------
    words : iterable of str
        Words of the domain.
    prompt : str
        The prompt; its words become tokens, too.
    family : str
        ``qwen2`` (eos is also pad, no bos, as in Qwen2.5) or ``llama`` (bos, no pad, as in Llama 3).
    vocab_size : int
        Upper bound.

    Returns
    -------
    transformers.Qwen2Tokenizer
        The tokenizer.

    Example
    -------
    >>> tokenizer = train_tokenizer(["seven", "boxes"], "Write it down.", "qwen2", 600)
    >>> len(tokenizer("seven boxes", add_special_tokens=False).input_ids)
    2
    """
    import contextlib
    import io

    from transformers import Qwen2Tokenizer

    # Each word as the first of a text and inside one: byte-level BPE has a token for either.
    lines = [form for word in words for form in (word, f" {word}")] * 20 + [prompt] * 50
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer prints empty progress lines
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(
            [lines], vocab_size=vocab_size, show_progress=False
        )
    if family == "llama":
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
        tokenizer.pad_token = None
    return tokenizer


def text_source(
    sentences: list[str],
    words: list[str],
    lengths: list[int],
    forbidden: set[str],
    random_share: float,
    repeat_share: float = 0.0,
) -> Callable[[random.Random], str]:
    """A function that draws one text for the decoder.

    Arguments
    ---------
    sentences : list of str
        Real sentences; may be empty.
    words : list of str
        Vocabulary of random strings.
    lengths : list of int
        Numbers of words that random strings may have.
    forbidden : set of str
        Texts that may not be drawn.
    random_share : float
        Share of random strings (all, if there are no sentences).
    repeat_share : float
        Share of the words of a random string that just repeat the word before: counting needs practice.

    Returns
    -------
    callable
        ``draw(rng) -> str``.

    Example
    -------
    >>> draw = text_source([], ["one", "two"], [2], {"one one", "two two", "two one"}, 1.0)
    >>> draw(random.Random(1))
    'one two'
    """
    allowed = [sentence for sentence in sentences if sentence not in forbidden]

    def draw(rng: random.Random) -> str:
        if allowed and rng.random() >= random_share:
            return rng.choice(allowed)
        for _ in range(1000):
            chosen = rng.choices(words, k=rng.choice(lengths))
            for index in range(1, len(chosen)) if repeat_share else ():
                if rng.random() < repeat_share:
                    chosen[index] = chosen[index - 1]
            text = " ".join(chosen)
            if text not in forbidden:
                return text
        raise RuntimeError("every random string over the train vocabulary is held back")

    return draw


class SlamText:
    """Turns a text into ids and labels in the SLAM layout.

    Arguments
    ---------
    tokenizer : PreTrainedTokenizer
        The decoder's tokenizer.
    prompt : str
        The prompt of the later SpeechLLM.
    stretch : list of float
        Probability that an input token is repeated 1, 2, 3 .. times: at 10 Hz a word lasts a few vectors.
    pause : float
        Probability that a pause token follows another word (and another pause, up to `max_pauses`).
    plain_share : float
        Share of examples that are the bare text, learned as a language model does.
    max_pauses : int
        Longest pause.
    """

    def __init__(
        self,
        tokenizer,
        prompt: str,
        stretch: list[float],
        pause: float,
        plain_share: float,
        max_pauses: int = 3,
    ) -> None:
        self.ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.prompt = self.ids(prompt)
        self.pause_id = self.ids(PAUSE)[0]
        self.eos = tokenizer.eos_token_id
        self.stretch = stretch
        self.pause = pause
        self.max_pauses = max_pauses
        self.plain_share = plain_share
        self._inner: dict[str, list[int]] = {}

    def __call__(
        self,
        text: str,
        rng: random.Random,
        plain: bool | None = None,
        source: str | None = None,
    ) -> tuple[list[int], list[int], int]:
        """One example.

        Arguments
        ---------
        text : str
            What is to be written.
        rng : random.Random
            Source of randomness.
        plain : bool, optional
            Whether the example is the bare text; drawn if None.
        source : str, optional
            What is heard, where that is not the text itself (translation).

        Returns
        -------
        tuple
            Input ids; labels of the same length (``IGNORED`` where nothing is learned); number of leading
            input positions that stand for speech.
        """
        target = self.ids(text)
        if plain is None:
            plain = rng.random() < self.plain_share
        if plain:
            return target, target[1:] + [self.eos], 0
        speech = self.stretched((text if source is None else source).split(), rng)
        ids = speech + self.prompt + target
        # As in the library: the row of the last prompt token predicts the first target token.
        labels = [IGNORED] * (len(speech) + len(self.prompt) - 1) + target + [self.eos]
        return ids, labels, len(speech)

    def stretched(self, words: list[str], rng: random.Random) -> list[int]:
        """Ids of the words, repeated and with pauses; equal neighbours always have a pause between them."""
        ids = self._pauses(rng)
        counts = range(1, len(self.stretch) + 1)
        for index, word in enumerate(words):
            if index:
                ids += self._pauses(rng, at_least=int(word == words[index - 1]))
            if word not in self._inner:
                self._inner[word] = self.ids(f" {word}")
            for token in self._inner[word]:
                ids += [token] * rng.choices(counts, self.stretch)[0]
        return ids + self._pauses(rng)

    def _pauses(self, rng: random.Random, at_least: int = 0) -> list[int]:
        count = 0
        while count < self.max_pauses and rng.random() < self.pause:
            count += 1
        return [self.pause_id] * max(count, at_least)
