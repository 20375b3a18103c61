"""Preparation from parquet shards, and reading the audio out of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from recipes.Loquacious.loquacious_prepare import SOURCE_PATTERNS, main, prepare_loquacious
from speechllm_prune.data import parquet
from speechllm_prune.data.manifest import prepare_command, read_manifest
from speechllm_prune.data.pipeline import read_audio
from speechllm_prune.runtime import UserError

SCRIPT = "recipes/Loquacious/loquacious_prepare.py"
AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def wav(seconds: float, seed: int, rate: int = 16000, **options: str) -> bytes:
    """A wav file of noise, different for each seed."""
    stream = io.BytesIO()
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))
    soundfile.write(stream, samples, rate, format="WAV", **options)
    return stream.getvalue()


def row(utterance: str | None, seed: int, **changes: Any) -> dict[str, Any]:
    """A sound row of a shard."""
    audio = {"bytes": wav(0.2 + 0.01 * seed, seed), "path": f"{utterance}.wav"}
    return {
        "ID": utterance,
        "duration": 9.9,  # never believed: the audio says how long it is
        "wav": audio,
        "spk_id": None,
        "text": f"TEXT NUMBER {seed}",
    } | changes


def write_shard(path: Path, rows: list[dict[str, Any]], group: int = 2, **types: Any) -> Path:
    """A shard as the data sets library writes it, in row groups of `group` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"ID": pa.string(), "duration": pa.float32(), "wav": AUDIO_TYPE}
    kinds |= {"spk_id": pa.string(), "text": pa.string()} | types
    schema = pa.schema([(name, kind) for name, kind in kinds.items() if kind is not None])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two dev shards with 5 + 2 rows, one test shard, and a training configuration."""
    folder = tmp_path / "LoquaciousSet"
    ids = [
        "84-121123-0000",
        "84-121123-0001",
        "common_voice_en_17",
        "20090112-PLENARY-10-en_1",
        "z",
    ]
    write_shard(
        folder / "dev/dev-00000-of-00002.parquet", [row(name, i) for i, name in enumerate(ids)]
    )
    write_shard(
        folder / "dev/dev-00001-of-00002.parquet", [row(f"84-2-{i}", 10 + i) for i in range(2)]
    )
    write_shard(folder / "test/test-00000-of-00001.parquet", [row("t-1", 20)])
    write_shard(folder / "small/train-00000-of-00001.parquet", [row("s-1", 30)])
    return folder


def skipped(folder: Path, split: str) -> dict[str, str]:
    """{id: reason} of a split's skipped list."""
    with open(folder / f"{split}.skipped.csv", newline="") as stream:
        return {row["id"]: row["reason"] for row in csv.DictReader(stream)}


# ------------------------------------------------------------------------------------------- sound
@pytest.mark.parametrize("level", ["corpus", "parent"])
def test_every_row_is_read_back(corpus: Path, tmp_path: Path, level: str) -> None:
    summaries = prepare_loquacious(corpus if level == "corpus" else corpus.parent, tmp_path / "m")
    assert {name: one["counts"]["utterances"] for name, one in summaries.items()} == {
        "dev": 7,
        "test": 1,
    }
    rows = read_manifest(tmp_path / "m/dev.csv")
    assert [Path(one.wav).name for one in rows][4:] == [
        "dev-00000-of-00002.parquet#4",
        "dev-00001-of-00002.parquet#0",
        "dev-00001-of-00002.parquet#1",
    ]
    assert (tmp_path / "m/dev.csv").read_text().splitlines()[1].split(",")[2] == (
        "dev/dev-00000-of-00002.parquet#0"
    )
    for one in reversed(rows):  # in any order, across row groups and shards
        seed = int(one.text.rsplit(" ", 1)[1])
        expected, _ = soundfile.read(io.BytesIO(wav(0.2 + 0.01 * seed, seed)), dtype="float32")
        assert torch.equal(read_audio(one.wav), torch.from_numpy(expected))
        assert one.duration == pytest.approx(len(expected) / 16000, abs=1e-6)


def test_splits_are_chosen(corpus: Path, tmp_path: Path) -> None:
    assert list(prepare_loquacious(corpus, tmp_path / "m", ["dev", "dev"])) == ["dev"]
    assert list(prepare_loquacious(corpus, tmp_path / "n", ["small"])) == ["small"]
    with pytest.raises(UserError, match="no split huge in .*found: dev, small, test"):
        prepare_loquacious(corpus, tmp_path / "o", ["huge"])


