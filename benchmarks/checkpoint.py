#!/usr/bin/env python3
"""C10: bytes of a checkpoint against the bytes of what is trained and of the optimiser's state.

    python benchmarks/checkpoint.py

Ours is what the training loop's checkpointer writes after an Adam step on a projector of real size (5120-2048-3584:
WavLM-Large in stacks of 5, Qwen2.5-7B). For the other side is counted what SpeechBrain's end-to-end SpeechLLM recipe
adds, which lists its frozen encoder among what it recovers: the 315 million parameters of WavLM-Large in fp32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import ROOT, Result, check, qwen2, script, speech_llm
from speechllm_prune import load_hparams
from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.checkpoint import AtomicCheckpointer, load_checkpoint_tensors
from speechllm_prune.data.batching import EndlessBatchSampler
from speechllm_prune.models.facts import encoder_facts
from speechllm_prune.models.projector import Projector

ENCODER = "microsoft/wavlm-large"


def save(folder: Path, sizes: tuple[int, int, int]) -> tuple[Path, SpeechLLMBrain]:
    """The checkpoint of a training run after one step of its optimiser on random gradients."""
    model = speech_llm(qwen2(2, 64, 1000), hidden=8)
    model.projector = Projector(*sizes)
    leaf = ROOT / "hparams" / "base" / "speechllm.yaml"
    hparams = load_hparams(leaf, {"data_folder": "none", "device": "cpu"})
    options = {"device": "cpu", "precision": "fp32", "noprogressbar": True}
    brain = SpeechLLMBrain(
        model,
        hparams,
        1000,
        1000,
        EndlessBatchSampler([1] * 100_000, 4),
        options,
        AtomicCheckpointer(folder),
        None,
    )
    brain.init_optimizers()
    for parameter in model.projector.parameters():
        parameter.grad = torch.randn_like(parameter)
    brain.optimizer.step()
    saved = brain.checkpointer.save_checkpoint(meta={"optimizer_step": 1})
    assert saved is not None
    return saved.path, brain


def measure(tiny: bool) -> list[Result]:
    """Bytes on disk, and names that have no business there."""
    sizes = (320, 128, 64) if tiny else (5120, 2048, 3584)
    with tempfile.TemporaryDirectory() as folder:
        path, brain = save(Path(folder), sizes)
        written = sum(file.stat().st_size for file in path.iterdir())
        names = set(load_checkpoint_tensors(path))
    trained = {name for name, p in brain.model.named_parameters() if p.requires_grad}
    check(trained <= names, "a trained tensor is not saved")
    needed = sum(p.numel() * 4 for p in brain.model.parameters() if p.requires_grad)
    for state in brain.optimizer.state.values():
        needed += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
    theirs = needed + 4 * encoder_facts(ENCODER).num_parameters
    frozen = len(names - trained)
    return [
        Result(
            "C10 checkpoint, MB, over what is trained and Adam's state",
            written / needed,
            "<= 1.05x",
            f"{written / 1e6:.1f}",
            f"{theirs / 1e6:.1f} (counted)",
            f"{needed / 1e6:.1f} MB",
        ),
        Result(
            "C10 checkpoint, frozen tensors", frozen, "<= 0", str(frozen), "all of the encoder", "0"
        ),
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
