#!/usr/bin/env python3
"""Kill a training run again and again while it saves, and count how often it cannot go on.

    python benchmarks/kill_loop.py --side ours --trials 200 [--seed 1] [--child trainer|saver] [--out FILE.md]
    python benchmarks/kill_loop.py --side speechbrain --trials 30

One chain of processes per side: each is killed with SIGKILL, the next one has to go on from what is on disk. Half of
the kills are aimed at the save window (a delay after the temporary folder, or a new checkpoint folder, appears), half
come at random times. A process that ends by itself before it has made a step could not recover; the folder is then
emptied and a new chain begins.

The child `trainer` is train.py on tiny models, with a validation and a checkpoint of about 25 MB after every step; the
child `saver` only saves in a loop. `speechbrain` is the same child with SpeechBrain's own Checkpointer in the place of
ours. Delays come from the seed; when a process is where is the machine's business, so counts vary a little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from speechbrain.utils.checkpoints import Checkpointer  # noqa: E402

from speechllm_prune.checkpoint import AtomicCheckpointer  # noqa: E402
from speechllm_prune.recoverables import StateDicts, TrainableState  # noqa: E402

SIDES = ("ours", "speechbrain")
WINDOW = 0.15
"""Seconds after the begin of a save within which an aimed kill falls."""


class PlainCheckpointer(Checkpointer):
    """SpeechBrain's, with what the trainer asks of a checkpointer."""

    def __init__(self, folder: Path, identity: Any = None) -> None:
        super().__init__(folder)

    def save_and_prune(
        self, meta: dict[str, Any], min_key: str | None, max_key: str | None
    ) -> None:
        """As the recipes do it."""
        min_keys, max_keys = ([key] if key else None for key in (min_key, max_key))
        self.save_and_keep_only(meta=meta, num_to_keep=2, min_keys=min_keys, max_keys=max_keys)


@dataclass
class Trial:
    """One kill and what came of it."""

    aimed: bool
    delay: float
    found_half: bool = False
    recovered: bool = True
    steps_again: int = 0
    message: str = ""


# ---------------------------------------------------------------------------------------------- children
def saver(side: str, folder: Path, log: Path) -> None:
    """Save 6 MB of tensors for ever; a line of the log is the step whose save is complete."""
    model = torch.nn.Linear(700, 700)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(700)).sum().backward()
    optimizer.step()
    checkpointer = (AtomicCheckpointer if side == "ours" else PlainCheckpointer)(folder / "save")
    checkpointer.add_recoverable("model", TrainableState(model))
    checkpointer.add_recoverable("state", StateDicts(optimizer=optimizer))
    found = checkpointer.recover_if_possible()
    step = 0 if found is None else int(found.meta["optimizer_step"])
    while True:
        _append(log, step)
        step += 1
        with torch.no_grad():
            model.bias.fill_(float(step))
        checkpointer.save_and_prune({"optimizer_step": step, "wer": 1.0}, "wer", None)


def trainer(side: str, folder: Path, log: Path) -> None:
    """train.py on the tiny models that lie in `folder`; a line of the log is the step that begins."""
    import speechllm_prune.training as training
    import train
    from speechllm_prune.brain import SpeechLLMBrain

    fit_batch = SpeechLLMBrain.fit_batch

    def logged(brain: SpeechLLMBrain, batch: Any) -> Any:
        _append(log, brain.optimizer_step)
        return fit_batch(brain, batch)

    SpeechLLMBrain.fit_batch = logged  # type: ignore[method-assign]
    if side == "speechbrain":
        training.AtomicCheckpointer = PlainCheckpointer  # type: ignore[assignment,misc]
    sys.exit(train.main([str(folder / "tiny.yaml")]))


def _append(log: Path, step: int) -> None:
    with open(log, "a", encoding="utf-8") as stream:
        stream.write(f"{step}\n")


def write_experiment(folder: Path) -> None:
    """Tiny models and a tiny corpus (of tests/tiny.py) and a leaf whose checkpoints have about 25 MB."""
    from tests import tiny
    from tests.recipes.verbs import leaf_values, write_leaf

    values = leaf_values(
        tiny.write_corpus(folder / "corpus"),
        tiny.write_wavlm(folder / "encoder", "layer"),
        tiny.write_decoder(folder / "decoder", "qwen2"),
        folder / "results",
    )
    values |= {"projector_dim": 10_000, "num_steps": 10**6, "valid_interval": 1, "lr": 1.0e-6}
    values |= {"valid_utterances": 1, "batch_size": 2}
    write_leaf(folder / "tiny.yaml", values)


Child = tuple[Callable[[str, Path, Path], None], Callable[[Path], None], str]
SAVER: Child = (saver, lambda folder: None, ".")
TRAINER: Child = (trainer, write_experiment, "results/tiny/3407/train")
"""What runs, what it needs on disk, and where its `save` folder is."""


