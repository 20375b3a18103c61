"""From manifest rows to batches: audio reading, SpeechBrain's dynamic items, length filters, loaders."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import speechbrain as sb
import torch
import torchaudio
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.utils.data import DataLoader

from speechllm_prune.data.audio import UNKNOWN_LENGTH, resampling_is_too_costly
from speechllm_prune.data.batching import collate
from speechllm_prune.data.features import FeatureStore
from speechllm_prune.data.manifest import Row, split_wav
from speechllm_prune.data.parquet import read_audio_bytes
from speechllm_prune.data.prompt import encode_target
from speechllm_prune.models.encoder import SAMPLE_RATE
from speechllm_prune.runtime import UserError


def read_audio(path: str | Path) -> Tensor:
    """Read a file as a mono waveform at 16 kHz: channels averaged, other rates resampled.

    Arguments
    ---------
    path : str or Path
        Any format that libsndfile reads; `x.parquet#17` is the audio in row 17 of a parquet file.

    Returns
    -------
    Tensor
        (N,) float32.

    Raises
    ------
    UserError
        If the file cannot be read, is empty, or holds NaN or infinite samples.
    """
    file, row = split_wav(str(path))
    source = file if row is None else io.BytesIO(read_audio_bytes(file, row))
    try:
        with soundfile.SoundFile(source) as audio:
            if audio.frames >= UNKNOWN_LENGTH:
                raise UserError(f"{path} states no length; convert it")
            samples, rate = audio.read(dtype="float32", always_2d=True), audio.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"cannot read the audio file {path}: {error}") from None
    return to_mono_16khz(torch.from_numpy(samples.T), rate, str(path))


def to_mono_16khz(samples: Tensor, rate: int, name: str) -> Tensor:
    """(channels, N) at any rate -> (N,) at 16 kHz, refused if empty or not finite."""
    if samples.numel() == 0:
        raise UserError(f"{name} holds no audio")
    # A finite sum has finite terms, and costs a tenth of looking at each of them.
    if not samples.sum().isfinite() and not samples.isfinite().all():
        raise UserError(f"{name} holds NaN or infinite samples")
    if resampling_is_too_costly(rate):
        raise UserError(f"{name} has the sample rate {rate} Hz; convert it to 16000 Hz")
    mono = samples[0] if len(samples) == 1 else samples.mean(dim=0)
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else mono


def read_utterance(row: Row) -> Tensor:
    """Audio of a manifest row; what is wrong with it is said with its id.

    Raises
    ------
    UserError
        As `read_audio`.
    """
    try:
        wav = read_audio(row.wav)
        seconds = len(wav) / SAMPLE_RATE
        if abs(seconds - row.duration) > 0.1:
            raise UserError(
                f"{row.wav} is {seconds:.2f} s long, its manifest says {row.duration:.2f} s"
            )
        return wav
    except UserError as error:
        raise UserError(
            f"utterance {row.ID}: {error}; repair the corpus, or prepare its manifest again with --overwrite, which "
            "skips what is bad"
        ) from None


def num_samples(duration: float) -> int:
    """Samples of an utterance at 16 kHz, from its duration in seconds."""
    return max(1, round(duration * SAMPLE_RATE))


@dataclass
class Utterances:
    """A split, ready to be batched.

    Arguments
    ---------
    rows : list of Row
        Manifest rows.
    dataset : DynamicItemDataset
        Items id, audio, target_ids, text, duration, in the order of the rows.
    sizes : list of int
        Decoder positions of each utterance.
    """

    rows: list[Row]
    dataset: DynamicItemDataset
    sizes: list[int]

    @property
    def hours(self) -> float:
        """Total duration."""
        return sum(row.duration for row in self.rows) / 3600

    def loader(self, batches: Any, num_workers: int = 0) -> DataLoader:
        """A loader over a list of index batches or a batch sampler."""
        return _Loader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=_leave_process_group,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # an iterator draws a number; the run's own must not depend on it
        )


def _leave_process_group(worker: int) -> None:
    """torchrun and `timeout` stop a whole process group: a worker must outlive the step that is still to be saved."""
    os.setpgrp()


class _Loader(DataLoader):
    """A DataLoader through which a user's mistake passes as one message.

    torch hands on what a worker process raised with the worker's traceback in its text.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            name = f"{UserError.__module__}.{UserError.__qualname__}: "
            raise UserError(str(error).rpartition(name)[2].strip()) from None


