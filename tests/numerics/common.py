"""What the numerical tests share: tiny SpeechLLMs from disk, random batches, a Brain on a list of utterances."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.train_logger import FileTrainLogger
from torch import Tensor
from torch.utils.data import DataLoader

from speechllm_prune import load_hparams
from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.checkpoint import AtomicCheckpointer
from speechllm_prune.data.batching import Batch, collate
from speechllm_prune.data.prompt import encode_target
from speechllm_prune.models.speechllm import DecoderInputs, SpeechLLM
from speechllm_prune.prune.lora import TRAIN_ADAPTER
from speechllm_prune.restore import build_model
from tests import tiny

BASE = Path(__file__).resolve().parents[2] / "hparams" / "base" / "speechllm.yaml"


def hparams_of(encoder: Path, decoder: Path, **overrides: Any) -> dict[str, Any]:
    """The base with tiny models: every default is the shipped one unless a test says otherwise."""
    return dict(_hparams(str(encoder), str(decoder), tuple(sorted(overrides.items()))))


@functools.cache
def _hparams(encoder: str, decoder: str, overrides: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    values = {
        "data_folder": "nowhere",
        "encoder_hub": encoder,
        "decoder_hub": decoder,
        "projector_dim": 24,
        "frame_stack": 3,
        "device": "cpu",
        "precision": "fp32",
    }
    return load_hparams(BASE, values | dict(overrides))


def build(encoder: Path, decoder: Path, **overrides: Any) -> SpeechLLM:
    """A SpeechLLM as every verb builds it, with adapters that do something where there are any."""
    model = build_model(hparams_of(encoder, decoder, **overrides))
    stir_adapters(model)
    return model


def stir_adapters(model: torch.nn.Module, adapter: str = TRAIN_ADAPTER) -> None:
    """Give LoRA's second factor, which starts at zero, values as after training."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def utterances(
    model: SpeechLLM, num_words: Sequence[int] = (1, 5, 2, 4), seed: int = 0
) -> list[dict[str, Any]]:
    """Dataset items of different lengths: noise as audio, random words as text."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index, count in enumerate(num_words):
        chosen = torch.randint(len(tiny.WORDS), (count,), generator=generator).tolist()
        text = " ".join(tiny.WORDS[i] for i in chosen).upper()
        length = 2500 + 4000 * count + 137 * index
        audio = torch.randn(length, generator=generator) * (0.1 + 0.2 * index) + 0.05 * index
        items.append(
            {
                "id": f"utterance{index}",
                "audio": audio,
                "target_ids": encode_target(model.tokenizer, text, model.text_case),
                "text": text,
                "duration": length / 16000,
            }
        )
    return items


def batch_of(model: SpeechLLM, num_words: Sequence[int] = (1, 5, 2, 4), seed: int = 0) -> Batch:
    """One mixed-length batch."""
    return collate(utterances(model, num_words, seed))


def random_inputs(decoder: Any, lengths: list[int], seed: int = 0) -> DecoderInputs:
    """Padded on the right, with labels on the last half of every row."""
    generator = torch.Generator().manual_seed(seed)
    width, longest = decoder.get_input_embeddings().embedding_dim, max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    rows = [(i, t) for i, n in enumerate(lengths) for t in range(n // 2, n)]
    return DecoderInputs(
        torch.randn(len(lengths), longest, width, generator=generator),
        mask,
        (mask.cumsum(1) - 1).clamp(min=0),
        torch.tensor(rows).T.contiguous(),
        torch.randint(3, 49, (len(rows),), generator=generator),
    )


class FixedSampler:
    """Stands in for `EndlessBatchSampler`: the same given batches in every pass."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = [list(batch) for batch in batches]
        self.pass_number, self.position = 0, 0

    def __iter__(self):
        while True:
            yield from self.batches

    def batches_of_pass(self, pass_number: int) -> list[list[int]]:
        return self.batches

    def advance(self) -> None:
        self.position += 1
        if self.position == len(self.batches):
            self.pass_number, self.position = self.pass_number + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"pass": self.pass_number, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.pass_number, self.position = state["pass"], state["position"]


def train_on(
    model: SpeechLLM,
    hparams: dict[str, Any],
    items: Sequence[dict[str, Any]],
    batches: Any,
    num_steps: int,
    folder: Path,
    valid_batches: Sequence[Sequence[int]] = ((0,),),
    distributed: bool = False,
    valid_interval: int | None = None,
) -> SpeechLLMBrain:
    """Train what requires gradients, through Brain's whole loop; the validations decode `valid_batches`.

    `batches` is a list that is gone through again and again, or a sampler.
    """
    sampler = FixedSampler(batches) if isinstance(batches, (list, tuple)) else batches
    options = {
        "device": "cpu",
        "precision": "fp32",
        "grad_accumulation_factor": hparams["grad_accumulation_factor"],
        "max_grad_norm": hparams["max_grad_norm"],
        "ckpt_interval_minutes": 0,
        "noprogressbar": True,
    }
    if distributed:
        options["distributed_backend"] = "gloo"
    brain = SpeechLLMBrain(
        model,
        hparams,
        num_steps,
        valid_interval or num_steps,
        sampler,
        options,
        AtomicCheckpointer(folder / "save"),
        FileTrainLogger(str(folder / "train_log.txt")),
    )
    brain.fit(
        brain.epochs(),
        DataLoader(items, batch_sampler=sampler, collate_fn=collate),
        DataLoader(items, batch_sampler=[list(b) for b in valid_batches], collate_fn=collate),
        progressbar=False,
    )
    return brain


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, non-persistent ones too."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw).hexdigest()
