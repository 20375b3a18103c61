"""Rows 45 to 48: several processes that do not do the same. Two gloo ranks with torchrun's environment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.processes import Processes
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import load_json, tensors

pytestmark = pytest.mark.slow

FEW = ("--num_steps", 4, "--valid_interval", 2, "--eval_manifests", "[]", "--batch_size", 2)


def test_row_45_nan_on_one_rank(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf(grad_accumulation_factor=2)
    ranks = verbs.run_ranks("train", study.leaf, *FEW, inject=[[], [("nan_loss", 1)]])
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert "step 2 is skipped: the loss of a batch is not finite (100-" in ranks[0].err
    assert "skipped" not in ranks[1].err, "one rank says it"
    assert load_json(study.root / "train/DONE.json")["skipped_steps"] == 1
    assert all(bool(t.isfinite().all()) for t in tensors(study.root / "train").values())


def test_row_46_other_batch_counts(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    for rank in verbs.run_ranks("train", study.leaf, *FEW, inject=[[], [("fewer_batches", 1)]]):
        assert rank.code == 2
        assert "batches in a pass is 3 on rank 0 and 2 on rank 1" in rank.message
    assert not list((study.root / "train").glob("save/CKPT+*")), "before the first step"


def test_row_47_other_yaml(make_leaf: MakeLeaf, verbs: Processes) -> None:
    study = make_leaf()
    for rank in verbs.run_ranks("train", study.leaf, *FEW, extra=[(), ("--lr", "5e-4")]):
        assert rank.code == 2 and "lr is 0.001 on rank 0 and 0.0005 on rank 1" in rank.message


def test_row_47_other_data(own_study: Study, verbs: Processes, tmp_path: Path) -> None:
    """The same names, other rows: as where every machine has a disk of its own."""
    shutil.copytree(own_study.results / "manifests", tmp_path / "other")
    csv = tmp_path / "other/librispeech/dev-clean.csv"
    csv.write_text(csv.read_text().replace(".", ".0", 1))
    run = ("measure", own_study.leaf, "--overwrite")
    extra = [(), ("--manifest_folder", tmp_path / "other")]
    for rank in verbs.run_ranks(*run, extra=extra):
        assert rank.code == 2 and "librispeech/dev-clean" in rank.message, rank


def test_row_48_one_rank_raises(make_leaf: MakeLeaf, verbs: Processes) -> None:
    """The other one does not wait for it: the job ends, with a code that is no success, and can be run again."""
    study = make_leaf()
    fault = [("raise_in", "step", 3, "RuntimeError")]
    zero, one = verbs.run_ranks("train", study.leaf, *FEW, inject=[[], fault], timeout=60)
    assert one.code == 1 and "injected in step" in one.err
    assert zero.code not in (0, 75)
    assert [rank.code for rank in verbs.run_ranks("train", study.leaf, *FEW)] == [0, 0]
