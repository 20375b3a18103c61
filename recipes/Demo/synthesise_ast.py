#!/usr/bin/env python3
"""Synthesise a small speech translation corpus in the layout of CoVoST 2 over Common Voice: En-De and Fr-En.

    python recipes/Demo/synthesise_ast.py OUT_FOLDER [--seed 3407]

writes ::

    OUT_FOLDER/cv/<language>/clips/*.mp3
    OUT_FOLDER/cv/<language>/validated.tsv                        the transcripts
    OUT_FOLDER/cv/<language>/covost_v2.<source>_<target>.tsv      path, translation, split
    OUT_FOLDER/cv/<language>/covost_v2.<source>_<target>.<split>.tsv
    OUT_FOLDER/frame_labels.<language>.jsonl   phonemes and words of the train split with their times
    OUT_FOLDER/lm_parallel.tsv                 en, de, fr: text for the decoder (no sentence of any split)
    OUT_FOLDER/synthesis.json                  how it was made; written last

No sentence is in two splits, in a split of the English corpus of the same seed (`synthesise.py`), or in a split and in
the decoder's text.
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.Demo import grammar, parallel
from recipes.Demo.synthesise import (
    SEEN_VOICES,
    add_pink_noise,
    corpus_texts,
    make_corpus,
    resample,
    timed_labels,
)
from recipes.Demo.synthesise import (
    SETTINGS as ENGLISH_CORPUS,
)
from speechllm_prune.experiment import read_json, sha256_file, sha256_json, write_text
from speechllm_prune.runtime import verb

VOICES = {
    "en": SEEN_VOICES,
    "fr": [
        (accent, variant)
        for accent in ("fr", "fr-be")
        for variant in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f4")
    ],
}
SETTINGS = {
    "version": 1,  # raise it when the code below changes what is written
    "directions": [["en", "de"], ["fr", "en"]],
    "splits": {
        "train": {"count": 2000},
        "dev": {"count": 120, "snr_db": [8, 20]},
        "test": {"count": 180, "snr_db": [8, 20]},
    },
    "lm_text": 30000,
    "wording": "narrow",
    "rate": [170, 255],
    "pitch": [25, 75],
    "pitch_range": [30, 70],
    "sample_rate": 16000,
    "labelled_split": "train",
}
SPLIT_COLUMNS = ("path", "sentence", "translation", "client_id")
VALIDATED_COLUMNS = (
    *("client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent"),
)


def corpus_sentences(seed: int, settings: dict, taken: Iterable[str]) -> dict[str, list[str]]:
    """The English side of all sentences: one list per direction and split, then the decoder's.

    Arguments
    ---------
    seed : int
        Seed of the corpus.
    settings : dict
        Like ``SETTINGS``.
    taken : iterable of str
        Sentences of other corpora, which may not occur.

    Returns
    -------
    dict
        ``<source>_<target>.<split>`` or ``lm`` -> lower-case English sentences. No sentence is in two lists.
    """
    sizes = {}
    # Evaluation first: their sentences stay what they are when the training lists grow.
    for split in sorted(settings["splits"], key=lambda split: split == "train"):
        for source, target in settings["directions"]:
            count = settings["splits"][split]["count"]
            sizes[f"{source}_{target}.{split}"] = (settings["wording"], count)
    sizes["lm"] = (settings["wording"], settings["lm_text"])
    return grammar.draw_texts(sizes, seed, exclude=taken)


def synthesise_list(
    direction: Sequence[str], split: str, english: list[str], seed: int, root: str, settings: dict
) -> list[dict[str, str]]:
    """Write the clips and labels of one split. Runs in a process of its own.

    Arguments
    ---------
    direction : sequence of str
        Source and target language.
    split : str
        train, dev or test.
    english : list of str
        Its sentences, in English whatever the source language is.
    seed : int
        Seed of the corpus.
    root : str
        Folder that holds ``cv``.
    settings : dict
        Like ``SETTINGS``.

    Returns
    -------
    list of dict
        The rows of the split: ``SPLIT_COLUMNS``.
    """
    import numpy
    import soundfile

    from recipes.Demo.espeak import Espeak

    source, target = direction
    engine = Espeak()
    name = f"{source}_{target}.{split}"
    rng = random.Random(f"{seed}/{name}")
    noise_rng = numpy.random.default_rng(rng.getrandbits(63))
    of_split, rate = settings["splits"][split], settings["sample_rate"]
    clips = Path(root, "cv", source, "clips")
    clips.mkdir(parents=True, exist_ok=True)
    # Numbers as in Common Voice, where a clip belongs to one split of its language.
    first = 1_000_000 * (1 + list(settings["splits"]).index(split))
    rows, labels = [], []
    for index, sentence in enumerate(english):
        speaker = index % len(VOICES[source])
        voice = {key: rng.randint(*settings[key]) for key in ("rate", "pitch", "pitch_range")}
        engine.set_voice(*VOICES[source][speaker], **voice)
        transcript = parallel.translate(sentence, source)
        speech = engine.say(parallel.spoken(transcript))
        samples = resample(speech.samples / 32768, engine.sample_rate, rate)
        samples *= rng.uniform(0.25, 0.9) / numpy.abs(samples).max()
        if "snr_db" in of_split:
            samples = add_pink_noise(samples, rng.uniform(*of_split["snr_db"]), noise_rng)
        path = f"common_voice_{source}_{first + index}.mp3"
        soundfile.write(clips / path, samples, rate, format="MP3")
        translation = parallel.translate(sentence, target)
        client = f"espeak-{source}-{speaker:02d}"
        rows.append(dict(zip(SPLIT_COLUMNS, (path, transcript, translation, client), strict=True)))
        if split == settings["labelled_split"]:
            labels.append({"id": Path(path).stem} | timed_labels(speech, engine.sample_rate))
    if labels:
        lines = (json.dumps(label, separators=(",", ":"), ensure_ascii=False) for label in labels)
        write_text(Path(root, f"frame_labels.{source}.jsonl"), "".join(f"{x}\n" for x in lines))
    return rows


def write_tsv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    """Write rows as Common Voice and CoVoST 2 do: tabs, no quoting, backslash as escape."""
    import io

    stream = io.StringIO()
    writer = csv.DictWriter(
        stream,
        columns,
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
        escapechar="\\",
        lineterminator="\n",
        extrasaction="ignore",
    )
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def write_tables(
    folder: Path, direction: Sequence[str], rows: dict[str, list[dict[str, str]]]
) -> None:
    """The tables of one direction: validated.tsv, the translations, and one table per split."""
    pair = "_".join(direction)
    everything = [row | {"split": split} for split, of_split in rows.items() for row in of_split]
    blank = {"up_votes": "2", "down_votes": "0", "age": "", "gender": "", "accent": ""}
    write_tsv(folder / "validated.tsv", VALIDATED_COLUMNS, [row | blank for row in everything])
    write_tsv(folder / f"covost_v2.{pair}.tsv", ("path", "translation", "split"), everything)
    for split, of_split in rows.items():
        write_tsv(folder / f"covost_v2.{pair}.{split}.tsv", SPLIT_COLUMNS, of_split)


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
    modules = {m.__name__: sha256_file(str(m.__file__)) for m in (grammar, parallel)}
    config_hash = sha256_json(
        settings | {"seed": seed, "voices": VOICES, "english_corpus": ENGLISH_CORPUS} | modules
    )

    def fill(building: Path) -> dict:
        english = corpus_texts(seed, ENGLISH_CORPUS)
        taken = (line for split in ENGLISH_CORPUS["splits"] for line in english[split])
        texts = corpus_sentences(seed, settings, taken)
        counts = _run_workers(texts, seed, building, settings)
        languages = parallel.LANGUAGES
        rows = [
            {lang: parallel.translate(line, lang) for lang in languages} for line in texts["lm"]
        ]
        write_tsv(building / "lm_parallel.tsv", languages, rows)
        return {"seed": seed, "settings": settings, "utterances": counts}

    return make_corpus(out_folder, config_hash, fill)


def _run_workers(
    texts: dict[str, list[str]], seed: int, building: Path, settings: dict
) -> dict[str, int]:
    """One fresh process per split (eSpeak's state makes a second split depend on the first). Returns counts."""
    context = multiprocessing.get_context("spawn")
    counts = {}
    with context.Pool(min(2, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        jobs = {}
        for direction in settings["directions"]:
            for split in settings["splits"]:
                english = texts[f"{'_'.join(direction)}.{split}"]
                task = (direction, split, english, seed, str(building), settings)
                jobs["_".join(direction), split] = pool.apply_async(synthesise_list, task)
        for direction in settings["directions"]:
            pair = "_".join(direction)
            rows = {split: jobs[pair, split].get() for split in settings["splits"]}
            write_tables(building / "cv" / direction[0], direction, rows)
            counts |= {f"{pair} {split}": len(of_split) for split, of_split in rows.items()}
    return counts


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
    counts = read_json(Path(arguments.out_folder, "synthesis.json"))["utterances"]
    for name, count in counts.items():
        print(f"{name}: {count} utterances")


if __name__ == "__main__":
    sys.exit(main())
