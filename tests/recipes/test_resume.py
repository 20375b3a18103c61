"""Interruptions: a stopped run says so, goes on where it was when run again, and ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from speechbrain import Stage
from torch import Tensor

from speechllm_prune.brain import SpeechLLMBrain
from tests import tiny
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import good, hypotheses, load_json, run, snapshot, tensors

STEPS = ("--num_steps", 12, "--valid_interval", 6, "--warmup_steps", 2)


class Interrupt:
    """Sends a signal to this process after some optimiser step: where a stop falls is not left to a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.at: int | None = None
        self.number = signal.SIGTERM
        original = SpeechLLMBrain.optimizers_step

        def step(brain: SpeechLLMBrain) -> None:
            original(brain)
            self.steps.append(brain.optimizer_step)
            if brain.optimizer_step == self.at:
                os.kill(os.getpid(), self.number)

        monkeypatch.setattr(SpeechLLMBrain, "optimizers_step", step)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """An `Interrupt` that does nothing until `at` is set."""
    return Interrupt(monkeypatch)


def all_checkpoints(stage: Path) -> list[dict[str, Tensor]]:
    """Tensors of the best and of the last checkpoint."""
    from safetensors.torch import load_file

    last = max((stage / "save").glob("CKPT+*"), key=lambda path: path.stat().st_mtime_ns)
    return [tensors(stage), load_file(last / "model.ckpt")]


def assert_same_end(first: Path, second: Path) -> None:
    """Best and last checkpoint agree to the bit, and so does what the log says of every validation."""
    for a, b in zip(all_checkpoints(first), all_checkpoints(second), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [(stage / "train_log.txt").read_text().splitlines() for stage in (first, second)]
    for one, two in zip(*logs, strict=True):
        assert one.split(" - ")[0] == two.split(" - ")[0]  # step, lr, epochs, utterances, hours
        # What follows is the training loss since the last validation or restart, then the validation.
        assert one.split(" - ")[-1] == two.split(" - ")[-1]


@pytest.mark.parametrize(
    "at", [1, 6, 8, 12], ids=["early", "before validation", "between", "after the last step"]
)
def test_training_goes_on_where_it_was_stopped(
    make_leaf: MakeLeaf, interrupt: Interrupt, at: int
) -> None:
    whole, parted = make_leaf(experiment_name="whole"), make_leaf(experiment_name="parted")
    good("train", whole.leaf, *STEPS)
    assert interrupt.steps == list(range(1, 13))
    interrupt.steps, interrupt.at = [], at
    outcome = run("train", parted.leaf, *STEPS)
    assert outcome.code == 75 and "run the same command again" in outcome.err
    stopped = load_json(parted.root / "train/STOPPED.json")
    assert stopped["signal"] == "SIGTERM" and stopped["stage"] == "train"
    assert stopped["optimizer_step"] == at
    assert not (parted.root / "train/DONE.json").exists()
    message = run("measure", parted.leaf)
    assert message.code == 2 and "is not finished" in message.message
    interrupt.at = None
    good("train", parted.leaf, *STEPS)
    assert interrupt.steps == list(range(1, 13)), "every step once"
    assert not (parted.root / "train/STOPPED.json").exists()
    assert_same_end(whole.root / "train", parted.root / "train")
    assert hypotheses(whole.root, "full") == hypotheses(parted.root, "full")


def test_a_stop_during_validation_loses_no_step(
    make_leaf: MakeLeaf, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_leaf()
    original = SpeechLLMBrain.on_stage_start

    def start(brain: SpeechLLMBrain, stage: Stage, epoch: int | None = None) -> None:
        original(brain, stage, epoch)
        if stage == Stage.VALID and brain.optimizer_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SpeechLLMBrain, "on_stage_start", start)
    assert run("train", study.leaf, *STEPS).code == 75
    assert load_json(study.root / "train/STOPPED.json")["optimizer_step"] == 6
    monkeypatch.setattr(SpeechLLMBrain, "on_stage_start", original)
    good("train", study.leaf, *STEPS)
    assert interrupt.steps == list(range(1, 13)), "every step once"
    lines = (study.root / "train/train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step: 6", "step: 12"]


def test_stopping_twice_with_accumulation_and_positions(
    make_leaf: MakeLeaf, interrupt: Interrupt
) -> None:
    changes = {"grad_accumulation_factor": 3, "batch_positions": 40, "batch_size": 2}
    whole = make_leaf(experiment_name="whole", **changes)
    parted = make_leaf(experiment_name="parted", **changes)
    good("train", whole.leaf, *STEPS)
    interrupt.number = signal.SIGUSR1
    for interrupt.at in (4, 9):
        assert run("train", parted.leaf, *STEPS).code == 75
    assert load_json(parted.root / "train/STOPPED.json")["signal"] == "SIGUSR1"
    interrupt.at = None
    good("train", parted.leaf, *STEPS)
    assert_same_end(whole.root / "train", parted.root / "train")


def test_healing_goes_on_where_it_was_stopped(own_study: Study, interrupt: Interrupt) -> None:
    heal = ("heal", own_study.leaf, "--block_size", 2, "--heal_lora_dropout", 0.3)
    good(*heal, "--tag", "whole")
    interrupt.at = 2
    assert run(*heal, "--tag", "parted").code == 75
    folder = own_study.root / "heal" / own_study.variant(2)
    parted, whole = (folder.with_name(f"{folder.name}+{tag}") for tag in ("parted", "whole"))
    assert load_json(parted / "STOPPED.json")["optimizer_step"] == 2
    outcome = run("evaluate", own_study.leaf, "--variant", parted.name)
    assert outcome.code == 2 and "--tag parted" in outcome.message
    interrupt.at = None
    good(*heal, "--tag", "parted")
    assert_same_end(whole, parted)


def test_a_stopped_sweep_goes_on(own_study: Study, interrupt: Interrupt) -> None:
    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "none,joint")
    interrupt.at = 3
    outcome = run(*sweep)
    assert outcome.code == 75 and "failed" not in outcome.out
    first = own_study.root / "eval" / own_study.variant(1, "none")
    before = snapshot(first)
    assert len(before) == 6
    interrupt.at = None
    assert "4 of 4 points are done" in good(*sweep).out
    assert snapshot(first) == before


