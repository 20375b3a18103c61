"""What several processes of one run do together: start, agree before they work, and stop at the same place."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from speechbrain.utils.distributed import ddp_all_reduce, is_distributed_initialized

from speechllm_prune.models.encoder import SAMPLE_RATE
from speechllm_prune.runtime import (
    Fault,
    Stopped,
    UserError,
    all_together,
    raise_if_stopped,
    stop_requested,
)


def start_ranks(backend: str, timeout_minutes: float) -> None:
    """Join the process group that torchrun's environment names; nothing without one, or if it has been joined.

    SpeechBrain's own function waits two hours for a rank that is gone, whatever one asks for.

    Raises
    ------
    UserError
        If the backend is unknown, or there is no GPU for this process.
    """
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        return
    if backend not in ("gloo", "nccl"):
        raise UserError(f"distributed_backend {backend!r} is not one of gloo, nccl")
    local = int(os.environ["LOCAL_RANK"])
    if backend == "nccl":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU (there are {torch.cuda.device_count()}); start fewer with "
                "--nproc_per_node, or give --distributed_backend gloo --device cpu"
            )
        torch.cuda.set_device(local)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    torch.distributed.init_process_group(backend, timeout=timeout)


def world_size() -> int:
    """Number of processes of this run."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def gather_objects(item: Any) -> list[Any]:
    """What every rank has, in the order of the ranks."""
    if not is_distributed_initialized():
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def gather(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks."""
    return [item for part in gather_objects(items) for item in part]


def agreed_maximum(*values: float) -> list[float]:
    """The largest of each value over all ranks, so that all of them decide alike."""
    if not is_distributed_initialized():
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    return ddp_all_reduce(shared, torch.distributed.ReduceOp.MAX).tolist()


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse to start where ranks would do different things, which ends in a hang or, worse, in numbers.

    Arguments
    ---------
    facts : mapping
        What must be the same on all ranks, by name.

    Raises
    ------
    UserError
        On every rank, naming what differs and one rank that has it otherwise.
    """
    everyone = gather_objects(dict(facts))
    problems = []
    for name, first in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other.get(name) != first:
                problems.append(
                    f"{name} is {first!r} on rank 0 and {other.get(name)!r} on rank {rank}"
                )
                break
    if problems:
        raise UserError(
            f"the processes of this run do not agree: {'; '.join(problems[:4])}. Start all of them with the same "
            "command, YAML and manifests"
        )


class InStep:
    """Batches of this rank; before each of them all ranks agree whether a signal asks them to stop.

    One rank's signal stops all, at the same place, also where some ranks have fewer batches. Every rank must go through
    its batches to the end.

    Arguments
    ---------
    batches : sized iterable
        Such as a loader.

    Example
    -------
    >>> list(InStep([1, 2]))
    [1, 2]
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if world_size() == 1:
            for batch in self.batches:
                raise_if_stopped()
                yield batch
            return
        batches = iter(self.batches)
        with all_together():
            for _ in range(int(agreed_maximum(len(self))[0])):
                if agreed_maximum(stop_requested() is not None)[0]:
                    raise Stopped(stop_requested() or "a signal on another rank")
                batch = next(batches, None)
                if batch is not None:
                    yield batch


def memory_fault(error: BaseException, model: Any, batch: Any, keys: str) -> Fault:
    """What to say when the device is full.

    Arguments
    ---------
    error : OutOfMemoryError
        torch's, whose first two sentences say what was asked for.
    model : SpeechLLM
        Counts positions.
    batch : Batch or None
        The one at work, if it is known.
    keys : str
        What to lower.
    """
    said = ". ".join(str(error).split(". ")[:2]).strip(".")
    what = f"the device is out of memory ({said})"
    if batch is not None:
        pairs = zip(batch.durations, batch.target_ids, strict=True)
        positions = [model.num_positions(round(d * SAMPLE_RATE), len(ids)) for d, ids in pairs]
        longest = max(range(len(batch)), key=positions.__getitem__)
        what += (
            f" on a batch of {len(batch)} utterances, {sum(batch.durations):.1f} s of audio and {len(batch)} x "
            f"{positions[longest]} positions; the longest is {batch.ids[longest]} with {batch.durations[longest]:.1f} s"
        )
    return Fault(f"{what}. Nothing that was saved is lost: lower {keys}, and run the command again")
