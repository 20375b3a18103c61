"""Preparation from the LibriSpeech layout: sound corpora, and every fault that real ones have had."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from recipes.LibriSpeech.librispeech_prepare import main, prepare_librispeech
from speechllm_prune.data.manifest import read_manifest
from speechllm_prune.runtime import UserError

SCRIPT = "recipes/LibriSpeech/librispeech_prepare.py"
COUNTS = {"dev-clean": 4, "test-clean": 4, "test-other": 3, "train-clean-100": 12}


@pytest.fixture
def corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A copy of the tiny corpus that the test may damage: the folder that holds the splits."""
    shutil.copytree(tiny_corpus / "LibriSpeech", tmp_path / "LibriSpeech")
    return tmp_path / "LibriSpeech"


def files(split: Path, *suffixes: str) -> list[Path]:
    """The files of a split with one of the suffixes, in order."""
    return sorted(path for path in split.rglob("*") if path.name.endswith(suffixes))


def skipped(manifest_folder: Path, split: str) -> dict[str, str]:
    """{id: reason} of a split's skipped list."""
    with open(manifest_folder / f"{split}.skipped.csv", newline="") as stream:
        return {row["id"]: row["reason"] for row in csv.DictReader(stream)}


# ------------------------------------------------------------------------------------------- sound
@pytest.mark.parametrize("level", ["parent", "corpus"])
def test_all_splits(tiny_corpus: Path, tmp_path: Path, level: str) -> None:
    data_folder = tiny_corpus if level == "parent" else tiny_corpus / "LibriSpeech"
    summaries = prepare_librispeech(data_folder, tmp_path)
    assert {
        split: summary["counts"]["utterances"] for split, summary in summaries.items()
    } == COUNTS
    assert {summary["data_root"] for summary in summaries.values()} == {
        str(tiny_corpus / "LibriSpeech")
    }
    texts = {}
    for path in files(tiny_corpus, ".trans.txt"):
        texts |= dict(line.split(" ", 1) for line in path.read_text().splitlines())
    for split in COUNTS:
        rows = read_manifest(tmp_path / f"{split}.csv")
        assert [row.ID for row in rows] == sorted(row.ID for row in rows)
        for row in rows:
            samples, rate = soundfile.read(row.wav)
            assert Path(row.wav).stem == row.ID and row.text == texts.pop(row.ID)
            assert row.duration == pytest.approx(len(samples) / rate, abs=1e-5)
    assert not texts


def test_some_splits_and_any_split_name(corpus: Path, tmp_path: Path) -> None:
    (corpus / "test-other").rename(corpus / "ood")
    summaries = prepare_librispeech(corpus, tmp_path / "m", splits=["ood", "dev-clean", "ood"])
    assert list(summaries) == ["ood", "dev-clean"]
    assert sorted(path.name for path in (tmp_path / "m").glob("*.json")) == [
        "dev-clean.json",
        "ood.json",
    ]


def test_other_rates_and_channels_are_said(corpus: Path, tmp_path: Path, capsys) -> None:
    path = files(corpus / "dev-clean", ".flac")[0]
    samples, _ = soundfile.read(path)
    soundfile.write(path, samples.repeat(2).reshape(-1, 2), 44100)
    summaries = prepare_librispeech(corpus, tmp_path / "m", ["dev-clean", "train-clean-100"])
    assert summaries["dev-clean"]["counts"]["resampled"] == {"44100": 1}
    assert summaries["train-clean-100"]["counts"]["resampled"] == {"8000": 1}
    said = capsys.readouterr().out
    assert "1 utterances at 44100 Hz: resampled to 16000 Hz" in said
    assert "1 utterances with several channels: averaged" in said


def test_counts_of_the_published_corpus_are_checked(corpus: Path, tmp_path: Path, capsys) -> None:
    (corpus / "test-other").rename(corpus / "ood")
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean", "ood"])
    said = capsys.readouterr().out
    assert "LibriSpeech dev-clean has 2703 utterances, here are 4" in said
    assert said.count("warning") == 1


