"""What `test_training.py` runs in two processes and in one: training, validation and measuring on uneven shards.

Run as `python -m tests.numerics.two_ranks ENCODER DECODER FOLDER` with RANK, WORLD_SIZE and the like set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import ddp_init_group

from speechllm_prune.data.batching import Batch, collate
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.restore import build_model, set_trainable, train_names
from tests.numerics.common import hparams_of, tensors_of, train_on, utterances

NUM_STEPS = 3
# Two optimiser steps' worth of utterances, over which each run goes round and round: [step][micro-batch].
TWO_RANKS = (
    [[[0, 1], [2]], [[3], [4, 5, 6]]],
    [[[7], [8]], [[9, 10], [11]]],
)
ONE_PROCESS = [[0, 1, 2, 7, 8], [3, 4, 5, 6, 9, 10, 11]]
VALID = [0, 4, 8, 1, 5]
NUM_WORDS = (1, 5, 2, 4, 1, 2, 1, 3, 6, 1, 4, 2)


def work(
    encoder: Path, decoder: Path, folder: Path, rank: int | None, max_grad_norm: float = 1e6
) -> dict[str, Any]:
    """Train, validate and measure as one of two ranks, or alone (rank None)."""
    distributed = rank is not None
    hparams = hparams_of(
        encoder,
        decoder,
        decoder_lora_rank=2,
        decoder_lora_dropout=0.0,
        grad_accumulation_factor=2 if distributed else 1,
        max_grad_norm=max_grad_norm,
        lr=0.02,
        max_tokens_per_second=2.0,
    )
    hparams["opt_class"] = torch.optim.SGD  # Adam would hide a wrong scale of the gradients
    model = build_model(hparams)
    start = tensors_of(model)
    items = utterances(model, NUM_WORDS)
    set_trainable(model, train_names(model))
    if rank == 1:
        # Frozen and unused: still different at the end, unless all frozen weights were sent around.
        model.encoder.model.masked_spec_embed.data.add_(1.0)
    batches = [micro for step in TWO_RANKS[rank] for micro in step] if distributed else ONE_PROCESS
    valid = [VALID[rank::2]] if distributed else [VALID]
    brain = train_on(model, hparams, items, batches, NUM_STEPS, folder, valid, distributed)
    shards = (VALID, []) if distributed else (VALID,)
    uneven = ([0, 1, 2, 3], [4]) if distributed else ([0, 1, 2, 3, 4],)
    return {
        "start": start,
        "tensors": tensors_of(model),
        "seen": brain.counters.state_dict(),
        "valid": brain.valid_value,
        "valid_loss": float(brain.valid_sums[0] / brain.valid_sums[1]),
        "distances": measure(model, items, uneven[rank or 0]),
        "one_empty": measure(model, items, shards[rank or 0]),
        "wrapped": type(brain.modules.model).__name__,
    }


def measure(model: SpeechLLM, items: list[dict], index: list[int]) -> tuple[torch.Tensor, int]:
    """Distances of some utterances in batches of two, the same model on every rank."""
    batches: list[Batch] = [
        collate([items[i] for i in index[first : first + 2]]) for first in range(0, len(index), 2)
    ]
    with torch.no_grad():
        found = measure_distances(
            model.decoder, (model.inputs_for(batch)._asdict() for batch in batches)
        )
    return found.matrix, found.count


if __name__ == "__main__":
    torch.set_num_threads(1)
    ddp_init_group({"distributed_backend": "gloo"})
    rank = torch.distributed.get_rank()
    encoder, decoder, folder = map(Path, sys.argv[1:])
    torch.save(work(encoder, decoder, folder, rank), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads take seconds to end by themselves
