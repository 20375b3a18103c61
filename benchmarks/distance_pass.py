#!/usr/bin/env python3
"""C6: what measuring all angular distances costs over a plain forward pass of the decoder body.

    python benchmarks/distance_pass.py

Plain is the decoder body on the same batch, with nothing collected. The usual way is shown beside it: the whole
causal LM with `output_hidden_states=True`, all positions of all layers and all logits. The decoder has random weights,
on which the cost does not depend. Counted: calls of lm_head, forward passes, bytes that the hooks keep.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Result, best_of, check, qwen2, script
from speechllm_prune.prune.distance import (
    ResidualStream,
    angular_distance,
    last_positions,
    measure_distances,
)


@torch.no_grad()
def measure(tiny: bool) -> list[Result]:
    """Overhead, the usual way, bytes kept, calls of lm_head."""
    layers, width, vocabulary, rows, length = (
        (3, 32, 50, 2, 10) if tiny else (28, 512, 32000, 4, 128)
    )
    decoder = qwen2(layers, width, vocabulary)
    mask = torch.ones(rows, length, dtype=torch.long)
    batch = {"inputs_embeds": torch.randn(rows, length, width), "attention_mask": mask}
    positions = mask.cumsum(1) - 1
    body_calls: list[int] = []
    head_calls: list[int] = []
    handles = [
        decoder.get_decoder().register_forward_hook(lambda *_: body_calls.append(1)),
        decoder.get_output_embeddings().register_forward_hook(lambda *_: head_calls.append(1)),
    ]
    matrix = measure_distances(decoder, [batch]).matrix
    calls = len(body_calls), len(head_calls)
    for handle in handles:
        handle.remove()
    with ResidualStream(decoder) as stream:
        stream.positions = last_positions(mask)
        decoder.get_decoder()(**batch, use_cache=False)
        kept = sum(state.untyped_storage().nbytes() for state in stream.states)
    usual = decoder(**batch, output_hidden_states=True).hidden_states
    first = angular_distance(usual[0][:, -1].double(), usual[1][:, -1].double()).mean()
    check(abs(float(matrix[0, 0] - first)) < 1e-6, "d(0, 1) by hand")
    check(calls[0] == 1, "more than one forward pass for all pairs")
    sides = {
        "plain": lambda: decoder.get_decoder()(**batch, position_ids=positions, use_cache=False),
        "ours": lambda: measure_distances(decoder, [batch]),
        "usual": lambda: decoder(**batch, output_hidden_states=True, use_cache=False),
    }
    seconds = best_of(sides, 1 if tiny else 5)
    ours = f"{seconds['ours']:.2f}"
    one_position = (layers + 1) * rows * width * 4
    return [
        Result(
            "C6 all distances over a plain forward, CPU s",
            100 * (seconds["ours"] / seconds["plain"] - 1),
            "<= 3 %",
            ours,
            f"{seconds['plain']:.2f}",
            "0 %",
            sides["ours"],
        ),
        Result(
            "C6 all distances, CPU s: HF output_hidden_states",
            seconds["usual"] / seconds["ours"],
            "",
            ours,
            f"{seconds['usual']:.2f}",
        ),
        Result(
            "C6 bytes kept: one position of every layer",
            kept / one_position,
            "<= 2x",
            f"{kept:,}",
            f"{one_position:,}",
            "1x",
        ),
        Result("C6 calls of lm_head", calls[1], "<= 0", str(calls[1]), "1", "0"),
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