def test_a_changed_configuration_is_not_resumed(make_leaf: MakeLeaf, interrupt: Interrupt) -> None:
    study = make_leaf()
    interrupt.at = 2
    assert run("train", study.leaf, *STEPS).code == 75
    interrupt.at, interrupt.steps = None, []
    outcome = run("train", study.leaf, *STEPS, "--lr", "5e-3")
    assert outcome.code == 2 and "lr is 0.005 here and 0.001" in outcome.message
    good("train", study.leaf, *STEPS, "--lr", "5e-3", "--overwrite")
    assert interrupt.steps[0] == 1


def test_a_half_written_checkpoint_is_not_used(make_leaf: MakeLeaf, interrupt: Interrupt) -> None:
    study = make_leaf()
    interrupt.at = 8
    run("train", study.leaf, *STEPS)
    save = study.root / "train/save"
    newest = max(save.glob("CKPT+*"), key=lambda path: path.stat().st_mtime_ns)
    shutil.copytree(newest, save / ".saving")
    (save / ".saving" / "model.ckpt").write_bytes(b"half")
    interrupt.at, interrupt.steps = None, []
    good("train", study.leaf, *STEPS)
    assert interrupt.steps[0] == 9 and not (save / ".saving").exists()


# ---------------------------------------------------------------------------------------------- real processes
@pytest.fixture
def started(repo_root: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `train.py` as a process; whatever is left of it at the end is ended."""
    processes: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        processes.append(
            subprocess.Popen(
                [sys.executable, str(repo_root / "train.py"), *map(str, arguments)],
                env=tiny.environment(repo_root),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until something is on disk while a process runs."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_processes(make_leaf: MakeLeaf, started, interrupt: Interrupt) -> None:
    """SIGTERM ends a run between steps, SIGKILL anywhere; run again, both end like the run that nothing disturbed."""
    steps = ("--num_steps", 60, "--valid_interval", 10, "--lr", "1e-4")
    whole = make_leaf(experiment_name="whole", eval_manifests=[])
    good("train", whole.leaf, *steps)
    for number in (signal.SIGTERM, signal.SIGKILL):
        study = make_leaf(experiment_name=number.name, eval_manifests=[])
        process = started(study.leaf, *steps)
        save = study.root / "train/save"
        wait_for(lambda save=save: len(list(save.glob("CKPT+*"))) >= 2, process)
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
        interrupt.steps = []
        if number == signal.SIGTERM:
            assert process.returncode == 75 and "Traceback" not in error
            assert 20 <= load_json(study.root / "train/STOPPED.json")["optimizer_step"] < 60
        else:
            assert process.returncode == -signal.SIGKILL
        good("train", study.leaf, *steps)
        assert interrupt.steps == list(range(interrupt.steps[0], 61)) and interrupt.steps[0] > 20
        assert number == signal.SIGTERM or interrupt.steps[0] % 10 == 1, "from a checkpoint on"
        assert_same_end(whole.root / "train", study.root / "train")
