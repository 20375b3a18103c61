#!/usr/bin/env python3
"""Prepare manifests from a local copy of LoquaciousSet (parquet shards of the Hugging Face data set).

    python recipes/Loquacious/loquacious_prepare.py DATA_FOLDER MANIFEST_FOLDER [--splits dev]

A split is a folder with `*.parquet`; each shard has the columns ID, wav (a struct with the bytes of an audio file) and
text. Only `dev` is needed for the paper's tables. Nothing is unpacked: `wav` in the manifest is `dev/x.parquet#17`, and
training and decoding read that row. Running it again is a no-op while the shards are as they were.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speechllm_prune.data.audio import AudioInfo, BadAudio, probe_audio
from speechllm_prune.data.manifest import Row
from speechllm_prune.data.parquet import open_shard, rows_of
from speechllm_prune.data.preparation import (
    DUPLICATE,
    SplitBuilder,
    prepare_parser,
    split_names,
)
from speechllm_prune.runtime import UserError, raise_if_stopped, verb

TRAINING_CONFIGS = ("large", "clean", "medium", "small")
"""Folders of training shards (up to terabytes): prepared only where `--splits` names them."""

COLUMNS = ("ID", "text")

SOURCE_PATTERNS = {
    "librispeech": r"\d+-\d+-\d+",
    "common_voice": r"common_voice_.*",
    "voxpopuli": r".*-PLENARY-.*",
}
"""Ids as their corpora of origin write them. An id that matches none counts as `other`."""


def prepare_loquacious(
    data_folder: str | Path,
    manifest_folder: str | Path,
    splits: Sequence[str] | None = None,
    max_bad_share: float = 0.01,
    skip_existing: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write the manifests of a local copy of LoquaciousSet.

    Arguments
    ---------
    data_folder : str or Path
        The folder that holds `dev/*.parquet`, or its parent.
    manifest_folder : str or Path
        Where `<split>.csv` goes.
    splits : sequence of str, optional
        Splits to prepare; by default all that are found, but for the large training configurations.
    max_bad_share : float
        Largest share of unusable utterances that is accepted in a split.
    skip_existing : bool
        Whether to keep a complete manifest of the same, unchanged shards.

    Returns
    -------
    dict
        The summary (content of the json file) of each split.

    Raises
    ------
    UserError
        If a folder or split is missing, a shard cannot be read or lacks a column, or too much of a split is bad.
    """
    root, found = find_corpus(data_folder), splits_in(data_folder, manifest_folder)
    chosen = [name for name in found if name not in TRAINING_CONFIGS]
    if splits is not None:
        chosen = list(dict.fromkeys(splits))
    unknown = [name for name in chosen if name not in found]
    if unknown or not chosen:
        raise UserError(
            f"no split {', '.join(unknown) or 'named'} in {root}. Splits found: {', '.join(found)}"
        )
    return {
        split: _prepare_split(root, split, Path(manifest_folder), max_bad_share, skip_existing)
        for split in chosen
    }


def splits_in(data_folder: str | Path, manifest_folder: str | Path) -> list[str]:
    """Folders with shards, found without opening any of them."""
    root = find_corpus(data_folder)
    return sorted(folder.name for folder in _folders(root) if _shards(folder))


def find_corpus(data_folder: str | Path) -> Path:
    """The folder that holds the splits: `data_folder` itself, or one folder in it."""
    folder = Path(os.path.abspath(data_folder))
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}. Name the corpus folder (holding dev/), or its parent"
        )
    if _shards(folder):
        raise UserError(
            f"{folder} looks like a split itself; name the folder that holds it: {folder.parent}"
        )
    if any(_shards(child) for child in _folders(folder)):
        return folder
    roots = [child for child in _folders(folder) if any(map(_shards, _folders(child)))]
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise UserError(
            f"several folders in {folder} hold parquet shards: {', '.join(path.name for path in roots)}; name one"
        )
    raise UserError(f"no parquet shards in {folder}: expected dev/*.parquet there")


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _shards(split: Path) -> list[Path]:
    return sorted(path for path in split.glob("*.parquet") if path.is_file())


def _prepare_split(
    root: Path, split: str, manifest_folder: Path, max_bad_share: float, skip_existing: bool
) -> dict[str, Any]:
    from tqdm import tqdm

    shards = _shards(root / split)
    builder = SplitBuilder(split, root, _fingerprint(shards))
    if skip_existing:
        summary = builder.kept(manifest_folder, max_bad_share)
        if summary is not None:
            return summary
    total = sum(open_shard(shard, COLUMNS).metadata.num_rows for shard in shards)
    seen: set[str] = set()
    with tqdm(total=total, desc=split, unit="row", disable=None) as bar:
        for shard in shards:
            for number, ((utterance, text), content) in enumerate(rows_of(shard, COLUMNS)):
                wav = f"{shard.relative_to(root).as_posix()}#{number}"
                utterance, text = (utterance or "").strip(), (text or "").strip()
                builder.add(
                    Row(utterance or wav, 0.0, wav, text), _judge(utterance, text, content, seen)
                )
                seen.add(utterance)
                bar.update()
                raise_if_stopped()
    return builder.write(manifest_folder, max_bad_share, {"source_patterns": SOURCE_PATTERNS})


def _judge(
    utterance: str, text: str, content: bytes | None, seen: set[str]
) -> AudioInfo | BadAudio:
    """What the audio of a row holds, or why the row cannot be used."""
    if not utterance:
        return BadAudio("row without ID")
    if utterance in seen:
        return BadAudio(DUPLICATE)
    if not text:
        return BadAudio("empty transcript")
    if not content:
        return BadAudio("row without audio bytes")
    try:
        return probe_audio(content)
    except BadAudio as error:
        return error


def _fingerprint(shards: Sequence[Path]) -> str:
    """Of name, size and end of each shard: the end of a parquet file states where everything in it lies."""
    digest = hashlib.sha256(repr(sorted(SOURCE_PATTERNS.items())).encode())
    for shard in shards:
        size = shard.stat().st_size
        with open(shard, "rb") as stream:
            stream.seek(max(0, size - (1 << 16)))
            digest.update(f"{shard.parent.name}/{shard.name} {size}\n".encode() + stream.read())
    return digest.hexdigest()


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    parser = prepare_parser(
        "Prepare manifests from a local copy of LoquaciousSet.",
        "the folder that holds dev/*.parquet, or its parent",
        "loquacious",
        "dev (default: all found, but for large, clean, medium and small)",
    )
    arguments = parser.parse_args(argv)
    prepare_loquacious(
        arguments.data_folder,
        arguments.manifest_folder,
        split_names(arguments.splits),
        arguments.max_bad_share,
        skip_existing=not arguments.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
