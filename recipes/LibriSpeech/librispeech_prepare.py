#!/usr/bin/env python3
"""Prepare manifests from LibriSpeech, or from any corpus in its layout.

    python recipes/LibriSpeech/librispeech_prepare.py DATA_FOLDER MANIFEST_FOLDER [--splits dev-clean,test-clean]

A split is a folder `<split>/<speaker>/<chapter>/` with `<speaker>-<chapter>.trans.txt` (lines
`ID TEXT`) and `ID.flac` or `ID.wav`; its name is free. Writes `MANIFEST_FOLDER/<split>.csv`,
`.json` and `.skipped.csv`. Running it again is a no-op while the corpus is as it was: same file
names and sizes, same transcripts. (Audio replaced by other audio of exactly the same size is not
noticed; `--overwrite` prepares again.)
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speechllm_prune.data.manifest import Row
from speechllm_prune.data.preparation import (
    SplitBuilder,
    prepare_parser,
    probe_all,
    split_names,
    text_lines,
)
from speechllm_prune.runtime import UserError, verb

AUDIO_SUFFIXES = (".flac", ".wav")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
OFFICIAL_UTTERANCES = {
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
}
"""Utterances of the published splits: a difference is said, and is right for a subset of LibriSpeech."""


def prepare_librispeech(
    data_folder: str | Path,
    manifest_folder: str | Path,
    splits: Sequence[str] | None = None,
    max_bad_share: float = 0.01,
    skip_existing: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write the manifests of a corpus in LibriSpeech layout.

    Arguments
    ---------
    data_folder : str or Path
        The corpus folder, or its parent (holding `LibriSpeech/`).
    manifest_folder : str or Path
        Where `<split>.csv` goes.
    splits : sequence of str, optional
        Splits to prepare; by default all that are found.
    max_bad_share : float
        Largest share of unusable utterances that is accepted in a split.
    skip_existing : bool
        Whether to keep a complete manifest of the same, unchanged corpus.

    Returns
    -------
    dict
        The summary (content of the json file) of each split.

    Raises
    ------
    UserError
        If a folder or split is missing or empty, has no transcripts, or too much of it is bad.
    """
    root = find_corpus(data_folder)
    chosen = _choose_splits(root, splits)
    missing = [split for split in OFFICIAL_UTTERANCES if split not in chosen]
    if splits is None and 0 < len(missing) < len(OFFICIAL_UTTERANCES):
        print(f"not in {root}: {', '.join(missing)}")
    return {
        split: _prepare_split(root, split, Path(manifest_folder), max_bad_share, skip_existing)
        for split in chosen
    }


# -------------------------------------------------------------------------------------- find splits
def find_corpus(data_folder: str | Path) -> Path:
    """The folder that holds the splits: `data_folder` itself, `data_folder/LibriSpeech`, or the one folder in it."""
    folder = Path(os.path.abspath(data_folder))
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}. Name the corpus folder, or its parent (holding LibriSpeech/)"
        )
    for root in (folder / "LibriSpeech", folder):
        if root.is_dir() and _is_corpus(root):
            return root
    roots = [] if _has(folder, ".trans.txt") else [c for c in _folders(folder) if _is_corpus(c)]
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise UserError(
            f"several folders in {folder} are in LibriSpeech layout: {', '.join(path.name for path in roots)}; name one"
        )
    expected = "<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt"
    if _has(folder, ".trans.txt"):
        raise UserError(
            f"{folder} looks like a split itself; name the folder that holds it: {folder.parent}"
        )
    packed = sorted(path.name for path in folder.iterdir() if path.name.endswith(ARCHIVES))
    hint = f"; unpack {', '.join(packed)} first (nothing is unpacked here)" if packed else ""
    raise UserError(
        f"no transcripts in {folder}: expected {expected} there, or in its folder LibriSpeech{hint}"
    )


def _is_corpus(root: Path) -> bool:
    return any(_has(split, ".trans.txt") for split in _folders(root))


def splits_in(data_folder: str | Path, manifest_folder: str | Path) -> list[str]:
    """Splits with transcripts, found without reading any of them."""
    root = find_corpus(data_folder)
    return sorted(folder.name for folder in _folders(root) if _has(folder, ".trans.txt"))


def _choose_splits(root: Path, splits: Sequence[str] | None) -> list[str]:
    found = sorted(folder.name for folder in _folders(root) if _has(folder, ".trans.txt"))
    if splits is None:
        mute = sorted(folder.name for folder in _folders(root) if _has(folder, *AUDIO_SUFFIXES))
        mute = [name for name in mute if name not in found]
        if mute:
            raise UserError(
                f"no transcripts (*.trans.txt) in {', '.join(mute)} of {root}, though there is audio. "
                f"To leave it out: --splits {','.join(found)}"
            )
        return found
    splits = list(dict.fromkeys(splits))
    for split in splits:
        if split in found:
            continue
        if (root / split).is_dir() and Path(split).name == split:
            state = (
                "has audio but no transcripts (*.trans.txt)"
                if _has(root / split, *AUDIO_SUFFIXES)
                else "is empty"
            )
            raise UserError(
                f"split '{split}' {state}: {root / split}. Splits found: {', '.join(found)}"
            )
        raise UserError(f"no split '{split}' in {root}. Splits found: {', '.join(found)}")
    if not splits:
        raise UserError(f"no split named. Splits found: {', '.join(found)}")
    return splits


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))


