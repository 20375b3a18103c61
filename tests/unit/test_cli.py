"""The command line, the shipped leaves, and the promise that every key of the base does something."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from speechllm_prune.cli import open_run, parse_arguments
from speechllm_prune.hparams import MACHINE_KEYS, SELECTION_KEYS, STAGE_KEYS, load_hparams
from speechllm_prune.keys import (
    CHOICES,
    EXTENSION_POINTS,
    MANIFEST_KEYS,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARES,
)
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.conftest import REPO_ROOT

BASE = REPO_ROOT / "hparams" / "base" / "speechllm.yaml"
LEAVES = sorted((REPO_ROOT / "hparams").glob("*.yaml"))
VERBS = ("train", "measure", "prune", "heal", "evaluate", "sweep")


def base_keys() -> set[str]:
    """Keys of the base."""
    return set(YAML().load(BASE.read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("argv", "pairs"),
    [
        (["--lr", "1e-3"], {"lr": 1e-3}),
        (["--lr=1e-3"], {"lr": 1e-3}),
        (["--prompt=a=b"], {"prompt": "a=b"}),
        (["--prompt", "Say: it."], {"prompt": "Say: it."}),
        (["--block_sizes", "2,4"], {"block_sizes": "2,4"}),
        (["--block_sizes", "[2, 4]"], {"block_sizes": [2, 4]}),
        (["--control"], {"control": True}),
        (["--control", "False"], {"control": False}),
        (["--control", "--seed", "1"], {"control": True, "seed": 1}),
        (["--start_layer", "-1"], {"start_layer": -1}),
        (["--encoder_revision", "null"], {"encoder_revision": None}),
        (["--shard", "1/2"], {"shard": "1/2"}),
        (["--experiment_name", "yes"], {"experiment_name": "yes"}),
        (["--experiment_name", "2026_11"], {"experiment_name": "2026_11"}),
        (["--tag", "007"], {"tag": "007"}),
        (["--text_file", ""], {"text_file": ""}),
        (["--prompt", "# one"], {"prompt": "# one"}),
        (["--prompt", "- one"], {"prompt": "- one"}),
        (["--prompt", "{a: b}"], {"prompt": "{a: b}"}),
        (["--prompt", "[unclosed"], {"prompt": "[unclosed"}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pairs(argv: list[str], pairs: dict) -> None:
    flags, found = parse_arguments("train", "", ["leaf.yaml", *argv])
    assert found == pairs
    assert all(isinstance(found[key], type(value)) for key, value in pairs.items())
    assert not any(isinstance(found[key], bool) != isinstance(pairs[key], bool) for key in pairs)
    assert flags.leaf == "leaf.yaml" and not flags.overwrite


def test_flags_may_stand_anywhere() -> None:
    flags, pairs = parse_arguments(
        "heal", "", ["--overwrite", "--lr", "1", "leaf.yaml", "--export"], {"export": "help"}
    )
    assert flags.overwrite and flags.export and flags.leaf == "leaf.yaml" and pairs == {"lr": 1}
    _, pairs = parse_arguments("train", "", ["leaf.yaml", "--export"])
    assert pairs == {"export": True}, "a flag of another verb is an unknown key, refused later"


def test_prefixes_of_flags_are_no_flags() -> None:
    flags, pairs = parse_arguments("train", "", ["leaf.yaml", "--dry"])
    assert not flags.dry_run and pairs == {"dry": True}


@pytest.mark.parametrize("argv", [[], ["a.yaml", "b.yaml"], ["a.yaml", "-x"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"train.py LEAF"):
        parse_arguments("train", "", argv)


@pytest.mark.parametrize("verb", [*VERBS, "report", "transcribe"])
def test_help(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert importlib.import_module(verb).main(["--help"]) == 0
    text = capsys.readouterr().out
    assert f"python {verb}.py" in text, "an example to copy"
    assert "usage" in text


def test_run_options_go_to_brain(tmp_path: Path) -> None:
    leaf = str(LEAVES[0])
    argv = [leaf, "--data_folder", "x", "--results_folder", str(tmp_path), "--noprogressbar"]
    run = open_run("train", "", [*argv, "--debug"])
    assert run is not None and run.run_options == {"noprogressbar": True, "debug": True}
    assert run.experiment.root.name.endswith("-debug")
    with pytest.raises(UserError, match="--debug_batches takes int"):
        open_run("train", "", [*argv, "--debug_batches", "many"])


# ---------------------------------------------------------------------------------------------- leaves
@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.stem)
@pytest.mark.parametrize("verb", VERBS)
def test_check_of_every_leaf(
    leaf: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is prepared, and without a network."""
    options = ["--results_folder", str(tmp_path / "results")]
    if "data_folder" not in yaml.safe_load(leaf.read_text(encoding="utf-8")):
        options += ["--data_folder", "corpus"]
    assert importlib.import_module(verb).main([str(leaf), "--check", *options]) == 0
    assert "ok" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.stem)
