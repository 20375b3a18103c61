"""The manifest: the narrow waist between the corpora and everything else.

A prepare script ends in `write_manifest`, every other part of the project begins with `read_manifest`. One split is
three files, and the last one written, `<split>.json`, says that the others are complete::

    <split>.csv            ID,duration,wav,text[,source_text]; wav is relative to data_root
    <split>.skipped.csv    id,reason of every row that was left out
    <split>.json           data_root, counts, hours, sha256 of the csv, fingerprint of the source

The text is the corpus's own; its case is changed later, where targets are made. No torch here.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from speechllm_prune.experiment import (
    SCHEMA,
    provenance,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from speechllm_prune.runtime import UserError

COLUMNS = ("ID", "duration", "wav", "text")
"""Columns of every manifest; `source_text` may follow (the transcript, where `text` is a translation)."""


@dataclass(frozen=True)
class Row:
    """One utterance.

    Arguments
    ---------
    ID : str
        Unique in its manifest.
    duration : float
        Seconds.
    wav : str
        Audio file: relative to data_root when written, absolute when read. `dev/x.parquet#17` is row 17 of a
        parquet file.
    text : str
        Reference as in the corpus: the transcript, or the translation.
    source_text : str, optional
        Transcript in the source language, where `text` is a translation.
    """

    ID: str
    duration: float
    wav: str
    text: str
    source_text: str | None = None


def manifest_path(manifest_folder: str | Path, key: str) -> Path:
    """CSV file of a manifest key such as `librispeech/test-clean`.

    Example
    -------
    >>> manifest_path("results/manifests", "librispeech/test-clean").as_posix()
    'results/manifests/librispeech/test-clean.csv'
    """
    parts = key.split("/")
    if len(parts) != 2 or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"'{key}' is no manifest key; write <corpus>/<split>, such as librispeech/test-clean"
        )
    return Path(manifest_folder) / parts[0] / f"{parts[1]}.csv"


def prepare_command(csv_path: str | Path, prepare: str = "") -> str:
    """The command that writes a manifest, guessed from its folder's name (the corpus), or else from the key `prepare`.

    Example
    -------
    >>> prepare_command("results/manifests/librispeech/dev-clean.csv")
    'python recipes/LibriSpeech/librispeech_prepare.py DATA_FOLDER results/manifests/librispeech'
    >>> prepare_command("m/covost2_en_de_standard/dev.csv").removeprefix("python recipes/CoVoST2/")
    'covost2_prepare.py DATA_FOLDER m/covost2_en_de_standard --source en --target de --protocol standard'
    >>> prepare_command("m/demo/dev.csv", "recipes.LibriSpeech.librispeech_prepare.prepare_librispeech")
    'python recipes/LibriSpeech/librispeech_prepare.py DATA_FOLDER m/demo'
    """
    folder = Path(csv_path).parent
    repo = Path(__file__).resolve().parents[2]
    scripts = sorted(repo.glob(f"recipes/*/{folder.name.split('_')[0]}_prepare.py"))
    module = prepare.rpartition(".")[0] or "recipes.CORPUS.corpus_prepare"
    script = scripts[0].relative_to(repo) if scripts else Path(f"{module.replace('.', '/')}.py")
    names = folder.name.split("_")[1:]  # <corpus>_<source>_<target>_<protocol> for translation
    options = (
        zip(("--source", "--target", "--protocol"), names, strict=True) if len(names) == 3 else ()
    )
    told = "".join(f" {option} {name}" for option, name in options)
    return f"python {script.as_posix()} DATA_FOLDER {folder.as_posix()}{told}"


# ------------------------------------------------------------------------------------------ write
def write_manifest(
    folder: str | Path,
    split: str,
    rows: Sequence[Row],
    skipped: Sequence[tuple[str, str]],
    data_root: str | Path,
    max_bad_share: float = 0.01,
    extra: Mapping[str, Any] | None = None,
    resampled: Mapping[int, int] | None = None,
    filtered: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Write one split: the skipped list, the csv, and last the json that marks them complete.

    Arguments
    ---------
    folder : str or Path
        Manifest folder of the corpus.
    split : str
        Name of the split as in the corpus.
    rows : sequence of Row
        Usable utterances, `wav` relative to `data_root`.
    skipped : sequence of (id, reason)
        Utterances left out.
    data_root : str or Path
        Folder that `wav` is relative to.
    max_bad_share : float
        Largest share of skipped utterances that is accepted.
    extra : mapping, optional
        Further entries of the json.
    resampled : mapping, optional
        Number of utterances by sample rate, for rates that loading will change.
    filtered : sequence of (id, reason), optional
        Utterances that a protocol leaves out: listed and counted like the skipped ones, but no fault of the corpus.

    Returns
    -------
    dict
        The content of `<split>.json`.

    Raises
    ------
    UserError
        If the split is empty, too much of it is bad, an ID occurs twice or a path leaves `data_root`.
    """
    csv_path = Path(folder) / f"{split}.csv"
    try:
        # Whatever an earlier run left is no longer complete from here on.
        csv_path.with_suffix(".json").unlink(missing_ok=True)
        skipped_path = write_skipped(csv_path, [*skipped, *(filtered or [])])
        reasons, left_out = _count(skipped), _count(filtered or [])
        _check_share(split, len(rows), reasons, max_bad_share, skipped_path, left_out)
        _check_rows(rows, split)
        with_source = any(row.source_text is not None for row in rows)
        columns = (*COLUMNS, "source_text") if with_source else COLUMNS
        write_text(csv_path, _csv(columns, (_cells(row)[: len(columns)] for row in rows)))
        counts = {
            "utterances": len(rows),
            "skipped": reasons,
            "resampled": {str(rate): n for rate, n in sorted((resampled or {}).items())},
        } | ({} if filtered is None else {"filtered": left_out})
        summary = (
            provenance(sha256_json({"split": split, **(extra or {})}))
            | {"split": split, "data_root": os.path.abspath(data_root), "counts": counts}
            | {"hours": round(sum(row.duration for row in rows) / 3600, 6)}
            | {"sha256": sha256_file(csv_path), **(extra or {})}
        )
        write_json(csv_path.with_suffix(".json"), summary)
    except OSError as error:
        raise UserError(f"cannot write the manifest {csv_path}: {error}") from None
    return summary


