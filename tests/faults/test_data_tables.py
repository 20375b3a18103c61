"""Rows 1, 7, 9, 16, 18: parquet shards of LoquaciousSet, and tables and clips of CoVoST 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.processes import Ended, Processes
from tests.faults.test_data import kept, skipped, truncate

LOQUACIOUS = "recipes/Loquacious/loquacious_prepare"
COVOST2 = "recipes/CoVoST2/covost2_prepare"


@pytest.fixture
def shards(shared_data: Path, tmp_path: Path) -> Path:
    """The dev split of LoquaciousSet in small, to damage."""
    shutil.copytree(shared_data / "loquacious_mini/dev", tmp_path / "loquacious/dev")
    return tmp_path / "loquacious"


def rewrite(shard: Path, change: Callable[[list[dict]], object], drop: str = "", **types) -> None:
    """Write a shard anew with its rows changed, a column left out, or others in another type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(shard).to_pylist()
    change(rows)
    table = pa.Table.from_pylist(
        [{name: cell for name, cell in row.items() if name != drop} for row in rows]
    )
    for name, kind in types.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array([1] * len(table), kind))
    pq.write_table(table, shard)


def test_row_18_parquet_columns(shards: Path, tmp_path: Path, verbs: Processes) -> None:
    import pyarrow as pa

    first = sorted((shards / "dev").glob("*.parquet"))[0]
    content = first.read_bytes()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: rewrite(first, lambda rows: None, drop="text"), "has no column text"),
        (lambda: rewrite(first, lambda rows: None, drop="wav"), "has no column wav"),
        (lambda: rewrite(first, lambda rows: None, text=pa.int64()), "text must hold text, it is"),
        (lambda: rewrite(first, lambda rows: None, wav=pa.int64()), "wav must be a struct"),
        (lambda: first.write_bytes(content[: len(content) // 2]), "cannot read the parquet file"),
        (lambda: first.write_bytes(b"<html>"), "cannot read the parquet file"),
        (
            lambda: first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n"),
            "git-lfs pointer",
        ),
    ]
    for damage, words in cases:
        first.write_bytes(content)
        damage()
        message = verbs.run(LOQUACIOUS, shards, tmp_path / "m", code=2).message
        assert words in message and str(first) in message
        assert not (tmp_path / "m/dev.json").exists()


def test_row_18_bad_rows_of_parquet(shards: Path, tmp_path: Path, verbs: Processes) -> None:
    first, second = sorted((shards / "dev").glob("*.parquet"))
    ids: list[str] = []

    def damage(rows: list[dict]) -> None:
        ids.extend(row["ID"] for row in rows)
        rows[0]["wav"]["bytes"] = rows[0]["wav"]["bytes"][:2000]
        rows[1]["text"] = None

    def damage_more(rows: list[dict]) -> None:
        rows[0]["wav"]["bytes"] = None
        ids.append(rows[0]["ID"])

    rewrite(first, damage)
    rewrite(second, damage_more)
    refusal = verbs.run(LOQUACIOUS, shards, tmp_path / "m", code=2).message
    assert "3 of 4 utterances are unusable" in refusal
    verbs.run(LOQUACIOUS, shards, tmp_path / "m", "--max_bad_share", 0.8)
    assert skipped(tmp_path / "m", "dev") == {
        ids[0]: "truncated audio",
        ids[1]: "empty transcript",
        ids[-1]: "row without audio bytes",
    }


# ------------------------------------------------------------------------------------------- CoVoST 2
@pytest.fixture
def covost(shared_data: Path, tmp_path: Path) -> Path:
    """French to English, to damage."""
    shutil.copytree(shared_data / "covost_mini/cv/fr", tmp_path / "cv/fr")
    return tmp_path / "cv"


def test_rows_01_07_09_16_a_table_of_clips(covost: Path, tmp_path: Path, verbs: Processes) -> None:
    table = covost / "fr/covost_v2.fr_en.test.tsv"
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    columns = header.split("\t")
    place, translation = columns.index("path"), columns.index("translation")
    names = [line.split("\t")[place] for line in lines]

    def changed(line: str, column: int, value: str) -> str:
        cells = line.split("\t")
        cells[column] = value
        return "\t".join(cells)

    extra = [
        changed(lines[0], place, "../../../etc/passwd.mp3"),
        changed(lines[0], place, "/etc/group.mp3"),
        changed(lines[0], place, "nowhere.mp3"),
        lines[1],
        lines[2] + "\tone cell too many",
    ]
    empty = changed(lines[2], translation, "")
    table.write_text("\n".join([header, *lines[:2], empty, *extra]) + "\n", encoding="utf-8")
    truncate(covost / "fr/clips" / names[0])

    def prepare(*more: object, code: int = 0) -> Ended:
        options = ("--source", "fr", "--target", "en", "--splits", "test", *more)
        return verbs.run(COVOST2, covost, tmp_path / "m", *options, code=code)

    assert "7 of 8 utterances are unusable" in prepare(code=2).message
    prepare("--max_bad_share", 0.9)
    reasons = skipped(tmp_path / "m", "test")
    stems = [name.removesuffix(".mp3") for name in names]
    assert reasons.pop(stems[0]) in ("truncated audio", "unreadable audio", "damaged audio")
    assert reasons == {
        "passwd": "path outside the corpus",
        "group": "path outside the corpus",
        "nowhere": "missing audio",
        stems[1]: "second utterance with this id",
        stems[2]: "empty translation",
        f"{table.name}, line 9": "row with too few or too many columns",
    }
    assert list(kept(tmp_path / "m", "test")) == [stems[1]]
