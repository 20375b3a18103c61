"""The manifest: what is written is read back, and what is damaged is refused with a remedy."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm_prune.data.audio import BadAudio, probe_audio
from speechllm_prune.data.manifest import (
    Row,
    current_manifest,
    manifest_path,
    read_manifest,
    read_summary,
    split_wav,
    write_manifest,
)
from speechllm_prune.experiment import sha256_file
from speechllm_prune.runtime import UserError

ROWS = [
    Row("a-1", 1.25, "dev/a-1.wav", 'He said "no", twice'),
    Row("b-2", 0.5, "dev/b-2.wav", "Übel, null"),
]


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A folder with (empty) files at the places that ROWS name."""
    for row in ROWS:
        path = tmp_path / "data" / row.wav
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "data"


@pytest.fixture
def manifest(tmp_path: Path, data_root: Path) -> Path:
    """A sound manifest of ROWS."""
    write_manifest(tmp_path / "m", "dev", ROWS, [], data_root, extra={"fingerprint": "f"})
    return tmp_path / "m" / "dev.csv"


def reseal(csv_path: Path) -> None:
    """Make the json state the hash of the (edited) csv, so that the later checks are reached."""
    summary = json.loads(csv_path.with_suffix(".json").read_text())
    summary["sha256"] = sha256_file(csv_path)
    csv_path.with_suffix(".json").write_text(json.dumps(summary))


# --------------------------------------------------------------------------------------- round trip
def test_a_carriage_return_in_a_text_is_a_line_break(tmp_path: Path, data_root: Path) -> None:
    rows = [replace(ROWS[0], text="one\rtwo\r\nthree")]
    write_manifest(tmp_path / "m", "dev", rows, [], data_root, extra={"fingerprint": "f"})
    assert [row.text for row in read_manifest(tmp_path / "m" / "dev.csv")] == ["one\ntwo\nthree"]


def test_round_trip(tmp_path: Path, data_root: Path) -> None:
    skipped = [
        ("c-3", "empty transcript"),
        ("d-4", "zero-length audio"),
        ("e-5", "empty transcript"),
    ]
    summary = write_manifest(
        tmp_path / "m", "dev", ROWS, skipped, data_root, max_bad_share=0.6, resampled={8000: 1}
    )
    csv_path = tmp_path / "m" / "dev.csv"
    rows = read_manifest(csv_path)
    assert [(row.ID, row.duration, row.text, row.source_text) for row in rows] == [
        (row.ID, row.duration, row.text, None) for row in ROWS
    ]
    assert [row.wav for row in rows] == [str(data_root / row.wav) for row in ROWS]
    assert (
        summary == read_summary(csv_path) == json.loads(csv_path.with_suffix(".json").read_text())
    )
    assert summary["counts"] == {
        "utterances": 2,
        "skipped": {"empty transcript": 2, "zero-length audio": 1},
        "resampled": {"8000": 1},
    }
    assert summary["hours"] == pytest.approx(1.75 / 3600, abs=1e-6)
    assert {"schema", "package_version", "git_commit", "config_hash", "inputs"} <= set(summary)
    assert csv_path.read_text().splitlines()[0] == "ID,duration,wav,text"
    with open(tmp_path / "m" / "dev.skipped.csv", newline="") as stream:
        assert list(csv.reader(stream)) == [["id", "reason"], *map(list, skipped)]


def test_translations_have_a_fifth_column_and_parquet_rows_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    rows = [
        Row("a", 1.0, "x.parquet#0", "Ja.", "Yes."),
        Row("b", 1.0, "x.parquet#1", "Nein, nicht.", "No, not."),
    ]
    write_manifest(tmp_path / "m", "test", rows, [], tmp_path)
    csv_path = tmp_path / "m" / "test.csv"
    assert csv_path.read_text().splitlines()[0] == "ID,duration,wav,text,source_text"
    read = read_manifest(csv_path)
    assert [row.source_text for row in read] == ["Yes.", "No, not."]
    assert split_wav(read[1].wav) == (str(tmp_path / "x.parquet"), 1)
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(UserError, match="1 audio files that do not exist"):
        read_manifest(csv_path)


