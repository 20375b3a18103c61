"""From manifest rows to batches: audio reading, SpeechBrain's dynamic items, length filters, loaders."""

from __future__ import annotations

import io
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
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"cannot read the audio file {path}: {error}") from None
    return to_mono_16khz(torch.from_numpy(samples.T), rate, str(path))


def to_mono_16khz(samples: Tensor, rate: int, name: str) -> Tensor:
    """(channels, N) at any rate -> (N,) at 16 kHz, refused if empty or not finite."""
    if samples.numel() == 0:
        raise UserError(f"{name} holds no audio")
    if not torch.isfinite(samples).all():
        raise UserError(f"{name} holds NaN or infinite samples")
    mono = samples.mean(dim=0)
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else mono


def read_utterance(row: Row) -> Tensor:
    """Audio of a manifest row; what is wrong with it is said with its id.

    Raises
    ------
    UserError
        As `read_audio`.
    """
    try:
        return read_audio(row.wav)
    except UserError as error:
        raise UserError(
            f"utterance {row.ID}: {error}; repair the corpus, or prepare its manifest again to skip it"
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
            pin_memory=torch.cuda.is_available(),
        )


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


def filter_training_rows(
    rows: Sequence[Row],
    num_targets: Sequence[int],
    min_seconds: float = 0.0,
    max_seconds: float = 0.0,
    max_target_tokens: int = 0,
) -> tuple[list[Row], Counter[str]]:
    """Length filters of training, each counted by its reason; 0 switches one off.

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