def _has(split: Path, *suffixes: str) -> bool:
    """Whether a file `*/*/*<suffix>` exists; stops at the first one (a big split has 100,000 files)."""
    return any(
        name.lower().endswith(suffixes)
        for speaker in _folders(split)
        for chapter in _folders(speaker)
        for name in _names(chapter)
    )


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder at any depth, in order; links are followed, but into no folder twice."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and real not in seen
        )
        if real not in seen:
            seen.add(real)
            yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


# --------------------------------------------------------------------------------------- read splits
@dataclass
class _Scan:
    """What the folders of a split hold, before any audio is opened."""

    texts: dict[str, str] = field(default_factory=dict)
    audio: dict[str, Path] = field(default_factory=dict)  # relative to the corpus folder
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: str = ""


def _scan(root: Path, split: str) -> _Scan:
    scan, digest = _Scan(), hashlib.sha256()
    origin: dict[str, str] = {}
    for path in _files(root / split):
        relative = path.relative_to(root)
        if not _is_utf8(relative):
            scan.skipped.append((ascii(path.name), "file name that is not UTF-8"))
        elif path.name.lower().endswith(".trans.txt"):
            content = path.read_bytes()
            digest.update(f"{relative.as_posix()} {len(content)}\n".encode() + content)
            for number, (utterance, text) in enumerate(_parse_transcript(path, content), start=1):
                if utterance in origin:
                    raise UserError(
                        f"the utterance id '{utterance}' occurs twice: {origin[utterance]} and {path}, entry {number}"
                    )
                origin[utterance] = f"{path}, entry {number}"
                scan.texts[utterance] = text
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            size = path.stat().st_size if path.is_file() else -1  # a link that leads nowhere
            digest.update(f"{relative.as_posix()} {size}\n".encode())
            if path.stem in scan.audio:
                scan.skipped.append((path.stem, "second audio file of an utterance"))
            else:
                scan.audio[path.stem] = relative
    scan.fingerprint = digest.hexdigest()
    return scan


def _is_utf8(path: Path) -> bool:
    """Whether a path can be written into a manifest: Linux also takes names that are no text."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_transcript(path: Path, content: bytes) -> Iterable[tuple[str, str]]:
    """(ID, text) of each line. A byte-order mark and CRLF are accepted, blank lines are not entries."""
    for line in text_lines(path, content):
        if line.strip():
            utterance, *words = line.split()
            yield utterance, " ".join(words)


def _select(scan: _Scan) -> list[str]:
    """Utterances that have a text and an audio file; the others go to the skipped list."""
    chosen = []
    for utterance in sorted(scan.texts.keys() | scan.audio.keys()):
        if utterance not in scan.texts:
            scan.skipped.append((utterance, "audio without transcript"))
        elif utterance not in scan.audio:
            scan.skipped.append((utterance, "transcript without audio"))
        elif not scan.texts[utterance]:
            scan.skipped.append((utterance, "empty transcript"))
        else:
            chosen.append(utterance)
    return chosen


# -------------------------------------------------------------------------------------- write splits
def _prepare_split(
    root: Path, split: str, manifest_folder: Path, max_bad_share: float, skip_existing: bool
) -> dict[str, Any]:
    scan = _scan(root, split)
    builder = SplitBuilder(split, root, scan.fingerprint)
    if skip_existing:
        summary = builder.kept(manifest_folder, max_bad_share)
        if summary is not None:
            return summary
    chosen = _select(scan)
    builder.skipped = scan.skipped
    probed = probe_all([root / scan.audio[utterance] for utterance in chosen], split)
    for utterance, info in zip(chosen, probed, strict=True):
        wav = scan.audio[utterance].as_posix()
        builder.add(Row(utterance, 0.0, wav, scan.texts[utterance]), info)
    official = OFFICIAL_UTTERANCES.get(split)
    return builder.write(manifest_folder, max_bad_share, corpus="LibriSpeech", official=official)


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    parser = prepare_parser(
        "Prepare manifests of LibriSpeech, or of a corpus in its layout.",
        "the corpus folder, or its parent (holding LibriSpeech/)",
        "librispeech",
        "dev-clean,test-clean (default: all found)",
    )
    arguments = parser.parse_args(argv)
    prepare_librispeech(
        arguments.data_folder,
        arguments.manifest_folder,
        split_names(arguments.splits),
        arguments.max_bad_share,
        skip_existing=not arguments.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