def test_a_second_run_keeps_what_did_not_change(corpus: Path, tmp_path: Path, capsys) -> None:
    first = prepare_loquacious(corpus, tmp_path / "m")
    assert prepare_loquacious(corpus, tmp_path / "m") == first
    assert capsys.readouterr().out.count("kept, the corpus has not changed") == 2
    write_shard(corpus / "dev/dev-00001-of-00002.parquet", [row("84-2-9", 12), row("84-2-8", 13)])
    prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    assert "kept" not in capsys.readouterr().out
    assert {"84-2-9", "84-2-8"} < {one.ID for one in read_manifest(tmp_path / "m/dev.csv")}


def test_few_row_groups_are_kept_in_memory(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    monkeypatch.setattr(parquet, "_groups", type(parquet._groups)())
    prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    for one in read_manifest(tmp_path / "m/dev.csv"):
        assert len(read_audio(one.wav)) == round(16000 * one.duration)
        assert len(parquet._groups) == 1


def test_sources_are_patterns_in_the_manifest(corpus: Path, tmp_path: Path) -> None:
    from speechllm_prune.evaluation.scoring import manifest_facts

    summary = prepare_loquacious(corpus, tmp_path / "m", ["dev"])["dev"]
    assert summary["source_patterns"] == SOURCE_PATTERNS
    ids = [one.ID for one in read_manifest(tmp_path / "m/dev.csv")]
    counts = [
        {"substitutions": 1, "deletions": 1, "insertions": 0, "reference_words": 4 + index}
        for index in range(len(ids))
    ]
    found = manifest_facts(summary, ids, counts)["by_source"]
    assert {name: one["num_utterances"] for name, one in found.items()} == {
        "librispeech": 4,
        "common_voice": 1,
        "voxpopuli": 1,
        "other": 1,
    }
    assert found["librispeech"]["value"] == pytest.approx(100 * 8 / (4 + 5 + 9 + 10))
    assert sum(one["reference_words"] for one in found.values()) == sum(range(4, 11))


# ------------------------------------------------------------------------------------------ faults
def test_every_bad_row_is_listed_with_its_reason(corpus: Path, tmp_path: Path) -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.full(4000, np.nan), 16000, format="WAV", subtype="FLOAT")
    bad = {
        "none": (row("none", 1, wav=None), "row without audio bytes"),
        "empty": (row("empty", 1, wav={"bytes": b"", "path": "x"}), "row without audio bytes"),
        "path": (row("path", 1, wav={"bytes": None, "path": "x.wav"}), "row without audio bytes"),
        "html": (row("html", 1, wav={"bytes": b"<html>", "path": None}), "unreadable audio"),
        "lfs": (
            row("lfs", 1, wav={"bytes": b"version https://git-lfs.github.com/x", "path": ""}),
            "git-lfs pointer instead of audio",
        ),
        "cut": (row("cut", 1, wav={"bytes": wav(1, 1)[:9000], "path": ""}), "truncated audio"),
        "zero": (row("zero", 1, wav={"bytes": wav(0, 1), "path": ""}), "zero-length audio"),
        "nan": (
            row("nan", 1, wav={"bytes": nan.getvalue(), "path": ""}),
            "NaN or infinite samples",
        ),
        "mute": (row("mute", 1, text=None), "empty transcript"),
        "blank": (row("blank", 1, text=" \n"), "empty transcript"),
        "84-2-0": (row("84-2-0", 1), "second utterance with this id"),
        "dev/dev-00002.parquet#11": (row(None, 1), "row without ID"),
    }
    write_shard(corpus / "dev/dev-00002.parquet", [one for one, _ in bad.values()])
    with pytest.raises(UserError, match="12 of 19 utterances are unusable"):
        prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    prepare_loquacious(corpus, tmp_path / "m", ["dev"], max_bad_share=0.7)
    assert skipped(tmp_path / "m", "dev") == {name: reason for name, (_, reason) in bad.items()}
    assert len(read_manifest(tmp_path / "m/dev.csv")) == 7


def test_other_rates_are_said_and_resampled(corpus: Path, tmp_path: Path, capsys) -> None:
    audio = {"bytes": wav(0.5, 1, rate=8000), "path": "a.wav"}
    write_shard(corpus / "dev/dev-00002.parquet", [row("a-8", 1, wav=audio)])
    prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    assert "1 utterances at 8000 Hz: resampled to 16000 Hz" in capsys.readouterr().out
    (one,) = (one for one in read_manifest(tmp_path / "m/dev.csv") if one.ID == "a-8")
    assert len(read_audio(one.wav)) == 8000


