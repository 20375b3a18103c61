"""Speed and peak memory of a piece of work."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def device_name(device: str) -> str:
    """What the device is: the name of the GPU, or the kind of processor (times of another one do not compare).

    Example
    -------
    >>> bool(device_name("cpu"))
    True
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


class Meter:
    """Context that measures wall seconds and peak memory.

    On a GPU the peak is what torch allocated within the context. On a CPU there is only the process's high-water mark,
    which earlier work may have set.

    Arguments
    ---------
    device : str
        cpu, cuda, cuda:1, ...

    Example
    -------
    >>> with Meter("cpu") as meter:
    ...     _ = sum(range(10))
    >>> meter.seconds > 0 and meter.peak_memory_bytes > 0
    True
    """

    seconds: float
    peak_memory_bytes: int
    warmup_seconds: float = 0.0
    """Until the second item of `warmed` was asked for."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device.startswith("cuda")

    def warmed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items as they are; the work on the first of several is noted as warm-up.

        The first batch loads kernels and grows the allocator, so a speed is that of the others. A batch of its own for
        that would cost a small split half as much again.
        """
        for number, item in enumerate(items):
            if number == 1:
                if self.cuda:
                    torch.cuda.synchronize(self.device)
                self.warmup_seconds = time.perf_counter() - self._start
            yield item

    def __enter__(self) -> Meter:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        if self.cuda:
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
            self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
