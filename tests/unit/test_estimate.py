"""The estimates count what the models count, and follow the schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.estimate import H100, RTX3090, estimate, main, setting, table

LEAF = "hparams/librispeech_qwen7b.yaml"


def leaf(repo_root: Path, **changes: object) -> dict:
    return load_hparams(repo_root / LEAF, {"data_folder": "x"} | changes)


def test_the_paper_preset_is_2_84_epochs(repo_root: Path) -> None:
    assert estimate(leaf(repo_root)).epochs == pytest.approx(2.84, abs=0.01)
    one_gpu = leaf(repo_root, grad_accumulation_factor=2)
    assert estimate(one_gpu, num_gpus=1).epochs == pytest.approx(2.84, abs=0.01)
    assert estimate(one_gpu, num_gpus=1).hours == pytest.approx(2 * estimate(leaf(repo_root)).hours)


def test_a_large_batch_costs_its_operations_and_a_small_one_its_launches(repo_root: Path) -> None:
    # 400 s on a GPU: about 424 billion operations per second of audio, at 40 % of an H100.
    large = estimate(leaf(repo_root, batch_size=33))
    assert 33 * 12.3 / large.step_seconds == pytest.approx(930, rel=0.03)
    small = estimate(leaf(repo_root, batch_size=1))
    assert small.step_seconds == estimate(leaf(repo_root, batch_size=2)).step_seconds
    assert 15 < small.memory_gib < large.memory_gib < 80


def test_lora_adds_its_parameters(repo_root: Path) -> None:
    plain, lora = estimate(leaf(repo_root)), estimate(leaf(repo_root, decoder_lora_rank=16))
    assert plain.adapters == 0 and lora.adapters == 10_092_544
    assert plain.decoder_share > lora.decoder_share > 90


def test_table_and_command(
    repo_root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    assert main([LEAF]) == 0
    assert capsys.readouterr().out.rstrip("\n") == table([LEAF])
    assert "| 28 | 315,453,120 | 7,615,616,512 | 95.8 % | 17,831,424 |" in table([LEAF])
    assert main([]) == 2 and main(["hparams/demo.yaml"]) == 2
    assert setting("hparams/minilibrispeech_qwen0.5b.yaml") == (1, RTX3090)
    assert setting(LEAF) == (2, H100)