def test_data_may_move(manifest: Path, data_root: Path, tmp_path: Path) -> None:
    data_root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no longer there; prepare it again"):
        read_manifest(manifest)
    assert read_manifest(manifest, data_root=tmp_path / "moved")[0].wav == str(
        tmp_path / "moved/dev/a-1.wav"
    )


def test_links_inside_the_corpus_are_followed(
    manifest: Path, data_root: Path, tmp_path: Path
) -> None:
    (data_root / "dev").rename(tmp_path / "elsewhere")
    (data_root / "dev").symlink_to(tmp_path / "elsewhere")
    assert len(read_manifest(manifest)) == 2


def test_manifest_path() -> None:
    assert manifest_path("m", "demo/ood") == Path("m/demo/ood.csv")
    for key in ("test-clean", "a/b/c", "../x", "librispeech/", "/x"):
        with pytest.raises(UserError, match="no manifest key"):
            manifest_path("m", key)


# ------------------------------------------------------------------------------------------- writing
def test_too_many_bad_rows_are_refused_and_listed(tmp_path: Path, data_root: Path) -> None:
    write_manifest(tmp_path / "m", "dev", ROWS, [], data_root)
    skipped = [("c-3", "unreadable audio")]
    with pytest.raises(
        UserError, match=r"1 of 3 .*1 unreadable audio.*dev.skipped.csv.*--max_bad_share 0.34"
    ):
        write_manifest(tmp_path / "m", "dev", ROWS, skipped, data_root, max_bad_share=0.33)
    assert "c-3,unreadable audio" in (tmp_path / "m" / "dev.skipped.csv").read_text()
    with pytest.raises(UserError, match="incomplete"):  # the earlier manifest no longer counts
        read_manifest(tmp_path / "m" / "dev.csv")
    write_manifest(tmp_path / "m", "dev", ROWS, skipped, data_root, max_bad_share=0.34)
    assert len(read_manifest(tmp_path / "m" / "dev.csv")) == 2


