"""Text on its way to tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from speechllm_prune.data.prompt import apply_case, encode_target, encode_text
from tests import tiny


@pytest.mark.parametrize(
    ("case", "expected"),
    [("lower", "größe he's"), ("upper", "GRÖSSE HE'S"), ("keep", "Größe He's")],
)
def test_case(case: str, expected: str) -> None:
    assert apply_case("Größe He's", case) == expected


def test_unknown_case_is_no_silent_keep() -> None:
    with pytest.raises(KeyError):
        apply_case("x", "title")


def test_targets_have_no_special_tokens(decoder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder_folder)
    for text in ("SEVEN GREEN BOXES", "", "Übelkeit 42"):
        ids = encode_target(tokenizer, text, "lower")
        assert tokenizer.decode(ids) == text.lower()
        assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
    assert encode_target(tokenizer, "Seven", "keep") != encode_target(tokenizer, "Seven", "lower")


def test_text_begins_as_the_tokenizer_begins_it_and_never_ends_with_eos(
    decoder_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder_folder)
    stop = frozenset({tokenizer.eos_token_id})
    ids = encode_text(tokenizer, "Seven Boxes", "lower", stop)
    begin = [tokenizer.bos_token_id] if decoder_folder.name == "llama" else []
    assert ids == begin + encode_target(tokenizer, "seven boxes", "keep")

    class Ending:
        """A tokenizer that ends every text, as some do."""

        def __call__(self, text: str):
            found = tokenizer(text)
            found["input_ids"] = [*found["input_ids"], tokenizer.eos_token_id]
            return found

    assert encode_text(Ending(), "Seven Boxes", "lower", stop) == ids


def test_the_tiny_vocabulary_is_not_only_bytes(qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2)
    text = " ".join(tiny.WORDS)
    assert len(encode_target(tokenizer, text, "lower")) < len(text) / 2