def write_skipped(csv_path: Path, skipped: Sequence[tuple[str, str]]) -> Path:
    """Write the skipped list of a manifest."""
    return write_text(csv_path.with_suffix(".skipped.csv"), _csv(("id", "reason"), skipped))


def _count(skipped: Sequence[tuple[str, str]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for _, reason in skipped).items()))


def current_manifest(
    csv_path: str | Path, data_root: str | Path, fingerprint: str, max_bad_share: float
) -> dict[str, Any] | None:
    """Summary of an existing manifest if it need not be written again, else None.

    It is kept if it is complete, its csv is unchanged, and it was made from the same folder in the same state
    (`fingerprint`, an entry that the prepare script gave to `write_manifest` in `extra`).

    Raises
    ------
    UserError
        If it is current, but more of it was skipped than `max_bad_share` now allows.
    """
    try:
        summary = read_summary(csv_path)
    except UserError:
        return None
    same = summary.get("fingerprint") == fingerprint and summary["data_root"] == os.path.abspath(
        data_root
    )
    if not same or sha256_file(csv_path) != summary["sha256"]:
        return None
    counts, skipped_path = summary["counts"], Path(csv_path).with_suffix(".skipped.csv")
    _check_share(
        summary["split"], counts["utterances"], counts["skipped"], max_bad_share, skipped_path
    )
    return summary


def _check_share(
    split: str,
    good: int,
    reasons: Mapping[str, int],
    max_bad_share: float,
    skipped_path: Path,
    left_out: Mapping[str, int] | None = None,
) -> None:
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is a share from 0 to 1, not {max_bad_share:g}")
    bad = sum(reasons.values())
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not good:
        found = (
            f"all {bad} utterances are unusable ({told}; see {skipped_path})"
            if bad
            else "no utterance found"
        )
        if left_out:
            told = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            found = f"the protocol leaves out {sum(left_out.values())} ({told}), {bad} are unusable; see {skipped_path}"
        raise UserError(f"split '{split}' is empty: {found}")
    if bad / (good + bad) > max_bad_share:
        raise UserError(
            f"split '{split}': {bad} of {good + bad} utterances are unusable ({told}), more than max_bad_share = "
            f"{max_bad_share:g}. They are listed in {skipped_path}; repair the corpus, or accept them with "
            f"--max_bad_share {math.ceil(100 * bad / (good + bad)) / 100:g}"
        )


