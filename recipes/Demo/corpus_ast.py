"""Read the demo's translation corpus for the bootstrap of its stand-in models: speech of one language, parallel text.

As with the English corpus, the bootstrap looks at the train split only; of the other splits it reads the text, and only
in order to keep it out of the decoder's.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from recipes.Demo import parallel
from recipes.Demo.corpus import Corpus
from speechllm_prune.runtime import UserError


@dataclass
class TranslationCorpus(Corpus):
    """One source language of a corpus in CoVoST 2 layout.

    Attributes
    ----------
    tables : list of Path
        The tables that it was read from.
    """

    tables: list[Path] = field(default_factory=list)

    def files(self) -> list[Path]:
        """All files that the bootstrap reads, sorted."""
        extra = [path for path in (self.labels_file, self.text_file) if path is not None]
        return sorted([*(audio for audio, _ in self.train.values()), *self.tables, *extra])


@dataclass
class ParallelText:
    """Text of the decoder that translates.

    Attributes
    ----------
    root : Path
        Folder that holds the language folders.
    sentences : list of dict
        Language -> sentence with case and full stop.
    splits : list of str
        Names of the tables whose text is held back.
    tables : list of Path
        All files that it was read from.
    """

    root: Path
    sentences: list[dict[str, str]]
    splits: list[str]
    tables: list[Path]

    def files(self) -> list[Path]:
        """All files that the bootstrap reads, sorted."""
        return self.tables


def is_translation_corpus(folder: str | Path) -> bool:
    """Whether a folder holds what `synthesise_ast.py` writes."""
    return Path(folder, "lm_parallel.tsv").is_file()


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a table without quoting, as Common Voice and CoVoST 2 write them."""
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))


def load_speech(folder: str | Path, language: str) -> TranslationCorpus:
    """The speech of one source language.

    Arguments
    ---------
    folder : str or Path
        OUT_FOLDER of `synthesise_ast.py`.
    language : str
        Source language, such as ``fr``.

    Returns
    -------
    TranslationCorpus
        Paths and transcripts, lower case and without full stop.

    Raises
    ------
    UserError
        If it has no speech of that language.
    """
    folder = Path(folder)
    root = folder / "cv" / language
    tables = sorted(root.glob("covost_v2.*.*.tsv"))  # one per split
    train: dict[str, tuple[Path, str]] = {}
    held_back = set()
    for table in tables:
        is_train = table.stem.endswith(".train")
        for row in read_tsv(table):
            text = parallel.spoken(row["sentence"])
            if is_train:
                train[Path(row["path"]).stem] = (root / "clips" / row["path"], text)
            else:
                held_back.add(text)
    if not train:
        found = ", ".join(sorted(path.name for path in folder.glob("cv/*"))) or "none"
        raise UserError(f"no training speech in {root} (languages found: {found}); give --language")
    labels = folder / f"frame_labels.{language}.jsonl"
    return TranslationCorpus(
        root=root.parent,
        train=train,
        held_back=held_back,
        splits=[table.stem.removeprefix("covost_v2.") for table in tables],
        labels_file=labels if labels.is_file() else None,
        text_file=None,
        tables=tables,
    )


def load_text(folder: str | Path) -> ParallelText:
    """The parallel text of the decoder, without what any evaluation split says.

    Arguments
    ---------
    folder : str or Path
        OUT_FOLDER of `synthesise_ast.py`.

    Returns
    -------
    ParallelText
        The sentences.
    """
    folder = Path(folder)
    tables = sorted(folder.glob("cv/*/covost_v2.*.*.tsv"))  # one per split
    held_back = {
        text
        for table in tables
        if not table.stem.endswith(".train")
        for row in read_tsv(table)
        for text in (row["sentence"], row["translation"])
    }
    source = folder / "lm_parallel.tsv"
    sentences = [row for row in read_tsv(source) if not held_back & set(row.values())]
    if not sentences:
        raise UserError(f"{source} holds no sentence; make the corpus with synthesise_ast.py")
    names = [table.stem.removeprefix("covost_v2.") for table in tables]
    return ParallelText(folder / "cv", sentences, names, sorted([*tables, source]))
