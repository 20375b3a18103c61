#!/usr/bin/env python3
"""What training, decoding, measuring and healing cost on a GPU, with full-size models of random weights.

    python benchmarks/gpu.py --part mem       # decoding: time and memory before and after the cut, the paper's 35 %
    python benchmarks/gpu.py --part train     # training steps
    python benchmarks/gpu.py --part probe     # measuring, sweeping, healing, and rows that depend on the batch
    python benchmarks/gpu.py --part mem --tiny --out results/gpu  # on a CPU: tiny models, to see that it runs

The models are those of the leaves (nothing is downloaded) and the code is the product's. Every row is printed when it
is there, the tables come last; `--out` keeps them as JSON. After seven minutes no row is begun: what is left out is
named.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import table

SECONDS = 420.0
GIB = 2**30
Row = dict[str, Any]


class Part:
    """One run: its clock, its rows, and what could not be measured.

    Arguments
    ---------
    device : str
    tiny : bool
        Tiny models.
    seconds : float
        After which no row is begun.
    """

    def __init__(self, device: str, tiny: bool, seconds: float = SECONDS) -> None:
        self.device, self.tiny = device, tiny
        self.cuda = device.startswith("cuda")
        self.deadline = time.monotonic() + seconds
        self.tables: dict[str, list[Row]] = {}
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def row(self, name: str, what: Row, measure: Callable[[], Row]) -> Row | None:
        """Measure a row of a table and print it; None if there is no time left or it fails."""
        label = f"{name}: {' '.join(str(value) for value in what.values())}"
        if time.monotonic() > self.deadline:
            self.skipped.append(label)
            return None
        try:
            found = what | measure()
        except (
            RuntimeError,
            ImportError,
        ) as error:  # such as too little memory: the other rows go on
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.failed.append(f"{label}: {reason}")
            print(f"FAILED {self.failed[-1]}", flush=True)
            return None
        finally:
            if self.cuda:
                torch.cuda.empty_cache()
        print(f"{name}: " + " ".join(f"{k}={_shown(v)}" for k, v in found.items()), flush=True)
        self.tables.setdefault(name, []).append(found)
        return found

    def note(self, text: str) -> None:
        """A line under the tables."""
        self.notes.append(text)
        print(text, flush=True)

    def training(self) -> torch.autocast:
        """The context in which the training loop computes on a GPU."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.cuda)

    def seconds(self, function: Callable[[], Any], most: int = 10) -> float:
        """Median seconds of a call, after one that is not counted; fewer than `most` if they take long."""
        times: list[float] = []
        begun, most = time.monotonic(), 1 if self.tiny else most
        while len(times) < 2 or (len(times) <= most and time.monotonic() - begun < 3.0):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def memory(self, function: Callable[[], Any]) -> Row:
        """Peaks of a call in GiB: allocated and reserved by torch, and in use on the whole device. None on a CPU."""
        if not self.cuda:
            function()
            return dict.fromkeys(("alloc_gib", "reserved_gib", "device_gib"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.wait()
        free, total = torch.cuda.mem_get_info()
        return {
            "alloc_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "device_gib": (total - free) / GIB,
        }

    def report(self) -> str:
        """All tables, notes, and what is missing."""
        parts = []
        for name, rows in self.tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            cells = [[_shown(row.get(column)) for column in columns] for row in rows]
            parts.append(f"{name}\n{table(cells, columns)}")
        parts += self.notes
        parts += [f"not measured, no time left: {label}" for label in self.skipped]
        parts += [f"FAILED {label}" for label in self.failed]
        return "\n\n".join(parts)

    def facts(self) -> Row:
        """For JSON."""
        machine = torch.cuda.get_device_name() if self.cuda else "cpu"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {"machine": machine, "tiny": self.tiny, "versions": versions} | {
            key: getattr(self, key) for key in ("tables", "notes", "skipped", "failed")
        }


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    """Command line; 1 if a row failed."""
    from benchmarks import gpu_mem, gpu_probe, gpu_train

    parts = {"mem": gpu_mem.run, "train": gpu_train.run, "probe": gpu_probe.run}
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny models: nothing to learn")
    parser.add_argument("--out", type=Path, help="folder for <part>.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no row is begun after this")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("error: there is no GPU here; --tiny runs on a CPU", file=sys.stderr)
        return 2
    part = Part(device, options.tiny, options.seconds)
    parts[options.part](part)
    print("\n" + part.report())
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.part}.json").write_text(json.dumps(part.facts(), indent=1))
    return int(bool(part.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
