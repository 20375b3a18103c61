"""A minimal binding of the eSpeak NG library: text in, samples and timed labels out.

The library comes from the optional package ``espeakng-loader`` (extra ``[demo]``). eSpeak NG is
GPL-3.0-or-later, so it is imported when it is used, and nothing of it is part of this project.
"""

import ctypes
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from speechllm_prune.runtime import UserError

_SYNCHRONOUS, _PHONEME_EVENTS = 2, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_NOISE_SEED = 1
_LIST_END, _WORD, _PHONEME = 0, 1, 7
# The library copies its data path into a buffer of 160 bytes and cuts what is longer.
_LONGEST_DATA_PATH = 120


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass
class Speech:
    """One synthesised sentence.

    Attributes
    ----------
    samples : numpy.ndarray
        int16 mono samples at the engine's rate.
    phonemes : list of (str, int)
        Phoneme mnemonic without stress marks (``_`` is silence) and the sample where it starts.
    words : list of (str, int)
        Stretch of text and the sample where it starts. eSpeak joins some words ("from the").
    """

    samples: numpy.ndarray
    phonemes: list[tuple[str, int]] = field(default_factory=list)
    words: list[tuple[str, int]] = field(default_factory=list)


class Espeak:
    """The speech synthesiser. Make one per process.

    Two equal calls in one process give slightly different samples (the library keeps state), and
    the same sequence of calls in a fresh process gives the same samples: whoever needs
    reproducible audio starts a process and calls in a fixed order.

    Raises
    ------
    UserError
        If the optional package is missing.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "the demo speaks with the optional package espeakng-loader, which is not installed; "
                "run: pip install 'speechllm-prune[demo]'   (eSpeak NG is GPL-3.0-or-later)"
            ) from None
        data_path = espeakng_loader.get_data_path()
        if len(os.fsencode(data_path)) > _LONGEST_DATA_PATH:
            self._short = tempfile.TemporaryDirectory(prefix="espeak-")
            short_path = Path(self._short.name) / "espeak-ng-data"
            short_path.symlink_to(data_path)
            data_path = str(short_path)
        self._variants = Path(data_path) / "voices" / "!v"
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._callback = _Callback(self._receive)  # kept: the library holds only the pointer
        self.sample_rate: int = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, os.fsencode(data_path), _PHONEME_EVENTS
        )
        if self.sample_rate <= 0:
            raise UserError(f"eSpeak NG did not start with its data in {data_path}; reinstall it")
        self._library.espeak_SetSynthCallback(self._callback)
        # Voices with breath add noise, which is seeded by the clock otherwise.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))
        self._chunks: list[numpy.ndarray] = []
        self._events: list[tuple[int, int, int, str]] = []

    def set_voice(self, accent: str, variant: str, rate: int, pitch: int, pitch_range: int) -> None:
        """Choose the voice of the next sentences.

        Arguments
        ---------
        accent : str
            Language name of eSpeak, such as ``en-us``.
        variant : str
            Voice variant, such as ``m3``.
        rate : int
            Words per minute.
        pitch : int
            Base pitch, 0 to 99.
        pitch_range : int
            Pitch range, 0 to 99.
        """
        # An unknown variant is not refused by the library: it speaks with the plain voice.
        if not (self._variants / variant).is_file():
            raise ValueError(f"unknown voice variant {variant!r}")
        if self._library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()) != 0:
            raise ValueError(f"eSpeak refused the voice {accent}+{variant}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str) -> Speech:
        """Synthesise one sentence with the current voice.

        Arguments
        ---------
        text : str
            Lower-case text without punctuation.

        Returns
        -------
        Speech
            Samples, phonemes and words with the samples where they start.
        """
        self._chunks, self._events = [], []
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, len(encoded), 0, 1, 0, 1, None, None)
        if status != 0 or not self._chunks:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r} (status {status})")
        words = [(position, sample) for kind, sample, position, _ in self._events if kind == _WORD]
        ends = [position for position, _ in words[1:]] + [len(text) + 1]
        return Speech(
            samples=numpy.concatenate(self._chunks),
            phonemes=[
                ("_" if name.startswith("_") else name.strip("',%="), sample)
                for kind, sample, _, name in self._events
                if kind == _PHONEME
            ],
            words=[
                (text[position - 1 : end - 1].strip(), sample)
                for (position, sample), end in zip(words, ends, strict=True)
            ],
        )

    def _receive(self, samples, count, events) -> int:
        """Take what the library hands over; the buffers are its own, so copy."""
        if samples and count > 0:
            self._chunks.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _LIST_END:
            event = events[index]
            if event.type in (_WORD, _PHONEME):
                name = event.id.string.decode("utf-8", "replace") if event.type == _PHONEME else ""
                self._events.append((event.type, event.sample, event.text_position, name))
            index += 1
        return 0