def make_utterances(
    rows: Sequence[Row],
    model: Any,
    features: FeatureStore | None = None,
    audio_of: dict[str, str] | None = None,
) -> Utterances:
    """Build the dynamic-item dataset of a split.

    Arguments
    ---------
    rows : sequence of Row
        Manifest rows, audio paths absolute.
    model : SpeechLLM
        Gives tokenizer, text case and the number of positions of an utterance.
    features : FeatureStore, optional
        Cached encoder features that take the place of the audio.
    audio_of : dict, optional
        {utterance id: id of the utterance whose audio it gets}: the shuffled-audio check.
    """
    by_id = {row.ID: row for row in rows}
    audio_of = audio_of or {}

    @sb.utils.data_pipeline.takes("id")
    @sb.utils.data_pipeline.provides("audio")
    def audio_pipeline(utterance: str) -> Tensor:
        source = audio_of.get(utterance, utterance)
        return features.read(source) if features is not None else read_utterance(by_id[source])

    @sb.utils.data_pipeline.takes("text")
    @sb.utils.data_pipeline.provides("target_ids")
    def target_pipeline(text: str) -> list[int]:
        return encode_target(model.tokenizer, text, model.text_case)

    data = {row.ID: {"text": row.text, "duration": row.duration} for row in rows}
    dataset = DynamicItemDataset(
        data,
        dynamic_items=[audio_pipeline, target_pipeline],
        output_keys=["id", "audio", "target_ids", "text", "duration"],
    )
    sizes = [
        model.num_positions(
            num_samples(by_id[audio_of.get(row.ID, row.ID)].duration),
            len(encode_target(model.tokenizer, row.text, model.text_case)),
        )
        for row in rows
    ]
    return Utterances(list(rows), dataset, sizes)


def misfit(model: Any, row: Row, num_targets: int) -> str | None:
    """Why the model cannot take an utterance, or None. Nothing is ever cut to fit.

    Arguments
    ---------
    model : SpeechLLM
        Knows the encoder's limits and the decoder's positions.
    row : Row
        Manifest row.
    num_targets : int
        Target tokens that follow the prompt.
    """
    samples, limit = num_samples(row.duration), model.encoder.max_samples
    window = getattr(model.decoder.config.get_text_config(), "max_position_embeddings", None)
    if model.encoder.output_length(samples) < 1:
        return "shorter than a frame of the encoder"
    if limit is not None and samples > limit:
        return f"longer than the {limit / SAMPLE_RATE:g} s that the encoder takes"
    if window is not None and model.num_positions(samples, num_targets) > window:
        return f"more than the {window} positions of the decoder"
    return None


def refuse_misfits(model: Any, rows: Sequence[Row], manifest: str) -> None:
    """Refuse rows that are to be measured or scored, and that the model cannot take: leaving them out would flatter it.

    Raises
    ------
    UserError
        With their number and the first one.
    """
    found = [(row, why) for row in rows if (why := misfit(model, row, 1)) is not None]
    if found:
        row, why = found[0]
        raise UserError(
            f"{manifest}: the model cannot take {len(found)} of {len(rows)} utterances, first '{row.ID}' "
            f"({row.duration:.2f} s: {why}); cut them into shorter pieces, or leave them out of the corpus"
        )


def filter_training_rows(
    rows: Sequence[Row],
    num_targets: Sequence[int],
    min_seconds: float = 0.0,
    max_seconds: float = 0.0,
    max_target_tokens: int = 0,
    model: Any = None,
) -> tuple[list[Row], Counter[str]]:
    """Length filters of training, each counted by its reason; 0 switches one off. What `model` cannot take goes, too.

    Returns
    -------
    list of Row, Counter
        The rows kept, and how many fell to each reason.
    """
    kept, dropped = [], Counter[str]()
    for row, tokens in zip(rows, num_targets, strict=True):
        if row.duration < min_seconds:
            dropped[f"shorter than {min_seconds} s"] += 1
        elif max_seconds and row.duration > max_seconds:
            dropped[f"longer than {max_seconds} s"] += 1
        elif max_target_tokens and tokens > max_target_tokens:
            dropped[f"more than {max_target_tokens} target tokens"] += 1
        elif model is not None and (reason := misfit(model, row, tokens)) is not None:
            dropped[reason] += 1
        else:
            kept.append(row)
    if not kept:
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            or "the manifests are empty"
        )
        raise UserError(
            f"no training utterance is left ({reasons}); change min_seconds, max_seconds or max_target_tokens"
        )
    return kept, dropped
