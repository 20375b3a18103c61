#!/usr/bin/env python3
"""How much re-ranking saves by sharing the forward pass below the cuts: CPU seconds and layer evaluations in one run.

    python benchmarks/rerank.py [--layers 28] [--depths 13] [--candidates 4] [--width 128] [--batches 2]

The decoder has random weights; the candidates are the blocks of smallest distance, as in `measure.py --rerank`. Naive
is removing each block and running all that is left. Both give the same losses, or the script fails. What is saved
depends on where the candidates lie: a block (l, n) costs L - l - n layers instead of L - n, so deep ones cost little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechllm_prune.models.speechllm import DecoderInputs
from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.prune.selectors import Block, BlockLosses, best_blocks, block_losses
from speechllm_prune.prune.surgery import Removal


def make_decoder(num_layers: int, width: int) -> Any:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def make_batches(width: int, count: int, rows: int = 4, length: int = 120) -> list[DecoderInputs]:
    """Random embeddings; the last quarter of every row are labels."""
    index = torch.arange(rows).repeat_interleave(length // 4)
    position = torch.arange(length - length // 4, length).repeat(rows)
    return [
        DecoderInputs(
            torch.randn(rows, length, width),
            torch.ones(rows, length, dtype=torch.long),
            torch.arange(length).expand(rows, -1),
            torch.stack([index, position]),
            torch.randint(1000, (len(index),)),
        )
        for _ in range(count)
    ]


def naive_losses(
    decoder: Any, blocks: list[Block], batches: list[DecoderInputs]
) -> tuple[dict[Block, float], int]:
    """Every block removed in turn and all that is left run on every batch; the sums and the layer evaluations."""
    total, evaluations = {}, 0
    for block in blocks:
        removal = Removal(decoder, *block)
        removal.apply()
        try:
            found: BlockLosses = block_losses(decoder, [], batches)
        finally:
            removal.undo()
        total[block] = found.full
        evaluations += found.layer_evaluations
    return total, evaluations


def cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and CPU time of a call."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def main(argv: list[str] | None = None) -> float:
    """Print the comparison; returns the ratio of CPU seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("layers", 28),
        ("depths", 13),
        ("candidates", 4),
        ("width", 128),
        ("batches", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    decoder = make_decoder(options.layers, options.width)
    batches = make_batches(options.width, options.batches)
    matrix = measure_distances(decoder, [batch._asdict() for batch in batches]).matrix
    blocks = [b for b in best_blocks(matrix.tolist(), options.candidates) if b[1] <= options.depths]
    block_losses(decoder, blocks[:1], batches[:1])  # what is only slow the first time
    shared, shared_seconds = cpu_seconds(lambda: block_losses(decoder, blocks, batches))
    naive, naive_seconds = cpu_seconds(lambda: naive_losses(decoder, blocks, batches))
    if naive[0] != shared.total:
        raise SystemExit("the losses differ")
    print(f"{options.layers} layers, {options.depths} depths, {len(blocks)} blocks, equal losses")
    print(f"{'':8}{'layer evaluations':>20}{'CPU seconds':>14}")
    print(f"{'naive':8}{naive[1]:>20}{naive_seconds:>14.2f}")
    print(f"{'shared':8}{shared.layer_evaluations:>20}{shared_seconds:>14.2f}")
    evaluations = naive[1] / shared.layer_evaluations
    ratio = naive_seconds / shared_seconds
    print(f"{'ratio':8}{evaluations:>20.2f}{ratio:>14.2f}")
    return ratio


if __name__ == "__main__":
    main()
