"""What preparation needs to know of an audio file: length, rate and channels, and whether it can be used."""

from __future__ import annotations

import io
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

_ESTIMATED = ("MP3", "OGG")  # formats whose header does not say how long the audio is
_MAY_HOLD_NAN = ("FLOAT", "DOUBLE")  # sample types; integers are always finite
_BLOCK = 1 << 20
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

    Truncation is noticed in flac and wav, without decoding (about 0.3 ms). mp3 and ogg are decoded, since their length
    is known only then (about 1500 times faster than they play); a truncated mp3 is noticed if its first frame states a
    length, otherwise it counts as a shorter one. Floating-point samples are decoded as well: they may be NaN.

    Raises
    ------
    BadAudio
        `missing`, `unreadable`, `truncated`, `zero-length` or too short audio, NaN samples, or a git-lfs pointer.

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
            if info.frames > 0 and audio.format == "FLAC" and not _last_sample_is_there(audio):
                raise BadAudio("truncated audio")
            if audio.format in _ESTIMATED or audio.subtype in _MAY_HOLD_NAN:
                decoded = _decode(audio)
                stated = audio.format == "MP3" and (b"Xing" in start or b"Info" in start)
                if stated and decoded < info.frames - _MP3_DELAY:
                    raise BadAudio("truncated audio")
                info = replace(info, frames=decoded)
        if _riff_is_cut(start, size):
            raise BadAudio("truncated audio")
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


def _decode(audio: soundfile.SoundFile) -> int:
    """Decode all of it; returns the number of frames."""
    frames = 0
    while len(block := audio.read(_BLOCK, dtype="float32")):
        if not np.isfinite(block).all():
            raise BadAudio("NaN or infinite samples")
        frames += len(block)
    return frames


def _last_sample_is_there(audio: soundfile.SoundFile) -> bool:
    """Whether the last sample can be read: the header of a truncated flac still states all."""
    try:
        audio.seek(audio.frames - 1)
        return len(audio.read(1)) == 1
    except soundfile.SoundFileError:
        return False


def _riff_is_cut(start: bytes, size: int) -> bool:
    """Whether a wav file is shorter than its header says (libsndfile reads it as a shorter one)."""
    if start[:4] != b"RIFF" or len(start) < 8:
        return False
    (declared,) = struct.unpack("<I", start[4:8])
    if declared == 0 or declared >= 0x7FFFF000:  # written as a stream, of unknown length
        return False
    return size < declared + 7  # 8 bytes of header, less a pad byte at the end