def test_bom_crlf_blank_lines_and_double_spaces_are_accepted(corpus: Path, tmp_path: Path) -> None:
    path = files(corpus / "dev-clean", ".trans.txt")[0]
    lines = path.read_text().splitlines()
    spoilt = "\r\n\r\n".join(line.replace(" ", "  ") + " " for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + spoilt.encode())
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"])
    rows = read_manifest(tmp_path / "m" / "dev-clean.csv")
    assert [f"{row.ID} {row.text}" for row in rows] == lines


# ------------------------------------------------------------------------------------- once prepared
def test_a_second_run_keeps_what_did_not_change(corpus: Path, tmp_path: Path, capsys) -> None:
    first = prepare_librispeech(corpus, tmp_path / "m")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()}
    capsys.readouterr()
    assert prepare_librispeech(corpus, tmp_path / "m") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()} == before
    assert capsys.readouterr().out.count("kept, the corpus has not changed") == 4
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"], skip_existing=False)
    assert (tmp_path / "m" / "dev-clean.csv").stat().st_mtime_ns > before[
        tmp_path / "m" / "dev-clean.csv"
    ]


@pytest.mark.parametrize("change", ["transcript", "audio", "lost", "moved", "csv"])
def test_a_changed_corpus_is_prepared_again(
    corpus: Path, tmp_path: Path, capsys, change: str
) -> None:
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"])
    path, transcript = (
        files(corpus / "dev-clean", ".flac")[0],
        files(corpus / "dev-clean", ".trans.txt")[0],
    )
    if change == "transcript":
        text = transcript.read_text()
        transcript.write_text(text[:-2] + ("A" if text[-2] != "A" else "B") + "\n")
    elif change == "audio":
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[: len(samples) // 2], rate)
    elif change == "lost":
        path.unlink()
    elif change == "moved":
        corpus = corpus.rename(tmp_path / "moved")
    else:
        (tmp_path / "m" / "dev-clean.csv").write_text("ID,duration,wav,text\n")
    capsys.readouterr()
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"], max_bad_share=0.5)
    assert "kept" not in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "m" / "dev-clean.csv")) == (3 if change == "lost" else 4)


def test_a_kept_manifest_is_still_held_to_the_share(corpus: Path, tmp_path: Path) -> None:
    files(corpus / "dev-clean", ".flac")[0].unlink()
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"], max_bad_share=0.3)
    with pytest.raises(UserError, match="1 of 4 utterances are unusable"):
        prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"])


