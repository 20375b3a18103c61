"""What `test_selectors.py` runs in two processes: losses of blocks on uneven shards.

Run as `python -m tests.numerics.two_ranks_losses DECODER FILE` with RANK, WORLD_SIZE and the like set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from speechbrain.utils.distributed import ddp_init_group
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.selectors import BlockLosses, block_losses
from tests.numerics.common import random_inputs

BLOCKS = [(1, 2), (0, 3)]
LENGTHS = [[9, 6, 3], [7, 5]]
"""Of the rows of rank 0 and of rank 1."""


def losses(decoder: Path, ranks: list[int]) -> BlockLosses:
    """Losses over the rows of the given ranks."""
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    return block_losses(model, BLOCKS, [random_inputs(model, LENGTHS[r], seed=r) for r in ranks])


if __name__ == "__main__":
    torch.set_num_threads(1)
    ddp_init_group({"distributed_backend": "gloo"})
    rank = int(os.environ["RANK"])
    found = losses(Path(sys.argv[1]), [rank])
    torch.save((found.total, found.full, found.num_labels), f"{sys.argv[2]}.{rank}")
