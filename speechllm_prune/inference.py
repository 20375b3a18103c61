"""From a finished model to text: decoding of batches, transcription of files, loading of exports."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechllm_prune.data.batching import Batch, collate, sorted_batches
from speechllm_prune.models.encoder import SAMPLE_RATE, SpeechEncoder, load_encoder
from speechllm_prune.models.projector import Projector
from speechllm_prune.models.speechllm import SpeechLLM, TaskParts
from speechllm_prune.runtime import UserError, raise_if_stopped
from speechllm_prune.search import greedy_search, has_loop

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
    looped : bool
        Whether a phrase is repeated again and again in it, see `search.has_loop`.
    """

    id: str
    ref: str
    hyp: str
    duration: float
    num_tokens: int
    capped: bool
    looped: bool


def decode_batch(model: SpeechLLM, batch: Batch) -> list[Hypothesis]:
    """Transcribe one batch that is on the model's device."""
    with torch.no_grad():
        inputs = model.inputs_for(batch, targets=False, padding_side="left")
    caps = [
        math.ceil(model.max_tokens_per_second * duration) + EXTRA_TOKENS
        for duration in batch.durations
    ]
    outputs = greedy_search(
        model.decoder,
        inputs.inputs_embeds,
        inputs.attention_mask,
        caps,
        model.token_ids.stop,
        model.decode_graphs,
    )
    return [
        Hypothesis(
            id=batch.ids[i],
            ref=batch.texts[i],
            hyp=model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            duration=batch.durations[i],
            num_tokens=len(tokens),
            capped=capped,
            looped=has_loop(tokens),
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
        Of a model that does several: the task of this request. Otherwise it must be the model's own.

    Returns
    -------
    list of str

    Raises
    ------
    UserError
        If the model does not do the task, or some audio cannot be read, is too short or too long.
    """
    from speechllm_prune.data.pipeline import read_audio

    with model.doing(task):
        wavs = [
            item.float().cpu() if isinstance(item, Tensor) else read_audio(item) for item in audio
        ]
        for index, (item, wav) in enumerate(zip(audio, wavs, strict=True)):
            name = f"waveform {index}" if isinstance(item, Tensor) else str(item)
            check_waveform(model, wav, name)
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
            batch = collate([items[i] for i in indices]).to(model.device)
            for hypothesis in decode(model, [batch]):
                texts[int(hypothesis.id)] = hypothesis.hyp
    return texts


def check_waveform(model: SpeechLLM, wav: Tensor, name: str) -> None:
    """Refuse a waveform that is none, or that the model cannot take.

    Raises
    ------
    UserError
    """
    if wav.dim() != 1:
        raise UserError(
            f"{name} has the shape {tuple(wav.shape)}; mono (N,) at {SAMPLE_RATE} Hz is expected"
        )
    check_length(model, len(wav), name)


def check_length(model: SpeechLLM, num_samples: int, name: str) -> None:
    """Refuse a number of samples at 16 kHz that encoder or decoder cannot take.

    Raises
    ------
    UserError
        Naming the limit.
    """
    if model.encoder.output_length(num_samples) < 1:
        raise UserError(f"{name} is too short for the encoder ({num_samples} samples)")
    seconds = num_samples / SAMPLE_RATE
    limit = model.encoder.max_samples
    if limit is not None and num_samples > limit:
        raise UserError(
            f"{name} is {seconds:.1f} s long, the encoder takes at most {limit / SAMPLE_RATE:.0f} s; cut it into "
            f"shorter pieces"
        )
    window = getattr(model.decoder.config.get_text_config(), "max_position_embeddings", None)
    positions = model.num_positions(num_samples, 1)
    if window is not None and positions > window:
        raise UserError(
            f"{name} is {seconds:.1f} s long and takes {positions} positions of the decoder, which has {window}; cut "
            f"it into shorter pieces"
        )


# ------------------------------------------------------------------------------------------ exports


def find_export(
    source: str | Path, savedir: str | Path | None = None, revision: str | None = None
) -> Path:
    """The folder of an export: the one given, or one fetched by its hub id.

    Arguments
    ---------
    source : str or Path
        A folder, or `owner/name`.
    savedir : str or Path, optional
        Where to keep what is fetched; default: the hub's cache.
    revision : str, optional
        Of the hub.

    Raises
    ------
    UserError
    """
    folder = Path(source)
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), revision=revision, local_dir=savedir))
        except (OSError, ValueError) as error:  # the hub's errors are OSErrors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{source} is no folder here, and cannot be had from the hub: {reason}"
            ) from None
    if not (folder / "speechllm.json").is_file():
        raise UserError(
            f"{folder} is not an export folder (no speechllm.json); make one with train.py, prune.py or heal.py "
            f"--export"
        )
    return folder


def load_export(
    source: str | Path, device: str | None = None, savedir: str | Path | None = None
) -> SpeechLLM:
    """Load what `--export` wrote: a plain causal LM with speechllm.json, projectors and perhaps encoders beside it.

    Arguments
    ---------
    source : str or Path
        The export folder, or a hub id.
    device : str, optional
        Default: a GPU if there is one.
    savedir : str or Path, optional
        See `find_export`.

    Returns
    -------
    SpeechLLM
        In eval mode, doing its first task.
    """
    from speechllm_prune.experiment import SCHEMA, read_json
    from speechllm_prune.models.decoder import load_decoder
    from speechllm_prune.prune.card import task_entries
    from speechllm_prune.prune.task_adapters import attach_adapter
    from speechllm_prune.restore import choose_device

    device = choose_device(device)
    folder = find_export(source, savedir)
    card = read_json(folder / "speechllm.json")
    if card["schema"] != SCHEMA:
        raise UserError(
            f"{folder} is an export of schema {card['schema']}, this package reads {SCHEMA}"
        )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    decoder, tokenizer = load_decoder(str(folder), dtype=dtype)
    encoders: dict[str, SpeechEncoder] = {}
    tasks = []
    for entry in task_entries(card):
        adapter = None
        if entry["adapter"]:
            adapter = f"task_{entry['name']}"  # a bare name could be that of a method
            attach_adapter(decoder, inside(folder, entry["folder"]), adapter, card["kept_layers"])
        tasks.append(_load_task(folder, entry, dtype, encoders, adapter))
    first = tasks[0]
    model = SpeechLLM(
        first.encoder,
        first.projector,
        decoder,
        tokenizer,
        first.frame_stack,
        first.prompt,
        text_case=first.text_case,
        task=first.name,
        max_tokens_per_second=first.max_tokens_per_second,
    ).to(device)
    if card.get("adapters") == "separate":
        for parts in tasks:
            model.add_task(parts)
        model.use_task(first.name)
    return model


def _load_task(
    folder: Path,
    entry: dict[str, Any],
    dtype: torch.dtype,
    encoders: dict[str, SpeechEncoder],
    adapter: str | None,
) -> TaskParts:
    """One task of an export; an encoder that another task has loaded already is shared."""
    from safetensors.torch import load_file

    source, norm = entry["encoder"], entry["encoder_output_norm"]
    key = f"{source['fingerprint']} {norm}"
    if key not in encoders:
        hub = str(inside(folder, source["folder"])) if source.get("folder") else source["hub"]
        encoders[key] = load_encoder(hub, source["revision"], dtype, norm)
    projector = build_projector(entry["projector"], str(folder))
    file = inside(folder, entry["folder"] or ".") / "projector.safetensors"
    projector.load_state_dict(load_file(file))
    return TaskParts(
        entry["name"],
        encoders[key],
        projector.requires_grad_(False).eval(),
        entry["frame_stack"],
        entry["prompt"],
        entry["text_case"],
        entry["max_tokens_per_second"],
        adapter,
    )


def inside(folder: Path, name: str) -> Path:
    """A folder of an export, which may come from anybody: it must not name one elsewhere.

    Raises
    ------
    UserError

    Example
    -------
    >>> inside(Path("export"), "adapters/asr").as_posix()
    'export/adapters/asr'
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / 'speechllm.json'} names the folder {name!r}, outside of the export"
        )
    return path


def build_projector(shape: dict[str, Any], where: str) -> Projector:
    """A projector of ours as speechllm.json describes it, without its weights.

    Raises
    ------
    UserError
        If it is of a class or with an activation that only its owner knows.
    """
    prefix, _, name = str(shape.get("activation", "")).rpartition(".")
    activation = getattr(torch.nn.modules.activation, name, None)
    own_class = shape["class"] != f"{Projector.__module__}.{Projector.__qualname__}"
    if own_class or prefix != "torch.nn" or activation is None:
        raise UserError(
            f"{where} has a projector of its own ({shape['class']}, {shape.get('activation')}); load it by hand"
        )
    return Projector(shape["input_size"], shape["hidden_size"], shape["output_size"], activation)