# ------------------------------------------------------------------------------------------- faults
def test_every_bad_utterance_is_listed_with_its_reason(
    corpus: Path, tmp_path: Path, capsys
) -> None:
    split = corpus / "train-clean-100"
    audio = files(split, ".flac")
    expected = {}
    for path, reason in zip(
        audio,
        ["transcript without audio", "truncated audio", "unreadable audio", "zero-length audio"],
        strict=False,
    ):
        expected[path.stem] = reason
    audio[0].unlink()
    os.truncate(audio[1], audio[1].stat().st_size // 2)
    audio[2].write_text("<html>404</html>")
    soundfile.write(audio[3].with_suffix(".wav"), [], 16000)
    audio[3].unlink()
    empty, mute = audio[4].stem, files(split, ".wav")[-1].stem
    for transcript in files(split, ".trans.txt"):
        lines = [line for line in transcript.read_text().splitlines() if not line.startswith(mute)]
        lines = [empty if line.startswith(empty) else line for line in lines]
        transcript.write_text("\n".join(lines))
    expected |= {empty: "empty transcript", mute: "audio without transcript"}

    with pytest.raises(
        UserError, match=r"6 of 12 utterances are unusable \(1 audio without transcript, 1 empty"
    ):
        prepare_librispeech(corpus, tmp_path / "m", ["train-clean-100"])
    assert skipped(tmp_path / "m", "train-clean-100") == expected
    assert not (tmp_path / "m" / "train-clean-100.json").exists()

    summary = prepare_librispeech(corpus, tmp_path / "m", ["train-clean-100"], max_bad_share=0.5)
    assert summary["train-clean-100"]["counts"]["skipped"] == dict.fromkeys(
        sorted(expected.values()), 1
    )
    rows = read_manifest(tmp_path / "m" / "train-clean-100.csv")
    assert len(rows) == 6 and not {row.ID for row in rows} & expected.keys()
    assert "skipped: 1 truncated audio" in capsys.readouterr().out


def test_audio_without_any_transcript_in_its_chapter_is_counted(
    corpus: Path, tmp_path: Path
) -> None:
    files(corpus / "train-clean-100", ".trans.txt")[0].unlink()
    prepare_librispeech(corpus, tmp_path / "m", ["train-clean-100"], max_bad_share=0.9)
    assert (
        list(skipped(tmp_path / "m", "train-clean-100").values())
        == ["audio without transcript"] * 6
    )


def test_two_audio_files_of_one_utterance(corpus: Path, tmp_path: Path) -> None:
    path = files(corpus / "dev-clean", ".flac")[0]
    shutil.copy(files(corpus / "dev-clean", ".wav")[0], path.with_suffix(".wav"))
    prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"], max_bad_share=0.5)
    assert skipped(tmp_path / "m", "dev-clean") == {path.stem: "second audio file of an utterance"}
    rows = {row.ID: row for row in read_manifest(tmp_path / "m" / "dev-clean.csv")}
    assert rows[path.stem].wav == str(path)


def test_the_same_id_twice_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = files(corpus / "dev-clean", ".trans.txt")[0]
    first = path.read_text().splitlines()[0]
    with open(path, "a") as stream:
        stream.write(first + "\n")
    with pytest.raises(UserError, match=f"'{first.split()[0]}' occurs twice.*entry 1.*entry 5"):
        prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"])


def test_a_transcript_that_is_not_utf8_names_file_and_line(corpus: Path, tmp_path: Path) -> None:
    path = files(corpus / "dev-clean", ".trans.txt")[0]
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1] + " CAFÉ".encode("latin-1"), *lines[2:]]))
    with pytest.raises(UserError, match=f"{path.name}, line 2: not UTF-8"):
        prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"])


def remove_transcripts(split: Path) -> None:
    """Leave only the audio."""
    for path in files(split, ".trans.txt"):
        path.unlink()


def empty_folder(split: Path) -> None:
    """Leave only the folder."""
    shutil.rmtree(split)
    split.mkdir()


@pytest.mark.parametrize(
    ("damage", "splits", "message"),
    [
        (
            shutil.rmtree,
            ["test-other"],
            "no split 'test-other'.*Splits found: dev-clean, test-clean, train-clean-100",
        ),
        (empty_folder, ["test-other"], "split 'test-other' is empty.*Splits found: dev-clean"),
        (
            remove_transcripts,
            ["test-other"],
            "split 'test-other' has audio but no transcripts.*Splits found",
        ),
        (
            remove_transcripts,
            None,
            "no transcripts.*in test-other.*--splits dev-clean,test-clean,train-clean-100",
        ),
        (None, ["../LibriSpeech/dev-clean"], "no split '../LibriSpeech/dev-clean'"),
        (None, [], "no split named. Splits found: dev-clean"),
    ],
)
def test_a_split_that_is_not_there(
    corpus: Path, tmp_path: Path, damage, splits, message: str
) -> None:
    if damage:
        damage(corpus / "test-other")
    with pytest.raises(UserError, match=message):
        prepare_librispeech(corpus, tmp_path / "m", splits)
    assert not (tmp_path / "m").exists()  # found out before any split is written


