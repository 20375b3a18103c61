"""What the benchmarks share: CPU seconds of both sides taking turns, peak memory, gates, their table, random models.

A benchmark is a script with a function `measure(tiny)` that returns `Result`s and raises if the two sides do not give
the same. `script` makes its command line: it prints the table and ends with exit code 1 if a gate is missed, after a
profile of where the time of our side goes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from speechllm_prune.data.batching import Batch
from speechllm_prune.models.encoder import SpeechEncoder
from speechllm_prune.models.projector import Projector
from speechllm_prune.models.speechllm import SpeechLLM

ROOT = Path(__file__).resolve().parents[1]
HEADER = ("goal", "gate", "ours", "theirs", "ratio", "limit")
STACK, FRAME_WIDTH, PROMPT_TOKENS = 5, 64, 12
"""Frames in a stack, width of a frame, and tokens of the prompt, of `speech_llm`."""


@dataclass
class Result:
    """One line of the table.

    Arguments
    ---------
    goal : str
        Number and name.
    value : float
        What is held against the gate.
    gate : str
        `>= 1.7x`, `<= 3 %`; empty: shown for information.
    ours, theirs, limit : str
        As they are to be shown.
    profile : callable, optional
        What to profile if the gate is missed.

    Example
    -------
    >>> Result("C1", 1.9, ">= 1.7x").is_met, Result("C6", 3.1, "<= 3 %").is_met
    (True, False)
    """

    goal: str
    value: float
    gate: str = ""
    ours: str = ""
    theirs: str = ""
    limit: str = ""
    profile: Callable[[], Any] | None = field(default=None, repr=False)

    @property
    def is_met(self) -> bool:
        """Whether the gate holds; true without one."""
        if not self.gate:
            return True
        sign, bound = self.gate.removesuffix("x").removesuffix("%").split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)

    @property
    def shown(self) -> str:
        """The value in the unit of the gate."""
        if "%" in self.gate + self.ours:
            return f"{self.value:.2f} %"
        return (
            f"{self.value:.2f}x"
            if self.gate.endswith("x") or not self.gate
            else f"{self.value:.0f}"
        )

    def cells(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        gate = self.gate or "-"
        missed = "" if self.is_met else " MISSED"
        return (self.goal, gate, self.ours, self.theirs, self.shown + missed, self.limit or "-")

    def facts(self) -> dict[str, Any]:
        """For JSON; `Result(**facts)` reads it back."""
        return asdict(self) | {"profile": None}


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """A Markdown table whose columns line up.

    Example
    -------
    >>> print(table([("a", "bcd")], ("x", "y")))
    | x | y   |
    |---|-----|
    | a | bcd |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- measuring


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU seconds that this process spends in a call: what else the machine does counts little."""
    started = time.process_time()
    function()
    return time.process_time() - started


def best_of(sides: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """CPU seconds of every side, the best of some rounds in which the sides take turns; one call before that counts
    for nothing."""
    for function in sides.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            times[name].append(cpu_seconds(sides[name]))
    return {name: min(values) for name, values in times.items()}


def extra_peak_mib(function: Callable[[], Any]) -> float:
    """MiB that a call adds to the resident memory of this process at its worst (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def peak_of_side(file: str, side: str, tiny: bool) -> float:
    """`extra_peak_mib` of one side of a script, in a process of its own: memory once used may stay with a process."""
    command = [sys.executable, file, "--side", side, *(["--tiny"] if tiny else [])]
    # glibc hands a freed tensor back at once, so that tensors are compared and not what is left between them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in a call, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def profile(function: Callable[[], Any], lines: int = 12) -> str:
    """Where a call spends its time: torch's operators, then Python's functions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        function()
    operators = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    rows = [
        (event.key, str(event.count), f"{event.self_cpu_time_total / 1e6:.3f}")
        for event in operators[:lines]
    ]
    python = cProfile.Profile()
    python.runcall(function)
    stream = io.StringIO()
    pstats.Stats(python, stream=stream).sort_stats("tottime").print_stats(lines)
    return f"{table(rows, ('operator', 'calls', 'own CPU s'))}\n{stream.getvalue().rstrip()}"


# ---------------------------------------------------------------------------------------------- command line


def script(
    document: str,
    measure: Callable[[bool], list[Result]],
    argv: list[str],
    sides: Callable[[bool], dict[str, Callable[[], Any]]] | None = None,
) -> int:
    """The command line of a benchmark; 1 if a gate is missed.

    Arguments
    ---------
    document : str
        The script's docstring.
    measure : callable
        Tiny or not -> results.
    argv : list of str
    sides : callable, optional
        Tiny or not -> what `--side` measures the memory of, by name.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="a size for tests: nothing to learn")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    if sides is not None:
        parser.add_argument("--side", help="only the peak memory of this side, in MiB")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sides is not None and options.side:
        sides(True)[options.side]()  # code is loaded when it first runs
        print(extra_peak_mib(sides(options.tiny)[options.side]))
        return 0
    results = measure(options.tiny)
    print(table([result.cells() for result in results]), flush=True)
    missed = [result for result in results if not result.is_met]
    profiles = {}
    for result in missed:
        if result.profile is not None and not options.tiny:
            profiles[result.goal] = profile(result.profile)
            print(f"\n{result.goal}: where our side's time goes\n{profiles[result.goal]}")
    if options.json:
        found = {"results": [result.facts() for result in results], "profiles": profiles}
        options.json.write_text(json.dumps(found), encoding="utf-8")
    return int(bool(missed))


def check(same: bool, what: str) -> None:
    """Refuse to compare the speed of two things that do not give the same."""
    if not same:
        raise SystemExit(f"the two sides differ: {what}")


# ---------------------------------------------------------------------------------------------- random models


def qwen2(layers: int, width: int, vocabulary: int, spread: float = 0.02) -> Any:
    """A frozen Qwen2 with random weights, of the shape of Qwen2.5: feed-forward 4 x width, 1 key-value head in 4."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = max(4, width // 64)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        initializer_range=spread,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


class Tokenizer:
    """Stands in for a tokenizer where batches hold token ids already: any prompt has `PROMPT_TOKENS` tokens."""

    bos_token_id, eos_token_id, pad_token_id = None, 2, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=list(range(3, len(self))))

    def __len__(self) -> int:
        return 3 + PROMPT_TOKENS


def speech_llm(decoder: Any, hidden: int) -> SpeechLLM:
    """Our model around a decoder, fed with encoder features; nothing is trainable yet."""
    encoder = SpeechEncoder(torch.nn.Identity(), FRAME_WIDTH)
    projector = Projector(STACK * FRAME_WIDTH, hidden, decoder.config.hidden_size)
    model = SpeechLLM(encoder, projector, decoder, Tokenizer(), STACK, "prompt")
    return model.requires_grad_(False)


def feature_batch(speech: Sequence[int], targets: Sequence[int], vocabulary: int) -> Batch:
    """Random features and targets with that many decoder positions and tokens in each row."""
    lengths = [STACK * n for n in speech]
    return Batch(
        ids=[str(i) for i in range(len(lengths))],
        audio=torch.randn(len(lengths), max(lengths), FRAME_WIDTH),
        audio_lengths=lengths,
        target_ids=[torch.randint(3, vocabulary, (n,)).tolist() for n in targets],
        texts=[""] * len(lengths),
        durations=[0.1 * n for n in speech],
    )
