"""Verbs in processes of their own, as a user starts them: own exit code, own signals, real deaths.

An import of torch and transformers costs seconds, so they are forked from one process that has imported everything and
computed nothing. Some tests put a fault into the process before the verb starts (`injections.py`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.conftest import REPO_ROOT

PRELOAD = [
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.wavlm.modeling_wavlm",
    "transformers.models.auto.tokenization_auto",
    "speechllm_prune.training",
    "speechllm_prune.sweep",
    "speechllm_prune.stages.export",
    "speechllm_prune.stages.measure",
    "speechllm_prune.stages.rerank",
    "speechllm_prune.reporting.figures",
    "recipes.LibriSpeech.librispeech_prepare",
    "jiwer",
    "whisper_normalizer.english",
    "tests.faults.injections",
]
Injection = tuple[Any, ...]
"""Name of a function in `injections.py`, and its arguments."""


@dataclass
class Ended:
    """How a verb ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one error message; fails unless there is exactly one, without a traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.err, self.err[-3000:]
        return errors[0].removeprefix("error: ")


class Running:
    """A verb at work."""

    def __init__(self, process: ForkServerProcess, files: tuple[Path, Path], command: str) -> None:
        self.process, self.files, self.command = process, files, command

    def ended(self, timeout: float = 120) -> Ended:
        """Wait for the end."""
        self.process.join(timeout)
        out, err = (
            file.read_text(errors="replace") if file.exists() else "" for file in self.files
        )
        assert self.process.exitcode is not None, (
            f"{self.command} hangs: {out[-2000:]} {err[-2000:]}"
        )
        return Ended(self.process.exitcode, out, err)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 120) -> None:
        """Wait for something on disk while it runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"{self.command} ended before: {self.ended()}"
            assert time.monotonic() < end, f"{self.command}: waited in vain"
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


class Processes:
    """Starts verbs.

    Arguments
    ---------
    folder : Path
        Where they run and where their output goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Running] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def start(
        self,
        verb: str,
        *arguments: object,
        inject: Sequence[Injection] = (),
        env: dict[str, str] | None = None,
    ) -> Running:
        """Start a verb with faults put into its process."""
        number = len(self.started)
        files = self.folder / f"{number}.out", self.folder / f"{number}.err"
        argv = [str(argument) for argument in arguments]
        process = self.context.Process(
            target=_child, args=(verb, argv, files, self.folder, env or {}, list(inject))
        )
        process.start()
        self.started.append(Running(process, files, f"{verb} {' '.join(argv)}"))
        return self.started[-1]

    def run(
        self,
        verb: str,
        *arguments: object,
        code: int = 0,
        inject: Sequence[Injection] = (),
        env: dict[str, str] | None = None,
    ) -> Ended:
        """Run a verb to its end, which must be with this exit code."""
        running = self.start(verb, *arguments, inject=inject, env=env)
        ended = running.ended()
        assert ended.code == code, (
            f"{running.command}: {ended.code}\n{ended.out[-3000:]}\n{ended.err[-3000:]}"
        )
        return ended

    def run_ranks(
        self,
        verb: str,
        *arguments: object,
        inject: Sequence[Sequence[Injection]] = ((), ()),
        extra: Sequence[Sequence[object]] = ((), ()),
        timeout: float = 120,
    ) -> list[Ended]:
        """Run a verb in two gloo ranks, with the environment that torchrun gives them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        ranks = [
            self.start(
                verb,
                *arguments,
                *extra[rank],
                inject=inject[rank],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        return [rank.ended(timeout) for rank in ranks]

    def kill(self) -> None:
        """End what is left."""
        for running in self.started:
            if running.process.is_alive():
                running.process.kill()
                running.process.join()


def _child(
    verb: str,
    argv: list[str],
    files: tuple[Path, Path],
    folder: Path,
    env: dict[str, str],
    inject: list[Injection],
) -> None:
    """What the new process does: the script, as `python VERB.py ARGUMENTS` would run it."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a script; this one came from a server
    os.environ.update(env)
    os.chdir(folder)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    injections = importlib.import_module("tests.faults.injections")
    for name, *arguments in inject:
        getattr(injections, name)(*arguments)
    script = str(REPO_ROOT / f"{verb}.py")
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")
