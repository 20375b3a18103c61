"""What makes two configurations the same: the archive has the word, machine keys are free, hubs are their content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import good, load_json, refused, snapshot, write_leaf

LATER = (
    ("measure",),
    ("prune", "--block_size", 2),
    ("heal", "--block_size", 2),
    ("evaluate",),
    ("sweep",),
)


@pytest.mark.parametrize("command", LATER, ids=lambda command: command[0])
def test_a_training_key_that_contradicts_the_archive(own_study: Study, command: tuple) -> None:
    before = snapshot(own_study.results)
    for key, value, archived in (
        ("lr", "2e-3", "0.001"),
        ("prompt", "Say it.", "Transcribe speech to text."),
        ("projector_dim", 64, "32"),
        ("train_manifests", "librispeech/dev-clean", "librispeech/train-clean-100"),
    ):
        message = refused(command[0], own_study.leaf, *command[1:], f"--{key}", value)
        shown = "0.002" if key == "lr" else str(value)
        assert key in message and shown in message and archived in message
        assert "hyperparams.yaml" in message and "--experiment_name" in message
    assert snapshot(own_study.results) == before


def test_the_same_value_again_is_no_contradiction(own_study: Study) -> None:
    good("measure", own_study.leaf, "--lr", "0.001", "--batch_size", 4)


def test_training_with_other_values_needs_overwrite(own_study: Study) -> None:
    message = refused("train", own_study.leaf, "--lr", "2e-3")
    assert "lr is 0.002 here and 0.001 in the archive" in message and "--overwrite" in message
    good("train", own_study.leaf, "--lr", "2e-3", "--overwrite")
    assert "another configuration" in refused("measure", own_study.leaf)


def test_a_leaf_changed_since_is_a_warning(own_study: Study) -> None:
    write_leaf(own_study.leaf, own_study.values | {"lr": 0.5, "projector_dim": 64})
    outcome = good("evaluate", own_study.leaf, "--overwrite")
    assert "warning: the leaf has changed" in outcome.err and "the archive is used" in outcome.err
    assert "lr is 0.5 here and 0.001" in outcome.err
    write_leaf(own_study.leaf, own_study.values | {"heal_steps": 99})
    assert "heal_steps is 99 here" in good("evaluate", own_study.leaf).err
    assert "changed" not in good("evaluate", restore_leaf(own_study)).err
    assert "changed" not in good("evaluate", own_study.root / "train/hyperparams.yaml").err
    assert "lr is 0.5" in refused(
        "train", write_leaf(own_study.leaf, own_study.values | {"lr": 0.5})
    )


def restore_leaf(study: Study) -> Path:
    """The leaf as it was at training."""
    return write_leaf(study.leaf, study.values)


def test_machine_keys_are_free(own_study: Study) -> None:
    """Another data folder, device, number of workers and place of the results: the same experiment."""
    moved = own_study.results.parent / "elsewhere"
    shutil.move(own_study.results, moved)
    options = (
        *("--results_folder", moved),
        *("--data_folder", "/no/longer/there"),
        *("--device", "cpu", "--num_workers", 1),
    )
    for command in (("measure",), ("evaluate",)):
        assert "already done" in good(command[0], own_study.leaf, *command[1:], *options).out
    good("heal", own_study.leaf, "--block_size", 2, *options)
    assert not own_study.results.exists()


def test_a_hub_is_its_content(own_study: Study, qwen2: Path, llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied_decoder"
    shutil.copytree(qwen2, copy)
    assert "already done" in good("measure", own_study.leaf, "--decoder_hub", copy).out
    good("heal", own_study.leaf, "--block_size", 2, "--decoder_hub", copy)
    assert "decoder_hub" in refused("measure", own_study.leaf, "--decoder_hub", llama)
    (copy / "generation_config.json").write_text('{"max_length": 7}')
    assert "decoder_hub" in refused("measure", own_study.leaf, "--decoder_hub", copy)


@pytest.mark.parametrize(
    ("command", "change"),
    [
        (("measure",), ("--last_token", "prompt")),
        (("measure",), ("--measure_manifest", "librispeech/test-clean")),
        (("heal", "--block_size", 2), ("--heal_steps", 3)),
        (("heal", "--block_size", 2), ("--heal_lora_rank", 8)),
        (("evaluate",), ("--max_tokens_per_second", 3)),
    ],
    ids=["last_token", "manifest", "heal_steps", "heal_lora_rank", "cap"],
)
def test_a_finished_stage_of_another_configuration(
    study: Study, command: tuple, change: tuple
) -> None:
    before = snapshot(study.root)
    message = refused(command[0], study.leaf, *command[1:], *change)
    assert "another configuration" in message and "--overwrite" in message
    assert snapshot(study.root) == before


def test_overwrite_and_tag_make_room(own_study: Study) -> None:
    heal = ("heal", own_study.leaf, "--block_size", 2)
    good(*heal)
    good(*heal, "--heal_steps", 3, "--tag", "short")
    folder = own_study.root / "heal" / own_study.variant(2)
    assert load_json(folder / "DONE.json")["num_steps"] == 4
    good(*heal, "--heal_steps", 3, "--overwrite")
    assert load_json(folder / "DONE.json")["num_steps"] == 3
    assert (folder.parent / f"{folder.name}+short" / "DONE.json").is_file()


def test_scores_of_a_model_that_is_no_more_are_not_kept(own_study: Study) -> None:
    variant = own_study.variant(2)
    good("heal", own_study.leaf, "--block_size", 2)
    good("evaluate", own_study.leaf, "--variant", variant)
    good("heal", own_study.leaf, "--block_size", 2, "--heal_steps", 3, "--overwrite")
    message = refused("evaluate", own_study.leaf, "--variant", variant)
    assert f"heal/{variant}/DONE.json" in message and "--overwrite" in message
    good("evaluate", own_study.leaf, "--variant", variant, "--overwrite")


def test_an_attempt_that_saved_nothing_binds_nobody(make_leaf: MakeLeaf) -> None:
    """A start that failed for a wrong hub must not make the mended leaf 'another configuration'."""
    study = make_leaf(encoder_hub="no/such-encoder")
    assert "encoder_hub" in refused("train", study.leaf)
    write_leaf(study.leaf, study.values | {"encoder_hub": make_leaf().values["encoder_hub"]})
    good("train", study.leaf)
    assert "no/such" not in (study.root / "train/hyperparams.yaml").read_text()


def test_loading_a_yaml_has_no_side_effects(own_study: Study) -> None:
    import random

    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state()
    files = snapshot(own_study.results)
    good("train", own_study.leaf, "--check")
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert snapshot(own_study.results) == files


def test_other_data_under_the_name_of_the_training_manifest_is_refused(own_study: Study) -> None:
    """Two corpora may take turns under one manifest name; a model is healed on the one that it was trained on."""
    (file,) = own_study.results.rglob("librispeech/train-clean-100.csv")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *reversed(lines[1:])]))
    for command in (
        ("measure", "--overwrite"),
        ("heal", "--block_size", 2),
        ("evaluate", "--overwrite"),
    ):
        message = refused(command[0], own_study.leaf, *command[1:])
        assert "train-clean-100.csv" in message and "changed since" in message
