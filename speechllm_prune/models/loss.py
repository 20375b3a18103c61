"""The loss on label rows, in one piece or in chunks whose logits are not kept.

Shapes: M label rows, H decoder width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechllm_prune.models.decoder import lm_logits
from speechllm_prune.prune.distill import TeacherRows, divergence


class LossSums(NamedTuple):
    """Sums over all labels of a batch, so that means can be taken over any number of batches and ranks."""

    loss: Tensor
    num_labels: Tensor
    num_correct: Tensor


def loss_sums(
    decoder: Any, rows: Tensor, labels: Tensor, teacher: TeacherRows | None, chunk_rows: int = 0
) -> LossSums:
    """Cross-entropy, and a teacher's weighted divergence, summed over label rows.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM, for its output layer.
    rows : Tensor
        (M, H) states after the final norm.
    labels : Tensor
        (M,).
    teacher : TeacherRows or None
        For the same rows.
    chunk_rows : int
        At most this many rows of (M, V) logits are in memory at once; the backward pass computes them a second time.
        0: all of them.
    """
    if not 0 < chunk_rows < len(labels):
        loss, correct = _sums(decoder, rows, labels, teacher)
    else:
        parts = []
        for first in range(0, len(labels), chunk_rows):
            some = slice(first, first + chunk_rows)
            said = None if teacher is None else teacher.rows(some)
            parts.append(
                checkpoint(_sums, decoder, rows[some], labels[some], said, use_reentrant=False)
            )
        loss, correct = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    # full, not tensor: a copy from the host would wait for the device
    return LossSums(loss, torch.full((), len(labels), device=rows.device), correct)


def _sums(
    decoder: Any, rows: Tensor, labels: Tensor, teacher: TeacherRows | None
) -> tuple[Tensor, Tensor]:
    logits = lm_logits(decoder, rows)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    if teacher is not None:
        loss = loss + teacher.beta * divergence(teacher, logits)
    return loss, (logits.argmax(-1) == labels).sum()
