"""The experiment folder as design and docs state it: paths, fields, provenance. What others build on."""

from __future__ import annotations

import json
import math
import re

import jiwer
import pytest
import torch
from safetensors.torch import load_file
from whisper_normalizer.english import EnglishTextNormalizer

import speechllm_prune
from speechllm_prune.experiment import sha256_file
from speechllm_prune.hparams import config_hash, identity, resolve_hparams
from tests.recipes.conftest import Study
from tests.recipes.verbs import SPLITS, load_json, load_rows

LAYERS = 6
PROVENANCE = {"schema", "package_version", "git_commit", "config_hash", "inputs"}
METRICS = set(
    "task variant corpus split metric value num_utterances num_layers start_layer block_size heal_mode tag control "
    "experiment_name seed rtfx peak_memory_bytes num_parameters decoder_parameters num_capped seconds note "
    "substitutions deletions insertions reference_words text_normaliser".split()
)


def files_of(study: Study, folder: str) -> set[str]:
    """Names below a folder; checkpoints are abbreviated."""
    root = study.root / folder
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {re.sub(r"CKPT\+[^/]+", "CKPT", name) for name in names}


def test_files(study: Study) -> None:
    checkpoint = {
        f"save/CKPT/{name}"
        for name in ("CKPT.yaml", "brain.ckpt", "model.ckpt", "state.ckpt", "MANIFEST.json")
    }
    loop = {"hyperparams.yaml", "env.log", "log.txt", "train_log.txt", "DONE.json"} | checkpoint
    assert files_of(study, "train") == loop | {"leaf.json"}
    for kind in ("speech", "text"):
        names = {"distances.safetensors", "path.json", "heatmap.png", "DONE.json"}
        assert files_of(study, f"measure/{kind}") == names
    variant = study.variant(2)
    assert {"plan.json", "export/speechllm.json"} <= files_of(study, f"prune/{variant[:6]}")
    assert loop | {"export/speechllm.json"} <= files_of(study, f"heal/{variant}")
    assert files_of(study, f"heal/control-{variant}") == loop
    assert files_of(study, "heal/" + study.variant(2, "decoder") + "+long") == loop
    for name in ("full", variant, f"control-{variant}", "full+shuffled_audio"):
        for split in SPLITS:
            assert files_of(study, f"eval/{name}/{split}") == {
                "hyps.jsonl",
                "metrics.json",
                "wer.txt",
            }
    report = files_of(study, "report")
    assert {"report.html", "table1.md", "table1.csv", "points.md", "points.csv"} <= report
    assert {"train", "measure", "prune", "heal", "eval", "report"} == {
        path.name for path in study.root.iterdir()
    }
    assert {path.name for path in study.results.iterdir()} == {"manifests", "features", "tiny"}
    left = [path for path in study.results.rglob("*") if path.name.startswith(".")]
    assert not left, "temporary files were left behind"


def test_provenance_of_every_json(study: Study) -> None:
    values = identity(resolve_hparams(study.leaf))
    stage = {"train": (), "measure": ("measure",), "heal": ("heal",), "eval": ("evaluate",)}
    seen = 0
    for file in study.root.rglob("*.json"):
        if "export" in file.parts or file.name == "leaf.json":
            continue
        record = load_json(file)
        assert set(record) >= PROVENANCE, file
        assert record["schema"] == 1 and record["package_version"] == speechllm_prune.__version__
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?|unknown)", record["git_commit"])
        for name, digest in record["inputs"].items():
            changed = name.endswith("plan.json")  # it lists the paths that chose it
            assert changed or sha256_file(study.root / name) == digest, (file, name)
        part = file.relative_to(study.root).parts
        if part[0] in stage and part[:2] != ("measure", "text"):
            assert record["config_hash"] == config_hash(values, *stage[part[0]]), file
        seen += 1
    assert seen > 20


