"""From a finished model to text: batched greedy search with a KV cache, and transcription of files.

Shapes: B utterances, X prefix positions, H decoder width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechllm_prune.data.batching import Batch, collate, sorted_batches
from speechllm_prune.models.decoder import lm_logits
from speechllm_prune.models.encoder import SAMPLE_RATE
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.runtime import UserError, raise_if_stopped

EXTRA_TOKENS = 10
"""Tokens that a hypothesis may have beyond `max_tokens_per_second` times its duration."""


@dataclass
class Hypothesis:
    """One decoded utterance.

    Arguments
    ---------
    id, ref, hyp : str
        Raw: nothing is normalised before scoring.
    duration : float
        Seconds.
    num_tokens : int
        Tokens before the end.
    capped : bool
        Whether it hit the cap on its length instead of ending by itself.
    """

    id: str
    ref: str
    hyp: str
    duration: float
    num_tokens: int
    capped: bool


@torch.no_grad()
def greedy_search(
    decoder: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    max_tokens: Sequence[int],
    stop: frozenset[int],
) -> list[tuple[list[int], bool]]:
    """Greedy decoding of a left-padded batch with a KV cache.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM.
    inputs_embeds : Tensor
        (B, X, H), padded on the left.
    attention_mask : Tensor
        (B, X).
    max_tokens : sequence of int
        Cap for each row.
    stop : frozenset of int
        Ids that end a hypothesis.

    Returns
    -------
    list of (token ids without the stop token, whether the cap was hit)
    """
    from transformers import DynamicCache

    body, embed = decoder.get_decoder(), decoder.get_input_embeddings()
    cache = DynamicCache(config=decoder.config)
    position = attention_mask.sum(1, keepdim=True)  # (B, 1), position of the next token in each row
    stops = torch.tensor(sorted(stop), device=inputs_embeds.device)
    caps = torch.tensor(list(max_tokens), device=inputs_embeds.device)
    ended = torch.zeros(len(inputs_embeds), dtype=torch.bool, device=inputs_embeds.device)
    steps: list[Tensor] = []
    check_every = (
        1 if inputs_embeds.device.type == "cpu" else 8
    )  # asking the GPU for a flag stalls it
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    for step in range(int(max(max_tokens))):
        hidden = body(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        token = lm_logits(decoder, hidden).argmax(-1)  # (B,)
        steps.append(token)
        ended |= torch.isin(token, stops) | (caps <= step + 1)
        if step % check_every == check_every - 1 and bool(ended.all()):
            break
        inputs_embeds = embed(token)[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
        positions, position = position, position + 1
    rows = torch.stack(steps, dim=1).tolist()
    return [_trim(row[:cap], stop) for row, cap in zip(rows, max_tokens, strict=True)]


def _trim(tokens: list[int], stop: frozenset[int]) -> tuple[list[int], bool]:
    end = next((index for index, token in enumerate(tokens) if token in stop), None)
    return (tokens, True) if end is None else (tokens[:end], False)


def decode_batch(model: SpeechLLM, batch: Batch) -> list[Hypothesis]:
    """Transcribe one batch that is on the model's device."""
    with torch.no_grad():
        inputs = model.inputs_for(batch, targets=False, padding_side="left")
    caps = [
        math.ceil(model.max_tokens_per_second * duration) + EXTRA_TOKENS
        for duration in batch.durations
    ]
    outputs = greedy_search(
        model.decoder, inputs.inputs_embeds, inputs.attention_mask, caps, model.token_ids.stop
    )
    return [
        Hypothesis(
            id=batch.ids[i],
            ref=batch.texts[i],
            hyp=model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            duration=batch.durations[i],
            num_tokens=len(tokens),
            capped=capped,
        )
        for i, (tokens, capped) in enumerate(outputs)
    ]


def decode(model: SpeechLLM, batches: Iterable[Batch]) -> list[Hypothesis]:
    """Transcribe batches in eval mode; stops between batches when a signal asks for it."""
    model.eval()
    hypotheses: list[Hypothesis] = []
    for batch in batches:
        raise_if_stopped()
        hypotheses += decode_batch(model, batch)
    return hypotheses


