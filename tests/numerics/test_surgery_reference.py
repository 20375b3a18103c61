"""Pruned logits and cached greedy continuations against loops in float64 that know no cache, mask or padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from speechllm_prune.inference import greedy_search
from speechllm_prune.prune.lora import LoraSettings, add_decoder_lora
from speechllm_prune.prune.surgery import remove_layers
from tests.numerics import reference_decoder as reference
from tests.numerics.common import stir_adapters

ROWS = [[5, 9, 17, 200, 33, 41], [7, 8], [101, 3, 250, 12]]
NUM_TOKENS = 5
BLOCKS = [(0, 2), (1, 3), (4, 2)]


def padded(rows: list[list[int]], side: str, pad: int = 11) -> dict[str, torch.Tensor]:
    """The rows as one batch, with explicit position ids."""
    length = max(map(len, rows)) + 1
    fills = [[pad] * (length - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(fill) for fill in fills]
    if side == "right":
        ids = [row + fill for row, fill in zip(rows, fills, strict=True)]
        mask = [one + zero for one, zero in zip(ones, zeros, strict=True)]
    else:
        ids = [fill + row for row, fill in zip(rows, fills, strict=True)]
        mask = [zero + one for one, zero in zip(ones, zeros, strict=True)]
    attention = torch.tensor(mask)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("start", "size"), BLOCKS)
def test_pruned_logits_and_continuations(
    decoder_folder: Path, start: int, size: int, side: str, lora: bool
) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    if lora:
        add_decoder_lora(decoder, LoraSettings(2, 4))
        stir_adapters(decoder)
        decoder.eval()
    weights, sizes = reference.weights_of(decoder), reference.sizes_of(decoder.config)
    table = weights["model.embed_tokens.weight"]
    kept = remove_layers(decoder, start, size)
    batch = padded(ROWS, side)
    logits = decoder(**batch, use_cache=False).logits
    found = greedy_search(decoder, *left_padded(decoder), [NUM_TOKENS] * len(ROWS), frozenset({-1}))
    for index, row in enumerate(ROWS):
        expected = torch.from_numpy(reference.logits(weights, sizes, table[row], kept))
        got = logits[index][batch["attention_mask"][index].bool()].double()
        assert (got - expected).abs().max() < 1e-4
        whole = torch.from_numpy(reference.logits(weights, sizes, table[row]))
        assert (whole - expected).abs().max() > 0.05  # the block does something
        tokens = reference.greedy(weights, sizes, row, NUM_TOKENS, kept)
        assert found[index][0] == tokens


def left_padded(decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """What cached decoding reads: embeddings and mask, padded on the left."""
    batch = padded(ROWS, "left")
    return decoder.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
