"""Checkpoints: only what is trained, in safetensors, and never half a checkpoint under a valid name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    ckpt_recency,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier
from torch import Tensor, nn

from speechllm_prune.runtime import UserError

MODEL_FILE = "model.ckpt"
"""The trainable tensors in a checkpoint folder (safetensors; the ending is SpeechBrain's)."""


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, writing under a temporary name that is changed when everything is on disk.

    The original writes its meta file first, so that a process killed while saving leaves a folder that counts as the
    newest checkpoint and makes every restart fail.
    """

    def _new_checkpoint_dirpath(self) -> Path:
        temporary = self.checkpoints_dir / ".saving"
        shutil.rmtree(temporary, ignore_errors=True)
        return temporary

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Checkpoint | None:
        """As the parent's; the folder appears under its final name once it is complete."""
        saved = super().save_checkpoint(*args, **kwargs)
        ddp_barrier()
        if saved is not None:
            for file in saved.path.iterdir():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            final = super()._new_checkpoint_dirpath()
            os.rename(saved.path, final)
            files = {name: final / path.name for name, path in saved.paramfiles.items()}
            saved = Checkpoint(final, saved.meta, files)
        # Deleting is collective: a rank that lists the folder too early counts other deletions and all of them hang.
        ddp_barrier()
        return saved

    def save_and_prune(
        self, meta: dict[str, Any], min_key: str | None, max_key: str | None
    ) -> None:
        """Save; keep the newest, the one before it, and the best by the given key."""
        self.save_checkpoint(meta=meta)
        self.delete_checkpoints(
            num_to_keep=2,
            importance_keys=[ckpt_recency],
            ckpt_predicate=self._worse(min_key, max_key),
        )

    def _worse(self, min_key: str | None, max_key: str | None) -> Any:
        best = self.find_checkpoint(min_key=min_key, max_key=max_key)
        return lambda checkpoint: best is None or checkpoint.path != best.path


def load_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The trainable tensors of a checkpoint folder, on the CPU."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MODEL_FILE}; the checkpoint was deleted or never finished"
        )
    return load_file(path)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are being trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor], expected: Iterable[str]) -> None:
    """Copy tensors into a model's parameters; names and shapes must fit exactly.

    Raises
    ------
    UserError
        Naming what is missing, unexpected or of another shape.
    """
    parameters = dict(model.named_parameters())
    expected = set(expected)
    problems = [f"missing {name}" for name in sorted(expected - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - expected)]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(parameters[name].shape)}"
        for name in sorted(expected & set(tensors))
        if tensors[name].shape != parameters[name].shape
    ]
    if problems:
        raise UserError(f"the checkpoint does not fit the model: {'; '.join(problems[:4])}")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@register_checkpoint_hooks
class TrainableState:
    """Recoverable: the trainable parameters of a model, and nothing of the frozen ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @mark_as_saver
    def save(self, path: Path) -> None:
        """Write safetensors."""
        save_file(
            {
                name: tensor.contiguous().cpu()
                for name, tensor in trainable_tensors(self.model).items()
            },
            path,
        )

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        """Read safetensors; names must fit exactly."""
        load_tensors(self.model, load_file(path), trainable_tensors(self.model))


@register_checkpoint_hooks
class StateDicts:
    """Recoverable: the `state_dict`s of optimiser, scheduler, sampler and counters in one file.

    Arguments
    ---------
    parts : object
        Anything with `state_dict` and `load_state_dict`, by name.
    """

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    @mark_as_saver
    def save(self, path: Path) -> None:
        """Write with torch."""
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        """Read with torch, tensors and plain values only."""
        states = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
