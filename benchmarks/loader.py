#!/usr/bin/env python3
"""C12: seconds of audio that the training loader reads, decodes, tokenises and pads in a CPU second.

    python benchmarks/loader.py

One process without workers. The files are the real FLAC of librispeech_mini where it lies ($SPEECHLLM_PRUNE_DATA, else
../shared/data), otherwise FLAC of shaped noise written on the spot: the table says which. The tokenizer is Qwen2's
class with a vocabulary trained on the transcripts. The other side is SpeechBrain's own: `DynamicItemDataset` with
`read_audio`, the same tokenizer, `PaddedBatch`, on the same batches. Waveforms and tokens of both are compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.dataset import DynamicItemDataset

from benchmarks.common import ROOT, Result, best_of, check, script
from speechllm_prune.data.batching import sorted_batches
from speechllm_prune.data.manifest import Row
from speechllm_prune.data.pipeline import make_utterances

BATCH_SIZE, RATE = 8, 16000


def real_rows(folder: Path) -> list[Row]:
    """Utterances of a corpus in LibriSpeech layout."""
    rows = []
    for file in sorted(folder.rglob("*.trans.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, text = line.split(" ", 1)
            audio = file.parent / f"{name}.flac"
            rows.append(Row(name, soundfile.info(audio).duration, str(audio), text))
    return rows


def synthetic_rows(folder: Path, count: int, longest: float) -> list[Row]:
    """Noise that swells and fades like syllables, as 16-bit FLAC, with words that say nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        seconds = longest * (0.5 + 0.5 * index / count)
        time = np.arange(round(RATE * seconds)) / RATE
        wave = np.convolve(rng.standard_normal(len(time)), np.ones(8) / 8, mode="same")
        wave = 0.2 * wave * np.sin(2 * np.pi * 2 * time) ** 2
        file = folder / f"{index}.flac"
        soundfile.write(file, wave, RATE, subtype="PCM_16")
        words = rng.choice(["SEVEN", "GREEN", "BOXES", "STAND", "NEAR"], size=int(3 * seconds))
        rows.append(Row(str(index), len(time) / RATE, str(file), " ".join(words)))
    return rows


def tokenizer_for(rows: list[Row]) -> Any:
    """Qwen2's tokenizer class with a vocabulary of these transcripts."""
    from transformers import Qwen2Tokenizer

    texts = [row.text.lower() for row in rows]
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=4000, show_progress=False)


def our_pass(rows: list[Row], tokenizer: Any) -> tuple[list[list[int]], Callable[[], list[Any]]]:
    """The batches, and a pass over them through our loader."""
    model = SimpleNamespace(
        tokenizer=tokenizer,
        text_case="lower",
        num_positions=lambda samples, targets: samples // 1600 + targets,
    )
    utterances = make_utterances(rows, model)
    batches = sorted_batches(utterances.sizes, BATCH_SIZE)
    return batches, lambda: list(utterances.loader(batches))


def speechbrain_pass(
    rows: list[Row], tokenizer: Any, batches: list[list[int]]
) -> Callable[[], list[Any]]:
    """A pass over the same batches through SpeechBrain's pipeline, with the items of its SpeechLLM recipe."""

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio(wav: str) -> torch.Tensor:
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens_bos", "tokens_eos")
    def text(wrd: str) -> Any:
        ids = tokenizer(wrd.lower(), add_special_tokens=False).input_ids
        yield torch.LongTensor([0, *ids])
        yield torch.LongTensor([*ids, 0])

    data = {row.ID: {"wav": row.wav, "wrd": row.text} for row in rows}
    dataset = DynamicItemDataset(data, [audio, text], ["id", "sig", "tokens_bos", "tokens_eos"])
    return lambda: list(
        SaveableDataLoader(dataset, batch_sampler=batches, collate_fn=PaddedBatch, num_workers=0)
    )


def check_same(ours: list[Any], theirs: list[Any]) -> None:
    """Both loaders give the same waveforms and tokens."""
    for mine, other in zip(ours, theirs, strict=True):
        check(mine.ids == other.id, "order")
        check(torch.equal(mine.audio, other.sig.data), "waveforms")
        for ids, row in zip(mine.target_ids, other.tokens_eos.data, strict=True):
            check(ids == row[: len(ids)].tolist(), "tokens")


def measure(tiny: bool) -> list[Result]:
    """Seconds of audio in a CPU second."""
    data = Path(os.environ.get("SPEECHLLM_PRUNE_DATA") or ROOT.parent / "shared" / "data")
    corpus = data / "librispeech_mini"
    with tempfile.TemporaryDirectory() as folder:
        if corpus.is_dir() and not tiny:
            rows, what = real_rows(corpus), "real FLAC"
        else:
            size = (3, 1.0) if tiny else (48, 16.0)
            rows, what = synthetic_rows(Path(folder), *size), "synthetic FLAC"
        tokenizer = tokenizer_for(rows)
        batches, ours = our_pass(rows, tokenizer)
        theirs = speechbrain_pass(rows, tokenizer, batches)
        check_same(ours(), theirs())
        passes = range(1 if tiny else 5)
        sides = {
            "ours": lambda: [len(ours()) for _ in passes],
            "theirs": lambda: [len(theirs()) for _ in passes],
        }
        seconds = best_of(sides, 1 if tiny else 3)
        # The bound: the same files decoded and nothing else.
        alone = best_of(
            {"read": lambda: [soundfile.read(row.wav, dtype="float32") for row in rows]}
        )
    audio = sum(row.duration for row in rows)
    speed = {name: len(passes) * audio / value for name, value in seconds.items()}
    return [
        Result(
            f"C12 loader, audio s per CPU s, {what}",
            speed["ours"],
            ">= 3000",
            f"{speed['ours']:,.0f}",
            f"{speed['theirs']:,.0f}",
            f"{audio / alone['read']:,.0f} (decoding)",
            sides["ours"],
        )
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
