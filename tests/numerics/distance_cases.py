"""What `test_distance_reference.py` measures, in one process or as one of two ranks.

Run as `python -m tests.numerics.distance_cases ENCODER DECODER FOLDER` with RANK, WORLD_SIZE and the like set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import ddp_init_group
from torch import Tensor

from speechllm_prune.data.batching import collate
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.distance import Distances, measure_distances
from tests.numerics.common import build, utterances

NUM_WORDS = (1, 5, 2, 4, 3)
SHARDS = ((0, 3, 4), (2, 1))
CASES = [
    (rule, side, adapters)
    for rule in ("sequence", "prompt")
    for side in ("right", "left")
    for adapters in (True, False)
]


def build_adapted(encoder: Path, decoder: Path) -> SpeechLLM:
    """A tiny SpeechLLM with adapters that do something, and dropout that must not."""
    return build(encoder, decoder, decoder_lora_rank=3, decoder_lora_dropout=0.9)


@torch.no_grad()
def rows_of(model: SpeechLLM, rule: str) -> list[Tensor]:
    """(T, H) decoder inputs of every utterance by itself, ending where the rule says."""
    items = utterances(model, NUM_WORDS)
    return [
        model.inputs_for(collate([item]), targets=rule == "sequence").inputs_embeds[0]
        for item in items
    ]


def batches_of(
    rows: list[Tensor], side: str, index: tuple[int, ...], batch_size: int = 2
) -> Iterator[dict[str, Tensor]]:
    """Rows padded on one side with what must not be seen."""
    for first in range(0, len(index), batch_size):
        part = index[first : first + batch_size]
        length = max(len(rows[i]) for i in part) + 1
        embeds = torch.full((len(part), length, rows[0].shape[1]), 3.0)
        mask = torch.zeros(len(part), length, dtype=torch.long)
        for row, i in enumerate(part):
            place = (
                slice(0, len(rows[i])) if side == "right" else slice(length - len(rows[i]), None)
            )
            embeds[row, place], mask[row, place] = rows[i], 1
        yield {"inputs_embeds": embeds, "attention_mask": mask, "index": torch.tensor(part)}


def as_arrays(found: Distances) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "matrix": found.matrix.numpy(),
        "influence": found.influence.numpy(),
        "post_norm": found.post_norm.numpy(),
        "samples": found.samples.numpy(),
        "count": found.count,
    }


def measure_all(
    encoder: Path, decoder: Path, index: tuple[int, ...]
) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """Every case, over this process's share of the utterances."""
    model = build_adapted(encoder, decoder)
    model.decoder.train()  # whoever forgot it
    return {
        (rule, side, adapters): as_arrays(
            measure_distances(
                model.decoder, batches_of(rows_of(model, rule), side, index), adapters=adapters
            )
        )
        for rule, side, adapters in CASES
    }


def save(found: dict[tuple[str, str, bool], dict[str, Any]], path: Path) -> None:
    """All arrays in one file."""
    flat = {
        "/".join((*map(str, case), name)): value
        for case, values in found.items()
        for name, value in values.items()
    }
    np.savez(path, **flat)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ddp_init_group({"distributed_backend": "gloo"})
    rank = torch.distributed.get_rank()
    encoder, decoder, folder = map(Path, sys.argv[1:])
    save(measure_all(encoder, decoder, SHARDS[rank]), folder / f"rank{rank}.npz")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads take seconds to end by themselves