def test_inputs_name_what_each_stage_was_made_from(study: Study) -> None:
    variant, manifests = study.variant(2), "../../manifests/librispeech/"
    inputs = {
        stage: set(load_json(study.root / stage)["inputs"])
        for stage in (
            "train/DONE.json",
            "measure/speech/DONE.json",
            "measure/text/DONE.json",
            f"heal/{variant}/DONE.json",
            f"eval/{variant}/{SPLITS[0]}/metrics.json",
        )
    }
    data = {f"{manifests}train-clean-100.csv", f"{manifests}dev-clean.csv"}
    assert list(inputs.values()) == [
        data,
        {f"{manifests}dev-clean.csv", "train/DONE.json"},
        {f"{manifests}dev-clean.csv"},
        data | {"train/DONE.json"},
        {
            "train/DONE.json",
            f"{manifests}test-clean.csv",
            f"prune/{variant[:6]}/plan.json",
            f"heal/{variant}/DONE.json",
        },
    ]


@pytest.mark.parametrize("kind", ["speech", "text"])
def test_measure(study: Study, kind: str) -> None:
    folder = study.root / "measure" / kind
    arrays = load_file(folder / "distances.safetensors")
    distance = arrays["distance"]
    assert distance.dtype == torch.float64 and distance.shape == (LAYERS, LAYERS)
    assert arrays["count"].dtype == torch.int64 and arrays["count"].tolist() == [4]
    found = load_json(folder / "path.json")
    assert (found["num_layers"], found["count"], found["last_token"]) == (LAYERS, 4, "sequence")
    assert found["measure_input"] == kind and found["measure_manifest"] == "librispeech/dev-clean"
    assert found["decoder_hub"] == study.values["decoder_hub"]
    assert found["note"] == "tiny random models"
    for n in range(1, LAYERS + 1):
        row = distance[n - 1]
        assert torch.isnan(row).tolist() == [start + n > LAYERS for start in range(LAYERS)]
        assert ((row >= 0) & (row <= 1) | torch.isnan(row)).all()
        if n < LAYERS:  # the block leaves the last layer: someone must receive
            candidates = row[: LAYERS - n].tolist()
            assert found["path"][str(n)] == candidates.index(min(candidates))
            others = sorted(candidates)[1:]
            margin = found["margin"].get(str(n))
            if others:
                assert margin == pytest.approx(others[0] - min(candidates), abs=1e-12)
    assert list(found["path"]) == [str(n) for n in range(1, LAYERS)]


def test_plan(study: Study) -> None:
    variant = study.variant(2)
    start = int(variant[1:3])
    plan = load_json(study.root / "prune" / variant[:6] / "plan.json")
    assert plan["kept_layers"] == [n for n in range(LAYERS) if n not in (start, start + 1)]
    assert (plan["num_layers"], plan["start_layer"], plan["block_size"]) == (LAYERS, start, 2)
    assert plan["receiving_layer"] == start + 2 and plan["path_sources"] == ["own"]
    assert plan["decoder_hub"] == study.values["decoder_hub"]


def test_done_files_of_the_loop(study: Study) -> None:
    variant = study.variant(2)
    for stage, steps in (("train", 6), (f"heal/{variant}", 4)):
        done = load_json(study.root / stage / "DONE.json")
        assert done["stage"] == stage and done["num_steps"] == steps
        assert (study.root / stage / done["checkpoint"] / "model.ckpt").is_file()
        assert 0 < done["optimizer_step"] <= steps and done["valid_wer"] >= 0
        assert done["num_trainable"] > 0
    assert done["variant"] == variant and done["heal_mode"] == "joint"
    assert done["lora"] == {"rank": 16, "alpha": 32, "dropout": 0.05}


