"""Distillation healing: the cut model learns from the unpruned one, whose answers are computed once for all cuts.

The loss of a label row is cross-entropy + beta x KL(teacher || student). Of the teacher only the K largest
log-probabilities are kept; all other tokens are one class, with the probability that is left over. What the teacher
says does not depend on the block that is removed, so a sweep over blocks computes it once per utterance.

Shapes: M label rows, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechllm_prune.data.batching import Batch
from speechllm_prune.runtime import raise_if_stopped


class TeacherRows(NamedTuple):
    """What the teacher says on label rows.

    Arguments
    ---------
    log_probs : Tensor
        (M, K) float32, largest first.
    token_ids : Tensor
        (M, K) int32.
    beta : float
        Weight of the divergence.
    """

    log_probs: Tensor
    token_ids: Tensor
    beta: float = 1.0

    def to(self, device: Any) -> TeacherRows:
        """Move to a device."""
        return TeacherRows(self.log_probs.to(device), self.token_ids.to(device), self.beta)

    def rows(self, some: slice) -> TeacherRows:
        """Some of the label rows."""
        return TeacherRows(self.log_probs[some], self.token_ids[some], self.beta)


def teacher_rows(logits: Tensor, top: int) -> TeacherRows:
    """The K most likely tokens of each row: (M, V) logits -> `TeacherRows`."""
    log_probs, token_ids = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]))
    return TeacherRows(log_probs, token_ids.int())


def divergence(teacher: TeacherRows, logits: Tensor) -> Tensor:
    """KL(teacher || student) summed over rows, tokens that the teacher's list lacks taken as one class.

    Never more than the divergence over all tokens, and equal to it where the list is the whole vocabulary.

    Arguments
    ---------
    teacher : TeacherRows
        (M, K).
    logits : Tensor
        (M, V) of the student.

    Returns
    -------
    Tensor
        Scalar, in nats.

    Example
    -------
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> divergence(teacher_rows(logits, top=2), logits).item() < 1e-6
    True
    """
    ours = logits.float().log_softmax(-1).gather(-1, teacher.token_ids.long())  # (M, K)
    kept = (teacher.log_probs.exp() * (teacher.log_probs - ours)).sum()
    if teacher.token_ids.shape[-1] == logits.shape[-1]:
        return kept
    theirs_rest, ours_rest = _log_rest(teacher.log_probs), _log_rest(ours)
    return kept + (theirs_rest.exp() * (theirs_rest - ours_rest)).sum()


def _log_rest(log_probs: Tensor) -> Tensor:
    """Log of the probability that the listed tokens leave over: (M, K) -> (M,)."""
    # A list that holds all probability up to rounding would give log 0, and a gradient of 1 / 0.
    listed = log_probs.logsumexp(-1).clamp(max=-1e-6)
    return torch.log(-torch.expm1(listed))


class TeacherStore:
    """The teacher's rows by utterance, in memory and in one file.

    Arguments
    ---------
    rows : dict
        {utterance id: TeacherRows of its target tokens and eos}.
    """

    def __init__(self, rows: dict[str, TeacherRows]) -> None:
        self.rows = rows

    def __contains__(self, utterance: str) -> bool:
        return utterance in self.rows

    def rows_of(self, utterances: Sequence[str], beta: float) -> TeacherRows:
        """Rows of a batch, one utterance after the other, as `SpeechLLM.build_inputs` orders its labels."""
        parts = [self.rows[utterance] for utterance in utterances]
        return TeacherRows(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            beta,
        )

    def save(self, file: Path) -> None:
        """Write one file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"log_probs/{name}": rows.log_probs for name, rows in self.rows.items()}
        tensors |= {f"token_ids/{name}": rows.token_ids for name, rows in self.rows.items()}
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        os.close(handle)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> TeacherStore:
        """Read what `save` wrote."""
        tensors = load_file(file)
        names = [name.partition("/")[2] for name in tensors if name.startswith("log_probs/")]
        return cls(
            {
                name: TeacherRows(tensors[f"log_probs/{name}"], tensors[f"token_ids/{name}"])
                for name in names
            }
        )


@torch.no_grad()
def ask_teacher(model: Any, batches: Iterable[Batch], top: int) -> TeacherStore:
    """Run the unpruned model over batches, every utterance once.

    Arguments
    ---------
    model : SpeechLLM
        Unpruned, in its stage-1 state.
    batches : iterable of Batch
        On the model's device.
    top : int
        K.
    """
    model.eval()
    rows: dict[str, TeacherRows] = {}
    for batch in batches:
        raise_if_stopped()
        logits, _ = model.label_logits(batch)
        found = teacher_rows(logits, top)
        sizes = [len(target) + 1 for target in batch.target_ids]
        parts = zip(
            batch.ids,
            found.log_probs.cpu().split(sizes),
            found.token_ids.cpu().split(sizes),
            strict=True,
        )
        rows |= {name: TeacherRows(log_probs, token_ids) for name, log_probs, token_ids in parts}
    return TeacherStore(rows)
