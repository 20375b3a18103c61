"""Find and read the tables of CoVoST 2 and Common Voice: tab separated, a backslash escapes, nothing is quoted.

`null` and `NA` are words like any other, and a quotation mark is a character of the text.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechllm_prune.data.preparation import text_lines
from speechllm_prune.runtime import UserError

SPLITS = ("train", "dev", "test")
_SPLIT_NAMES = {"train": ("train", "train_covost"), "dev": ("dev",), "test": ("test",)}


@dataclass(frozen=True)
class Entry:
    """A row of a table."""

    clip: str
    sentence: str
    translation: str

    @property
    def utterance(self) -> str:
        """The clip's name without its ending."""
        return os.path.splitext(self.clip.replace("\\", "/").rsplit("/", 1)[-1])[0] or self.clip


@dataclass
class Read:
    """A split as the tables have it."""

    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Tables:
    """Where the clips and tables of one direction lie.

    Arguments
    ---------
    folder : Path
        Of the source language: holds `clips/`.
    pair : str
        Such as `en_de`.
    where : Path
        Folder of the tables.
    """

    folder: Path
    pair: str
    where: Path

    @property
    def clips(self) -> Path:
        """Folder of the audio."""
        return self.folder / "clips"

    @property
    def joint(self) -> Path:
        """The published table of all splits, without transcripts."""
        return self.where / f"covost_v2.{self.pair}.tsv"

    @property
    def validated(self) -> Path:
        """The table of Common Voice that has the transcripts."""
        return self.folder / "validated.tsv"

    def of_split(self, split: str) -> Path:
        """The table of one split, with transcripts."""
        return self.where / f"covost_v2.{self.pair}.{split}.tsv"

    def files(self, split: str) -> list[Path]:
        """The tables that a split is read from."""
        one = self.of_split(split)
        return [one] if one.is_file() else [self.joint, self.validated]

    def splits(self) -> list[str]:
        """Splits that there are tables for."""
        joint = self.joint.is_file()
        return [split for split in SPLITS if joint or self.of_split(split).is_file()]


# -------------------------------------------------------------------------------------------- find
def find_tables(data_folder: str | Path, source: str, target: str) -> Tables:
    """Find clips and tables in `data_folder`, in its folder of the language, or one level deeper.

    Raises
    ------
    UserError
        Saying what was looked for and what there is.
    """
    top, pair = Path(os.path.abspath(data_folder)), f"{source}_{target}"
    if not top.is_dir():
        raise UserError(
            f"no such folder: {top}. Name the folder of Common Voice that holds {source}/clips"
        )
    children = sorted(path for path in top.iterdir() if path.is_dir())
    candidates = [top, top / source, *(child / source for child in children)]
    languages = [path for path in dict.fromkeys(candidates) if (path / "clips").is_dir()]
    if not languages:
        raise UserError(
            f"no clips in {top}: expected {source}/clips/*.mp3 of Common Voice there, or one level deeper"
        )
    found = []
    for folder in languages:
        for where in dict.fromkeys((folder, folder.parent, top)):
            tables = Tables(folder, pair, where)
            if tables.splits():
                found.append(tables)
                break
    if not found:
        there = sorted(
            {path.name for folder in languages for path in folder.glob("covost_v2.*.tsv")}
        )
        raise UserError(
            f"no table covost_v2.{pair}.tsv (or .train.tsv, .dev.tsv, .test.tsv) in {languages[0]}; "
            f"there is {', '.join(there) or 'no table of CoVoST 2'}"
        )
    if len(found) > 1:
        names = ", ".join(str(tables.folder) for tables in found)
        raise UserError(f"{pair} is there several times: {names}; name one of these folders")
    return found[0]


# -------------------------------------------------------------------------------------------- read
def read_split(tables: Tables, split: str) -> Read:
    """Rows of a split, from its own table or from the published one joined with Common Voice's transcripts."""
    result = Read()
    if tables.of_split(split).is_file():
        columns = ("path", "sentence", "translation")
        for values in _read_table(tables.of_split(split), columns, result):
            result.entries.append(Entry(*values))
        return result
    if not tables.validated.is_file():
        raise UserError(
            f"{tables.joint} has no transcripts: {tables.validated} of Common Voice 4 is needed as well"
        )
    sentences = _sentences(tables.validated)
    for clip, translation, name in _read_table(
        tables.joint, ("path", "translation", "split"), result
    ):
        if name not in _SPLIT_NAMES[split]:
            continue
        sentence = sentences.get(clip)
        entry = Entry(clip, sentence or "", translation)
        if sentence is None:
            result.skipped.append((entry.utterance, "no transcript in validated.tsv"))
        else:
            result.entries.append(entry)
    return result


def _sentences(validated: Path) -> dict[str, str]:
    sentences: dict[str, str] = {}
    for clip, sentence in _read_table(validated, ("path", "sentence"), Read()):
        sentences.setdefault(clip, sentence)
    return sentences


def _read_table(path: Path, columns: Sequence[str], result: Read) -> list[list[str]]:
    """The named columns of each row; rows with another number of cells are skipped."""
    lines = text_lines(path, path.read_bytes())
    header = _cells(lines[0])
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; its columns are {', '.join(header)}"
        )
    places = [header.index(name) for name in columns]
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = _cells(line)
        if len(cells) != len(header) or not cells[places[0]].strip():
            reason = "row with too few or too many columns"
            reason = reason if len(cells) != len(header) else "row without path"
            result.skipped.append((f"{path.name}, line {number}", reason))
            continue
        rows.append([cells[place].strip(" \t") for place in places])
    return rows


def _cells(line: str) -> list[str]:
    r"""Cells of a line.

    Example
    -------
    >>> _cells('a.mp3\tHe said "no\tnull\tback\\\\slash')
    ['a.mp3', 'He said "no', 'null', 'back\\slash']
    """
    if "\\" not in line:
        return line.split("\t")
    return next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"), [])