@pytest.mark.parametrize("skipped", [[], [("x", "empty transcript")]])
def test_an_empty_split_is_refused(tmp_path: Path, skipped: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError, match="'dev' is empty"):
        write_manifest(tmp_path / "m", "dev", [], skipped, tmp_path, max_bad_share=1.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("a-1", 1.0, "dev/b.wav", "x"), "'a-1' occurs twice"),
        (Row("n", 0.0, "dev/b.wav", "x"), "duration is 0.0"),
        (Row("n", float("nan"), "dev/b.wav", "x"), "duration is nan"),
        (Row("n", 1.0, "../b.wav", "x"), "not a path inside"),
        (Row("n", 1.0, "dev/../../b.wav", "x"), "not a path inside"),
        (Row("n", 1.0, "/etc/passwd", "x"), "not a path inside"),
        (Row("n", 1.0, "", "x"), "not a path inside"),
        (Row("n", 1.0, "dev/b.wav", "  "), "text is empty"),
        (Row("", 1.0, "dev/b.wav", "x"), "ID is empty"),
    ],
)
def test_unsound_rows_are_not_written(tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_manifest(tmp_path / "m", "dev", [*ROWS, row], [], tmp_path)
    assert not (tmp_path / "m" / "dev.json").exists()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_share_out_of_range(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="share from 0 to 1"):
        write_manifest(tmp_path / "m", "dev", ROWS, [], tmp_path, max_bad_share=share)


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(UserError, match="cannot write the manifest"):
        write_manifest(tmp_path / "m", "dev", ROWS, [], tmp_path)


def test_a_crash_before_the_json_leaves_it_incomplete(
    manifest: Path, data_root: Path, monkeypatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("speechllm_prune.data.manifest.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(manifest.parent, "dev", ROWS[:1], [], data_root)
    with pytest.raises(UserError, match="incomplete"):
        read_manifest(manifest)


def test_current_manifest(manifest: Path, data_root: Path) -> None:
    assert current_manifest(manifest, data_root, "f", 0.01) == read_summary(manifest)
    assert current_manifest(manifest, data_root, "other", 0.01) is None
    assert current_manifest(manifest, data_root.parent, "f", 0.01) is None
    assert current_manifest(manifest.with_name("test.csv"), data_root, "f", 0.01) is None
    with open(manifest, "a") as stream:
        stream.write("\n")
    assert current_manifest(manifest, data_root, "f", 0.01) is None


# ------------------------------------------------------------------------------------------- reading
def test_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="librispeech_prepare.py DATA_FOLDER .*librispeech$"):
        read_manifest(tmp_path / "librispeech" / "dev-clean.csv")


def test_edited_csv_is_refused(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("twice", "once"))
    with pytest.raises(UserError, match="has changed since it was written"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ID,duration,wav,text", "ID,wav,duration,text", "has the columns ID,wav,duration,text"),
        ("ID,duration,wav,text", "ID,duration,wav,text,speaker", "has the columns"),
        ("0.5", "half", "line 3: duration 'half' is not a number"),
        ("0.5", "-1", "duration is -1.0"),
        ("b-2,", "a-1,", "'a-1' occurs twice"),
        ("dev/b-2.wav", "../b-2.wav", "not a path inside data_root"),
        ("dev/b-2.wav", "/etc/passwd", "not a path inside data_root"),
        ("dev/b-2.wav", "dev/b-3.wav", "1 audio files that do not exist"),
        ('"Übel, null"', "Übel, null", "line 3: 5 columns instead of 4"),
        ('"Übel, null"', "", "text is empty"),
    ],
)
def test_unsound_csv_is_refused(manifest: Path, old: str, new: str, message: str) -> None:
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))
    reseal(manifest)
    with pytest.raises(UserError, match=message):
        read_manifest(manifest)


def test_other_schema_and_broken_json(manifest: Path) -> None:
    json_path = manifest.with_suffix(".json")
    summary = json.loads(json_path.read_text())
    json_path.write_text(json.dumps(summary | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99, not 1; prepare the manifest again"):
        read_manifest(manifest)
    json_path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(UserError, match="lacks counts, data_root, sha256, split"):
        read_manifest(manifest)
    json_path.write_text(json.dumps(summary)[:50])
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(manifest)


# --------------------------------------------------------------------------------------------- audio
def noise(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """Noise, so that flac cannot pack it into almost nothing."""
    return 0.1 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))


@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg", "mp3"])
def test_probe_reads_the_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(0.5, 44100, 2), 44100)
    info = probe_audio(path)
    assert (info.sample_rate, info.channels) == (44100, 2)
    assert info.duration == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_probe_notices_truncation(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(1.0), 16000)
    probe_audio(path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(BadAudio, match="truncated|unreadable"):
        probe_audio(path)


def test_probe_refuses_what_is_no_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "zero.wav", noise(0), 16000)
    (tmp_path / "page.wav").write_text("<html>404</html>")
    (tmp_path / "empty.flac").touch()
    (tmp_path / "folder.wav").mkdir()
    for name, reason in {
        "zero.wav": "zero-length audio",
        "page.wav": "unreadable audio",
        "empty.flac": "unreadable audio",
        "folder.wav": "missing audio",
        "none.wav": "missing audio",
    }.items():
        with pytest.raises(BadAudio, match=reason):
            probe_audio(tmp_path / name)


def test_probe_reads_all_real_samples(shared_data: Path) -> None:
    files = [
        p
        for p in (shared_data / "samples").rglob("*")
        if p.suffix in {".wav", ".flac", ".mp3", ".ogg"}
    ]
    assert len(files) == 14
    for path in files:
        samples, rate = soundfile.read(path, always_2d=True)
        info = probe_audio(path)
        assert (info.sample_rate, info.channels) == (rate, samples.shape[1])
        assert info.frames == pytest.approx(len(samples), rel=0.01)
