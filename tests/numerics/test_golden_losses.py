"""The losses of a tiny training run and of a tiny healing, as they were when they were last looked at.

From audio files through preparation, batching, encoder, projector, decoder with adapters, loss, accumulation, clipping,
optimiser and schedule, then the cut and what healing trains. A change that is not meant to alter results leaves the
list as it is. CONTRIBUTING.md says when the list may be changed.

    .venv/bin/python -m pytest -s tests/numerics/test_golden_losses.py      # prints the list as it is now
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from speechllm_prune.brain import SpeechLLMBrain
from tests.recipes.verbs import good, leaf_values, write_leaf

LOSSES = {
    "train": [6.431429, 6.694699, 6.017146, 6.136044, 5.595627, 5.036087, 5.772993, 4.581698],
    "heal": [5.004076, 5.910151, 5.469553, 5.693051, 5.162498, 4.665238],
}
"""Mean loss per label of every micro-batch, fp32, one thread: 4 steps of 2 micro-batches, then 3 of healing."""


def test_losses_are_the_golden_ones(
    tiny_corpus: Path,
    wavlm_layer: Path,
    qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    fit_batch = SpeechLLMBrain.fit_batch

    def listening(brain: SpeechLLMBrain, batch: Any) -> Tensor:
        loss = fit_batch(brain, batch)
        seen.append(float(loss))
        return loss

    monkeypatch.setattr(SpeechLLMBrain, "fit_batch", listening)
    values = leaf_values(tiny_corpus, wavlm_layer, qwen2, tmp_path / "results") | {
        "num_steps": 4,
        "grad_accumulation_factor": 2,
        "valid_interval": 4,
        "valid_utterances": 1,
        "lr": 5.0e-3,
        "warmup_steps": 1,
        "decoder_lora_rank": 4,
        "decoder_lora_dropout": 0.0,
        "heal_steps": 3,
        "heal_lora_dropout": 0.0,
        "device": "cpu",
        "precision": "fp32",
        "max_seconds": 1.5,
        "eval_manifests": ["librispeech/test-other"],
    }
    leaf = write_leaf(tmp_path / "golden.yaml", values)
    found = {}
    for stage, options in {"train": [], "heal": ["--block_size", 2, "--start_layer", 2]}.items():
        seen.clear()
        good(stage, leaf, *options)
        found[stage] = list(seen)
        print(f'    "{stage}": [{", ".join(f"{loss:.6f}" for loss in seen)}],')
    for stage, losses in LOSSES.items():
        assert found[stage] == pytest.approx(losses, rel=1e-4), stage
