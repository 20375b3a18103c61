"""The training loop: how a step is cut up changes nothing, cached features change nothing, and it can overfit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.checkpoint import load_checkpoint_tensors
from speechllm_prune.data.batching import Batch, EndlessBatchSampler, collate
from speechllm_prune.data.features import FeatureStore, write_store
from speechllm_prune.data.prompt import encode_target
from speechllm_prune.inference import decode
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.restore import build_model, set_trainable, train_names
from speechllm_prune.runtime import Stopped, graceful_stop
from tests import tiny
from tests.numerics import two_ranks
from tests.numerics.common import build, hparams_of, tensors_of, train_on, utterances

STEPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
CUTS = {
    "1 x 4": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "2 x 2": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "4 x 1": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "uneven": [[0, 1, 2], [3], [4], [5, 6, 7]],
}


def sgd(encoder: Path, decoder: Path, **overrides: Any) -> tuple[SpeechLLM, dict[str, Any]]:
    hparams = hparams_of(
        encoder, decoder, decoder_lora_rank=2, decoder_lora_dropout=0.0, lr=0.02, **overrides
    )
    hparams["opt_class"] = torch.optim.SGD  # Adam would hide a wrong scale of the gradients
    model = build_model(hparams)
    set_trainable(model, train_names(model))
    return model, hparams


def by_hand(
    model: SpeechLLM, num_steps: int, max_grad_norm: float
) -> tuple[dict[str, Tensor], list[float]]:
    """SGD in plain torch: mean loss over the labels of a step, clipped, rate falling linearly to zero."""
    items = utterances(model, two_ranks.NUM_WORDS)
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for step in range(num_steps):
        sums = [model(collate([items[i]])) for i in STEPS[step % len(STEPS)]]
        loss = sum(s.loss for s in sums) / sum(int(s.num_labels) for s in sums)
        gradients = torch.autograd.grad(loss, trained)
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        norms.append(norm)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                scale = min(1.0, max_grad_norm / norm)
                parameter -= 0.02 * (1 - step / num_steps) * scale * gradient
    return tensors_of(model), norms


@pytest.mark.parametrize(
    ("name", "max_grad_norm"), [*((name, 1e6) for name in CUTS), ("1 x 4", 0.5), ("uneven", 0.5)]
)
def test_accumulation_does_not_change_the_update(
    wavlm_layer: Path, qwen2: Path, tmp_path: Path, name: str, max_grad_norm: float
) -> None:
    expected, norms = by_hand(sgd(wavlm_layer, qwen2)[0], 3, max_grad_norm)
    assert (min(norms) > max_grad_norm) == (max_grad_norm < 1)  # clipped always or never
    cuts = CUTS[name]
    model, hparams = sgd(
        wavlm_layer,
        qwen2,
        grad_accumulation_factor=len(cuts) // len(STEPS),
        max_grad_norm=max_grad_norm,
        max_tokens_per_second=1.0,
    )
    start = tensors_of(model)
    items = utterances(model, two_ranks.NUM_WORDS)
    brain = train_on(model, hparams, items, cuts, 3, tmp_path)
    for key, tensor in tensors_of(model).items():
        moved, wanted = tensor - start[key], expected[key] - start[key]
        torch.testing.assert_close(moved, wanted, atol=3e-6, rtol=1e-3, msg=key)
    assert (
        expected["projector.layers.0.weight"] - start["projector.layers.0.weight"]
    ).abs().max() > 1e-4
    labels = sum(len(items[i]["target_ids"]) + 1 for step in (0, 1, 0) for i in STEPS[step])
    seconds = sum(items[i]["duration"] for step in (0, 1, 0) for i in STEPS[step])
    seen = brain.counters.state_dict()
    assert (seen["labels"], seen["utterances"]) == (labels, 12)
    assert seen["seconds"] == pytest.approx(seconds)
    assert brain.scheduler.last_epoch == brain.optimizer_step == 3
    saved = load_checkpoint_tensors(next((tmp_path / "save").glob("CKPT*")))
    assert sorted(saved) == sorted(train_names(model))
    assert all(torch.equal(saved[key], tensors_of(model)[key]) for key in saved)


@pytest.mark.slow
def test_two_ranks_with_uneven_shards_equal_one_process(
    wavlm_layer: Path, llama: Path, tmp_path: Path, repo_root: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(wavlm_layer), str(llama), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.numerics.two_ranks", *arguments],
            cwd=repo_root,
            env=tiny.environment(repo_root) | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    alone = two_ranks.work(wavlm_layer, llama, tmp_path / "alone", None)
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    unused = "encoder.model.masked_spec_embed"
    for rank in ranks:
        assert rank["wrapped"] == "DistributedDataParallel" and alone["wrapped"] == "SpeechLLM"
        for key, tensor in alone["tensors"].items():
            start = alone["start"][key]
            assert torch.equal(rank["start"][key], start), key  # drawn alike on every rank
            if key == unused:
                continue
            assert torch.equal(rank["tensors"][key], ranks[0]["tensors"][key]), key
            torch.testing.assert_close(
                rank["tensors"][key] - start, tensor - start, atol=3e-6, rtol=1e-3, msg=key
            )
        assert rank["seen"] == pytest.approx(alone["seen"])
        assert rank["valid"] == pytest.approx(alone["valid"])
        assert rank["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-4)
        for part in ("distances", "one_empty"):
            assert rank[part][1] == alone[part][1] == 5
            torch.testing.assert_close(
                rank[part][0], alone[part][0], atol=1e-5, rtol=0, equal_nan=True
            )
    assert not torch.equal(ranks[0]["tensors"][unused], ranks[1]["tensors"][unused])
    moved = (
        alone["tensors"]["projector.layers.0.weight"] - alone["start"]["projector.layers.0.weight"]
    )
    assert moved.abs().max() > 1e-4
    assert len(list((tmp_path / "save").iterdir())) == 1  # one checkpoint, written once


def optimiser_state(brain: SpeechLLMBrain) -> list[Tensor]:
    return [
        value
        for state in brain.optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def test_a_stopped_run_resumes_to_the_same_end(
    wavlm_layer: Path, qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hparams = hparams_of(
        wavlm_layer,
        qwen2,
        decoder_lora_rank=2,
        decoder_lora_dropout=0.0,
        grad_accumulation_factor=2,
        lr=0.01,
        max_tokens_per_second=1.0,
    )
    used: list[list[str]] = []
    stop_after: list[int] = []
    real_batch = SpeechLLMBrain.fit_batch

    def fit_batch(brain: SpeechLLMBrain, batch: Batch) -> Tensor:
        used.append(batch.ids)
        loss = real_batch(brain, batch)
        if stop_after == [brain.optimizer_step]:
            os.kill(os.getpid(), signal.SIGTERM)
            stop_after.clear()
        return loss

    monkeypatch.setattr(SpeechLLMBrain, "fit_batch", fit_batch)

    def run(folder: Path) -> SpeechLLMBrain:
        model = build_model(hparams)
        items = utterances(model, two_ranks.NUM_WORDS)
        set_trainable(model, train_names(model))
        sampler = EndlessBatchSampler([len(item["audio"]) for item in items], 3)  # 4 batches a pass
        with graceful_stop():
            return train_on(model, hparams, items, sampler, 5, folder, valid_interval=2)

    straight = run(tmp_path / "straight")
    expected, used = used, []
    assert len(expected) == 10  # two and a half passes
    with pytest.raises(Stopped, match="SIGTERM"):
        stop_after.append(3)
        run(tmp_path / "stopped")
    resumed = run(tmp_path / "stopped")
    assert used == expected
    assert resumed.optimizer_step == straight.optimizer_step == 5
    after = tensors_of(resumed.model)
    assert all(torch.equal(after[key], value) for key, value in tensors_of(straight.model).items())
    for a, b in zip(optimiser_state(resumed), optimiser_state(straight), strict=True):
        assert torch.equal(a, b)
    assert resumed.counters.state_dict() == straight.counters.state_dict()
    assert resumed.scheduler.state_dict()["last_epoch"] == 5
    logs = [
        (tmp_path / name / "train_log.txt").read_text().splitlines()
        for name in ("straight", "stopped")
    ]
    assert [line.split(",")[0] for line in logs[0]] == ["step: 2", "step: 4", "step: 5"]
    assert logs[1][0] == logs[0][0] and logs[1][-1].split(" - ")[-1] == logs[0][-1].split(" - ")[-1]


def spoken(model: SpeechLLM, count: int) -> list[dict[str, Any]]:
    """Utterances of one tone per word: what is said can be heard."""
    rng = np.random.default_rng(0)
    items = []
    for index in range(count):
        words = list(rng.choice(tiny.WORDS, size=1 + index % 4))
        audio = torch.from_numpy(tiny.tones(words, rng))
        text = " ".join(words)
        items.append(
            {
                "id": str(index),
                "audio": audio,
                "target_ids": encode_target(model.tokenizer, text, "lower"),
                "text": text,
                "duration": len(audio) / 16000,
            }
        )
    return items


@pytest.mark.parametrize(("lora_rank", "num_steps"), [(8, 60), (0, 200)])
def test_overfitting_eight_utterances(
    wavlm_layer: Path, qwen2: Path, tmp_path: Path, lora_rank: int, num_steps: int
) -> None:
    hparams = hparams_of(
        wavlm_layer,
        qwen2,
        decoder_lora_rank=lora_rank,
        decoder_lora_dropout=0.0,
        projector_dim=64,
        lr=0.01,
        num_steps=num_steps,
    )
    model = build_model(hparams)
    # A random output layer this narrow cannot say anything with certainty: louder hidden states can.
    model.decoder.model.norm.weight.data *= 4
    items = spoken(model, 8)
    encoded = [
        item | {"audio": model.encoder(item["audio"][None], [len(item["audio"])])[0][0]}
        for item in items
    ]
    set_trainable(model, train_names(model))
    everyone = [list(range(8))]
    brain = train_on(model, hparams, encoded, everyone, num_steps, tmp_path, everyone)
    model.eval()
    with torch.no_grad():
        sums = model(collate(items))
    assert float(sums.loss / sums.num_labels) < 0.02
    assert int(sums.num_correct) == int(sums.num_labels)
    assert brain.valid_value == 0.0
    assert [(h.hyp, h.capped) for h in brain.hypotheses] == [
        (item["text"], False) for item in items
    ]
    # From the sound alone, one by one: and another sound gives its own words.
    assert model.transcribe([item["audio"] for item in items[::-1]]) == [
        i["text"] for i in items[::-1]
    ]


def test_cached_features_take_the_place_of_the_encoder(
    encoder_folder: Path, qwen2: Path, tmp_path: Path
) -> None:
    model = build(encoder_folder, qwen2, max_tokens_per_second=2.0)
    items = utterances(model, [1, 5, 2, 4])
    write_store(tmp_path / "store", model.encoder, [collate(items[:3]), collate(items[3:])])
    store = FeatureStore(tmp_path / "store")
    cached = [item | {"audio": store.read(item["id"])} for item in items]
    with torch.no_grad():
        expected = model(collate(items)).loss
        words = model.transcribe([item["audio"] for item in items])
        calls: list[int] = []
        handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
        inner = model.encoder.model.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(collate(cached)).loss, expected, atol=1e-4, rtol=1e-5)
        assert [h.hyp for h in decode(model, [collate(cached)])] == words
        assert calls == []
        model(collate(items))
        assert calls  # the hooks do count
    handle.remove()
    inner.remove()


def test_environment_is_not_a_distributed_one() -> None:
    """The single-process side of these tests means nothing under torchrun."""
    assert "RANK" not in os.environ
