#!/usr/bin/env python3
"""C8: the loss of many cuts by sharing the forward pass below them, against removing each block and running the rest.

    python benchmarks/rerank.py

What is compared: `block_losses` as `measure.py --rerank` calls it, teacher-forced on the same batches, for the block of
smallest distance at each of 13 sizes of a decoder of 28 layers with random weights. Both sides give the same losses bit
for bit. It is not a sweep of WER: decoding token by token shares nothing below the cut. What is saved depends on where
the blocks lie: without (l, n) the rest costs L - l - n layers instead of L - n, so deep blocks cost little.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Result, best_of, check, qwen2, script
from speechllm_prune.models.speechllm import DecoderInputs
from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.prune.selectors import Block, BlockLosses, best_blocks, block_losses
from speechllm_prune.prune.surgery import Removal


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


def measure(tiny: bool) -> list[Result]:
    """Time and layer evaluations for the best block of each size."""
    layers, depths, width, length = (6, 3, 32, 16) if tiny else (28, 13, 256, 120)
    decoder = qwen2(layers, width, 1000, spread=0.05)
    batches = make_batches(width, 1, length=length)
    matrix = measure_distances(decoder, [batch._asdict() for batch in batches]).matrix
    blocks = [block for block in best_blocks(matrix.tolist(), 1) if block[1] <= depths]
    naive, evaluations = naive_losses(decoder, blocks, batches)
    shared = block_losses(decoder, blocks, batches)
    check(naive == shared.total, "losses")
    sides = {
        "ours": lambda: block_losses(decoder, blocks, batches),
        "theirs": lambda: naive_losses(decoder, blocks, batches),
    }
    seconds = best_of(sides, 1 if tiny else 3)
    counted = evaluations / shared.layer_evaluations
    return [
        Result(
            f"C8 losses of {len(blocks)} cuts, {layers} layers, CPU s: each cut run alone",
            seconds["theirs"] / seconds["ours"],
            ">= 4x",
            f"{seconds['ours']:.2f}",
            f"{seconds['theirs']:.2f}",
            f"{counted:.2f}x by layers run ({shared.layer_evaluations}, {evaluations})",
            sides["ours"],
        )
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
