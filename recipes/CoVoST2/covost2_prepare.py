#!/usr/bin/env python3
"""Prepare manifests of CoVoST 2 from a local copy of Common Voice 4 and the CoVoST 2 tables.

    python recipes/CoVoST2/covost2_prepare.py DATA_FOLDER MANIFEST_FOLDER --source en --target de
                                              [--protocol standard|speechbrain] [--splits dev,test]

Needs `<source>/clips/*.mp3` and, beside it, either `covost_v2.<source>_<target>.{train,dev,test}.tsv` or
`covost_v2.<source>_<target>.tsv` with `validated.tsv`. `text` is the translation, `source_text` the transcript.
A manifest folder holds one direction in one protocol (see protocols.py); its name says which, such as
`covost2_en_de_standard`, and the three options may then be left out. Running it again is a no-op while tables and clips
are as they were.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.CoVoST2.protocols import PROTOCOLS, apply_speechbrain
from recipes.CoVoST2.tables import SPLITS, Entry, Tables, find_tables, read_split
from speechllm_prune.data.manifest import Row, read_summary
from speechllm_prune.data.preparation import (
    DUPLICATE,
    SplitBuilder,
    prepare_parser,
    probe_all,
    split_names,
)
from speechllm_prune.runtime import UserError, verb

OFFICIAL_UTTERANCES = {
    "en_de": {"train": 289430, "dev": 15531, "test": 15531},
    "fr_en": {"train": 207374, "dev": 14760, "test": 14760},
}
"""Rows of the published splits: a difference is said, and is right for a part of CoVoST 2."""


@dataclass(frozen=True)
class Variety:
    """What a manifest folder holds: one direction in one protocol."""

    source: str
    target: str
    protocol: str

    @property
    def pair(self) -> str:
        """Direction as the tables write it."""
        return f"{self.source}_{self.target}"

    @property
    def corpus(self) -> str:
        """Name of the corpus in manifests and results."""
        return f"covost2_{self.pair}_{self.protocol}"


def prepare_covost2(
    data_folder: str | Path,
    manifest_folder: str | Path,
    splits: Sequence[str] | None = None,
    max_bad_share: float = 0.01,
    skip_existing: bool = True,
    source: str | None = None,
    target: str | None = None,
    protocol: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the manifests of one direction of CoVoST 2.

    Arguments
    ---------
    data_folder : str or Path
        The folder with `clips/` and the tables, its parent, or the parent's parent.
    manifest_folder : str or Path
        Where `<split>.csv` goes; named `covost2_<source>_<target>_<protocol>` it says the last three arguments.
    splits : sequence of str, optional
        Of train, dev and test; by default those that are found.
    max_bad_share : float
        Largest share of unusable utterances that is accepted in a split.
    skip_existing : bool
        Whether to keep a complete manifest of the same, unchanged corpus.
    source, target : str, optional
        Language codes as in the tables.
    protocol : str, optional
        standard | speechbrain.

    Returns
    -------
    dict
        The summary (content of the json file) of each split.

    Raises
    ------
    UserError
        If something is missing or contradicts the folder, a table is damaged, or too much of a split is bad.
    """
    folder = Path(manifest_folder)
    variety = choose_variety(folder, source, target, protocol)
    tables = find_tables(data_folder, variety.source, variety.target)
    found = tables.splits()
    chosen = found if splits is None else list(dict.fromkeys(splits))
    unknown = [name for name in chosen if name not in found]
    if unknown or not chosen:
        raise UserError(
            f"no split {', '.join(unknown) or 'named'} of {variety.pair} in {tables.folder}. "
            f"Splits found: {', '.join(found)}"
        )
    missing = [name for name in SPLITS if name not in found]
    if missing:
        print(f"not in {tables.folder}: {variety.pair} {', '.join(missing)}")
    _refuse_mixture(folder, variety, chosen)
    return {
        split: _prepare_split(tables, split, folder, variety, max_bad_share, skip_existing)
        for split in chosen
    }


def splits_in(data_folder: str | Path, manifest_folder: str | Path) -> list[str]:
    """Splits that there are tables for, of the direction that the manifest folder's name says."""
    variety = choose_variety(Path(manifest_folder), None, None, None)
    return find_tables(data_folder, variety.source, variety.target).splits()


def choose_variety(
    folder: Path, source: str | None, target: str | None, protocol: str | None
) -> Variety:
    """Direction and protocol: as given, else as the folder's name says, which they must not contradict.

    Example
    -------
    >>> choose_variety(Path("results/manifests/covost2_fr_en_speechbrain"), None, None, None)
    Variety(source='fr', target='en', protocol='speechbrain')
    """
    parts = folder.name.split("_")
    says = len(parts) == 4 and (parts[0] == "covost2" or parts[3] in PROTOCOLS)
    named = parts[1:] if says else [None, None, None]
    given = [source, target, protocol]
    values = [value or name for value, name in zip(given, named, strict=True)]
    if not (values[0] and values[1]):
        raise UserError(
            f"the folder's name '{folder.name}' does not say the direction: give --source and --target, such as "
            "--source en --target de, or name the folder covost2_en_de_standard"
        )
    variety = Variety(values[0], values[1], values[2] or PROTOCOLS[0])
    if variety.protocol not in PROTOCOLS:
        raise UserError(
            f"no protocol '{variety.protocol}'; there are {', '.join(PROTOCOLS)} (recipes/CoVoST2/README.md)"
        )
    if says and named != [variety.source, variety.target, variety.protocol]:
        raise UserError(
            f"{folder} is named as the manifests of another direction or protocol; write these to "
            f"{folder.with_name(variety.corpus)}"
        )
    return variety