def test_leaves_say_what_they_are_for(leaf: Path) -> None:
    """A leaf: the base, flat scalars, a comment with the command; its name is the experiment's."""
    text = leaf.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert values["base"] == "base/speechllm.yaml" and values["experiment_name"] == leaf.stem
    assert text.startswith("#") and (".py hparams/" in text or "run.sh" in text)
    flat = (str, int, float, bool, list, type(None))
    assert all(isinstance(value, flat) for value in values.values())
    hparams = load_hparams(leaf, {"data_folder": "corpus"})
    base = load_hparams(BASE, {"data_folder": "corpus"})
    assert set(hparams) == set(base)


def test_the_demo_has_no_placeholder() -> None:
    assert load_hparams(REPO_ROOT / "hparams" / "demo.yaml")["experiment_name"] == "demo"


# ---------------------------------------------------------------------------------------------- keys
def test_no_dead_key() -> None:
    """Every key of the base is read by the code, or referred to inside the base."""
    files = [*REPO_ROOT.glob("*.py"), *(REPO_ROOT / "speechllm_prune").rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    base = BASE.read_text(encoding="utf-8")
    read = set(re.findall(r"(?:hparams|values)\[[\"'](\w+)[\"']\]|hparams\.(\w+)", code))
    used = {name for pair in read for name in pair} | set(re.findall(r"!ref <(\w+)>", base))
    assert base_keys() - used == set()


def test_no_key_is_read_that_the_base_does_not_have() -> None:
    files = [*REPO_ROOT.glob("*.py"), *(REPO_ROOT / "speechllm_prune").rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert set(re.findall(r"hparams\[[\"'](\w+)[\"']\]", code)) <= base_keys()
    assert not re.search(r"getattr\((self\.)?hparams", code), "defaults live in the base"


def test_the_key_lists_name_keys_of_the_base() -> None:
    """A name mistyped in one of them would silently move a key into another class."""
    lists = [
        MACHINE_KEYS,
        SELECTION_KEYS,
        EXTENSION_POINTS,
        POSITIVE,
        NOT_NEGATIVE,
        SHARES,
        NOT_EMPTY,
    ]
    for names in [*lists, set(CHOICES), set(MANIFEST_KEYS), *STAGE_KEYS.values()]:
        assert names <= base_keys(), names - base_keys()
    stages = [MACHINE_KEYS, SELECTION_KEYS, *STAGE_KEYS.values()]
    assert sum(map(len, stages)) == len(set().union(*stages)), "a key in two classes"


# ---------------------------------------------------------------------------------------------- imports
def test_light_imports(repo_root: Path) -> None:
    """`import speechllm_prune`, report.py and the help of the verbs do not wait for torch."""
    code = (
        "import sys, json, contextlib, io, speechllm_prune, report, train, sweep, transcribe\n"
        "import speechllm_prune.reporting.build, speechllm_prune.reporting.paper\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    for module in (report, train, sweep, transcribe):\n"
        "        assert module.main(['--help']) == 0\n"
        "    assert report.main(['--paper', '--json']) == 0\n"
        "heavy = ('torch', 'transformers', 'speechbrain', 'peft', 'torchaudio')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
