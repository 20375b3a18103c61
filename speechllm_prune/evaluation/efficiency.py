"""Speed and peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
import time

import torch


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

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Meter:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        if self.cuda:
            self.peak_memory_bytes = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
            self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
