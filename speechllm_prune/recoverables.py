"""What a checkpoint holds: the trained tensors in safetensors, and the state of all that moves while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import is_distributed_initialized
from torch import Tensor, nn

from speechllm_prune.ranks import gather_objects
from speechllm_prune.runtime import Fault, UserError, set_random_state


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

    def check_finite(self) -> None:
        """Refuse to save NaN or infinity.

        Raises
        ------
        Fault
            Naming the tensors.
        """
        bad = [n for n, t in trainable_tensors(self.model).items() if not bool(t.isfinite().all())]
        if bad:
            raise Fault(
                f"the weights are not finite ({', '.join(bad[:3])}): nothing was saved. The last checkpoint is good: "
                "lower lr, or look at the data, and run the same command again to go on from it"
            )

    def num_bytes(self) -> int:
        """Size of what is saved."""
        return sum(tensor.nbytes for tensor in trainable_tensors(self.model).values())

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

    def num_bytes(self) -> int:
        """Size of the tensors that are saved."""
        return _tensor_bytes([part.state_dict() for part in self.parts.values()])

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


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Counters:
    """What the run has seen, over all ranks (labels, utterances, seconds of audio), skipped, and validated last.

    Sums stay on the device; reading them waits for it.
    """

    NAMES = ("labels", "utterances", "seconds")

    def __init__(self, device: str) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.skipped_steps = 0
        self.validated_step = 0

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        seen = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        return seen | {
            "skipped_steps": self.skipped_steps,
            "validated_step": self.validated_step,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From the checkpoint."""
        self.skipped_steps = int(state["skipped_steps"])
        self.validated_step = int(state["validated_step"])
        self.sums.copy_(torch.tensor([state[name] for name in self.NAMES], dtype=torch.float64))


class RandomStates:
    """The generators of every rank, so that dropout goes on as if nothing had happened."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank() if is_distributed_initialized() else 0
        self.states: list[dict[str, Any]] = []

    def collect(self, mine: dict[str, Any]) -> None:
        """Bring the states of all ranks together, which all ranks must join: the main one saves."""
        self.states = gather_objects(mine)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"ranks": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint: this rank's generators go on where they were."""
        set_random_state(state["ranks"][self.rank])
