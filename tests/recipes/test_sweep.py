"""Sweeps from the command line: several paths, the coarse plan, killed and restarted, how often the encoder runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from speechllm_prune.models.encoder import WaveEncoder
from tests import tiny
from tests.recipes.conftest import Study, copy_study
from tests.recipes.test_distributed import torchrun
from tests.recipes.verbs import SPLITS, good, load_json, refused, run, snapshot, tensors

TIMING = ("rtfx", "tokens_per_second", "peak_memory_bytes")


def write_path(study: Study, name: str, path: dict[int, int]) -> Path:
    """A path of somebody else."""
    file = study.leaf.parent / name
    file.write_text(json.dumps({"num_layers": tiny.DECODER_LAYERS, "path": path}))
    return file


def variants(study: Study) -> set[str]:
    """What was evaluated on both sets."""
    return {
        folder.name
        for folder in (study.root / "eval").iterdir()
        if all((folder / split / "metrics.json").is_file() for split in SPLITS)
    }


def set_scores(study: Study, variant: str, value: float) -> None:
    """Give a variant other scores; the sweep leaves what is finished alone."""
    for split in SPLITS:
        file = study.root / "eval" / variant / split / "metrics.json"
        record = load_json(file) | {"value": value}
        file.write_text(json.dumps(record))


# ---------------------------------------------------------------------------------------------- paths
def test_several_paths_share_blocks(own_study: Study) -> None:
    one = write_path(own_study, "one.json", {1: 1, 2: 1})
    two = write_path(own_study, "two.json", {1: 3, 2: 1})
    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2", "--path", f"{one},{two}")
    told = good(*sweep, "--dry_run").out
    assert "6 points, 0 done; about" in told
    assert f"would run n=2 joint: l01n02-joint ({one}, {two})" in told
    out = good(*sweep).out
    assert f"chosen by several paths and run once: l01n02 by {one} and {two}" in out
    assert "6 of 6 points are done" in out
    blocks = {"l01n01", "l03n01", "l01n02"}
    assert variants(own_study) - {"full"} == {f"{b}-{m}" for b in blocks for m in ("none", "joint")}
    plan = load_json(own_study.root / "prune/l01n02/plan.json")
    assert plan["path_sources"] == [str(one), str(two)]
    before = snapshot(own_study.root)
    out = good(*sweep).out
    assert len(re.findall(r"^\[\d/6\] n=\d \w+: was already done$", out, re.M)) == 6
    assert snapshot(own_study.root) == before
    # Another path that chooses a block adds its name to the plan, and nothing else changes.
    good("sweep", own_study.leaf, "--block_sizes", "2", "--start_layer", 1)
    changed = {
        name for name, state in snapshot(own_study.root).items() if before.get(name) != state
    }
    assert changed == {"prune/l01n02/plan.json"}
    message = refused("sweep", own_study.leaf, "--block_sizes", "2", "--path", "own,nowhere")
    assert "path 'nowhere' is neither" in message


# ---------------------------------------------------------------------------------------------- coarse
def test_coarse_plan(own_study: Study) -> None:
    file = write_path(own_study, "path.json", dict.fromkeys(range(1, 6), 0))
    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2,3,4,5", "--path", file)
    sweep = (*sweep, "--heal_modes", "none,projector", "--plan", "coarse")
    assert "leave --shard out" in refused(*sweep, "--shard", "1/2")
    out = good(*sweep, "--dry_run").out
    assert "4 points, 0 done" in out and "follow when all coarse points are scored" in out
    good(*sweep, "--heal_modes", "none")  # `none` alone decides for itself; its points are shared
    for size in (1, 4):
        shutil.rmtree(own_study.root / f"eval/l00n{size:02d}-none")
    for extra in variants(own_study) - {"full"}:
        shutil.rmtree(own_study.root / "eval" / extra)
    coarse = ("--block_sizes", "1,4", "--plan", "all")
    good(*sweep, *coarse)
    full = load_json(own_study.root / "eval/full" / SPLITS[0] / "metrics.json")["value"]
    for name, value in (("l00n01", full), ("l00n04", 2 * full)):
        set_scores(own_study, f"{name}-projector", value)
    set_scores(own_study, "l00n04-none", full)  # the healed mode decides, not this one
    set_scores(own_study, "full", full)
    out = good(*sweep).out
    assert f"around the tolerance 0.25 on {file}: 2, 3" in out and "8 of 8 points are done" in out
    assert variants(own_study) - {"full"} == {
        f"l00n{size:02d}-{mode}" for size in (1, 2, 3, 4) for mode in ("none", "projector")
    }
    before = snapshot(own_study.root)
    assert "8 of 8" in good(*sweep).out and snapshot(own_study.root) == before
    shutil.rmtree(own_study.root / "eval/full" / SPLITS[1])
    assert "not evaluated on librispeech/test-other; run: python evaluate.py" in refused(*sweep)


# ---------------------------------------------------------------------------------------------- failures
def test_failed_points_are_reported_and_only_they_are_run_again(
    own_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speechllm_prune.stages import heal

    sweep = ("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "projector,joint")
    original, broken = heal.fit, own_study.variant(1, "joint")

    def fit(bench: Any, stage: str, *args: Any, **facts: Any) -> None:
        if stage == f"heal/{broken}":
            raise RuntimeError("out of luck")
        original(bench, stage, *args, **facts)

    monkeypatch.setattr(heal, "fit", fit)
    outcome = run(*sweep)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "3 of 4 points are done\nfailed: n=1 joint: out of luck\n" in outcome.out
    assert "[2/4] n=1 joint: failed after" in outcome.out
    monkeypatch.setattr(heal, "fit", original)
    before = snapshot(own_study.root / "heal")
    assert "4 of 4 points are done" in good(*sweep).out
    after = snapshot(own_study.root / "heal")
    assert {name: after[name] for name in before if broken not in name} == {
        name: state for name, state in before.items() if broken not in name
    }
    # What no point can do anything about is the user's mistake, said once.
    message = refused(*sweep, "--heal_steps", 3)
    assert "no point could be run" in message and "another configuration" in message


# ---------------------------------------------------------------------------------------------- the encoder
def test_the_encoder_runs_once_per_utterance(
    own_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of depths and modes; the next sweep does without."""
    rows: Counter[str] = Counter()
    original = WaveEncoder.encode

    def encode(encoder: WaveEncoder, wavs: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        rows["encoded"] += len(wavs)
        return original(encoder, wavs, lengths)

    monkeypatch.setattr(WaveEncoder, "encode", encode)
    shutil.rmtree(own_study.results / "features")
    sweep = (
        "sweep",
        own_study.leaf,
        "--heal_modes",
        "none,decoder,joint,joint+kl",
        "--block_sizes",
    )
    good(*sweep, "1,2")
    assert rows["encoded"] == 12 + 4 + 4 + 3  # train, dev, test-clean, test-other
    good(*sweep, "1,2,3")
    assert rows["encoded"] == 12 + 4 + 4 + 3


def test_without_the_cache_the_sweep_says_so(study: Study) -> None:
    told = "cache_features is False: the encoder runs again for every point"
    assert told not in good("sweep", study.leaf, "--dry_run").out
    archive = study.root / "train/hyperparams.yaml"
    text = archive.read_text()
    try:
        archive.write_text(text.replace("cache_features: true", "cache_features: false"))
        assert told in good("sweep", study.leaf, "--dry_run").out
    finally:
        archive.write_text(text)


# ---------------------------------------------------------------------------------------------- interruptions
def tables(study: Study) -> dict[str, list[dict[str, str]]]:
    """Rows of the report's tables without what a clock has measured."""
    good("report", study.root)
    found = {}
    for file in sorted((study.root / "report").glob("*.csv")):
        if file.name == "efficiency.csv":  # times and memory throughout
            continue
        with open(file, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        found[file.name] = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
    return found


@pytest.mark.slow
def test_killed_sweeps_end_with_the_same_tables(
    trained: Study, tmp_path: Path, repo_root: Path
) -> None:
    """SIGKILL at random moments, restarted each time: nothing that was finished is done again, the tables agree."""
    whole, parted = copy_study(trained, tmp_path / "a"), copy_study(trained, tmp_path / "b")
    options = [
        "--block_sizes",
        "1,2",
        "--heal_modes",
        "none,joint",
        "--control",
        "--path",
        "own,tail",
    ]
    options += ["--heal_steps", "8"]
    task = {
        "whole": [str(whole.leaf), *options],
        "parted": [str(parted.leaf), *options],
        "root": str(parted.root),
        "seed": 3407,
        "kills": 6,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.sweep_driver", json.dumps(task)],
        env=tiny.environment(repo_root),
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    history = found["history"]
    assert found["code"] == 0 and found["killed"] == len(history) - 1 > 0
    for before, after in zip(history, history[1:], strict=False):
        assert {name: after.get(name) for name in before} == before, "a finished point was redone"
    expected = tables(whole)
    assert "points.csv" in expected and "table1.csv" in expected
    assert len(expected["points.csv"]) == 2 * len(variants(whole)) > 10
    assert tables(parted) == expected


@pytest.mark.slow
def test_a_terminated_sweep_says_so_and_goes_on(own_study: Study, repo_root: Path) -> None:
    """SIGTERM while a point is being healed: exit 75, STOPPED.json; run again, it ends."""
    options = [str(own_study.leaf), "--block_sizes", "1,2", "--heal_modes", "joint"]
    command = [sys.executable, str(repo_root / "sweep.py"), *options, "--heal_steps", "60"]
    process = subprocess.Popen(
        command, env=tiny.environment(repo_root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stage = own_study.root / "heal" / own_study.variant(1)
    end = time.monotonic() + 120
    while not list(stage.glob("save/CKPT*")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 75 and "Traceback" not in output and "failed" not in output
    assert load_json(stage / "STOPPED.json")["signal"] == "SIGTERM"
    assert not (stage / "DONE.json").exists()
    assert "2 of 2 points are done" in good("sweep", *options, "--heal_steps", "60").out
    assert not list(own_study.root.rglob("STOPPED.json"))


# ---------------------------------------------------------------------------------------------- many healings
def test_a_healing_does_not_depend_on_what_ran_before(own_study: Study) -> None:
    """The second one of a sweep is the one that `heal.py` makes, first thing in its life."""
    good("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "joint")
    good("heal", own_study.leaf, "--block_size", 2, "--heal_mode", "joint", "--tag", "alone")
    stage = own_study.root / "heal" / own_study.variant(2)
    one, other = tensors(stage), tensors(stage.with_name(f"{stage.name}+alone"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_several_healings_in_one_process_group(own_study: Study, repo_root: Path) -> None:
    """Each one is what it is in a process group of its own."""
    leaf = own_study.leaf
    sweep = ("--block_sizes", "1,2", "--heal_modes", "none,decoder,joint")
    done = torchrun(repo_root, repo_root / "sweep.py", leaf, *sweep)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("6 of 6 points are done") == 1, "one rank speaks"
    assert len(variants(own_study)) == 7
    alone = ("--block_size", 2, "--heal_mode", "joint", "--tag", "alone")
    done = torchrun(repo_root, repo_root / "heal.py", leaf, *alone)
    assert done.returncode == 0, done.stderr[-4000:]
    stage = own_study.root / "heal" / own_study.variant(2)
    one, other = tensors(stage), tensors(stage.with_name(f"{stage.name}+alone"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
