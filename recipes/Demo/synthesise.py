#!/usr/bin/env python3
"""Synthesise a small English speech corpus in the layout of LibriSpeech.

    python recipes/Demo/synthesise.py OUT_FOLDER [--seed 3407]

writes ::

    OUT_FOLDER/LibriSpeech/<split>/<speaker>/<chapter>/<speaker>-<chapter>-0000.flac + .trans.txt
    OUT_FOLDER/LibriSpeech/SPEAKERS.TXT
    OUT_FOLDER/frame_labels.jsonl      phonemes and words of train-clean-100 with their times
    OUT_FOLDER/lm_text.txt             text for the language model (no sentence of any split)
    OUT_FOLDER/synthesis.json          how it was made; written last

The speakers of train-clean-100 also speak dev-clean and test-clean, with other sentences and some noise;
those of test-other are unseen. ``ood`` has both, other sentence patterns, noise, and files at another rate.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.Demo import grammar
from speechllm_prune.experiment import (
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from speechllm_prune.runtime import UserError, verb

SEEN_VOICES = [
    (accent, variant)
    for accent in ("en-us", "en")
    for variant in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f4")
]
UNSEEN_VOICES = [
    ("en-us", "f5"),
    ("en-us", "quincy"),
    ("en-us", "linda"),
    ("en-gb-x-rp", "f3"),
    ("en-gb-scotland", "m3"),
    ("en-gb-scotland", "f5"),
]
SPLITS = {
    "train-clean-100": {"count": 2400, "wording": "narrow", "voices": "seen"},
    # Some noise, or the full model would make no error at all and a relative degradation would mean nothing.
    "dev-clean": {"count": 120, "wording": "narrow", "voices": "seen", "snr_db": [8, 20]},
    "test-clean": {"count": 180, "wording": "narrow", "voices": "seen", "snr_db": [8, 20]},
    "test-other": {"count": 180, "wording": "narrow", "voices": "unseen"},
    "ood": {
        "count": 180,
        "wording": "wide",
        "voices": "all",
        "sample_rate": 22050,
        "snr_db": [5, 20],
    },
}
LM_TEXT = {"narrow": 20000, "wide": 20000}
SETTINGS = {
    "version": 1,  # raise it when the code below changes what is written
    "splits": SPLITS,
    "lm_text": LM_TEXT,
    "rate": [170, 255],
    "pitch": [25, 75],
    "pitch_range": [30, 70],
    "sample_rate": 16000,
    "utterances_per_chapter": 20,
    "labelled_split": "train-clean-100",
}


def speakers(voices: str) -> list[tuple[int, str, str]]:
    """Speakers of a split.

    Arguments
    ---------
    voices : str
        ``seen``, ``unseen`` or ``all``.

    Returns
    -------
    list of (int, str, str)
        Speaker number, accent, variant. A number stands for one voice in all splits.

    Example
    -------
    >>> len(speakers("all")) == len(speakers("seen")) + len(speakers("unseen"))
    True
    """
    seen = [(1001 + i, *voice) for i, voice in enumerate(SEEN_VOICES)]
    unseen = [(2001 + i, *voice) for i, voice in enumerate(UNSEEN_VOICES)]
    return {"seen": seen, "unseen": unseen, "all": seen + unseen}[voices]


def corpus_texts(seed: int, settings: dict) -> dict[str, list[str]]:
    """All sentences of the corpus: one list per split, then the language model's two.

    Arguments
    ---------
    seed : int
        Seed of the corpus.
    settings : dict
        Like ``SETTINGS``.

    Returns
    -------
    dict
        Split name, ``lm-narrow`` or ``lm-wide`` -> sentences. No sentence is in two lists.
    """
    # Evaluation first: their sentences stay what they are when the training lists grow.
    splits = settings["splits"]
    order = sorted(splits, key=lambda split: split.startswith("train"))
    sizes = {split: (splits[split]["wording"], splits[split]["count"]) for split in order}
    sizes |= {f"lm-{wording}": (wording, count) for wording, count in settings["lm_text"].items()}
    return grammar.draw_texts(sizes, seed)


def utterances(
    split: str, texts: list[str], settings: dict
) -> Iterator[tuple[str, tuple[int, str, str], str]]:
    """Give each sentence of a split a speaker, a chapter and an utterance id.

    Yields
    ------
    tuple
        Utterance id ``speaker-chapter-number``, the speaker, the sentence.
    """
    people = speakers(settings["splits"][split]["voices"])
    per_chapter = settings["utterances_per_chapter"]
    split_number = list(settings["splits"]).index(split)
    for index, text in enumerate(texts):
        speaker = people[index % len(people)]
        turn = index // len(people)
        chapter = 100_000 * (split_number + 1) + 10 * speaker[0] + turn // per_chapter
        yield f"{speaker[0]}-{chapter}-{turn % per_chapter:04d}", speaker, text


def synthesise_split(split: str, texts: list[str], seed: int, root: str, settings: dict) -> None:
    """Write the audio, transcripts and labels of one split. Runs in a process of its own.

    Arguments
    ---------
    split : str
        Name of the split.
    texts : list of str
        Its sentences.
    seed : int
        Seed of the corpus.
    root : str
        Folder that holds ``LibriSpeech``.
    settings : dict
        Like ``SETTINGS``.
    """
    import numpy
    import soundfile

    from recipes.Demo.espeak import Espeak

    engine = Espeak()
    of_split = settings["splits"][split]
    file_rate = of_split.get("sample_rate", settings["sample_rate"])
    rng = random.Random(f"{seed}/{split}")
    noise_rng = numpy.random.default_rng(rng.getrandbits(63))
    transcripts: dict[Path, list[str]] = {}
    labels = []
    for uttid, (number, accent, variant), text in utterances(split, texts, settings):
        voice = {key: rng.randint(*settings[key]) for key in ("rate", "pitch", "pitch_range")}
        engine.set_voice(accent, variant, **voice)
        speech = engine.say(text)
        samples = resample(speech.samples / 32768, engine.sample_rate, file_rate)
        samples *= rng.uniform(0.25, 0.9) / numpy.abs(samples).max()
        if "snr_db" in of_split:
            samples = add_pink_noise(samples, rng.uniform(*of_split["snr_db"]), noise_rng)
        chapter = Path(root, "LibriSpeech", split, str(number), uttid.split("-")[1])
        chapter.mkdir(parents=True, exist_ok=True)
        soundfile.write(chapter / f"{uttid}.flac", samples, file_rate, subtype="PCM_16")
        transcripts.setdefault(chapter, []).append(f"{uttid} {text.upper()}\n")
        if split == settings["labelled_split"]:
            labels.append({"id": uttid} | timed_labels(speech, engine.sample_rate))
    for chapter, lines in transcripts.items():
        speaker_chapter = f"{chapter.parent.name}-{chapter.name}"
        write_text(chapter / f"{speaker_chapter}.trans.txt", "".join(lines))
    if labels:
        lines = "".join(json.dumps(label, separators=(",", ":")) + "\n" for label in labels)
        write_text(Path(root, "frame_labels.jsonl"), lines)


def timed_labels(speech, sample_rate: int) -> dict[str, list]:
    """Phonemes and words of an utterance with their start in seconds (three decimals)."""
    return {
        kind: [[name, round(sample / sample_rate, 3)] for name, sample in getattr(speech, kind)]
        for kind in ("phonemes", "words")
    }


def resample(samples, rate_in: int, rate_out: int):
    """Change the sample rate by polyphase filtering.

    Arguments
    ---------
    samples : numpy.ndarray
        Mono samples.
    rate_in : int
        Their rate.
    rate_out : int
        The rate wanted.

    Returns
    -------
    numpy.ndarray
        Samples at the new rate.

    Example
    -------
    >>> import numpy
    >>> len(resample(numpy.zeros(22050), 22050, 16000))
    16000
    """
    from scipy.signal import resample_poly

    if rate_in == rate_out:
        return samples
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    return resample_poly(samples, up, down, window=_low_pass(up, down))


@functools.cache
def _low_pass(up: int, down: int):
    """The filter that `resample_poly` would design anew in every call, which costs more than the filtering."""
    from scipy.signal import firwin

    widest = max(up, down)
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))


def add_pink_noise(samples, snr_db: float, rng):
    """Add noise whose power falls with 1/f, at a signal-to-noise ratio in dB; avoid clipping."""
    import numpy

    spectrum = numpy.fft.rfft(rng.standard_normal(len(samples)))
    noise = numpy.fft.irfft(spectrum / numpy.sqrt(numpy.arange(1, len(spectrum) + 1)), len(samples))
    noise *= numpy.sqrt(numpy.mean(samples**2) / numpy.mean(noise**2)) * 10 ** (-snr_db / 20)
    mixed = samples + noise
    return mixed * min(1.0, 0.99 / numpy.abs(mixed).max())


def speakers_txt() -> str:
    """SPEAKERS.TXT as LibriSpeech writes it."""
    lines = ["; Synthetic voices of eSpeak NG\n", ";ID  |SEX| SUBSET           |MINUTES| NAME\n"]
    for subset, voices in (("train-clean-100", "seen"), ("test-other", "unseen")):
        for number, accent, variant in speakers(voices):
            sex = "F" if variant.startswith("f") or variant == "linda" else "M"
            lines.append(f"{number} | {sex} | {subset:<16} | 0.00 | eSpeak NG {accent}+{variant}\n")
    return "".join(lines)


def synthesise(out_folder: str | Path, seed: int, settings: dict = SETTINGS) -> bool:
    """Make the corpus, unless the folder already holds it.

    Arguments
    ---------
    out_folder : str or Path
        Folder to make. If it exists it must be empty or hold a corpus of this program.
    seed : int
        Seed of sentences and voices.
    settings : dict
        Sizes and voices.

    Returns
    -------
    bool
        Whether anything was written.
    """
    config_hash = sha256_json(settings | {"seed": seed, "grammar": sha256_file(grammar.__file__)})

    def fill(building: Path) -> dict:
        texts = corpus_texts(seed, settings)
        _run_workers(texts, seed, building, settings)
        write_text(building / "LibriSpeech" / "SPEAKERS.TXT", speakers_txt())
        lm_text = [
            line for name, lines in texts.items() if name.startswith("lm-") for line in lines
        ]
        write_text(building / "lm_text.txt", "".join(f"{line}\n" for line in lm_text))
        splits = settings["splits"]
        facts = {"utterances": {split: len(texts[split]) for split in splits}}
        facts["words"] = {s: sum(len(text.split()) for text in texts[s]) for s in splits}
        return {"seed": seed, "settings": settings} | facts

    return make_corpus(out_folder, config_hash, fill)


def make_corpus(
    out_folder: str | Path, config_hash: str, fill: Callable[[Path], dict[str, Any]]
) -> bool:
    """Make the folder of a corpus, whole or not at all, unless it already holds that corpus.

    Arguments
    ---------
    out_folder : str or Path
        Folder to make. If it exists it must be empty or hold a corpus of this program.
    config_hash : str
        Of all that decides the content.
    fill : callable
        ``fill(folder) -> facts``: writes the content into an empty folder; the facts go to synthesis.json.

    Returns
    -------
    bool
        Whether anything was written.
    """
    out = Path(out_folder).resolve()
    marker = out / "synthesis.json"
    if marker.is_file() and read_json(marker).get("config_hash") == config_hash:
        return False
    if out.exists() and not marker.is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; name a new folder, or empty it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write_json(building / "synthesis.json", {"config_hash": config_hash} | fill(building))
        os.chmod(building, 0o755)  # mkdtemp makes it private
        if out.exists():
            shutil.rmtree(out)
        os.rename(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _run_workers(texts: dict[str, list[str]], seed: int, building: Path, settings: dict) -> None:
    """One fresh process per split (eSpeak's state makes a second split depend on the first)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(2, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        jobs = [
            pool.apply_async(synthesise_split, (split, texts[split], seed, str(building), settings))
            for split in settings["splits"]
        ]
        for job in jobs:
            job.get()


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out_folder", metavar="OUT_FOLDER", help="folder to write the corpus to")
    parser.add_argument("--seed", type=int, default=3407, help="seed of sentences and voices")
    arguments = parser.parse_args(argv)
    if not synthesise(arguments.out_folder, arguments.seed):
        print(f"{arguments.out_folder} is already complete")
        return
    counts = read_json(Path(arguments.out_folder, "synthesis.json"))
    for split, count in counts["utterances"].items():
        print(f"{split}: {count} utterances, {counts['words'][split]} words")


if __name__ == "__main__":
    sys.exit(main())
