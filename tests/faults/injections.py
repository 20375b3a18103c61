"""Faults that a test puts into the process of a verb before it starts: at which step, in which batch, on which rank."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.data.batching import Batch, EndlessBatchSampler

OWNERS = {
    "forward": "speechllm_prune.brain:SpeechLLMBrain.compute_forward",
    "step": "speechllm_prune.brain:SpeechLLMBrain.optimizers_step",
    "validation": "speechllm_prune.brain:SpeechLLMBrain.evaluate_batch",
    "save": "speechllm_prune.recoverables:save_file",
    "publish": "speechllm_prune.checkpoint:AtomicCheckpointer._publish",
    "decode": "speechllm_prune.inference:decode_batch",
    "inputs": "speechllm_prune.models.speechllm:SpeechLLM.inputs_for",
    "encode": "speechllm_prune.models.encoder:SpeechEncoder.forward",
    "text": "speechllm_prune.prune.distance:pairwise_distances",
    "losses": "speechllm_prune.prune.selectors:_loss",
    "export": "speechllm_prune.prune.export:write_projector",
}
"""Where things happen."""


def _patch(where: str, make: Callable[[Any], Any]) -> None:
    module, _, path = OWNERS[where].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))


def signal_in(where: str, call: int, *numbers: int) -> None:
    """Send this process signals when something is called for the n-th time; 9 leaves nothing to chance either."""
    calls = [0]

    def make(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return wrapped

    _patch(where, make)


def signal_after_step(step: int, number: int) -> None:
    """Send this process a signal right after an optimiser step."""

    def make(original: Any) -> Any:
        def wrapped(brain: SpeechLLMBrain) -> None:
            original(brain)
            if brain.optimizer_step == step:
                os.kill(os.getpid(), number)

        return wrapped

    _patch("step", make)


def raise_in(where: str, call: int, kind: str) -> None:
    """Raise (a RuntimeError, out of `memory`, or ENOSPC) when something is called for the n-th time."""
    calls = [0]

    def make(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                if kind == "ENOSPC":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
                raise RuntimeError(f"injected in {where}")
            return original(*args, **kwargs)

        return wrapped

    _patch(where, make)


def nan_loss(*steps: int) -> None:
    """The loss of these optimiser steps (0-based) is NaN on this rank."""
    original = SpeechLLMBrain.compute_forward

    def forward(brain: SpeechLLMBrain, batch: Batch, stage: Any) -> Any:
        sums = original(brain, batch, stage)
        return sums._replace(loss=sums.loss * torch.nan) if brain.optimizer_step in steps else sums

    SpeechLLMBrain.compute_forward = forward  # type: ignore[method-assign]


def infinite_gradient(step: int) -> None:
    """The loss of a step is finite and its gradient is not."""
    original = SpeechLLMBrain.optimizers_step

    def wrapped(brain: SpeechLLMBrain) -> None:
        if brain.optimizer_step == step:
            next(p for p in brain.model.parameters() if p.grad is not None).grad[0] = torch.inf
        original(brain)

    SpeechLLMBrain.optimizers_step = wrapped  # type: ignore[method-assign]


def nan_weight(step: int) -> None:
    """A weight becomes NaN after a step, as by a broken optimiser."""
    original = SpeechLLMBrain.optimizers_step

    def wrapped(brain: SpeechLLMBrain) -> None:
        original(brain)
        if brain.optimizer_step == step:
            with torch.no_grad():
                next(p for p in brain.model.parameters() if p.requires_grad)[0] = torch.nan

    SpeechLLMBrain.optimizers_step = wrapped  # type: ignore[method-assign]


def log_losses(path: str) -> None:
    """Write step, utterances and the bits of the loss of every micro-batch as a line."""
    original = SpeechLLMBrain.fit_batch

    def fit_batch(brain: SpeechLLMBrain, batch: Batch) -> Tensor:
        step = brain.optimizer_step
        loss = original(brain, batch)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([step, brain.step, batch.ids, float(loss).hex()]) + "\n")
        return loss

    SpeechLLMBrain.fit_batch = fit_batch  # type: ignore[method-assign]


def fewer_batches(count: int) -> None:
    """The sampler of this rank has fewer batches than those of the others."""
    original = EndlessBatchSampler.batches_of_pass

    def batches_of_pass(sampler: EndlessBatchSampler, pass_number: int) -> list[list[int]]:
        return original(sampler, pass_number)[:-count]

    EndlessBatchSampler.batches_of_pass = batches_of_pass  # type: ignore[method-assign]


def free_bytes(count: int) -> None:
    """The disk has this much room."""
    usage = shutil.disk_usage

    def disk_usage(path: Any) -> Any:
        return usage(path)._replace(free=count)

    shutil.disk_usage = disk_usage  # type: ignore[assignment]


def clock_goes_back() -> None:
    """Every look at the clock shows an earlier time."""
    times = iter(range(2_000_000_000, 0, -100_000))
    time.time = lambda: float(next(times))  # type: ignore[assignment]


def slow_save(seconds: float) -> None:
    """Saving takes long: a window for signals from outside."""

    def make(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        return wrapped

    _patch("save", make)


def forget_random_state() -> None:
    """Nothing restores the generators when a run goes on."""
    import speechllm_prune.recoverables as recoverables

    recoverables.set_random_state = lambda state: None


def hub_cache(folder: str) -> None:
    """The hub's cache is elsewhere (the client reads HF_HUB_CACHE when it is imported, long before this)."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = folder