def _check_rows(rows: Iterable[Row], split: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.ID in seen:
            raise UserError(
                f"split '{split}': the utterance id '{row.ID}' occurs twice; ids must be unique"
            )
        seen.add(row.ID)
        _check_row(row, f"split '{split}', utterance '{row.ID}'")


def _check_row(row: Row, where: str) -> None:
    if not row.ID or not row.text.strip():
        raise UserError(f"{where}: {'ID' if not row.ID else 'text'} is empty")
    if not (math.isfinite(row.duration) and row.duration > 0):
        raise UserError(
            f"{where}: duration is {row.duration}, it must be a positive number of seconds"
        )
    inside = os.path.normpath(row.wav)
    if not row.wav or os.path.isabs(inside) or inside.split(os.sep)[0] in ("..", "."):
        raise UserError(
            f"{where}: '{row.wav}' is not a path inside data_root; absolute paths and .. are refused"
        )


def _cells(row: Row) -> tuple[str, ...]:
    values = ("" if value is None else str(value) for value in astuple(row))
    # The csv module does not quote a lone carriage return, and reads it as the end of a line.
    return tuple(value.replace("\r\n", "\n").replace("\r", "\n") for value in values)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------------------------------- read
def read_summary(csv_path: str | Path) -> dict[str, Any]:
    """Content of `<split>.json` of a complete manifest.

    Raises
    ------
    UserError
        If the manifest was never prepared, is incomplete, or has another schema.
    """
    csv_path = Path(csv_path)
    json_path = csv_path.with_suffix(".json")
    if not (csv_path.is_file() and json_path.is_file()):
        state = "is incomplete" if csv_path.exists() or json_path.exists() else "does not exist"
        raise UserError(
            f"the manifest {csv_path} {state}; prepare it with: {prepare_command(csv_path)}"
        )
    summary = read_json(json_path)
    missing = {"schema", "split", "data_root", "counts", "sha256"} - set(summary)
    if missing or summary["schema"] != SCHEMA:
        told = (
            f"lacks {', '.join(sorted(missing))}"
            if missing
            else f"has schema {summary['schema']}, not {SCHEMA}"
        )
        raise UserError(
            f"{json_path} {told}; prepare the manifest again: {prepare_command(csv_path)}"
        )
    return summary


def read_manifest(
    csv_path: str | Path, data_root: str | Path | None = None, check_audio: bool = True
) -> list[Row]:
    """Read a manifest, checking that it is complete, unchanged and sound.

    Arguments
    ---------
    csv_path : str or Path
        The csv file; see `manifest_path`.
    data_root : str or Path, optional
        Where the audio lies now, if it has moved since the manifest was written.
    check_audio : bool
        Whether every audio file must exist (they are not opened).

    Returns
    -------
    list of Row
        In the order of the file; `wav` is absolute. Links inside `data_root` are followed.

    Raises
    ------
    UserError
        Naming the file and line, and what to run.
    """
    csv_path = Path(csv_path)
    summary = read_summary(csv_path)
    remedy = f"prepare it again: {prepare_command(csv_path)}"
    if sha256_file(csv_path) != summary["sha256"]:
        raise UserError(
            f"{csv_path} has changed since it was written (its sha256 differs); {remedy}"
        )
    with open(csv_path, encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        columns = tuple(next(reader, ()))
        if columns not in (COLUMNS, (*COLUMNS, "source_text")):
            raise UserError(
                f"{csv_path} has the columns {','.join(columns)}; they must be {','.join(COLUMNS)}[,source_text]"
            )
        rows = [
            _parse(cells, len(columns), f"{csv_path}, line {reader.line_num}") for cells in reader
        ]
    _check_rows(rows, summary["split"])
    root = os.path.abspath(data_root or summary["data_root"])
    if not os.path.isdir(root):
        raise UserError(
            f"the audio of {csv_path} was in {root}, which is no longer there; {remedy}"
        )
    rows = [replace(row, wav=os.path.join(root, os.path.normpath(row.wav))) for row in rows]
    if check_audio:
        lost = [
            path
            for path in dict.fromkeys(split_wav(row.wav)[0] for row in rows)
            if not os.path.isfile(path)
        ]
        if lost:
            raise UserError(
                f"{csv_path} names {len(lost)} audio files that do not exist, first {lost[0]}; {remedy}"
            )
    return rows


def _parse(cells: Sequence[str], width: int, where: str) -> Row:
    if len(cells) != width:
        raise UserError(f"{where}: {len(cells)} columns instead of {width}")
    try:
        duration = float(cells[1])
    except ValueError:
        raise UserError(f"{where}: duration '{cells[1]}' is not a number") from None
    return Row(cells[0], duration, cells[2], cells[3], cells[4] if width > 4 else None)


def split_wav(wav: str) -> tuple[str, int | None]:
    """Split the `wav` entry of a row into a file and a row number (None for a plain audio file).

    Example
    -------
    >>> split_wav("dev/x.parquet#17"), split_wav("dev/a#1.flac")
    (('dev/x.parquet', 17), ('dev/a#1.flac', None))
    """
    match = re.fullmatch(r"(.*\.parquet)#(\d+)", wav)
    return (match[1], int(match[2])) if match else (wav, None)
