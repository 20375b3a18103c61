"""Rows 36, 37 and 49: SIGTERM and SIGUSR1 in every loop, twice, and while saving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT
from tests.faults.processes import Processes
from tests.recipes.conftest import MakeLeaf, Study, copy_study
from tests.recipes.verbs import load_json, snapshot

pytestmark = pytest.mark.slow

FEW = ("--num_steps", 6, "--valid_interval", 3, "--eval_manifests", "[]")
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(scope="module")
def shared_study(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A copy that the tests of this module make different folders of."""
    return copy_study(trained, tmp_path_factory.mktemp("signals"))


def stopped_in(folder: Path, number: int) -> None:
    """The stage says that it was stopped, is not done, and is not locked."""
    record = load_json(folder / "STOPPED.json")
    assert record["signal"] == signal.Signals(number).name and record["config_hash"]
    assert not (folder / "DONE.json").exists() and not (folder / "run.lock").exists()


def test_row_36_training(make_leaf: MakeLeaf, verbs: Processes) -> None:
    """From outside, at any time after the first checkpoint: resumable within a step, and it goes on."""
    study = make_leaf(num_steps=400, valid_interval=5, lr=1e-5, valid_utterances=1)
    stage = study.root / "train"
    for number in (TERM, USR1):
        before = len(list(stage.glob("save/CKPT+*")))
        running = verbs.start("train", study.leaf, "--eval_manifests", "[]")
        running.wait_until(
            lambda before=before: (
                len(list(stage.glob("save/CKPT+*"))) > before
                or (before and not (stage / "STOPPED.json").exists())
            )
        )
        running.send(number)
        ended = running.ended()
        assert ended.code == 75 and "run the same command again to resume" in ended.err
        stopped_in(stage, number)
        newest = max(stage.glob("save/CKPT+*"))
        step = load_json(stage / "STOPPED.json")["optimizer_step"]
        assert load_json(newest / "MANIFEST.json")["optimizer_step"] == step


def test_row_36_a_signal_to_the_whole_process_group(make_leaf: MakeLeaf, tmp_path: Path) -> None:
    """As torchrun and `timeout` send it: the workers that load data get it, too."""
    study = make_leaf(num_steps=4000, valid_interval=4000, lr=1e-5, num_workers=2)
    command = [sys.executable, "train.py", str(study.leaf), "--eval_manifests", "[]"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            command, cwd=REPO_ROOT, stdout=out, stderr=out, start_new_session=True
        )
        end = time.monotonic() + 120
        while "time:" not in (tmp_path / "out").read_text():  # printed after some steps
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, TERM)
        assert process.wait(60) == 75, (tmp_path / "out").read_text()
    stopped_in(study.root / "train", TERM)
    assert list(study.root.glob("train/save/CKPT+*"))


def test_row_36_validation(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf(eval_batch_size=2)
    verbs.run("train", study.leaf, *FEW, code=75, inject=[("signal_in", "validation", 1, TERM)])
    stopped_in(study.root / "train", TERM)
    assert load_json(study.root / "train/STOPPED.json")["optimizer_step"] == 3


def test_row_36_feature_encoding(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf(cache_features=True, eval_batch_size=2)
    verbs.run("train", study.leaf, *FEW, code=75, inject=[("signal_in", "encode", 2, TERM)])
    stopped_in(study.root / "train", TERM)
    assert not list((study.results / "features").iterdir()), "half a store was left behind"
    verbs.run("train", study.leaf, *FEW)


@pytest.mark.parametrize(
    "where, call, command, stage",
    [
        ("decode", 1, ("evaluate",), "eval/full/librispeech-test-clean"),
        ("inputs", 1, ("measure",), "measure/speech"),
        ("text", 1, ("measure", "--measure_input", "text"), "measure/text"),
    ],
    ids=["decoding", "measuring speech", "measuring text"],
)
def test_row_36_loops_over_a_split(
    shared_study: Study, verbs: Processes, where: str, call: int, command: tuple, stage: str
) -> None:
    verb, *options = command
    small = ("--eval_batch_size", 2, "--measure_batch_size", 2, "--overwrite")
    fault = [("signal_in", where, call, USR1)]
    run = (verb, shared_study.leaf, *options, *small)
    verbs.run(*run, code=75, inject=fault)
    stopped_in(shared_study.root / stage, USR1)
    verbs.run(*run)
    assert not (shared_study.root / stage / "STOPPED.json").exists()


def test_row_36_reranking(own_study: Study, verbs: Processes) -> None:
    run = ("measure", own_study.leaf, "--rerank", 2)
    small = ("--measure_batch_size", 2, "--overwrite")
    verbs.run(*run, *small, code=75, inject=[("signal_in", "losses", 1, TERM)])
    folder = own_study.root / "measure/speech"
    assert load_json(folder / "STOPPED.json")["signal"] == "SIGTERM"
    assert (folder / "DONE.json").exists() and not (folder / "rerank.json").exists()
    verbs.run(*run, "--measure_batch_size", 2)
    assert (folder / "rerank.json").exists() and not (folder / "STOPPED.json").exists()


def test_row_36_one_rank_suffices(own_study: Study, verbs: Processes) -> None:
    """The other rank, which has fewer batches, stops at the same place."""
    run = ("evaluate", own_study.leaf, "--eval_batch_size", 1, "--overwrite")
    run += ("--eval_manifests", "librispeech/test-other")
    fault = ("signal_in", "decode", 1, TERM)
    ended = verbs.run_ranks(*run, inject=[[], [fault]])
    assert [rank.code for rank in ended] == [75, 75], ended
    stage = own_study.root / "eval/full/librispeech-test-other"
    assert load_json(stage / "STOPPED.json")["signal"] == "a signal on another rank"
    assert [rank.code for rank in verbs.run_ranks(*run)] == [0, 0]


def test_row_37_the_second_signal_exits_at_once(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    twice = [("signal_in", "step", 4, TERM, TERM)]
    verbs.run("train", study.leaf, *FEW, code=128 + TERM, inject=twice)
    assert not (study.root / "train/STOPPED.json").exists()
    ended = verbs.run("train", study.leaf, *FEW)
    assert "taken over" in ended.err, "its lock stayed behind"


def test_row_37_a_signal_during_a_save(make_leaf: MakeLeaf, verbs: Processes) -> None:
    """The first one lets the save finish, the second one does not: recoverable both ways."""
    study = make_leaf()
    save = study.root / "train/save"
    verbs.run("train", study.leaf, *FEW, code=75, inject=[("signal_in", "save", 1, TERM)])
    assert len(list(save.glob("CKPT+*"))) >= 1 and not (save / ".saving").exists()
    verbs.run("train", study.leaf, *FEW, code=143, inject=[("signal_in", "save", 1, TERM, TERM)])
    assert (save / ".saving").exists(), "this one met the save"
    verbs.run("train", study.leaf, *FEW)
    assert not (save / ".saving").exists()


def test_row_49_sweep_interrupted(own_study: Study, verbs: Processes) -> None:
    """Killed in the second healing: finished points are not done again, and all get done."""
    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "none,joint")
    verbs.run(*sweep, code=-9, inject=[("signal_in", "step", 6, signal.SIGKILL)])
    done = [file.parent for file in own_study.root.glob("eval/l*/*/metrics.json")]
    before = {folder: snapshot(folder) for folder in done}
    assert 2 <= len(done) < 8
    verbs.run(*sweep)
    assert len(list(own_study.root.glob("eval/l*/*/metrics.json"))) == 8
    assert {folder: snapshot(folder) for folder in done} == before