def transcribe(
    model: SpeechLLM,
    audio: Sequence[str | Path | Tensor],
    batch_size: int = 8,
    task: str | None = None,
) -> list[str]:
    """Transcribe files or waveforms, in the order given.

    Arguments
    ---------
    model : SpeechLLM
        Any finished model.
    audio : sequence of paths or (N,) tensors
        Files of any rate, or mono waveforms at 16 kHz.
    batch_size : int
        Utterances decoded together; the result does not depend on it (fp32).
    task : str, optional
        Must be the model's own task.

    Returns
    -------
    list of str
    """
    from speechllm_prune.data.pipeline import read_audio

    if task is not None and task != model.task:
        raise UserError(f"this model does {model.task}, not {task}")
    wavs = [item.float().cpu() if isinstance(item, Tensor) else read_audio(item) for item in audio]
    for index, wav in enumerate(wavs):
        if wav.dim() != 1:
            raise UserError(
                f"waveform {index} has the shape {tuple(wav.shape)}; mono (N,) at 16 kHz is expected"
            )
        limit = model.encoder.max_samples
        if limit is not None and len(wav) > limit:
            raise UserError(
                f"{audio[index]} is {len(wav) / SAMPLE_RATE:.1f} s long, the encoder takes at most "
                f"{limit / SAMPLE_RATE:.0f} s; cut it into shorter pieces"
            )
        if model.encoder.output_length(len(wav)) < 1:
            raise UserError(f"{audio[index]} is too short for the encoder ({len(wav)} samples)")
    items = [
        {
            "id": str(i),
            "audio": wav,
            "target_ids": [],
            "text": "",
            "duration": len(wav) / SAMPLE_RATE,
        }
        for i, wav in enumerate(wavs)
    ]
    texts = [""] * len(items)
    for indices in sorted_batches([len(wav) for wav in wavs], batch_size):
        for hypothesis in decode(model, [collate([items[i] for i in indices]).to(model.device)]):
            texts[int(hypothesis.id)] = hypothesis.hyp
    return texts


def load_export(folder: str | Path, device: str | None = None) -> SpeechLLM:
    """Load what `--export` wrote: a plain causal LM with speechllm.json, projector and perhaps the encoder beside it.

    Arguments
    ---------
    folder : str or Path
        The export folder.
    device : str, optional
        Default: a GPU if there is one.

    Returns
    -------
    SpeechLLM
        In eval mode.
    """
    from safetensors.torch import load_file

    from speechllm_prune.experiment import read_json
    from speechllm_prune.models.decoder import load_decoder
    from speechllm_prune.models.encoder import load_encoder
    from speechllm_prune.models.projector import Projector
    from speechllm_prune.restore import choose_device

    folder = Path(folder)
    if not (folder / "speechllm.json").is_file():
        raise UserError(
            f"{folder} is not an export folder (no speechllm.json); make one with prune.py or heal.py --export"
        )
    card = read_json(folder / "speechllm.json")
    device = choose_device(device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    source = card["encoder"]
    hub = str(folder / source["folder"]) if source.get("folder") else source["hub"]
    encoder = load_encoder(hub, source["revision"], dtype, card["encoder_output_norm"])
    decoder, tokenizer = load_decoder(str(folder), dtype=dtype)
    shape = card["projector"]
    if (
        shape["class"] != "speechllm_prune.models.projector.Projector"
        or shape["activation"] != "torch.nn.GELU"
    ):
        raise UserError(
            f"{folder} has a projector of its own ({shape['class']}, {shape['activation']}); load it by hand"
        )
    projector = Projector(shape["input_size"], shape["hidden_size"], shape["output_size"])
    projector.load_state_dict(load_file(folder / "projector.safetensors"))
    task = card["tasks"][0]
    model = SpeechLLM(
        encoder,
        projector.requires_grad_(False),
        decoder,
        tokenizer,
        card["frame_stack"],
        task["prompt"],
        text_case=task["text_case"],
        task=task["name"],
        max_tokens_per_second=card["max_tokens_per_second"],
    )
    return model.to(device)