# ---------------------------------------------------------------------------------------------- the loop
def run_trials(
    side: str, child: Child, trials: int, folder: Path, rng: random.Random
) -> list[Trial]:
    """Kill and restart; the last kill, too, is followed by a restart.

    Arguments
    ---------
    side : str
        ours | speechbrain.
    child : Child
        `SAVER` or `TRAINER`.
    trials : int
        Number of kills.
    folder : Path
        To work in.
    rng : Random
        Of the delays.

    Returns
    -------
    list of Trial
    """
    body, prepare, where = child
    prepare(folder)
    save, log, output = folder / where / "save", folder / "log", folder / "output"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_imports_of(child)])
    done: list[Trial] = []
    judged = reached = 0
    while True:
        log.write_text("")
        process = context.Process(target=_start, args=(body, side, folder, log, output))
        process.start()
        _wait(lambda running=process: log.stat().st_size > 0 or not running.is_alive(), 300)
        going = log.stat().st_size > 0
        if judged < len(done):  # else this is the first run of a new chain
            judged = len(done)
            done[-1].recovered = going
            done[-1].steps_again = max(0, reached + 1 - _steps(log)[0]) if going else 0
            if not going:
                done[-1].message = _last_line(output)
        if len(done) == trials or (not going and not done):
            process.kill()
            process.join()
            assert done, f"the first run does not start: {_last_line(output)}"
            return done
        if not going:
            process.join()
            shutil.rmtree(save.parent if where != "." else save, ignore_errors=True)
            continue
        trial = Trial(rng.random() < 0.5, rng.random())
        _wait_for_the_moment(trial, save, log)
        process.kill()
        process.join()
        trial.found_half = _is_half(side, save)
        reached = max(_steps(log))
        done.append(trial)


def _imports_of(child: Child) -> Sequence[str]:
    from tests.faults.processes import PRELOAD

    return PRELOAD if child is TRAINER else ["speechllm_prune.checkpoint"]


def _start(body: Any, side: str, folder: Path, log: Path, output: Path) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    body(side, folder, log)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def _wait_for_the_moment(trial: Trial, save: Path, log: Path) -> None:
    """Let it make two more steps; then wait for a save to begin and a part of it, or any time."""
    enough = len(_steps(log)) + 2
    _wait(lambda: len(_steps(log)) >= enough, 60)
    if trial.aimed:
        before = set(_names(save))
        _wait(lambda: bool(_names(save) - before), 60)
        time.sleep(WINDOW * trial.delay)
    else:
        time.sleep(1.0 * trial.delay)


def _names(save: Path) -> set[str]:
    return {path.name for path in save.iterdir()} if save.is_dir() else set()


def _steps(log: Path) -> list[int]:
    return [int(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]


def _is_half(side: str, save: Path) -> bool:
    """Whether the kill met a save: a temporary folder, or a checkpoint folder that lacks something."""
    if side == "ours":
        return (save / ".saving").exists()
    sizes = [{f.name: f.stat().st_size for f in path.iterdir()} for path in save.glob("CKPT+*")]
    whole = {name: max(size.get(name, 0) for size in sizes) for size in sizes for name in size}
    names = [name for name in whole if name.endswith(".ckpt") and name != "brain.ckpt"]
    return any(size.get(name, 0) < whole[name] for size in sizes for name in names)


def _last_line(output: Path) -> str:
    """The last thing that was said, without the name of the checkpoint."""
    lines = output.read_text(errors="replace").strip().splitlines()
    said = re.sub(r"/\S*", "...", lines[-1]) if lines else "nothing"
    return " ".join(said.split())[:120]


# ---------------------------------------------------------------------------------------------- the table
def table(side: str, child: str, trials: list[Trial]) -> str:
    """Counts, as Markdown."""
    lines = [
        "| side | child | kills | trials | met a save | cannot go on | most steps done twice |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, chosen in (
        ("aimed at the save", [t for t in trials if t.aimed]),
        ("at random times", [t for t in trials if not t.aimed]),
        ("all", trials),
    ):
        failed = sum(not trial.recovered for trial in chosen)
        again = max((trial.steps_again for trial in chosen if trial.recovered), default=0)
        half = sum(trial.found_half for trial in chosen)
        lines.append(
            f"| {side} | {child} | {name} | {len(chosen)} | {half} | **{failed}** | {again} |"
        )
    messages = sorted({trial.message for trial in trials if trial.message})
    return "\n".join([*lines, *(f"\nSaid by a run that could not go on: `{m}`" for m in messages)])


def main(argv: list[str] | None = None) -> int:
    """Entry point: see the module's docstring. Exit code 1 if ours could not go on once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=SIDES, default="ours")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", choices=("trainer", "saver"), default="trainer")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    child = TRAINER if options.child == "trainer" else SAVER
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trials = run_trials(
            options.side, child, options.trials, Path(folder), random.Random(options.seed)
        )
    given = f"--side {options.side} --trials {options.trials} --seed {options.seed} --child {options.child}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    head = (
        f"## {options.side}, {options.child}\n\n`python benchmarks/kill_loop.py {given}`\n"
        f"{time.strftime('%Y-%m-%d')}, {machine}, {time.monotonic() - began:.0f} s\n\n"
    )
    text = head + table(options.side, options.child, trials)
    print(text)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as stream:
            stream.write(text + "\n\n")
    print(json.dumps([vars(trial) for trial in trials if not trial.recovered], indent=1))
    return int(options.side == "ours" and not all(trial.recovered for trial in trials))


if __name__ == "__main__":
    if __package__ is None:  # the children must find this module under its own name
        from benchmarks.kill_loop import main
    sys.exit(main())
