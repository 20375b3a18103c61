"""What the prepare scripts share: reading text files, probing audio, the split on its way to a manifest, what is said.

Corpus-specific code ends here: a script fills a `SplitBuilder` and calls `write`.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechllm_prune.data.audio import POINTER, AudioInfo, BadAudio, probe_audio
from speechllm_prune.data.manifest import (
    Row,
    current_manifest,
    read_summary,
    write_manifest,
    write_skipped,
)
from speechllm_prune.runtime import UserError, raise_if_stopped

SAMPLE_RATE = 16000
DUPLICATE = "second utterance with this id"


# -------------------------------------------------------------------------------------------- read
def text_lines(path: str | Path, content: bytes) -> list[str]:
    """Lines of a text file. A byte-order mark and any kind of line end are accepted.

    Unlike `str.splitlines`, only line ends end a line: a line separator or form feed inside a text stays there.

    Raises
    ------
    UserError
        If it is not UTF-8, naming the line, or a git-lfs pointer.

    Example
    -------
    >>> text_lines("x.tsv", b"\\xef\\xbb\\xbfa\\tb\\r\\nc")
    ['a\\tb', 'c']
    """
    if content.startswith(POINTER):
        raise UserError(
            f"{path} is a git-lfs pointer, not the file; run `git lfs pull` where it was cloned"
        )
    try:
        return re.split(r"\r\n|\n|\r", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from None


def probe_all(paths: Sequence[Path], title: str) -> list[AudioInfo | BadAudio]:
    """What each file holds, or why it cannot be used; read in threads, since this waits for the disk."""
    from tqdm import tqdm

    def probe(path: Path) -> AudioInfo | BadAudio:
        try:
            return probe_audio(path)
        except BadAudio as error:
            return error

    results = []
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        try:
            for result in tqdm(
                pool.map(probe, paths), total=len(paths), desc=title, unit="file", disable=None
            ):
                results.append(result)
                raise_if_stopped()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


# ------------------------------------------------------------------------------------------- write
@dataclass
class SplitBuilder:
    """A split on its way to a manifest.

    Arguments
    ---------
    name : str
        Split.
    root : Path
        What `wav` is relative to.
    fingerprint : str
        Of everything in the corpus that the manifest depends on.
    """

    name: str
    root: Path
    fingerprint: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    filtered: list[tuple[str, str]] | None = None
    """Rows that a protocol leaves out: listed and counted, but not bad. None: there is no protocol."""
    rates: Counter[int] = field(default_factory=Counter)
    several_channels: int = 0

    def add(self, row: Row, info: AudioInfo | BadAudio) -> None:
        """Take a row with what its audio holds: into the manifest, or into the skipped list."""
        if isinstance(info, BadAudio):
            self.skipped.append((row.ID, str(info)))
            return
        self.rates[info.sample_rate] += info.sample_rate != SAMPLE_RATE
        self.several_channels += info.channels > 1
        duration = round(info.duration, 6)
        self.rows.append(Row(row.ID, duration, row.wav, row.text, row.source_text))

    def kept(self, manifest_folder: Path, max_bad_share: float) -> dict[str, Any] | None:
        """Summary of the manifest that is there already, if the corpus has not changed since."""
        csv_path = manifest_folder / f"{self.name}.csv"
        summary = current_manifest(csv_path, self.root, self.fingerprint, max_bad_share)
        if summary is not None:
            counts = summary["counts"]
            print(
                f"{csv_path}: kept, the corpus has not changed ({counts['utterances']} utterances, "
                f"{sum(counts['skipped'].values())} skipped)"
            )
        return summary

    def write(
        self,
        manifest_folder: Path,
        max_bad_share: float,
        extra: Mapping[str, Any] | None = None,
        corpus: str = "",
        official: int | None = None,
    ) -> dict[str, Any]:
        """Write the manifest and say what is in it.

        Arguments
        ---------
        manifest_folder : Path
            Of the corpus.
        max_bad_share : float
            Accepted share of unusable rows.
        extra : mapping, optional
            Further entries of the json.
        corpus : str
            Name, for the comparison with `official`.
        official : int, optional
            Rows of the published split: another number is a warning.

        Raises
        ------
        UserError
            If the split is empty, too much of it is bad, or it shares utterances with another kind of split.
        """
        _refuse_overlap(manifest_folder, self)
        facts = {"fingerprint": self.fingerprint, "several_channels": self.several_channels}
        summary = write_manifest(
            manifest_folder,
            self.name,
            self.rows,
            sorted(self.skipped),
            self.root,
            max_bad_share,
            extra=facts | dict(extra or {}),
            resampled=+self.rates,
            filtered=None if self.filtered is None else sorted(self.filtered),
        )
        say_summary(manifest_folder / f"{self.name}.csv", summary, print)
        total = len(self.rows) + len(self.skipped) + len(self.filtered or [])
        if official is not None and total != official:
            print(
                f"  warning: {corpus} {self.name} has {official} utterances, here are {total}: "
                "a part, or another corpus"
            )
        return summary


def _refuse_overlap(manifest_folder: Path, split: SplitBuilder) -> None:
    """Refuse utterances that a split of another kind has too (train and test; not train-5 and train-100).

    The manifest counts as unprepared from here on, and its skipped list names what is shared.
    """
    ids, audio = {row.ID for row in split.rows}, {row.wav: row.ID for row in split.rows}
    for csv_path in sorted(manifest_folder.glob("*.csv")):
        if _kind(csv_path.stem) == _kind(split.name) or csv_path.name.endswith(".skipped.csv"):
            continue
        try:
            read_summary(csv_path)
        except UserError:  # incomplete: it will be compared when it is prepared
            continue
        with open(csv_path, encoding="utf-8", newline="") as stream:
            others = [(row["ID"], row["wav"]) for row in csv.DictReader(stream)]
        shared = {ID for ID, _ in others} & ids | {audio[wav] for _, wav in others if wav in audio}
        if shared:
            path = manifest_folder / f"{split.name}.csv"
            path.with_suffix(".json").unlink(missing_ok=True)
            listed = [(ID, f"also in {csv_path.stem}") for ID in sorted(shared)]
            skipped_path = write_skipped(path, sorted([*split.skipped, *listed]))
            raise UserError(
                f"split '{split.name}': {len(shared)} utterances are in {csv_path} too, first '{min(shared)}'; a model "
                f"must not be evaluated on what it was trained or chosen on. They are listed in {skipped_path}; repair "
                f"the corpus, or delete {csv_path} if it is out of date"
            )


def _kind(split: str) -> str:
    """Kind of a split: train-clean-100 is train."""
    return re.split(r"[^a-z]", split.lower())[0] or split


def say_summary(csv_path: Path, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say what was found, what was left out and what will be changed."""
    counts = summary["counts"]
    listed = csv_path.with_suffix(".skipped.csv")
    say(f"{csv_path}: {counts['utterances']} utterances, {summary['hours']:.3f} h")
    for reason, count in counts["skipped"].items():
        say(f"  skipped: {count} {reason} (listed in {listed})")
    for reason, count in counts.get("filtered", {}).items():
        say(f"  left out by the protocol: {count} {reason} (listed in {listed})")
    for rate, count in counts["resampled"].items():
        say(
            f"  {count} utterances at {rate} Hz: resampled to {SAMPLE_RATE} Hz when they are loaded"
        )
    if summary["several_channels"]:
        say(
            f"  {summary['several_channels']} utterances with several channels: averaged when they are loaded"
        )


# ------------------------------------------------------------------------------------ command line
def prepare_parser(description: str, data_help: str, corpus: str, splits_help: str) -> Any:
    """The arguments that every prepare script has."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("data_folder", help=data_help)
    parser.add_argument(
        "manifest_folder", help=f"where <split>.csv goes, such as results/manifests/{corpus}"
    )
    parser.add_argument("--splits", help=f"comma-separated, such as {splits_help}")
    parser.add_argument(
        "--max_bad_share", type=float, default=0.01, help="accepted share of unusable utterances"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="prepare again, even if nothing changed"
    )
    return parser


def split_names(given: str | None) -> list[str] | None:
    """Names in a comma-separated list.

    Example
    -------
    >>> split_names("dev, test"), split_names(None)
    (['dev', 'test'], None)
    """
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]
