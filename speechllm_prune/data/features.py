"""Encoder features on disk, computed once per utterance: valid because the encoder is frozen and nothing is augmented.

A store is a folder with `features.bin` (frames of all utterances one after the other, raw, in the encoder's type) and
`index.json`, written last. Raw and memory-mapped: decompression would be slower than running the encoder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechllm_prune.data.batching import Batch
from speechllm_prune.experiment import SCHEMA, read_json, sha256_json, write_json
from speechllm_prune.models.encoder import SpeechEncoder
from speechllm_prune.runtime import raise_if_stopped

_RAW: dict[torch.dtype, Any] = {
    torch.float32: np.dtype("<f4"),
    torch.bfloat16: np.dtype("<i2"),
    torch.float16: np.dtype("<f2"),
}


def store_fingerprint(
    encoder_fingerprint: str, output_norm: str, dtype: torch.dtype, summary: Mapping[str, Any]
) -> str:
    """Name of a store: another encoder, option, type, manifest or corpus folder is another store.

    The CSV alone would not do: a noisy copy of a corpus has the same one. `summary` is the manifest's json, which knows
    where the audio is, and in its `fingerprint` the sizes of the files.
    """
    data = [summary[name] for name in ("sha256", "data_root")] + [summary.get("fingerprint")]
    return sha256_json([SCHEMA, encoder_fingerprint, output_norm, str(dtype), data])[:24]


class FeatureStore:
    """Read access to a finished store.

    Arguments
    ---------
    folder : Path
        Made by `write_store`.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / "index.json")
        self.dtype: torch.dtype = getattr(torch, index["dtype"])
        self.width: int = index["width"]
        self.where = {name: (start, n) for name, start, n in index["utterances"]}
        self.raw = np.memmap(folder / "features.bin", dtype=_RAW[self.dtype], mode="r").reshape(
            -1, self.width
        )

    def __contains__(self, utterance: str) -> bool:
        return utterance in self.where

    def read(self, utterance: str) -> Tensor:
        """(T, D) frames of an utterance."""
        start, length = self.where[utterance]
        frames = torch.from_numpy(np.array(self.raw[start : start + length]))
        return frames.view(self.dtype)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the folder holds a finished store."""
        return (folder / "index.json").is_file()


@torch.no_grad()
def write_store(folder: Path, encoder: SpeechEncoder, batches: Iterable[Batch]) -> None:
    """Encode batches and write a store; nothing stands under `folder` until it is complete.

    Arguments
    ---------
    folder : Path
        Where the store goes.
    encoder : SpeechEncoder
        The frozen encoder.
    batches : iterable of Batch
        Waveforms on the encoder's device, every utterance once.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    utterances: list[tuple[str, int, int]] = []
    start = 0
    try:
        with open(temporary / "features.bin", "wb") as stream:
            for batch in batches:
                raise_if_stopped()
                features, lengths = encoder(batch.audio, batch.audio_lengths)
                for name, frames, length in zip(batch.ids, features.cpu(), lengths, strict=True):
                    stream.write(_as_bytes(frames[:length]))
                    utterances.append((name, start, length))
                    start += length
        index: dict[str, Any] = {
            "schema": SCHEMA,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "width": encoder.output_size,
            "utterances": utterances,
        }
        write_json(temporary / "index.json", index)
        if FeatureStore.exists(folder):  # another process was faster
            return
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_bytes(frames: Tensor) -> bytes:
    frames = frames.contiguous()
    if frames.dtype == torch.bfloat16:  # NumPy has no bfloat16
        frames = frames.view(torch.int16)
    return frames.numpy().tobytes()
