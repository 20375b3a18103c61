"""Full-size models with random weights, made on the device from the project's own leaves, and batches for them.

Nothing is downloaded: the shapes come from `speechllm_prune.models.facts`. Random weights never end a hypothesis, so
every row is given its number of tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Tokenizer
from speechllm_prune.data.batching import Batch
from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.encoder import SAMPLE_RATE
from speechllm_prune.models.estimate import LABELS_PER_SECOND
from speechllm_prune.models.facts import meta_decoder, meta_encoder
from speechllm_prune.models.speechllm import SpeechLLM

HPARAMS = Path(__file__).resolve().parents[1] / "hparams"
TINY_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
}
TINY_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def random_model(leaf: str, device: str, tiny: bool = False) -> SpeechLLM:
    """The leaf's model with random weights: frozen parts in bf16 on a GPU and fp32 elsewhere, the projector in fp32."""
    torch.manual_seed(0)
    hparams = load_hparams(HPARAMS / f"{leaf}.yaml", {"data_folder": "unused"})
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    decoder = meta_decoder(hparams["decoder_hub"], **(TINY_DECODER if tiny else {}))
    encoder = meta_encoder(
        hparams["encoder_hub"],
        hparams["encoder_output_norm"],
        **(TINY_ENCODER if tiny else {}),
    )
    for module in (decoder, encoder):
        _fill(module, device, dtype)
    decoder.tie_weights()  # where embedding and output layer are one, leaving the meta device has parted them
    projector = hparams["projector_class"](
        input_size=hparams["frame_stack"] * encoder.output_size,
        hidden_size=32 if tiny else hparams["projector_dim"],
        output_size=decoder.config.hidden_size,
        activation=hparams["activation"],
    ).to(device)
    model = SpeechLLM(
        encoder, projector, decoder, Tokenizer(), hparams["frame_stack"], hparams["prompt"]
    )
    return model.requires_grad_(False)


@torch.no_grad()
def _fill(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Weights for a model without any: norms 1, biases 0, everything else normal with deviation 0.02."""
    module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, 0.02)
    for part in module.modules():
        for name, _ in list(part.named_buffers(recurse=False)):
            fresh: Any = type(part)(
                part.config
            )  # rotary frequencies: fp32, and no part of a checkpoint
            setattr(part, name, getattr(fresh, name).to(device))


def random_batch(model: SpeechLLM, durations: list[float]) -> Batch:
    """Noise of these lengths with random targets, on the model's device."""
    generator = torch.Generator().manual_seed(len(durations))
    lengths = [int(SAMPLE_RATE * seconds) for seconds in durations]
    audio = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    vocabulary = model.decoder.config.vocab_size
    targets = [
        torch.randint(3, vocabulary, (round(LABELS_PER_SECOND * seconds),), generator=generator)
        for seconds in durations
    ]
    return Batch(
        ids=[str(i) for i in range(len(lengths))],
        audio=audio,
        audio_lengths=lengths,
        target_ids=[target.tolist() for target in targets],
        texts=[""] * len(lengths),
        durations=list(durations),
    ).to(model.device)


def caps_of(durations: list[float]) -> list[int]:
    """Tokens of each hypothesis, its end included."""
    return [round(LABELS_PER_SECOND * seconds) + 1 for seconds in durations]


def evaluation_lengths(count: int = 64) -> list[float]:
    """Seconds of utterances as in a test set: log-normal, 1.3 to 35 s, about 7.5 s in the mean; longest first.

    Example
    -------
    >>> lengths = evaluation_lengths()
    >>> len(lengths), round(sum(lengths) / len(lengths), 1)
    (64, 7.4)
    """
    generator = random.Random(0)
    lengths: list[float] = []
    while len(lengths) < count:
        seconds = generator.lognormvariate(1.8, 0.65)
        if 1.3 <= seconds <= 35.0:
            lengths.append(round(seconds, 2))
    return sorted(lengths, reverse=True)
