"""The experiment folder: atomic files, stages that are done or not, names of variants."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from speechllm_prune.experiment import (
    Experiment,
    Variant,
    git_commit,
    provenance,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from speechllm_prune.runtime import UserError


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path, "name", 7)


def test_layout(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, "name", 7)
    assert experiment.root == tmp_path / "name" / "7"
    assert experiment.stage("prune/l01n02") == tmp_path / "name" / "7" / "prune" / "l01n02"
    assert experiment.archive() == tmp_path / "name" / "7" / "train" / "hyperparams.yaml"
    assert Experiment(tmp_path, "name", 7, debug=True).root == tmp_path / "name" / "7-debug"
    assert not experiment.root.exists()  # asking for a place does not make it


def test_writing_is_atomic_and_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"b": [1, None, "ü"]})
    assert read_json(file) == {"b": [1, None, "ü"]}
    assert file.read_text(encoding="utf-8").endswith("}\n") and file.stat().st_mode & 0o077 == 0o044
    with pytest.raises(ValueError, match="Out of range"):
        write_json(file, {"b": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \ud800 way")
    assert read_json(file) == {"b": [1, None, "ü"]}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]  # no temporary file stays


def test_reading_what_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a.json does not exist"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON.*delete it and run"):
        read_json(tmp_path / "a.json")


def test_hashes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 300_000)
    assert sha256_file(file) == hashlib.sha256(b"x" * 300_000).hexdigest()
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})


def test_provenance_names_its_inputs_relative_to_the_experiment(experiment: Experiment) -> None:
    file = write_text(experiment.stage("train") / "a.txt", "x")
    record = provenance("hash", [file], experiment.root)
    assert record["inputs"] == {"train/a.txt": hashlib.sha256(b"x").hexdigest()}
    assert set(record) == {
        *("schema", "package_version", "versions", "git_commit", "config_hash", "inputs")
    }
    assert git_commit() == record["git_commit"]


def test_life_of_a_stage(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"heal does not exist \(no DONE.json\); run: the command"):
        experiment.require("heal", "the command")
    assert experiment.begin("heal", "hash")
    with pytest.raises(UserError, match="heal is not finished"):
        experiment.require("heal", "the command")
    experiment.stopped("heal", "hash", "SIGTERM", step=3)
    stopped = json.loads((experiment.stage("heal") / "STOPPED.json").read_text(encoding="utf-8"))
    assert (stopped["signal"], stopped["step"]) == ("SIGTERM", 3)
    assert experiment.begin("heal", "hash")  # goes on
    assert not (experiment.stage("heal") / "STOPPED.json").exists()
    kept = write_text(experiment.stage("heal") / "kept.txt", "x")
    experiment.finish("heal", "hash", [kept], value=1)
    assert experiment.require("heal", "") == experiment.stage("heal")
    assert read_json(experiment.stage("heal") / "DONE.json")["value"] == 1
    assert not experiment.begin("heal", "hash")  # nothing to do
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another configuration .*--overwrite"):
        experiment.begin("heal", "other")
    assert kept.exists()
    assert experiment.begin("heal", "other", overwrite=True)
    assert list(experiment.stage("heal").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("full", Variant()),
        ("full+shuffled_audio", Variant(tag="shuffled_audio")),
        ("l00n01-none", Variant(0, 1, "none")),
        ("l18n08-joint+kl", Variant(18, 8, "joint", "kl")),
        ("control-l02n12-decoder", Variant(2, 12, "decoder", control=True)),
        ("l100n120-projector", Variant(100, 120, "projector")),
    ],
)
def test_variant_names_there_and_back(name: str, variant: Variant) -> None:
    assert Variant.parse(name) == variant
    assert variant.name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "l1n8-none",
        "l18n08",
        "l18n08-lora",
        "joint",
        "full-none",
        "l18n08-joint+",
        "../x",
        "l01n01-none/..",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no variant"):
        Variant.parse(name)
