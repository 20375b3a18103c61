"""Rows 39 to 44, 50, 57 and 60: locks, numbers that are none, memory that is full, files that are half there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from speechllm_prune.lock import RunLock
from speechllm_prune.runtime import UserError
from tests.faults.processes import Ended, Processes
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import load_json, tensors

pytestmark = pytest.mark.slow

FEW = ("--num_steps", 8, "--valid_interval", 4, "--eval_manifests", "[]")


def is_finite(stage: Path) -> bool:
    """Whether all checkpoints of a stage are free of NaN."""
    files = list(stage.glob("save/CKPT+*/model.ckpt"))
    assert files
    return all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


# ---------------------------------------------------------------------------------------------- folders
def test_row_39_the_output_folder_cannot_be_written(make_leaf: MakeLeaf, verbs: Processes) -> None:
    """A file in the place of a folder, which stops root as well as anybody."""
    study = make_leaf()
    study.results.mkdir()
    (study.results / "tiny").write_text("")
    ended = verbs.run("train", study.leaf, *FEW, code=2)
    assert "cannot write" in ended.message and "--results_folder" in ended.message
    assert str(study.results / "tiny") in ended.message
    assert "encoder:" not in ended.out, "models were loaded first"


def test_row_40_two_runs_in_one_folder(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf(num_steps=5000, valid_interval=5, valid_utterances=1, lr=1e-5)
    first = verbs.start("train", study.leaf, "--eval_manifests", "[]")
    lock = study.root / "train/run.lock"
    first.wait_until(lambda: list((study.root / "train").glob("save/CKPT+*")))
    for options in ((), ("--overwrite",)):
        ended = verbs.run("train", study.leaf, "--eval_manifests", "[]", *options, code=2)
        owner = load_json(lock)
        assert f"process {first.process.pid} on {owner['host']}" in ended.message
    first.send(signal.SIGTERM)
    assert first.ended().code == 75 and not lock.exists()


def test_row_41_stale_lock(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    lock = study.root / "train/run.lock"
    kill = [("signal_after_step", 5, signal.SIGKILL)]
    verbs.run("train", study.leaf, *FEW, code=-9, inject=kill)
    held = load_json(lock)
    lock.write_text(json.dumps(held | {"host": "elsewhere"}))
    message = verbs.run("train", study.leaf, *FEW, code=2).message
    assert "on elsewhere" in message and f"delete {lock}" in message
    lock.write_text(json.dumps(held))
    ended = verbs.run("train", study.leaf, *FEW)
    assert f"left behind by process {held['pid']}" in ended.err and "taken over" in ended.err
    assert not lock.exists()


def test_row_41_which_locks_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that another process has now, and a requeued job that has moved to another host, hold nothing."""
    lock = RunLock(tmp_path).acquire()
    mine = load_json(lock.file)
    with pytest.raises(UserError, match=f"process {mine['pid']} on"):
        RunLock(tmp_path).acquire()
    lock.file.write_text(json.dumps(mine | {"process_start": "7@another boot"}))
    RunLock(tmp_path).acquire()
    lock.file.write_text(json.dumps(mine | {"host": "elsewhere", "job": "17"}))
    with pytest.raises(UserError, match="cannot be asked from here"):
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(UserError, match="cannot be asked from here"):
        RunLock(tmp_path).acquire()  # the same life of the job, on another of its hosts
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = RunLock(tmp_path).acquire()
    lock.release()
    assert lock.file.exists(), "a lock that somebody else has taken stays"
    again.release()
    assert not lock.file.exists()


