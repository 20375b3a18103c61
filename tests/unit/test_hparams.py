"""Leaf and command line over the base: what is taken, what is refused and how, and that stock HyperPyYAML agrees."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechllm_prune import load_hparams
from speechllm_prune.brain import LinearWarmdown
from speechllm_prune.cli import open_run, parse_arguments
from speechllm_prune.hparams import (
    config_hash,
    differences,
    hub_fingerprint,
    identity,
    is_training_key,
    resolve_hparams,
)
from speechllm_prune.models.projector import Projector
from speechllm_prune.runtime import UserError

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "hparams" / "base" / "speechllm.yaml"
LEAVES = sorted((ROOT / "hparams").glob("*.yaml"))


@pytest.fixture
def leaf(tmp_path: Path) -> Callable[..., Path]:
    """Write a leaf over the shipped base; each argument is a line."""

    def write(*lines: str) -> Path:
        path = tmp_path / "leaf.yaml"
        head = [f"base: {BASE}", "data_folder: somewhere"]
        path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        return path

    return write


def test_leaf_lies_over_base_and_command_line_over_both(leaf) -> None:
    path = leaf("lr: 0.5", "batch_size: 9")
    plain = load_hparams(path)
    assert (plain["lr"], plain["batch_size"], plain["frame_stack"]) == (0.5, 9, 5)
    over = load_hparams(path, {"lr": 0.25, "results_folder": "elsewhere"})
    assert (over["lr"], over["batch_size"]) == (0.25, 9)
    assert over["manifest_folder"] == "elsewhere/manifests"  # references follow


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.name)
def test_shipped_leaves_resolve(path: Path) -> None:
    before = torch.random.get_rng_state()
    hparams = load_hparams(path, {"data_folder": "somewhere"})
    assert set(hparams) == set(load_hparams(BASE, {"data_folder": "somewhere"}))
    assert torch.equal(torch.random.get_rng_state(), before)  # loading has no side effects


def test_stock_hyperpyyaml_loads_the_resolved_text_to_the_same(leaf, tmp_path: Path) -> None:
    path = leaf(
        "lr: 3.0e-3",
        "text_case: upper",
        "train_manifests: [demo/train]",
        "opt_class: !name:torch.optim.AdamW",
        "    weight_decay: 0.1",
    )
    archive = tmp_path / "hyperparams.yaml"
    archive.write_text(resolve_hparams(path, {"seed": 5}), encoding="utf-8")
    ours = load_hparams(path, {"seed": 5})
    with open(archive, encoding="utf-8") as stream:
        stock = load_hyperpyyaml(stream)
    assert set(ours) == set(stock)

    def plain(value: Any) -> Any:
        return (value.func, value.args, value.keywords) if hasattr(value, "func") else value

    assert {k: plain(v) for k, v in ours.items()} == {k: plain(v) for k, v in stock.items()}
    assert (stock["seed"], stock["text_case"], stock["lr"]) == (5, "upper", 0.003)
    # The archive is a leaf in its own right.
    assert identity(resolve_hparams(archive)) == identity(resolve_hparams(path, {"seed": 5}))
    assert "base" not in stock


def test_extension_points_are_really_replaced(leaf) -> None:
    plain = load_hparams(leaf())
    hparams = load_hparams(
        leaf(
            "opt_class: !name:torch.optim.SGD",
            "    momentum: 0.5",
            "lr_scheduler: !name:torch.optim.lr_scheduler.LinearLR",
            "activation: !name:torch.nn.ReLU",
            "projector_class: !name:torch.nn.Bilinear",
        )
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = hparams["opt_class"]([parameter], lr=0.1)
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.5
    # Nothing is left of the arguments of the class that was there.
    scheduler = hparams["lr_scheduler"](optimizer)
    assert type(scheduler) is torch.optim.lr_scheduler.LinearLR
    assert type(hparams["activation"]()) is torch.nn.ReLU
    assert type(hparams["projector_class"](2, 3, 4)) is torch.nn.Bilinear
    assert type(plain["opt_class"]([parameter])) is torch.optim.Adam
    assert type(plain["lr_scheduler"](optimizer, num_steps=4)) is LinearWarmdown
    assert type(plain["projector_class"](2, 3, 4)) is Projector


def test_scheduler_follows_flat_keys(leaf) -> None:
    hparams = load_hparams(leaf("warmup_steps: 7"), {"final_lr_share": 0.25})
    optimizer = hparams["opt_class"]([torch.nn.Parameter(torch.zeros(1))])
    scheduler = hparams["lr_scheduler"](optimizer, num_steps=50)
    assert (scheduler.warmup_steps, scheduler.final_lr_share) == (7, 0.25)


def refused(path: Path, *parts: str, overrides: dict[str, Any] | None = None) -> None:
    with pytest.raises(UserError) as caught:
        load_hparams(path, overrides)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_unknown_key_names_the_nearest_the_file_and_the_line(leaf) -> None:
    path = leaf("lr: 0.1", "batchsize: 4")
    refused(path, f"{path}, line 4", "unknown key 'batchsize'", "did you mean 'batch_size'?")
    refused(
        leaf(), "command line: unknown key 'heal_step'", "'heal_steps'", overrides={"heal_step": 1}
    )
    with pytest.raises(UserError) as caught:
        load_hparams(leaf("zzzzqqqq: 1"))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size: four", "'batch_size' takes a whole number, given 'four'"),
        ("batch_size: 2.5", "'batch_size' takes a whole number, given 2.5"),
        ("batch_size: True", "'batch_size' takes a whole number"),
        ("batch_size: 0", "'batch_size' must be above 0, given 0"),
        ("warmup_steps: -1", "'warmup_steps' must be 0 or more, given -1"),
        ("lr: [1, 2]", "'lr' takes a number"),
        ("skip_prep: 1", "'skip_prep' takes True or False, given 1"),
        ("task: asrr", "'task' is one of asr, ast, given 'asrr'"),
        ("text_case: Lower", "'text_case' is one of lower, upper, keep"),
        ("encoder_hub: {a: 1}", "'encoder_hub' takes text"),
        ("train_manifests: {a: 1}", "'train_manifests' takes a list"),
        ("block_sizes: [2, x]", "'block_sizes' takes whole numbers above 0"),
        ("lr: !name:torch.optim.Adam", "'lr' is not an extension point"),
        ("opt_class: adam", "'opt_class' takes an object such as !name:package.Class"),
        ("opt_class: !name:os.system", "takes an object from 'os.system'"),
        ("opt_class: !name:torchevil.Adam", "takes an object from 'torchevil.Adam'"),
        ("opt_class: !apply:torch.load", "'opt_class' takes an object such as"),
        ("activation: !name:torch.nn.Gelu", "Gelu"),
        ("lr: 1: 2", "not valid YAML"),
    ],
)
def test_wrong_values_are_refused_with_the_line(leaf, line: str, message: str) -> None:
    path = leaf("# a comment", line)
    refused(path, message)
    if "takes" in message and "object from" not in message:
        refused(path, f"{path}, line 4")


def test_numbers_are_taken_in_the_type_of_the_default(leaf) -> None:
    hparams = load_hparams(leaf("lr: 1", "seed: 7", "prompt: 12", "train_manifests: demo/train"))
    assert (hparams["lr"], type(hparams["lr"])) == (1.0, float)
    assert (hparams["prompt"], hparams["train_manifests"]) == ("12", ["demo/train"])
    listed = load_hparams(leaf(), {"block_sizes": "2,4,6", "heal_modes": "none,joint"})
    assert (listed["block_sizes"], listed["heal_modes"]) == ([2, 4, 6], ["none", "joint"])


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_scientific_notation_is_a_number_in_leaf_command_line_and_archive(
    leaf, tmp_path: Path, written: str
) -> None:
    for path, overrides in ((leaf(f"lr: {written}"), {}), (leaf(), {"lr": 1e-4})):
        assert load_hparams(path, overrides)["lr"] == 1e-4
        archive = tmp_path / "hyperparams.yaml"
        archive.write_text(resolve_hparams(path, overrides), encoding="utf-8")
        assert load_hparams(archive)["lr"] == 1e-4
    assert arguments("leaf.yaml", "--lr", written)[1]["lr"] == 1e-4


def test_nested_objects_are_checked_too(leaf) -> None:
    refused(leaf("opt_class: !name:torch.optim.Adam", "    foreach: !apply:os.getcwd"), "os.getcwd")


def test_another_package_needs_allow_module(leaf) -> None:
    path = leaf("lr_scheduler: !name:collections.OrderedDict")
    refused(path, "collections.OrderedDict", "--allow_module collections")
    assert "collections.OrderedDict" in resolve_hparams(path, allowed_modules=["collections"])


def test_missing_file_and_placeholder(tmp_path: Path, leaf) -> None:
    leaf()
    refused(tmp_path / "leef.yaml", "does not exist", "did you mean", "leaf.yaml")
    refused(BASE, "give --data_folder VALUE")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    refused(folder, "is not a YAML file")
    nested = tmp_path / "nested.yaml"
    nested.write_text("base: leaf.yaml\n", encoding="utf-8")
    refused(nested, "may not have a base of its own")


# ---------------------------------------------------------------------------------------------- command line


def arguments(*argv: str) -> tuple[Any, dict[str, Any]]:
    return parse_arguments("train", "", list(argv), {"export": "help"})


def test_command_line_values() -> None:
    flags, pairs = arguments(
        "leaf.yaml",
        "--lr",
        "1e-4",
        "--prompt=a=b",
        "--skip_prep",
        "--batch_size",
        "3",
        "--overwrite",
        "--start_layer",
        "-1",
    )
    assert flags.leaf == "leaf.yaml" and flags.overwrite and not flags.export
    assert pairs["prompt"] == "a=b"  # SpeechBrain's own parser eats this '='
    assert (pairs["skip_prep"], pairs["batch_size"], pairs["start_layer"]) == (True, 3, -1)
    assert float(pairs["lr"]) == 1e-4


@pytest.mark.parametrize(
    "value", ["!name:os.system", "!!python/object:os.system", " !apply:os.getcwd", "!ref <seed>"]
)
def test_no_tags_on_the_command_line(leaf, value: str) -> None:
    with pytest.raises(UserError, match="tags are not allowed in values"):
        arguments("leaf.yaml", "--lr", value)
    run = open_run("train", "", [str(leaf()), "--prompt", f"x {value}", "--results_folder", "r"])
    assert (
        run is not None and run.hparams["prompt"] == f"x {value}"
    )  # inside a text it is only text


def test_prefixes_of_names_are_not_accepted(leaf) -> None:
    with pytest.raises(UserError, match="unknown key 'overwrit'"):
        open_run("train", "", [str(leaf()), "--overwrit"])


def test_numbers_of_the_command_line_are_checked(leaf, tmp_path: Path) -> None:
    run = open_run("train", "", [str(leaf()), "--lr", "1e-3", "--results_folder", str(tmp_path)])
    assert run is not None and run.hparams["lr"] == 0.001
    with pytest.raises(
        UserError, match="command line: 'num_steps' takes a whole number, given 'many'"
    ):
        open_run("train", "", [str(leaf()), "--num_steps", "many"])


# ---------------------------------------------------------------------------------------------- identity


def hash_of(path: Path, *stages: str, **overrides: Any) -> str:
    return config_hash(identity(resolve_hparams(path, overrides)), *stages)


def test_hash_leaves_out_the_machine_and_what_is_only_selected(leaf) -> None:
    path = leaf()
    reference = hash_of(path)
    assert (
        hash_of(path, data_folder="other", results_folder="x", num_workers=3, device="cpu")
        == reference
    )
    assert hash_of(path, block_size=3, heal_mode="decoder", eval_manifests=["a/b"]) == reference
    assert hash_of(path, heal_steps=3, measure_batch_size=2, eval_batch_size=5) == reference
    for change in (
        {"lr": 0.5},
        {"seed": 1},
        {"prompt": "x"},
        {"train_manifests": ["a/b"]},
        {"encoder_revision": "r"},
    ):
        assert hash_of(path, **change) != reference
    assert hash_of(path, "heal", heal_steps=3) != hash_of(path, "heal")
    assert hash_of(path, "heal", eval_batch_size=3) == hash_of(path, "heal")
    other = leaf("opt_class: !name:torch.optim.AdamW")
    assert hash_of(other) != reference


def test_a_local_hub_is_what_its_files_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    assert hub_fingerprint(str(tmp_path / "a"), None) == hub_fingerprint(str(tmp_path / "b"), None)
    assert (
        differences(
            {"encoder_hub": str(tmp_path / "a")},
            {"encoder_hub": str(tmp_path / "b")},
            ["encoder_hub"],
        )
        == []
    )
    (tmp_path / "b" / "config.json").write_text('{"x": 1}', encoding="utf-8")
    assert hub_fingerprint(str(tmp_path / "a"), None) != hub_fingerprint(str(tmp_path / "b"), None)
    assert (
        hub_fingerprint("org/model", None) == "org/model@main" != hub_fingerprint("org/model", "v2")
    )
    assert differences({"lr": 1}, {"lr": 2}, ["lr"]) == ["lr is 1 here and 2 in the archive"]


def test_stable_keys_are_in_the_base() -> None:
    text = BASE.read_text(encoding="utf-8")
    keys = set(load_hparams(BASE, {"data_folder": "x"}))
    assert {"lr", "seed", "decoder_hub"} <= {key for key in keys if is_training_key(key)}
    assert not is_training_key("num_workers") and not is_training_key("heal_steps")
    stable = """experiment_name seed data_folder results_folder manifest_folder task prepare skip_prep train_manifests
    valid_manifest eval_manifests measure_manifest encoder_hub encoder_revision decoder_hub decoder_revision frame_stack
    projector_dim prompt text_case batch_size batch_positions lr num_steps warmup_steps max_grad_norm
    grad_accumulation_factor precision valid_interval valid_utterances ckpt_interval_minutes decoder_lora_rank
    decoder_lora_alpha heal_steps heal_lora_rank heal_lora_alpha cache_features max_bad_share opt_class lr_scheduler
    projector_class activation train_logger""".split()
    assert set(stable) <= keys
    assert all(re.search(rf"^{key}:", text, re.MULTILINE) for key in keys)
