"""Two gloo processes under torchrun: the same files, and the same numbers where they have to be the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.recipes.conftest import Study
from tests.recipes.verbs import (
    SPLITS,
    good,
    leaf_values,
    load_json,
    load_rows,
    tensors,
    write_leaf,
)


def torchrun(repo_root: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Two processes of a script, on one thread each."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *map(str, arguments),
        ],
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def two_ranks(
    tiny_corpus: Path,
    wavlm_layer: Path,
    qwen2: Path,
    repo_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Study:
    """The study by two processes; 4, 3 and 12 utterances divide by two differently."""
    folder = tmp_path_factory.mktemp("two_ranks")
    values = leaf_values(tiny_corpus, wavlm_layer, qwen2, folder / "results")
    # Validating after every step deletes old checkpoints, which all ranks must agree on.
    values |= {"valid_interval": 1, "batch_size": 2}
    values |= {"eval_batch_size": 1, "measure_batch_size": 1}
    leaf = write_leaf(folder / "tiny.yaml", values)
    done = torchrun(repo_root, repo_root / "train.py", leaf)
    assert done.returncode == 0, done.stderr[-4000:]
    study = Study(leaf, values, tiny_corpus, folder / "results")
    block = ["--block_size", "2"]
    again = ["train", str(leaf), "--experiment_name", "parted", "--eval_manifests", "[]"]
    commands = [
        ["stop_at_4", *again],
        again,
        ["measure", str(leaf)],
        ["measure", str(leaf), "--measure_input", "text"],
        ["heal", str(leaf), *block, "--heal_mode", "joint", "--export"],
        ["sweep", str(leaf), "--block_sizes", "2", "--heal_modes", "none,joint"],
    ]
    done = torchrun(repo_root, "-m", "tests.recipes.distributed_driver", json.dumps(commands))
    assert done.returncode == 0, done.stderr[-4000:]
    return study


@pytest.fixture(scope="module")
def one_rank(two_ranks: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same trained and healed models, measured and decoded by one process."""
    folder = tmp_path_factory.mktemp("one_rank")
    shutil.copytree(two_ranks.results, folder / "results")
    values = two_ranks.values | {"results_folder": str(folder / "results")}
    study = Study(
        write_leaf(folder / "tiny.yaml", values), values, two_ranks.corpus, folder / "results"
    )
    good("measure", study.leaf, "--overwrite")
    good("measure", study.leaf, "--measure_input", "text", "--overwrite")
    for variant in ("full", study.variant(2, "none"), study.variant(2, "joint")):
        good("evaluate", study.leaf, "--variant", variant, "--overwrite")
    return study


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["speech", "text"])
def test_the_matrix_is_the_same(two_ranks: Study, one_rank: Study, kind: str) -> None:
    two, one = (
        load_file(s.root / f"measure/{kind}/distances.safetensors") for s in (two_ranks, one_rank)
    )
    assert two["count"].tolist() == one["count"].tolist() == [4]
    torch.testing.assert_close(two["distance"], one["distance"], rtol=0, atol=1e-9, equal_nan=True)
    paths = [load_json(s.root / f"measure/{kind}/path.json")["path"] for s in (two_ranks, one_rank)]
    assert paths[0] == paths[1]


@pytest.mark.slow
def test_hypotheses_and_scores_are_the_same(two_ranks: Study, one_rank: Study) -> None:
    for variant in ("full", two_ranks.variant(2, "none"), two_ranks.variant(2, "joint")):
        for split in SPLITS:
            two, one = (s.root / "eval" / variant / split for s in (two_ranks, one_rank))
            assert load_rows(two / "hyps.jsonl") == load_rows(one / "hyps.jsonl")
            assert len(load_rows(two / "hyps.jsonl")) == (4 if "clean" in split else 3)
            values = [load_json(folder / "metrics.json")["value"] for folder in (two, one)]
            assert values[0] == values[1]


@pytest.mark.slow
def test_training_counts_both_ranks(two_ranks: Study) -> None:
    done = load_json(two_ranks.root / "train/DONE.json")
    assert done["num_steps"] == 6
    lines = (two_ranks.root / "train/train_log.txt").read_text().splitlines()
    assert len(lines) == 6, "one rank writes the log"
    assert "utterances: 4," in lines[0] and "utterances: 24," in lines[5]
    assert 2 <= len(list((two_ranks.root / "train/save").glob("CKPT+*"))) <= 3
    assert not list(two_ranks.results.rglob("STOPPED.json"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(two_ranks: Study) -> None:
    """The driver has stopped `parted` after step 4 and run it again: it ends like the run that nothing disturbed."""
    stages = two_ranks.root / "train", two_ranks.results / "parted/3407/train"
    whole, parted = map(tensors, stages)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    logs = [(stage / "train_log.txt").read_text().splitlines() for stage in stages]
    assert len(logs[0]) == len(logs[1]) == 6, "step 4 is validated after the stop"
    for one, two in zip(*logs, strict=True):
        assert (
            one.split(" - ")[0] == two.split(" - ")[0]
            and one.split(" - ")[-1] == two.split(" - ")[-1]
        )


@pytest.mark.slow
def test_one_process_with_twice_the_batches_trains_the_same(
    two_ranks: Study, tmp_path: Path
) -> None:
    """2 ranks x 2 utterances and 1 rank x 4 see the same utterances per step here, so the weights agree."""
    values = two_ranks.values | {
        "results_folder": str(tmp_path / "results"),
        "batch_size": 4,
        "eval_manifests": [],
    }
    good("train", write_leaf(tmp_path / "tiny.yaml", values))
    stages = tmp_path / "results/tiny/3407/train", two_ranks.root / "train"
    steps = [load_json(stage / "DONE.json")["optimizer_step"] for stage in stages]
    assert steps[0] == steps[1]
    one, two = map(tensors, stages)
    for name in one:  # other batches of two would move them apart by 6e-3
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