@pytest.mark.parametrize(
    ("rows", "types", "message"),
    [
        ([{"ID": "a", "text": "x"}], {"wav": None}, "has no column wav; its columns are ID"),
        ([{"ID": "a", "wav": None}], {"text": None}, "has no column text"),
        ([{"ID": 7, "text": "x"}], {"ID": pa.int64()}, "column ID must hold text, it is int64"),
        ([{"wav": b"x", "text": "x"}], {"wav": pa.binary()}, "wav must be a struct.*it is binary"),
    ],
)
def test_a_shard_without_a_column_is_named(
    corpus: Path, tmp_path: Path, rows: list[dict[str, Any]], types: dict, message: str
) -> None:
    write_shard(corpus / "dev/dev-00002.parquet", rows, **types)
    with pytest.raises(UserError, match=f"dev-00002.parquet.*{message}"):
        prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer.*git lfs"),
        (b"", "cannot read the parquet file"),
        (None, "cannot read the parquet file"),  # half of a shard
    ],
)
def test_a_shard_that_cannot_be_read(
    corpus: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    shard = corpus / "dev/dev-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_loquacious(corpus, tmp_path / "m", ["dev"])
    assert str(shard) in str(caught.value)


def test_a_shard_damaged_inside(corpus: Path, tmp_path: Path) -> None:
    shard = corpus / "test/test-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[4:2000] = bytes(1996)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the parquet file|unusable"):
        prepare_loquacious(corpus, tmp_path / "m", ["test"])


def test_reading_what_is_not_there(corpus: Path, tmp_path: Path) -> None:
    shard = corpus / "dev/dev-00001-of-00002.parquet"
    with pytest.raises(UserError, match="has 2 rows, there is no row 2"):
        read_audio(f"{shard}#2")
    with pytest.raises(UserError, match="cannot read the parquet file .*gone.parquet"):
        read_audio(f"{corpus}/gone.parquet#0")
    empty = write_shard(tmp_path / "e.parquet", [row("a", 1, wav=None)])
    with pytest.raises(UserError, match="row 0 of .* holds no audio"):
        read_audio(f"{empty}#0")


def test_folders_that_are_no_corpus(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        prepare_loquacious(tmp_path / "nowhere", tmp_path / "m")
    with pytest.raises(UserError, match="looks like a split itself.*LoquaciousSet$"):
        prepare_loquacious(corpus / "dev", tmp_path / "m")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no parquet shards in .*expected dev/"):
        prepare_loquacious(tmp_path / "other", tmp_path / "m")
    write_shard(tmp_path / "copy/dev/x.parquet", [row("a", 1)])
    with pytest.raises(UserError, match="several folders .*: LoquaciousSet, copy; name one"):
        prepare_loquacious(tmp_path, tmp_path / "m")


# ------------------------------------------------------------------------------------ command line
def test_as_a_script_from_anywhere(run_verb, corpus: Path, tmp_path: Path) -> None:
    done = run_verb(SCRIPT, corpus, "m", "--splits", "dev", cwd=tmp_path)
    assert "m/dev.csv: 7 utterances" in done.stdout
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "dev.csv",
        "dev.json",
        "dev.skipped.csv",
    }
    failed = run_verb(SCRIPT, "nowhere", "m", code=2, cwd=tmp_path)
    assert failed.stderr.startswith("error: no such folder") and "Traceback" not in failed.stderr


def test_main_in_process(corpus: Path, tmp_path: Path, capsys) -> None:
    write_shard(corpus / "dev/dev-00002.parquet", [row("bad", 1, text="")])
    arguments = [str(corpus), str(tmp_path / "m"), "--splits", "dev"]
    assert main(arguments) == 2
    assert "error: split 'dev': 1 of 8" in capsys.readouterr().err
    assert main([*arguments, "--max_bad_share", "0.2"]) == 0
    assert "loquacious_prepare.py DATA_FOLDER" in prepare_command("m/loquacious/dev.csv")


def test_real_shards(shared_data: Path, tmp_path: Path) -> None:
    """The counts that the fixture's README states."""
    summaries = prepare_loquacious(shared_data / "loquacious_mini", tmp_path)
    counts = {name: one["counts"] for name, one in summaries.items()}
    assert {name: one["utterances"] for name, one in counts.items()} == {
        "train": 7,
        "dev": 4,
        "test": 3,
    }
    assert not any(one["skipped"] for one in counts.values())
    for one in read_manifest(tmp_path / "dev.csv"):
        assert len(read_audio(one.wav)) == round(one.duration * 16000)
