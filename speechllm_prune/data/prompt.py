"""Text on its way to tokens: the case of the targets, and token ids of targets and plain sentences."""

from __future__ import annotations

from typing import Any


def apply_case(text: str, text_case: str) -> str:
    """Change the case of a target.

    Example
    -------
    >>> apply_case("HE'S HERE", "lower"), apply_case("He", "keep"), apply_case("He", "upper")
    ("he's here", 'He', 'HE')
    """
    return {"lower": text.lower, "upper": text.upper, "keep": text.__str__}[text_case]()


def encode_target(tokenizer: Any, text: str, text_case: str) -> list[int]:
    """Token ids of a target, without any special token: eos is added as a label, never as an input."""
    return tokenizer(apply_case(text, text_case), add_special_tokens=False).input_ids


def encode_text(tokenizer: Any, text: str, text_case: str, eos: frozenset[int]) -> list[int]:
    """Token ids for text mode: begun as the tokenizer begins a text (Llama 3: bos), never ended by eos."""
    ids = list(tokenizer(apply_case(text, text_case)).input_ids)
    while ids and ids[-1] in eos:
        ids.pop()
    return ids
