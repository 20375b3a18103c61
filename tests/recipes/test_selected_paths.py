"""`--path` and `measure.py --rerank` from the command line."""

from __future__ import annotations

import json
import shutil

from safetensors.torch import load_file

from speechllm_prune.prune.path import pruning_path, tail_path
from speechllm_prune.prune.selectors import Evidence, best_blocks, select
from tests.recipes.conftest import Study
from tests.recipes.verbs import good, load_json, refused, snapshot
from tests.tiny import DECODER_LAYERS as L

M = 2


def test_rerank_is_measured_on_demand_and_its_path_is_used(own_study: Study) -> None:
    leaf, folder = own_study.leaf, own_study.root / "measure" / "speech"
    prune = ("prune", leaf, "--block_size", 2, "--path", "rerank")
    message = refused(*prune)
    assert "rerank.json does not exist; run: " in message and "--rerank" in message
    before = snapshot(folder)
    out = good("measure", leaf, "--rerank", M, "--rerank_utterances", 3).out
    assert "is already done" in out and "rerank.json: by loss" in out  # only the ranking was new
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"rerank.json"}
    found = load_json(folder / "rerank.json")
    matrix = load_file(folder / "distances.safetensors")["distance"].tolist()
    tried = [(int(l), int(n)) for n, row in found["loss"].items() for l in row]
    assert sorted(tried) == sorted(best_blocks(matrix, M))
    assert found["num_layers"] == L and found["last_token"] == "sequence"
    for n, row in found["loss"].items():
        assert row[str(found["path"][n])] == min(row.values()) and min(row.values()) > 0
    assert found["full_loss"] > 0 and found["num_labels"] > 3
    good(*prune)
    name = f"l{found['path']['2']:02d}n02"
    assert "rerank" in load_json(own_study.root / "prune" / name / "plan.json")["path_sources"]
    good("measure", leaf, "--rerank", M, "--rerank_utterances", 3)
    assert snapshot(folder) == after
    message = refused("measure", leaf, "--rerank", M + 1, "--rerank_utterances", 3)
    assert "rerank.json was made with another configuration (rerank 2" in message
    elsewhere = folder / "rerank.json"  # and as a file it is a path like any other
    good("prune", leaf, "--block_size", 3, "--path", elsewhere)


def test_rerank_needs_speech(own_study: Study) -> None:
    before = snapshot(own_study.root)
    message = refused("measure", own_study.leaf, "--measure_input", "text", "--rerank", 2)
    assert "rerank compares losses of the trained system on speech" in message
    assert snapshot(own_study.root) == before
    assert "'rerank' must be 0 or more" in refused("measure", own_study.leaf, "--rerank", -1)


def test_other_selectors_and_where_each_block_came_from(own_study: Study) -> None:
    leaf, root = own_study.leaf, own_study.root
    matrix = load_file(root / "measure/speech/distances.safetensors")["influence"].tolist()
    expected = {
        "influence": pruning_path(matrix),
        "random": select("random", Evidence(L, seed=3407)),
        "tail": tail_path(L),
    }
    for name, path in expected.items():
        good("prune", leaf, "--block_size", 2, "--path", name)
        plan = load_json(root / "prune" / f"l{path[2]:02d}n02" / "plan.json")
        assert name in plan["path_sources"] and plan["start_layer"] == path[2]
    good("sweep", leaf, "--block_sizes", "1", "--heal_modes", "none", "--path", "random")
    assert (root / "eval" / f"l{expected['random'][1]:02d}n01-none").is_dir()
    message = refused("prune", leaf, "--block_size", 2, "--path", "best")
    assert "neither own, text, tail, influence, random, rerank nor a file" in message


def test_paths_that_were_not_measured_name_the_command(own_study: Study) -> None:
    leaf, folder = own_study.leaf, own_study.root / "measure" / "speech"
    partial = own_study.leaf.parent / "partial.json"
    partial.write_text(json.dumps({"num_layers": L, "path": {"1": 2}}))
    message = refused("prune", leaf, "--block_size", 2, "--path", partial)
    assert "has no block of size 2; it has 1" in message
    shutil.rmtree(folder)
    for name in ("influence", "rerank", "own"):
        message = refused("prune", leaf, "--block_size", 2, "--path", name)
        assert "run: python measure.py" in message


def test_healing_of_another_block_is_refused(own_study: Study) -> None:
    """Blocks that start at one layer have tensors of the same names: only the list of layers tells them apart."""
    leaf, root = own_study.leaf, own_study.root
    start = ("--start_layer", 1)
    good("heal", leaf, "--block_size", 2, *start, "--heal_mode", "joint")
    done = load_json(root / "heal/l01n02-joint/DONE.json")
    assert done["kept_layers"] == [0, 3, 4, 5]
    good("prune", leaf, "--block_size", 3, *start)
    shutil.copytree(root / "heal/l01n02-joint", root / "heal/l01n03-joint")
    message = refused("evaluate", leaf, "--variant", "l01n03-joint")
    assert "was made on layers 0, 3..5, the decoder has 0, 4..5" in message
