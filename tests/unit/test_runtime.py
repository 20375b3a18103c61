"""Exit codes, signals and seeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speechllm_prune import runtime
from speechllm_prune.runtime import (
    Stopped,
    UserError,
    derive_seed,
    graceful_stop,
    raise_if_stopped,
    seed_everything,
    stop_requested,
    verb,
)
from tests import tiny


def test_a_users_mistake_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> None:
        raise UserError(f"no {argv[0]}")

    assert verb(main)(["folder"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: no folder\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_of_a_verb(returned: int | None, code: int) -> None:
    assert verb(lambda argv: returned)([]) == code


def test_a_fault_keeps_its_traceback() -> None:
    def main(argv: list[str]) -> None:
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        verb(main)([])


@pytest.mark.parametrize("error", [Stopped("SIGTERM"), KeyboardInterrupt()])
def test_stopping_is_exit_code_75(error: BaseException, capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> None:
        raise error

    assert verb(main)([]) == 75
    assert "run the same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_sets_a_flag_for_the_loops(number: int) -> None:
    before = signal.getsignal(number)
    with graceful_stop():
        raise_if_stopped()
        assert stop_requested() is None
        os.kill(os.getpid(), number)
        assert stop_requested() == signal.Signals(number).name
        with pytest.raises(Stopped, match=signal.Signals(number).name):
            raise_if_stopped()
    assert signal.getsignal(number) is before
    with graceful_stop():
        assert stop_requested() is None  # another run starts without it
    assert runtime._stop_signal is None


def test_second_signal_ends_the_process_at_once(repo_root: Path) -> None:
    code = (
        "import os, signal, speechllm_prune.runtime as r\n"
        "with r.graceful_stop():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still alive', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "alive\n")


def test_seeds_differ_by_seed_stage_and_rank() -> None:
    seeds = [
        derive_seed(s, stage, rank)
        for s in (1, 2)
        for stage in ("train", "heal")
        for rank in (0, 1)
    ]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**31 for seed in seeds)


def test_seeding_reaches_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(1, "train")
    first = draw()
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_everything(1, "train")
    assert draw() == first
    seed_everything(1, "train", rank=1)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_light_modules_need_no_torch(repo_root: Path) -> None:
    modules = "runtime experiment cli hparams prune.path tasks reporting.tables"
    code = (
        f"import sys; [__import__('speechllm_prune.' + name) for name in '{modules}'.split()]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=tiny.environment(repo_root)).returncode
        == 0
    )
