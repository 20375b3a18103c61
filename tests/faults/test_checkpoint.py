"""Rows 24, 25, 29 to 32, 35, 38, 59: what becomes of checkpoints that are damaged, foreign, or only half there."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from speechllm_prune.experiment import sha256_file
from tests.faults.processes import Processes
from tests.recipes.conftest import MakeLeaf, Study, copy_study
from tests.recipes.verbs import leaf_values, load_json, write_leaf

pytestmark = pytest.mark.slow

FEW = ("--num_steps", 8, "--valid_interval", 3, "--eval_manifests", "[]", "--lr", "1e-4")


def checkpoints(stage: Path) -> list[Path]:
    """Checkpoints of a stage, the newest first."""
    return sorted((stage / "save").glob("CKPT+*"), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at."""
    return load_json(checkpoint / "MANIFEST.json")["optimizer_step"]


@pytest.fixture(scope="module")
def killed(
    tiny_corpus: Path, wavlm_layer: Path, qwen2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """Killed after step 7, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("killed")
    values = leaf_values(tiny_corpus, wavlm_layer, qwen2, folder / "results")
    study = Study(write_leaf(folder / "tiny.yaml", values), values, tiny_corpus, folder / "results")
    kill = [("signal_after_step", 7, signal.SIGKILL)]
    Processes(folder).run("train", study.leaf, *FEW, code=-9, inject=kill)
    assert [step_of(path) for path in checkpoints(study.root / "train")] == [6, 3]
    return study


@pytest.fixture
def stopped(killed: Study, tmp_path: Path) -> Study:
    """A copy of `killed` that a test may change."""
    return copy_study(killed, tmp_path)


def first_step(verbs: Processes, study: Study, **how) -> tuple[int, str]:
    """Run training again to its end: the step it began with, and what it said."""
    log = verbs.folder / "losses"
    ended = verbs.run("train", study.leaf, *FEW, inject=[("log_losses", str(log))], **how)
    return json.loads(log.read_text().splitlines()[0])[0], ended.err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def check_fallback(
    stopped: Study, verbs: Processes, damage: Callable[[Path], None], name: str, said: str
) -> None:
    """The damaged newest checkpoint is named in a warning, and the run goes on from the one before it."""
    newest = checkpoints(stopped.root / "train")[0]
    damage(newest / name)
    step, err = first_step(verbs, stopped)
    assert step == 3, "the checkpoint before it"
    assert "warning: the checkpoint" in err and newest.name in err and said in err
    assert load_json(stopped.root / "train/DONE.json")["num_steps"] == 8


def test_row_29_truncated_safetensors(stopped: Study, verbs: Processes) -> None:
    check_fallback(stopped, verbs, cut, "model.ckpt", "bytes instead of")


def test_row_30_flipped_byte(stopped: Study, verbs: Processes) -> None:
    check_fallback(stopped, verbs, flip, "model.ckpt", "not what was saved (sha256)")


def test_row_30_flipped_byte_in_the_finished_model(own_study: Study, verbs: Processes) -> None:
    """The hash in DONE.json guards what later verbs load."""
    done = load_json(own_study.root / "train/DONE.json")
    flip(own_study.root / "train" / done["checkpoint"] / "model.ckpt")
    ended = verbs.run("evaluate", own_study.leaf, "--overwrite", code=2)
    assert "model.ckpt is not the file that was saved" in ended.message
    assert (own_study.root / "eval/full/librispeech-test-clean/metrics.json").is_file()


def test_row_31_missing_manifest(stopped: Study, verbs: Processes) -> None:
    check_fallback(stopped, verbs, Path.unlink, "MANIFEST.json", "no usable manifest")


def test_row_31_nothing_usable_is_not_from_scratch(stopped: Study, verbs: Processes) -> None:
    for path in checkpoints(stopped.root / "train"):
        flip(path / "state.ckpt")
    for _ in range(2):  # what was set aside by the first try counts in the second
        ended = verbs.run("train", stopped.leaf, *FEW, code=2)
        assert "none of the 2 checkpoints" in ended.message and "--overwrite" in ended.message
    assert "REJECTED+" in ended.err or "put a good copy" in ended.message
    verbs.run("train", stopped.leaf, *FEW, "--overwrite")


def test_row_24_checkpoint_of_another_backbone(
    stopped: Study, make_leaf: MakeLeaf, qwen2_tied: Path, verbs: Processes
) -> None:
    other = make_leaf(experiment_name="other", decoder_hub=str(qwen2_tied))
    kill = [("signal_after_step", 4, signal.SIGKILL)]
    verbs.run("train", other.leaf, *FEW, code=-9, inject=kill)
    shutil.rmtree(other.root / "train/save")
    shutil.copytree(stopped.root / "train/save", other.root / "train/save")
    message = verbs.run("train", other.leaf, *FEW, code=2).message
    assert "saved by another run: decoder sha256:" in message and "--overwrite" in message


def test_row_24_checkpoint_of_other_layers(own_study: Study, verbs: Processes) -> None:
    """The adapters have the same names and shapes whichever block went: only the manifest can tell."""
    heal = ("heal", own_study.leaf, "--block_size", 1, "--heal_steps", 4)
    kill = [("signal_after_step", 3, signal.SIGTERM)]
    for start in (1, 2):
        verbs.run(*heal, "--start_layer", start, code=75, inject=kill)
    one, two = (own_study.root / f"heal/l{start:02d}n01-joint/save" for start in (1, 2))
    shutil.rmtree(two)
    shutil.copytree(one, two)
    message = verbs.run(*heal, "--start_layer", 2, code=2).message
    assert "kept layers [0, 2, 3, 4, 5] there, [0, 1, 3, 4, 5] now" in message


def test_row_25_lora_rank_changed_on_resume(own_study: Study, verbs: Processes) -> None:
    heal = ("heal", own_study.leaf, "--block_size", 1, "--start_layer", 1, "--heal_steps", 4)
    verbs.run(*heal, code=75, inject=[("signal_after_step", 2, signal.SIGTERM)])
    message = verbs.run(*heal, "--heal_lora_rank", 4, code=2).message
    assert "configuration" in message and "saved by another run" in message


def test_row_25_lora_targets_changed(stopped: Study, verbs: Processes) -> None:
    """Other trained tensors than the model has, under a manifest that is in order: refused by name."""
    newest = checkpoints(stopped.root / "train")[0]
    tensors = load_file(newest / "model.ckpt")
    tensors["projector.extra.lora_A.train.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, newest / "model.ckpt")
    manifest = load_json(newest / "MANIFEST.json")
    manifest["files"]["model.ckpt"] = {
        "bytes": (newest / "model.ckpt").stat().st_size,
        "sha256": sha256_file(newest / "model.ckpt"),
    }
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    message = verbs.run("train", stopped.leaf, *FEW, code=2).message
    assert "unexpected projector.extra.lora_A.train.weight" in message


def test_row_35_another_number_of_processes(stopped: Study, verbs: Processes) -> None:
    for rank in verbs.run_ranks("train", stopped.leaf, *FEW):
        assert rank.code == 2 and "number of processes 1 there, 2 now" in rank.message


def test_row_38_too_little_room(stopped: Study, verbs: Processes) -> None:
    before = checkpoints(stopped.root / "train")
    ended = verbs.run("train", stopped.leaf, *FEW, code=1, inject=[("free_bytes", 1000)])
    assert (
        "a checkpoint was not saved: it needs " in ended.message
        and "1,000 are free" in ended.message
    )
    assert checkpoints(stopped.root / "train") == before
    assert first_step(verbs, stopped)[0] == 6


def test_row_38_disk_full_while_saving(stopped: Study, verbs: Processes) -> None:
    before = checkpoints(stopped.root / "train")
    ended = verbs.run(
        "train", stopped.leaf, *FEW, code=1, inject=[("raise_in", "save", 1, "ENOSPC")]
    )
    assert "No space left on device" in ended.message and "bytes in" in ended.message
    assert checkpoints(stopped.root / "train") == before
    assert not (stopped.root / "train/save/.saving").exists()
    assert first_step(verbs, stopped)[0] == 6


def test_row_59_the_clock_goes_back(make_leaf: MakeLeaf, verbs: Processes) -> None:
    """Several saves within a second, each with an earlier time than the one before: the order is that of the steps."""
    study = make_leaf()
    back = ("clock_goes_back",)
    every = ("--num_steps", 8, "--valid_interval", 1, "--eval_manifests", "[]")
    kill = ("signal_after_step", 7, signal.SIGKILL)
    verbs.run("train", study.leaf, *every, code=-9, inject=[back, kill])
    steps = [step_of(path) for path in checkpoints(study.root / "train")]
    assert steps[:2] == [6, 5] and len(steps) <= 3
    log = verbs.folder / "losses"
    verbs.run("train", study.leaf, *every, inject=[back, ("log_losses", str(log))])
    assert json.loads(log.read_text().splitlines()[0])[0] == 6


def test_row_32_killed_20_times_while_saving(tmp_path: Path) -> None:
    """The saving loop of benchmarks/kill_loop.py, killed in the save window and at random times: always recoverable."""
    from benchmarks.kill_loop import SAVER, run_trials

    results = run_trials("ours", SAVER, 20, tmp_path, random.Random(11))
    assert len(results) == 20 and not [trial for trial in results if not trial.recovered], results
    assert sum(trial.found_half for trial in results) >= 3, "too few kills met a save"
