"""Every verb from end to end on tiny models: what it does, what it leaves alone, what running it again does."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechllm_prune import load_hparams
from speechllm_prune.sweep import plan_points
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import (
    SPLITS,
    audio_of,
    good,
    hypotheses,
    load_json,
    load_rows,
    run,
    snapshot,
    tensors,
    write_leaf,
)

LAYERS = 6


def test_finished_stages_are_left_as_they_are(study: Study) -> None:
    before = snapshot(study.root)
    for command in (
        ("train",),
        ("measure",),
        ("measure", "--measure_input", "text"),
        ("heal", "--block_size", 2, "--heal_mode", "joint"),
        ("heal", "--block_size", 2, "--heal_mode", "joint", "--control"),
        ("heal", "--block_size", 2, "--heal_mode", "decoder", "--tag", "long"),
        ("evaluate",),
        ("evaluate", "--variant", study.variant(2)),
        ("sweep", "--block_sizes", "1,2"),
    ):
        assert "already done" in good(command[0], study.leaf, *command[1:]).out
    good("prune", study.leaf, "--block_size", 2)
    assert snapshot(study.root) == before


def test_training_again_gives_the_same_weights(own_study: Study) -> None:
    first = tensors(own_study.root / "train")
    (own_study.root / "train" / "left_over.txt").write_text("x")
    good("train", own_study.leaf, "--overwrite")
    again = tensors(own_study.root / "train")
    assert first.keys() == again.keys() and len(first) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not (own_study.root / "train" / "left_over.txt").exists()


def test_measuring_again_gives_the_same_numbers(own_study: Study) -> None:
    folder = own_study.root / "measure" / "speech"
    before = snapshot(folder)
    good("measure", own_study.leaf, "--overwrite")
    after = snapshot(folder)
    assert before.keys() == after.keys()
    for name in ("distances.safetensors", "path.json"):
        assert before[name][1] == after[name][1] and before[name][0] != after[name][0]


def test_training_changes_the_projector_and_writes_a_log(trained: Study) -> None:
    folder = trained.root / "train"
    state = tensors(folder)
    assert {name.split(".")[0] for name in state} == {"projector"}
    assert list(state) == sorted(load_json(folder / "DONE.json")["trainable"])
    lines = (folder / "train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step: 3", "step: 6"]
    for word in (
        "lr: ",
        "epochs: ",
        "audio_hours: ",
        "train loss: ",
        "valid loss: ",
        "valid wer: ",
    ):
        assert all(word in line for line in lines), word
    assert (folder / "env.log").read_text().count("torch ") == 1


def test_each_heal_mode_trains_what_it_says(own_study: Study) -> None:
    stage1 = tensors(own_study.root / "train")
    start = int(own_study.variant(2)[1:3])
    mlp = {
        f"decoder.model.layers.{start}.mlp.{part}_proj.lora_{side}.heal.weight"
        for part in ("gate", "up", "down")
        for side in "AB"
    }
    expected = {"decoder": mlp, "projector": set(stage1), "joint": mlp | set(stage1)}
    for mode, names in expected.items():
        good("heal", own_study.leaf, "--block_size", 2, "--heal_mode", mode)
        folder = own_study.root / "heal" / own_study.variant(2, mode)
        state = tensors(folder)
        assert set(state) == names == set(load_json(folder / "DONE.json")["trainable"])
        assert all(tensor.abs().sum() > 0 for name, tensor in state.items() if "lora_B" in name)
        if mode != "decoder":  # healing starts from stage 1 and moves on
            assert not any(torch.equal(state[name], stage1[name]) for name in stage1)
            assert all((state[name] - stage1[name]).abs().max() < 0.05 for name in stage1)
    assert (own_study.root / "train" / "DONE.json").stat().st_mtime_ns < (
        folder / "DONE.json"
    ).stat().st_mtime_ns


def test_the_control_heals_the_uncut_model(study: Study) -> None:
    variant = study.variant(2)
    start = int(variant[1:3])
    names = set(tensors(study.root / "heal" / f"control-{variant}"))
    assert {name.split(".")[3] for name in names if name.startswith("decoder")} == {str(start + 2)}
    full, control, cut = (
        load_json(study.root / "eval" / name / SPLITS[0] / "metrics.json")
        for name in ("full", f"control-{variant}", variant)
    )
    lora = sum(t.numel() for n, t in tensors(study.root / "heal" / variant).items() if "lora" in n)
    assert control["decoder_parameters"] == full["decoder_parameters"] + lora
    assert cut["decoder_parameters"] < full["decoder_parameters"]
    assert control["control"] and not cut["control"] and control["start_layer"] == start


def test_shuffled_audio_is_another_variant(study: Study) -> None:
    rows = load_rows(study.root / "eval/full+shuffled_audio" / SPLITS[0] / "hyps.jsonl")
    plain = load_rows(study.root / "eval/full" / SPLITS[0] / "hyps.jsonl")
    assert [(r["id"], r["ref"]) for r in rows] == [(r["id"], r["ref"]) for r in plain]
    # Every utterance says what another one says; the cap on the length, which these models reach, is its own.
    begins = {row["hyp"][:5]: row["id"] for row in plain}
    assert len(begins) == len(plain)
    heard = {row["id"]: begins[row["hyp"][:5]] for row in rows}
    assert set(heard.values()) == set(heard)
    assert all(utterance != source for utterance, source in heard.items())


# ---------------------------------------------------------------------------------------------- sweep
def points_done(study: Study) -> set[str]:
    """Variants with both scores."""
    return {
        folder.name
        for folder in (study.root / "eval").iterdir()
        if all((folder / split / "metrics.json").is_file() for split in SPLITS)
    }


def test_shards_cover_all_points_exactly_once(own_study: Study) -> None:
    wanted = {own_study.variant(n, mode) for n in (1, 2, 3) for mode in ("none", "joint")}
    assert [point.block_size for point in plan_points([], ["none"], LAYERS, False)] == [1, 2, 3]
    done = points_done(own_study)
    assert done == {"full"}
    for shard in ("1/3", "2/3", "3/3"):
        good("sweep", own_study.leaf, "--shard", shard, "--heal_steps", 1)
        fresh = points_done(own_study) - done
        assert len(fresh) == 2 and fresh <= wanted
        done |= fresh
    assert done == wanted | {"full"}
    before = snapshot(own_study.root)
    assert "6 of 6 points" in good("sweep", own_study.leaf, "--heal_steps", 1).out
    assert snapshot(own_study.root) == before


def test_a_failing_point_does_not_stop_the_others(own_study: Study) -> None:
    broken = own_study.root / "prune" / own_study.variant(1)[:6] / "plan.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    outcome = run("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "none")
    assert outcome.code == 1
    assert "failed: n=1 none" in outcome.err and str(broken) in outcome.err
    assert "1 of 2 points are done" in outcome.out
    assert points_done(own_study) == {"full", own_study.variant(2, "none")}
    broken.unlink()
    assert (
        "2 of 2"
        in good("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "none").out
    )


def test_a_path_from_elsewhere_and_blocks_that_two_paths_share(own_study: Study) -> None:
    elsewhere = own_study.results.parent / "elsewhere.json"
    shutil.copy(own_study.root / "measure/speech/path.json", elsewhere)
    sweep = ("sweep", own_study.leaf, "--block_sizes", "2", "--heal_modes", "none")
    good(*sweep)
    before = snapshot(own_study.root / "eval")
    for path in (str(elsewhere), "text", "tail"):
        good(*sweep, "--path", path)
    block = own_study.variant(2)[:6]
    plan = load_json(own_study.root / "prune" / block / "plan.json")
    assert plan["path_sources"][:2] == ["own", str(elsewhere)]
    after = snapshot(own_study.root / "eval")
    assert {name: after[name] for name in before} == before, "a shared block was decoded again"
    assert f"l{LAYERS - 1 - 2:02d}n02-none" in points_done(own_study)


def test_a_sweep_takes_the_control_of_its_deepest_point(own_study: Study) -> None:
    good("sweep", own_study.leaf, "--block_sizes", "1,2", "--heal_modes", "projector", "--control")
    names = {own_study.variant(1, "projector"), own_study.variant(2, "projector")}
    assert (
        points_done(own_study) == {"full", "control-" + own_study.variant(2, "projector")} | names
    )


# ---------------------------------------------------------------------------------------------- flags
def test_dry_run_and_check_write_nothing(own_study: Study, make_leaf: MakeLeaf) -> None:
    before = snapshot(own_study.results)
    block = ("--block_size", 2)
    for command in (
        ("train",),
        ("measure",),
        ("prune", *block),
        ("heal", *block),
        ("evaluate",),
        ("sweep",),
    ):
        assert good(command[0], own_study.leaf, *command[1:], "--dry_run").out.strip()
        assert "ok" in good(command[0], own_study.leaf, *command[1:], "--check").out
    assert "l03n02" in good("prune", own_study.leaf, *block, "--path", "tail", "--dry_run").out
    assert good("sweep", own_study.leaf, "--dry_run", "--shard", "1/2").out.count("would run") == 3
    assert snapshot(own_study.results) == before
    fresh = make_leaf(experiment_name="fresh", results_folder=str(own_study.results / "fresh"))
    good("train", fresh.leaf, "--dry_run")
    assert not fresh.results.exists()


def test_print_hparams_is_a_file_for_stock_hyperpyyaml(own_study: Study, tmp_path: Path) -> None:
    text = good("train", own_study.leaf, "--print_hparams", "--num_workers", 3).out
    loaded = load_hyperpyyaml(text)
    ours = load_hparams(own_study.leaf, {"num_workers": 3})
    plain = {key: value for key, value in loaded.items() if not callable(value)}
    assert plain == {key: value for key, value in ours.items() if not callable(value)}
    assert loaded["num_workers"] == 3 and loaded["manifest_folder"] == str(
        own_study.results / "manifests"
    )
    archived = load_hyperpyyaml((own_study.root / "train/hyperparams.yaml").read_text())
    assert archived["lr"] == 1e-3 and archived["projector_dim"] == 32


def test_the_archived_yaml_is_a_leaf_itself(own_study: Study) -> None:
    archive = own_study.root / "train" / "hyperparams.yaml"
    options = ("--results_folder", own_study.results)
    assert "already done" in good("train", archive, *options).out
    good("train", archive, *options, "--experiment_name", "again", "--skip_prep")
    first, again = (
        tensors(own_study.root / "train"),
        tensors(own_study.results / "again/3407/train"),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_is_another_run(own_study: Study) -> None:
    good("train", own_study.leaf, "--seed", 1)
    other = own_study.results / "tiny" / "1" / "train"
    first, second = tensors(own_study.root / "train"), tensors(other)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_debug_runs_live_beside(own_study: Study) -> None:
    before = snapshot(own_study.root)
    options = ("--debug", "--num_steps", 1000, "--valid_interval", 500, "--heal_steps", 1000)
    good("train", own_study.leaf, *options)
    good("measure", own_study.leaf, "--debug")
    good("heal", own_study.leaf, "--debug", "--block_size", 1)
    debug = own_study.results / "tiny" / "3407-debug"
    assert load_json(debug / "train/DONE.json")["num_steps"] == 4
    assert {path.name for path in debug.iterdir()} == {"train", "eval", "measure", "prune", "heal"}
    assert snapshot(own_study.root) == before


def test_batches_by_positions_and_workers(make_leaf: MakeLeaf) -> None:
    changes = {"batch_positions": 60, "grad_accumulation_factor": 2, "num_workers": 1}
    study = make_leaf(**changes, cache_features=False, valid_utterances=2, max_seconds=0.9)
    outcome = good("train", study.leaf)
    assert "longer than 0.9 s" in outcome.out
    assert load_json(study.root / "train/DONE.json")["optimizer_step"] in (3, 6)


# ---------------------------------------------------------------------------------------------- transcribe, report
def test_transcribe_prints_one_line_a_file(study: Study) -> None:
    variant = study.variant(2)
    expected = hypotheses(study.root, variant)
    files = [audio_of(study.corpus, name) for name in expected]
    folder = study.root / "heal" / variant / "export"
    pairs = list(zip(map(str, files), expected.values(), strict=True))
    plain = good("transcribe", folder, *files).out
    assert plain == "".join(f"{file}\t{text}\n" for file, text in pairs)
    lines = good("transcribe", folder, *files, "--jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"audio": file, "text": text} for file, text in pairs
    ]


def test_report_shows_every_point(study: Study) -> None:
    folder = study.root / "report"
    with open(folder / "points.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(SPLITS) * len(points_done(study)) > 12
    for row in rows:
        metrics = load_json(study.root / "eval" / row["variant"] / row["eval_set"] / "metrics.json")
        assert float(row["value"]) == pytest.approx(metrics["value"])
        assert row["control"] == str(metrics["control"]) and row["tag"] == metrics["tag"]
    page = (folder / "report.html").read_text()
    assert "tiny random models" in page
    assert "tiny random models" in (folder / "table1.md").read_text()


@pytest.mark.slow
def test_as_a_user_runs_them(study: Study, run_verb, tmp_path: Path) -> None:
    """In processes of their own, from another folder: relative paths, exit codes, nothing but the message on stderr."""
    leaf = write_leaf(tmp_path / "here" / "leaf.yaml", study.values | {"results_folder": "results"})
    shutil.copytree(study.results, tmp_path / "results")
    done = run_verb("sweep.py", "here/leaf.yaml", "--block_sizes", "1,2")
    assert "4 of 4 points are done" in done.stdout
    wrong = run_verb("heal.py", "here/leaf.yaml", "--block_sise", 2, code=2)
    assert (
        wrong.stderr
        == "error: command line: unknown key 'block_sise'; did you mean 'block_size'?\n"
    )
    assert leaf.is_file()