def _refuse_mixture(folder: Path, variety: Variety, chosen: Sequence[str]) -> None:
    """One folder, one direction and protocol: results are named by it."""
    for split in SPLITS:
        try:
            summary = read_summary(folder / f"{split}.csv") if split not in chosen else {}
        except UserError:
            continue
        there = tuple(summary.get(key) for key in ("source", "target", "protocol"))
        if summary and there != (variety.source, variety.target, variety.protocol):
            raise UserError(
                f"{folder} holds {split} of covost2_{'_'.join(map(str, there))}, which must not be mixed with "
                f"{variety.corpus}; write this to {folder.with_name(variety.corpus)}"
            )


def _prepare_split(
    tables: Tables,
    split: str,
    folder: Path,
    variety: Variety,
    max_bad_share: float,
    skip_existing: bool,
) -> dict[str, Any]:
    read = read_split(tables, split)
    builder = SplitBuilder(split, tables.folder, _fingerprint(tables, split, read.entries, variety))
    if skip_existing:
        summary = builder.kept(folder, max_bad_share)
        if summary is not None:
            return summary
    builder.skipped = list(read.skipped)
    rows = _rows(builder, read.entries, variety)
    probed = probe_all([tables.folder / row.wav for row in rows], f"{variety.pair} {split}")
    for row, info in zip(rows, probed, strict=True):
        builder.add(row, info)
    return builder.write(
        folder,
        max_bad_share,
        {"source": variety.source, "target": variety.target, "protocol": variety.protocol},
        corpus=f"CoVoST 2 {variety.pair}",
        official=OFFICIAL_UTTERANCES.get(variety.pair, {}).get(split),
    )


def _rows(builder: SplitBuilder, entries: Sequence[Entry], variety: Variety) -> list[Row]:
    """Rows whose audio is worth opening; the others go to the lists of the builder."""
    rows, seen = [], set[str]()
    if variety.protocol == "speechbrain":
        builder.filtered = []
    for entry in entries:
        utterance = entry.utterance
        sentence, translation = entry.sentence, entry.translation
        inside = os.path.normpath(entry.clip)
        if os.path.isabs(inside) or inside.split(os.sep)[0] in ("..", ".") or "\0" in inside:
            builder.skipped.append((utterance, "path outside the corpus"))
        elif utterance in seen:
            builder.skipped.append((utterance, DUPLICATE))
        elif not sentence or not translation:
            builder.skipped.append(
                (utterance, f"empty {'translation' if sentence else 'transcript'}")
            )
        else:
            seen.add(utterance)
            if builder.filtered is not None:
                kept = apply_speechbrain(
                    entry.clip, sentence, translation, variety.source, variety.target
                )
                if isinstance(kept, str):
                    builder.filtered.append((utterance, kept))
                    continue
                sentence, translation = kept
            wav = Path("clips", inside).as_posix()
            rows.append(Row(utterance, 0.0, wav, translation, sentence))
    return rows


def _fingerprint(tables: Tables, split: str, entries: Sequence[Entry], variety: Variety) -> str:
    """Of direction, protocol, tables, and the size of each clip."""
    digest = hashlib.sha256(repr(variety).encode())
    for path in tables.files(split):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    for entry in entries:
        try:
            size = os.stat(tables.clips / entry.clip).st_size
        except (OSError, ValueError):
            size = -1
        digest.update(f"{size}\n".encode())
    return digest.hexdigest()


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    parser = prepare_parser(
        "Prepare manifests of CoVoST 2 from Common Voice 4 and the CoVoST 2 tables.",
        "the folder that holds <source>/clips, its parent, or the folder <source> itself",
        "covost2_en_de_standard",
        "dev,test (default: all found)",
    )
    parser.add_argument("--source", help="language that is spoken, such as en")
    parser.add_argument("--target", help="language of the translation, such as de")
    parser.add_argument(
        "--protocol",
        help="standard (default: all rows as they are) or speechbrain (its lower-casing and row filter)",
    )
    arguments = parser.parse_args(argv)
    prepare_covost2(
        arguments.data_folder,
        arguments.manifest_folder,
        split_names(arguments.splits),
        arguments.max_bad_share,
        skip_existing=not arguments.overwrite,
        source=arguments.source,
        target=arguments.target,
        protocol=arguments.protocol,
    )


if __name__ == "__main__":
    sys.exit(main())
