"""What preparation needs to know of an audio file: length, rate and channels, and whether it can be used."""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

POINTER = b"version https://git-lfs"
"""First bytes of the text file that git-lfs leaves in place of a file that was not downloaded."""

MIN_SECONDS = 0.025
"""Below the window of one encoder frame there is nothing to encode."""

UNKNOWN_LENGTH = 1 << 40
"""As many frames, or more, libsndfile gives where a header does not say (a flac that was written into a pipe)."""

_WAV = ("WAV", "WAVEX")
_BLOCK = 1 << 20
_STREAM = 0x7FFFF000  # of this size or more: written as a stream, of unknown length
_MP3_DELAY = 2 * 1152  # samples of encoder delay and padding that decoders drop or keep


class BadAudio(ValueError):
    """Audio that cannot be used; the message is the reason for the skipped list."""


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file holds."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def probe_audio(source: str | Path | bytes) -> AudioInfo:
    """Read what an audio file (or its bytes) says of itself, and see whether it goes on to its end.

    All of it is decoded (over 1000 times faster than it plays), so that what passes here does not stop a training days
    later; but for a wav of whole numbers, where every byte is a sample. A truncated ogg, or a mp3 whose first frame
    does not state a length, cannot be told from a shorter one.

    Raises
    ------
    BadAudio
        `missing`, `unreadable`, `damaged`, `truncated`, `zero-length` or too short audio, NaN samples, a rate that
        cannot be resampled, or a git-lfs pointer.

    Example
    -------
    >>> probe_audio(b"version https://git-lfs.github.com/spec/v1")
    Traceback (most recent call last):
    speechllm_prune.data.audio.BadAudio: git-lfs pointer instead of audio
    """
    try:
        start = _first_bytes(source)
        if start.startswith(POINTER):
            raise BadAudio("git-lfs pointer instead of audio")
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        with soundfile.SoundFile(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as audio:
            info = AudioInfo(audio.frames, audio.samplerate, audio.channels)
            if not (audio.format in _WAV and audio.subtype.startswith("PCM")):
                info = _decoded(audio, info, start)
        if _riff_is_cut(start, size):
            raise BadAudio("truncated audio")
        if resampling_is_too_costly(info.sample_rate):
            raise BadAudio("sample rate that cannot be resampled")
    except (soundfile.SoundFileError, OSError):
        there = isinstance(source, bytes) or os.path.isfile(source)
        raise BadAudio("unreadable audio" if there else "missing audio") from None
    if info.frames <= 0:
        raise BadAudio("zero-length audio")
    if info.duration < MIN_SECONDS:
        raise BadAudio(f"audio shorter than {1000 * MIN_SECONDS:g} ms")
    return info


def _first_bytes(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4096]
    with open(source, "rb") as stream:
        return stream.read(4096)


def _decoded(audio: soundfile.SoundFile, info: AudioInfo, start: bytes) -> AudioInfo:
    """What all of it holds, once decoded; refused where that breaks off before the length that is stated."""
    frames = 0
    if info.frames >= UNKNOWN_LENGTH:
        raise BadAudio("audio whose header states no length")
    if audio.format == "FLAC" and info.frames > 0 and not _last_sample_is_there(audio):
        raise BadAudio("truncated audio")
    try:
        while len(block := audio.read(_BLOCK, dtype="float32")):
            if not np.isfinite(block).all():
                raise BadAudio("NaN or infinite samples")
            frames += len(block)
    except soundfile.SoundFileError:
        raise BadAudio("damaged audio") from None
    stated = info.frames
    if audio.format == "MP3":
        stated = stated - _MP3_DELAY if b"Xing" in start or b"Info" in start else 0
    if audio.format != "OGG" and frames < stated:
        raise BadAudio("truncated audio")
    return replace(info, frames=frames)


def _last_sample_is_there(audio: soundfile.SoundFile) -> bool:
    """Whether the last sample can be read: the header of a truncated flac still states all."""
    try:
        audio.seek(audio.frames - 1)
        there = len(audio.read(1)) == 1
        audio.seek(0)
        return there
    except soundfile.SoundFileError:
        return False


def resampling_is_too_costly(rate: int) -> bool:
    """Whether the filters from a rate to 16 kHz would fill the memory: a rate that shares no factor with it.

    Example
    -------
    >>> [rate for rate in (8000, 11025, 22255, 44100, 48000, 11127, 44099) if resampling_is_too_costly(rate)]
    [11127, 44099]
    """
    common = math.gcd(rate, 16000)
    return (rate // common) * (16000 // common) > 20_000_000


def _riff_is_cut(start: bytes, size: int) -> bool:
    """Whether a wav file is shorter than its header says (libsndfile reads it as a shorter one).

    The header says it twice: for the whole file, and for the samples in it.
    """
    if start[:4] != b"RIFF" or len(start) < 8:
        return False
    (declared,) = struct.unpack("<I", start[4:8])
    if 0 < declared < _STREAM and size < declared + 7:  # 8 bytes, less a pad byte at the end
        return True
    place = 12
    while place + 8 <= len(start):
        name, (length,) = (
            start[place : place + 4],
            struct.unpack("<I", start[place + 4 : place + 8]),
        )
        if name == b"data":
            return length < _STREAM and size < place + 8 + length
        place += 8 + length + length % 2
    return False