def expected_identity(variant: str) -> dict[str, object]:
    """What a variant's name says of it."""
    name, _, tag = variant.partition("+")
    control = name.startswith("control-")
    name = name.removeprefix("control-")
    if name == "full":
        return {
            "start_layer": None,
            "block_size": 0,
            "heal_mode": "none",
            "tag": tag,
            "control": False,
        }
    match = re.fullmatch(r"l(\d\d)n(\d\d)-(\w+)", name)
    assert match
    return {
        "start_layer": int(match[1]),
        "block_size": int(match[2]),
        "heal_mode": match[3],
        "tag": tag,
        "control": control,
    }


def test_metrics_and_hypotheses(study: Study) -> None:
    files = sorted((study.root / "eval").glob("*/*/metrics.json"))
    assert len(files) == 2 * 8
    for file in files:
        metrics, rows = load_json(file), load_rows(file.parent / "hyps.jsonl")
        variant = file.parent.parent.name
        assert METRICS | PROVENANCE <= set(metrics), METRICS - set(metrics)
        assert {key: metrics[key] for key in expected_identity(variant)} == expected_identity(
            variant
        )
        assert metrics["variant"] == variant
        assert f"{metrics['corpus']}-{metrics['split']}" == file.parent.name
        assert (metrics["task"], metrics["metric"], metrics["seed"]) == ("asr", "wer", 3407)
        assert metrics["experiment_name"] == "tiny" and metrics["num_layers"] == LAYERS
        assert metrics["note"] == "tiny random models"
        assert metrics["rtfx"] > 0 and metrics["peak_memory_bytes"] > 0 and metrics["seconds"] > 0
        assert metrics["num_parameters"] > metrics["decoder_parameters"] > 0
        assert len(rows) == metrics["num_utterances"] == (4 if "clean" in file.parent.name else 3)
        assert metrics["num_capped"] == sum(row["capped"] for row in rows)
        assert metrics["num_repetitions"] == sum(row["looped"] for row in rows)
        assert metrics["eval_batch_size"] == 16 and metrics["tokens_per_second"] > 0
        assert metrics["timed_utterances"] == len(rows), "one batch: no other could be a warm-up"
        counts = ("substitutions", "deletions", "insertions", "reference_words")
        for row in rows:
            assert set(row) == {
                *("id", "ref", "hyp", "duration", "num_tokens", "capped", "looped"),
                *counts,
            }
            assert row["num_tokens"] <= math.ceil(12 * row["duration"]) + 10
            assert row["ref"] == row["ref"].upper(), "references are as in the corpus"
        totals = {name: sum(row[name] for row in rows) for name in counts}
        assert totals == {name: metrics[name] for name in counts}
        errors = sum(totals[name] for name in counts[:3])
        assert metrics["value"] == pytest.approx(100 * errors / totals["reference_words"])
        assert (file.parent / "wer.txt").stat().st_size > 0


def test_scores_can_be_made_again_from_the_hypotheses(study: Study) -> None:
    """By jiwer and the Whisper normaliser, without our code."""
    normalise = EnglishTextNormalizer()
    folder = study.root / "eval/full" / SPLITS[0]
    rows = load_rows(folder / "hyps.jsonl")
    wer = jiwer.wer([normalise(r["ref"]) for r in rows], [normalise(r["hyp"]) for r in rows])
    assert load_json(folder / "metrics.json")["value"] == pytest.approx(100 * wer)


def test_order_and_ids_are_those_of_the_manifest(study: Study) -> None:
    manifest = (study.results / "manifests/librispeech/test-clean.csv").read_text().splitlines()
    ids = [line.split(",")[0] for line in manifest[1:]]
    for file in (study.root / "eval").glob(f"*/{SPLITS[0]}/hyps.jsonl"):
        assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ids


def test_checkpoints_hold_the_trainable_tensors_only(study: Study) -> None:
    for checkpoint in study.root.rglob("model.ckpt"):
        names = set(load_file(checkpoint))
        assert names and all(name.startswith("projector.") or ".lora_" in name for name in names)
        assert checkpoint.parent.name.startswith("CKPT+")
    assert len(list((study.root / "train/save").glob("CKPT+*"))) <= 3