def test_a_split_with_transcripts_but_without_audio_is_empty(corpus: Path, tmp_path: Path) -> None:
    for path in files(corpus / "dev-clean", ".flac", ".wav"):
        path.unlink()
    with pytest.raises(
        UserError, match="'dev-clean' is empty: all 4 utterances are unusable .4 transcript without"
    ):
        prepare_librispeech(corpus, tmp_path / "m", ["dev-clean"], max_bad_share=1.0)


def test_a_folder_that_is_not_there_or_not_a_corpus(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder: .*nowhere"):
        prepare_librispeech(tmp_path / "nowhere", tmp_path / "m")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no transcripts in .*other: expected <split>/<speaker>"):
        prepare_librispeech(tmp_path / "other", tmp_path / "m")
    with pytest.raises(
        UserError, match="looks like a split itself; name the folder that holds it: .*LibriSpeech$"
    ):
        prepare_librispeech(corpus / "dev-clean", tmp_path / "m")


# ------------------------------------------------------------------------------------- command line
def test_as_a_script_from_anywhere(
    run_verb, tiny_corpus: Path, tmp_path: Path, monkeypatch
) -> None:
    done = run_verb(SCRIPT, tiny_corpus, "m", "--splits", "dev-clean, test-clean", cwd=tmp_path)
    assert sorted(
        path.name for path in (tmp_path / "m").glob("*.csv") if "skipped" not in path.name
    ) == [
        "dev-clean.csv",
        "test-clean.csv",
    ]
    assert "4 utterances" in done.stdout
    failed = run_verb(SCRIPT, "nowhere", "m", code=2)
    assert failed.stderr.startswith("error: no such folder") and "Traceback" not in failed.stderr


def test_without_the_repository_on_the_path(tmp_path: Path, repo_root: Path) -> None:
    """A script's own folder is on the path, the repository is not: it must find its own package."""
    code = (
        f"import runpy, sys; runpy.run_path({str(repo_root / SCRIPT)!r});"
        "import speechllm_prune; print(sys.path[0], speechllm_prune.__file__)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        str(repo_root),
        str(repo_root / "speechllm_prune" / "__init__.py"),
    ]


def test_main_in_process(corpus: Path, tmp_path: Path, capsys) -> None:
    files(corpus / "dev-clean", ".flac")[0].unlink()
    arguments = [str(corpus), str(tmp_path / "m"), "--splits", "dev-clean"]
    assert main(arguments) == 2
    assert "error: split 'dev-clean': 1 of 4" in capsys.readouterr().err
    assert main([*arguments, "--max_bad_share", "0.25"]) == 0
    before = (tmp_path / "m" / "dev-clean.csv").stat().st_mtime_ns
    assert main([*arguments, "--max_bad_share", "0.25", "--overwrite"]) == 0
    assert (tmp_path / "m" / "dev-clean.csv").stat().st_mtime_ns > before


# --------------------------------------------------------------------------------------- real speech
@pytest.mark.parametrize(
    ("name", "utterances", "seconds"),
    [
        (
            "librispeech_mini",
            {"dev-clean": 10, "test-other": 50, "train-clean-100": 1},
            58 + 367 + 16,
        ),
        (
            "fsdd_mini",
            {"dev-clean": 27, "test-clean": 27, "test-other": 26, "train-clean-100": 120},
            5.7 * 60,
        ),
    ],
)
def test_real_speech(
    shared_data: Path, tmp_path: Path, name: str, utterances: dict, seconds: float
) -> None:
    summaries = prepare_librispeech(shared_data / name, tmp_path)
    assert {
        split: summary["counts"]["utterances"] for split, summary in summaries.items()
    } == utterances
    assert not any(summary["counts"]["skipped"] for summary in summaries.values())
    assert sum(summary["hours"] for summary in summaries.values()) * 3600 == pytest.approx(
        seconds, rel=0.02
    )
    rows = read_manifest(tmp_path / "dev-clean.csv")
    assert all(row.text == row.text.upper() and len(row.text.split()) >= 2 for row in rows)
