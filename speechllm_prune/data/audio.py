"""What preparation needs to know of an audio file, without decoding it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import soundfile


class BadAudio(ValueError):
    """Audio that cannot be used; the message is the reason for the skipped list."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def probe_audio(path: str | Path) -> AudioInfo:
    """Read the header of an audio file, and see whether the file goes on to its end (about 0.3 ms).

    Truncation is noticed in flac and wav. What mp3 and ogg headers say of their length is an
    estimate, so only decoding would tell.

    Raises
    ------
    BadAudio
        `missing`, `unreadable`, `truncated` or `zero-length audio`.
    """
    try:
        with soundfile.SoundFile(path) as audio:
            info = AudioInfo(audio.frames, audio.samplerate, audio.channels)
            if info.frames > 0 and audio.format == "FLAC" and not _last_sample_is_there(audio):
                raise BadAudio("truncated audio")
        if _riff_is_cut(path):
            raise BadAudio("truncated audio")
    except (soundfile.SoundFileError, OSError):
        raise BadAudio("unreadable audio" if os.path.isfile(path) else "missing audio") from None
    if info.frames <= 0:
        raise BadAudio("zero-length audio")
    return info


def _last_sample_is_there(audio: soundfile.SoundFile) -> bool:
    """Whether the last sample can be read: the header of a truncated flac still states all."""
    try:
        audio.seek(audio.frames - 1)
        return len(audio.read(1)) == 1
    except soundfile.SoundFileError:
        return False


def _riff_is_cut(path: str | Path) -> bool:
    """Whether a wav file is shorter than its header says (libsndfile reads it as a shorter one)."""
    with open(path, "rb") as stream:
        header = stream.read(8)
    if header[:4] != b"RIFF":
        return False
    (declared,) = struct.unpack("<I", header[4:])
    if declared == 0 or declared >= 0x7FFFF000:  # written as a stream, of unknown length
        return False
    return os.path.getsize(path) < declared + 7  # 8 bytes of header, less a pad byte at the end
