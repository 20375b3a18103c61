"""Rows 1 to 17: bad recordings and transcripts, made from real data in the real layout.

Preparation skips a bad row, counts it and lists it with its reason; too many of them, or what cannot be told apart, is
one message and exit 2. What breaks after preparation is one message with the utterance.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechllm_prune.data.manifest import Row, read_manifest
from speechllm_prune.data.pipeline import read_audio
from tests.faults.processes import Processes
from tests.recipes.verbs import load_json

LIBRISPEECH = "recipes/LibriSpeech/librispeech_prepare"


@pytest.fixture
def corpus(shared_data: Path, tmp_path: Path) -> Path:
    """Ten real utterances of LibriSpeech dev-clean, to damage; the folder that holds `LibriSpeech/`."""
    shutil.copytree(
        shared_data / "librispeech_mini/LibriSpeech/dev-clean",
        tmp_path / "corpus/LibriSpeech/dev-clean",
    )
    return tmp_path / "corpus"


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """Where manifests go."""
    return tmp_path / "manifests/librispeech"


def audio(corpus: Path) -> list[Path]:
    return sorted(corpus.rglob("*.flac"))


def transcripts(corpus: Path) -> list[Path]:
    return sorted(corpus.rglob("*.trans.txt"))


def skipped(manifests: Path, split: str = "dev-clean") -> dict[str, str]:
    """{utterance: reason} of the skipped list."""
    with open(manifests / f"{split}.skipped.csv", encoding="utf-8", newline="") as stream:
        return {row["id"]: row["reason"] for row in csv.DictReader(stream)}


def kept(manifests: Path, split: str = "dev-clean") -> dict[str, Row]:
    """{utterance: row} of the manifest, read as the stages read it."""
    return {row.ID: row for row in read_manifest(manifests / f"{split}.csv")}


# ------------------------------------------------------------------------------------------- damage
def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_inside(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def as_wav(file: Path, samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> Path:
    """The same utterance as a wav."""
    file.unlink()
    soundfile.write(file.with_suffix(".wav"), samples, rate, subtype=subtype)
    return file.with_suffix(".wav")


def with_nan(file: Path) -> None:
    samples, rate = soundfile.read(file)
    samples[-1] = math.nan
    as_wav(file, samples, rate, "FLOAT")


def lying_header(*places: int) -> Callable[[Path], None]:
    """A wav that claims twice the samples it has: in the size of the file (4), of the samples (40), or both."""

    def lie(file: Path) -> None:
        wav = as_wav(file, soundfile.read(file)[0])
        content = bytearray(wav.read_bytes())
        for place in places:
            (size,) = struct.unpack("<I", content[place : place + 4])
            content[place : place + 4] = struct.pack("<I", 2 * size)
        wav.write_bytes(content)

    return lie


def odd_rate(file: Path) -> None:
    """A rate that shares no factor with 16 kHz: its resampling filters would fill the memory."""
    as_wav(file, soundfile.read(file)[0], 44099)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all.flac")


def name_of_bytes(file: Path) -> None:
    os.rename(file, os.fsencode(file.parent) + b"/caf\xe9.flac")


def without_text(file: Path) -> None:
    (transcript,) = file.parent.glob("*.trans.txt")
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join(line for line in lines if not line.startswith(file.stem)))


def empty_text(file: Path) -> None:
    (transcript,) = file.parent.glob("*.trans.txt")
    lines = [
        f"{file.stem}   " if line.startswith(file.stem) else line
        for line in transcript.read_text().splitlines()
    ]
    transcript.write_text("\n".join(lines))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "row_01_truncated": (truncate, "truncated audio"),
    "row_01_damaged_inside": (damage_inside, "damaged audio"),
    "row_01_header_claims_more": (lying_header(4, 40), "truncated audio"),
    "row_01_header_claims_more_samples": (lying_header(40), "truncated audio"),
    "row_02_no_samples": (lambda file: as_wav(file, np.zeros(0)), "zero-length audio"),
    "row_03_nan": (with_nan, "NaN or infinite samples"),
    "row_05_odd_rate": (odd_rate, "sample rate that cannot be resampled"),
    "row_06_text": (lambda file: file.write_text("404 not found\n"), "unreadable audio"),
    "row_06_empty_file": (lambda file: file.write_bytes(b""), "unreadable audio"),
    "row_07_missing": (lambda file: file.unlink(), "transcript without audio"),
    "row_07_dangling_link": (dangling, "missing audio"),
    "row_07_name_of_bytes": (name_of_bytes, "transcript without audio"),
    "row_09_no_transcript": (without_text, "audio without transcript"),
    "row_09_empty_transcript": (empty_text, "empty transcript"),
    "row_12_20_ms": (
        lambda file: as_wav(file, np.zeros(320) + 0.1),
        "audio shorter than 25 ms",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_rows_01_to_12_a_bad_utterance(
    corpus: Path, manifests: Path, verbs: Processes, name: str
) -> None:
    """Refused by default (1 of 10 is more than 1 %), naming count, reason and list; accepted share: left out."""
    damage, reason = DAMAGES[name]
    victim = audio(corpus)[4]
    damage(victim)
    message = verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    for part in (reason, "max_bad_share", str(manifests / "dev-clean.skipped.csv"), "'dev-clean'"):
        assert part in message
    assert not (manifests / "dev-clean.json").exists(), "refused, so not prepared"
    ended = verbs.run(LIBRISPEECH, corpus, manifests, "--max_bad_share", 0.2)
    assert f"skipped: 1 {reason}" in ended.out
    assert skipped(manifests)[victim.stem] == reason
    assert victim.stem not in kept(manifests) and len(kept(manifests)) == 9
    assert load_json(manifests / "dev-clean.json")["counts"]["skipped"][reason] == 1


def test_rows_04_05_channels_and_rates_are_averaged_and_resampled(
    corpus: Path, manifests: Path, verbs: Processes
) -> None:
    """Not silent, and right: the same sound at 8 and 44.1 kHz, in stereo, in whole numbers or floats."""
    rates = {8000: 0, 44100: 1, 48000: 2, 11025: 3}
    originals = {}
    time = np.arange(16000) / 16000
    for rate, number in rates.items():
        file = audio(corpus)[number]
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        soundfile.write(file, np.stack([1.5 * tone, 0.5 * tone], 1) if rate > 16000 else tone, rate)
        originals[file.stem] = 0.3 * np.sin(2 * np.pi * 440 * time)
    ended = verbs.run(LIBRISPEECH, corpus, manifests)
    for rate in rates:
        assert f"1 utterances at {rate} Hz: resampled to 16000 Hz" in ended.out
    assert "2 utterances with several channels: averaged" in ended.out
    for utterance, row in kept(manifests).items():
        wav = read_audio(row.wav)
        assert abs(len(wav) / 16000 - row.duration) < 1e-3
        if utterance in originals:
            expected = torch.from_numpy(originals[utterance]).float()
            assert torch.allclose(wav[400:-400], expected[400:-400], atol=0.01)


def test_digital_silence_and_odd_places_are_taken(
    corpus: Path, manifests: Path, verbs: Processes
) -> None:
    """Silence, upper-case endings, other depths, spaces, other scripts and links are no faults."""
    files = audio(corpus)
    soundfile.write(files[0], np.zeros(16000), 16000)
    files[1].rename(files[1].with_suffix(".FLAC"))
    split = corpus / "LibriSpeech/dev-clean"
    chapter = files[-1].parent
    deeper = split / "an extra folder" / "ещё одна" / chapter.name
    deeper.parent.mkdir(parents=True)
    chapter.rename(deeper)
    (corpus / "LibriSpeech").rename(corpus / "mein Korpus, 中文")
    (split.parent.parent / "mein Korpus, 中文/dev-clean/loop").symlink_to(corpus)
    link = corpus.with_name("link")
    link.symlink_to(corpus)
    verbs.run(LIBRISPEECH, link, manifests)
    rows = kept(manifests)
    assert len(rows) == 10 and not skipped(manifests)
    assert all(torch.isfinite(read_audio(row.wav)).all() for row in rows.values())


def test_row_10_encodings_of_transcripts(corpus: Path, manifests: Path, verbs: Processes) -> None:
    first, second, *_ = transcripts(corpus)
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    verbs.run(LIBRISPEECH, corpus, manifests)
    rows = kept(manifests)
    assert len(rows) == 10 and not any(
        "\r" in row.text or "\ufeff" in row.ID for row in rows.values()
    )
    good = second.read_bytes()
    second.write_bytes(good + "\nx-1-1 CAFÉ\n".encode("latin-1"))
    message = verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    line = len(good.splitlines()) + 2
    assert f"{second}, line {line}: not UTF-8" in message
    second.write_bytes(good.decode().encode("utf-16"))
    assert (
        f"{second}, line 1: not UTF-8" in verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    )


def test_row_13_duplicates_and_overlap(corpus: Path, manifests: Path, verbs: Processes) -> None:
    split = corpus / "LibriSpeech/dev-clean"
    first = transcripts(corpus)[0]
    text = first.read_text()
    first.write_text(text + text.splitlines()[0] + "\n")
    message = verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    assert f"'{audio(corpus)[0].stem}' occurs twice" in message and str(first) in message
    first.write_text(text)
    speaker = sorted(path for path in split.iterdir() if path.is_dir())[0]
    shutil.copytree(speaker, corpus / "LibriSpeech/train-clean-100" / speaker.name)
    message = verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    assert "'train-clean-100'" in message and "dev-clean.csv too" in message
    reasons = skipped(manifests, "train-clean-100")
    assert set(reasons.values()) == {"also in dev-clean"} and audio(corpus)[0].stem in reasons


def test_row_15_missing_split(corpus: Path, manifests: Path, verbs: Processes) -> None:
    (corpus / "LibriSpeech/empty").mkdir()
    for split in ("test-clean", "../dev-clean", "empty"):
        message = verbs.run(LIBRISPEECH, corpus, manifests, "--splits", split, code=2).message
        assert f"'{split}'" in message and "Splits found: dev-clean" in message
    assert not manifests.exists()
    shutil.rmtree(corpus / "LibriSpeech/dev-clean")
    assert "no transcripts in" in verbs.run(LIBRISPEECH, corpus, manifests, code=2).message


def test_row_17_nothing_is_unpacked(corpus: Path, manifests: Path, verbs: Processes) -> None:
    """No code here opens an archive (`test_security.py` says so of every file): a packed corpus is a message."""
    import tarfile

    with tarfile.open(corpus / "dev-clean.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../../escaped")
        archive.addfile(member)
    shutil.rmtree(corpus / "LibriSpeech")
    before = sorted(corpus.parent.rglob("*"))
    message = verbs.run(LIBRISPEECH, corpus, manifests, code=2).message
    assert "unpack dev-clean.tar.gz first" in message
    assert sorted(corpus.parent.rglob("*")) == before


def test_the_skipped_list_is_json_free_text(
    corpus: Path, manifests: Path, verbs: Processes
) -> None:
    """Names with commas, quotes and line ends stay one row of the list."""
    odd = audio(corpus)[0].with_name('a, "b"\nc.flac')
    shutil.copy(audio(corpus)[0], odd)
    verbs.run(LIBRISPEECH, corpus, manifests, "--max_bad_share", 0.5)
    assert skipped(manifests) == {'a, "b"\nc': "audio without transcript"}
    assert json.dumps(load_json(manifests / "dev-clean.json"))
