"""The GPU benchmark on a CPU with tiny models: every row is there, every side does the same; no speed is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import gpu, gpu_mem
from benchmarks.gpu_models import TINY_DECODER, random_model
from speechllm_prune.models.decoder import num_parameters
from speechllm_prune.models.facts import decoder_facts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="meant for a CPU")


def run(part: str, folder: Path, *options: str) -> dict[str, Any]:
    """What a part writes; it must not fail."""
    assert gpu.main(["--part", part, "--tiny", "--out", str(folder), *options]) == 0
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.slow
def test_mem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("mem", tmp_path)
    rows = found["tables"]["decoding"]
    assert {row["layers"] for row in rows} == {5, 3} and len(rows) == 2 * 16
    assert {row["mode"] for row in rows} == set(gpu_mem.SEARCHES)
    assert all(row["differ"].startswith("0 of ") for row in rows)
    assert all(row["seconds"] > 0 and row["rtfx"] > 0 for row in rows)
    assert len(found["tables"]["memory"]) == 2 * 3
    assert len(found["notes"]) == 4 and all("paper: 35 %" in note for note in found["notes"])
    out = capsys.readouterr().out
    assert out.count("ours, graphs") > 2 * 10, "once as it goes, once in the table"
    assert not found["skipped"] and not found["failed"]


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    found = run("train", tmp_path)
    rows = found["tables"]["training"]
    assert len(rows) == 2 * 5 and len(found["tables"]["encoder"]) == 2
    for leaf in {row["leaf"] for row in rows}:
        mine = {row["variant"]: row for row in rows if row["leaf"] == leaf}
        losses = [row["loss"] for row in mine.values()]
        # Without position ids of its own, padding in the middle moves SpeechBrain's by a little.
        assert max(losses) - min(losses) < 1e-3
        assert mine["ours"]["lm_head_rows"] == 3 * 4
        assert mine["SpeechBrain's, re-stated"]["lm_head_rows"] > 5 * 12
        assert mine["ours, loss_chunk_rows 4"]["lm_head_rows"] == 2 * 3 * 4
        estimates = {name: row["estimate_gib"] for name, row in mine.items()}
        assert estimates["ours, gradient_checkpointing"] < estimates["ours"]


@pytest.mark.slow
def test_probe(tmp_path: Path) -> None:
    tables = run("probe", tmp_path)["tables"]
    counts = {name: len(rows) for name, rows in tables.items()}
    assert counts == {
        "distance pass": 8,
        "sweep of losses": 4,
        "cut in memory": 2,
        "healing": 6,
        "tokens": 2,
    }
    for row in tables["tokens"]:
        assert row["rows"] == 6 and row["dtype"] == "float32"
        assert row["batch_16_differs"] == row["graphs_differ"] == row["batch_16_graphs_differ"] == 0


def test_no_row_is_begun_when_time_is_up(tmp_path: Path) -> None:
    found = run("mem", tmp_path, "--seconds", "0")
    assert not found["tables"] and len(found["skipped"]) == 1 + 2 * (16 + 3)


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setitem(gpu_mem.SEARCHES, "generate", refuse)
    monkeypatch.setattr(gpu, "SECONDS", 60.0)
    assert gpu.main(["--part", "mem", "--tiny"]) == 1
    out = capsys.readouterr().out
    assert "FAILED decoding: 5 generate 35 s: CUDA out of memory." in out
    assert "| 5      | ours " in out


def test_a_gpu_is_needed_for_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--part", "mem"]) == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize("leaf", ["librispeech_llama8b", "librispeech_qwen1.5b"])
def test_random_models_are_what_the_leaf_names(leaf: str) -> None:
    model = random_model(leaf, "cpu", tiny=True)
    hub = "meta-llama/Llama-3.1-8B" if "llama" in leaf else "Qwen/Qwen2.5-1.5B"
    facts = decoder_facts(hub)
    config = AutoConfig.for_model(facts.model_type, **facts.config | TINY_DECODER)
    usual = AutoModelForCausalLM.from_config(config)
    assert num_parameters(model.decoder) == num_parameters(usual)  # tied where the leaf's are
    for name, buffer in usual.named_buffers():
        assert torch.equal(model.decoder.get_buffer(name), buffer), name
    assert all(p.isfinite().all() and not p.is_meta for p in model.parameters())
    weights = model.decoder.get_decoder().layers[1]
    assert (weights.input_layernorm.weight == 1).all()
    assert 0.015 < weights.mlp.up_proj.weight.std() < 0.025