def test_row_41_a_dead_process_that_nobody_has_waited_for(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        RunLock(tmp_path).acquire()
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    try:
        RunLock(tmp_path).acquire().release()
    finally:
        os.waitpid(pid, 0)


# ---------------------------------------------------------------------------------------------- NaN
def nan_run(study: Study, verbs: Processes, *fault: object, code: int = 0) -> Ended:
    """Train with a fault; what was saved is finite, however it ends."""
    ended = verbs.run("train", study.leaf, *FEW, code=code, inject=[fault])
    assert is_finite(study.root / "train")
    return ended


def test_row_42_nan_loss_once(make_leaf: MakeLeaf, verbs: Processes, tmp_path: Path) -> None:
    study = make_leaf(grad_accumulation_factor=2)
    log = ("log_losses", str(tmp_path / "log"))
    ended = verbs.run("train", study.leaf, *FEW, inject=[("nan_loss", 5), log])
    assert is_finite(study.root / "train")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (batch,) = (ids for step, micro, ids, _ in lines if (step, micro) == (5, 1))
    said = f"step 6 is skipped: the loss of a batch is not finite ({', '.join(batch)})"
    assert said in ended.err and said in (study.root / "train/log.txt").read_text()
    assert load_json(study.root / "train/DONE.json")["skipped_steps"] == 1
    assert "skipped_steps: 1" in (study.root / "train/train_log.txt").read_text().splitlines()[-1]
    assert len(lines) == 16, "the other micro-batch of the step counts as used"


def test_row_42_infinite_gradient(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    ended = nan_run(study, verbs, "infinite_gradient", 5)
    assert "step 6 is skipped: the gradient is not finite" in ended.err


def test_row_43_nan_repeated(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    ended = nan_run(study, verbs, "nan_loss", 4, 5, 6, 7, code=1)
    assert "3 steps in a row were skipped, the last is step 7" in ended.message
    assert not (study.root / "train/DONE.json").exists()
    verbs.run("train", study.leaf, *FEW)


def test_row_44_nan_in_the_last_steps(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    nan_run(study, verbs, "nan_loss", 6, 7)
    assert load_json(study.root / "train/DONE.json")["skipped_steps"] == 2
    assert all(bool(t.isfinite().all()) for t in tensors(study.root / "train").values())


def test_row_44_weights_that_are_nan_are_not_saved(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    ended = nan_run(study, verbs, "nan_weight", 8, code=1)
    assert "the weights are not finite (projector." in ended.message
    assert len(list((study.root / "train").glob("save/CKPT+*"))) == 1
    verbs.run("train", study.leaf, *FEW)


# ---------------------------------------------------------------------------------------------- the rest
def test_row_50_one_point_of_a_sweep_fails(own_study: Study, verbs: Processes) -> None:
    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "none,joint")
    ended = verbs.run(*sweep, code=1, inject=[("raise_in", "step", 1, "RuntimeError")])
    assert "injected in step" in ended.err + ended.out and "failed" in ended.err + ended.out
    assert len(list(own_study.root.glob("eval/l*/*/metrics.json"))) == 6
    verbs.run(*sweep)
    assert len(list(own_study.root.glob("eval/l*/*/metrics.json"))) == 8


def test_row_57_out_of_memory_in_training(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    fault = [("raise_in", "forward", 6, "memory")]
    message = verbs.run("train", study.leaf, *FEW, code=1, inject=fault).message
    for part in ("Tried to allocate 1 GiB", "a batch of 4 utterances", " s of audio", " positions"):
        assert part in message
    assert "the longest is 100-100" in message and "batch_size or batch_positions" in message
    assert is_finite(study.root / "train")
    verbs.run("train", study.leaf, *FEW)


def test_row_57_out_of_memory_in_evaluation(own_study: Study, verbs: Processes) -> None:
    fault = [("raise_in", "decode", 1, "memory")]
    ended = verbs.run("evaluate", own_study.leaf, "--overwrite", code=1, inject=fault)
    assert "a batch of 4 utterances" in ended.message and "lower eval_batch_size" in ended.message


def test_row_60_half_written_results(own_study: Study, verbs: Processes) -> None:
    split = own_study.root / "eval/full/librispeech-test-clean"
    metrics, log = split / "metrics.json", own_study.root / "train/train_log.txt"
    for file in (metrics, log):
        file.write_bytes(file.read_bytes()[:-40])
    message = verbs.run("evaluate", own_study.leaf, code=2).message
    assert "metrics.json is not valid JSON" in message and "delete it" in message
    ended = verbs.run("report", own_study.root)
    assert "metrics.json" in ended.out + ended.err, "the report says what it leaves out"
    verbs.run("evaluate", own_study.leaf, "--overwrite")
    assert load_json(metrics)["metric"] == "wer"
