#!/usr/bin/env python3
"""All benchmarks of a CPU, one after the other, into one table.

    python benchmarks/cpu.py [--out benchmarks/results] [--runs 1] [--tiny] [NAME...]

Writes <date>-cpu.md into OUT: the table of the first run, what the other runs gave, and where and how it was measured.
Ends with exit code 1 if a gate was missed in any run; the table is written all the same.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Result, table

NAMES = (
    "train_step",
    "decoding",
    "distance_pass",
    "padding",
    "rerank",
    "healing",
    "checkpoint",
    "wavlm_attention",
    "loader",
)
PACKAGES = ("torch", "transformers", "speechbrain", "peft")


def run_one(name: str, tiny: bool) -> tuple[list[Result], dict[str, str]]:
    """A benchmark in a process of its own: its results, and profiles of what missed a gate."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], cwd=ROOT, env=environment, check=False
        )
        if not file.is_file():  # the two sides differ, or the script broke
            return [Result(f"{name}: no result", 0.0, ">= 1")], {}
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return [Result(**facts) for facts in found["results"]], found["profiles"]


def machine() -> list[str]:
    """What the numbers depend on, without names."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    state = commit.stdout.strip() or "unknown"
    return [
        f"- machine: {model or platform.machine()}, {os.cpu_count()} cores visible, one used; {platform.system()}",
        f"- versions: Python {platform.python_version()}, {', '.join(versions)}",
        f"- commit: {state}{' with uncommitted changes' if dirty else ''}",
    ]


def load() -> str:
    """Load averages, where the system tells them."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def page(runs: list[list[Result]], facts: list[str], profiles: dict[str, str]) -> str:
    """The results file."""
    lines = [f"# CPU benchmarks, {datetime.date.today()}", "", *facts, ""]
    lines += [
        "What each line compares: [README](../README.md). CPU seconds; the best of several rounds in turn.",
        "",
    ]
    lines += [table([result.cells() for result in runs[0]]), ""]
    for number, run in enumerate(runs[1:], start=2):
        shown = "; ".join(f"{result.goal}: {result.cells()[4]}" for result in run if result.gate)
        lines += [f"Run {number}: {shown}", ""]
    for goal, text in profiles.items():
        lines += [f"## Missed: {goal}", "", "```", text, "```", ""]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--runs", type=int, default=1, help="how often everything is run")
    parser.add_argument("--tiny", action="store_true", help="a size for tests: nothing to learn")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    started, before = time.monotonic(), load()
    runs: list[list[Result]] = []
    profiles: dict[str, str] = {}
    for number in range(options.runs):
        runs.append([])
        for name in options.names or NAMES:
            print(f"==> {name} ({number + 1}/{options.runs})", flush=True)
            results, found = run_one(name, options.tiny)
            runs[-1] += results
            profiles |= found
    facts = machine() + [
        f"- command: python benchmarks/cpu.py {' '.join(argv)}".rstrip(),
        f"- load average (1, 5, 15 minutes) before: {before}; after: {load()}",
        f"- took {(time.monotonic() - started) / 60:.0f} minutes",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{datetime.date.today()}-cpu.md"
    text = page(runs, facts, profiles)
    file.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{file}")
    return int(not all(result.is_met for run in runs for result in run))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
