"""Read a small corpus in LibriSpeech layout for the bootstrap of the stand-in models.

The bootstrap looks at the train splits only; of every other split it reads the transcripts, and
only in order to keep them out of the decoder's text.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from speechllm_prune.runtime import UserError


@dataclass
class Corpus:
    """Paths and transcripts of a corpus.

    Attributes
    ----------
    root : Path
        Folder that holds the split folders.
    train : dict
        Utterance id -> (audio path, lower-case transcript) of all ``train*`` splits, in order.
    held_back : set of str
        Lower-case transcripts of all other splits.
    splits : list of str
        Names of the split folders.
    labels_file : Path or None
        Timed labels of synthetic speech (``frame_labels.jsonl`` beside the tree).
    text_file : Path or None
        Text for the decoder (``lm_text.txt`` beside the tree).
    """

    root: Path
    train: dict[str, tuple[Path, str]]
    held_back: set[str]
    splits: list[str]
    labels_file: Path | None
    text_file: Path | None

    @property
    def words(self) -> list[str]:
        """Distinct words of the train transcripts, sorted."""
        return sorted({word for _, text in self.train.values() for word in text.split()})

    def labels(self) -> dict[str, dict]:
        """Timed labels: utterance id -> ``phonemes`` and ``words``, lists of [name, start in s]."""
        if self.labels_file is None:
            raise UserError(
                f"{self.root} has no frame_labels.jsonl, which synthesise.py writes; "
                "use --labels ctc for a corpus of recorded speech"
            )
        rows = [json.loads(line) for line in self.labels_file.read_text().splitlines()]
        return {row.pop("id"): row for row in rows}

    def decoder_text(self) -> list[str]:
        """Sentences of ``lm_text.txt`` that no other split speaks; empty if there is no such file."""
        if self.text_file is None:
            return []
        lines = [line.strip().lower() for line in self.text_file.read_text().splitlines()]
        return [line for line in lines if line and line not in self.held_back]

    def files(self) -> list[Path]:
        """All files that the bootstrap reads, sorted."""
        extra = [path for path in (self.labels_file, self.text_file) if path is not None]
        transcripts = self.root.glob("*/*/*/*.trans.txt")
        return sorted([*(audio for audio, _ in self.train.values()), *transcripts, *extra])


def load_corpus(folder: str | Path) -> Corpus:
    """Find a corpus.

    Arguments
    ---------
    folder : str or Path
        Folder of the splits, or its parent (which holds ``LibriSpeech``).

    Returns
    -------
    Corpus
        Paths and transcripts.

    Raises
    ------
    UserError
        If there is no train split with audio and transcripts.
    """
    folder = Path(folder)
    root = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
    if not root.is_dir():
        raise UserError(f"{folder} does not exist; name a folder in LibriSpeech layout")
    splits = sorted({path.parts[-4] for path in root.glob("*/*/*/*.trans.txt")})
    train: dict[str, tuple[Path, str]] = {}
    held_back = set()
    for split in splits:
        for uttid, audio, text in _utterances(root / split):
            if not split.startswith("train"):
                held_back.add(text)
            elif audio.is_file() and text:
                train[uttid] = (audio, text)
    if not train:
        raise UserError(
            f"no utterance of a train split below {root} (found splits: {', '.join(splits) or 'none'}); "
            "the stand-in models are trained on it, so a folder train-clean-100 is needed"
        )
    beside = root.parent
    labels_file, text_file = beside / "frame_labels.jsonl", beside / "lm_text.txt"
    return Corpus(
        root=root,
        train=train,
        held_back=held_back,
        splits=splits,
        labels_file=labels_file if labels_file.is_file() else None,
        text_file=text_file if text_file.is_file() else None,
    )


def _utterances(split: Path):
    """Yield (id, audio path, lower-case transcript) of a split folder, sorted."""
    for transcripts in sorted(split.glob("*/*/*.trans.txt")):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            uttid, _, text = line.strip().partition(" ")
            if uttid:
                yield uttid, transcripts.parent / f"{uttid}.flac", " ".join(text.lower().split())


def read_audio(path: Path, sample_rate: int):
    """Read a mono waveform as float32, resampled if the file has another rate.

    Arguments
    ---------
    path : Path
        Audio file.
    sample_rate : int
        Rate wanted.

    Returns
    -------
    numpy.ndarray
        float32 samples.
    """
    import soundfile

    from recipes.Demo.synthesise import resample

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resample(samples.mean(axis=1), rate, sample_rate).astype("float32")
