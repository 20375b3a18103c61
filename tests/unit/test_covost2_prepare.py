"""Preparation of CoVoST 2: both layouts of its tables, both protocols, and every fault that real copies have had."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes.CoVoST2.covost2_prepare import main, prepare_covost2
from recipes.CoVoST2.protocols import plain_text
from speechllm_prune.data.manifest import read_manifest
from speechllm_prune.data.pipeline import read_audio
from speechllm_prune.runtime import UserError

SCRIPT = "recipes/CoVoST2/covost2_prepare.py"
CORPUS = "cv-corpus-4-2019-12-10"

ROWS = {  # clip: (sentence, translation, split)
    "a": ("The house is quite old.", "Das Haus ist ziemlich alt.", "train"),
    "b": ('He said "no" twice today.', 'Er sagte heute zweimal "nein".', "train_covost"),
    "c": ("Where are you going now?", "Wohin gehst du denn jetzt?", "dev"),
    "d": ("null", "NA", "test"),
    "e": ("A café on the corner.", "Ein Café an der Ecke.", "test"),
    "f": ("This one is left here.", "Dieses hier bleibt übrig.", "test"),
}
STANDARD = {"train": ["a", "b"], "dev": ["c"], "test": ["d", "e", "f"]}


def write_clip(path: Path, seconds: float = 0.5, rate: int = 48000) -> None:
    """An mp3 of noise."""
    samples = 0.1 * np.random.default_rng(len(path.stem)).standard_normal(int(seconds * rate))
    soundfile.write(path, samples, rate)


def write_table(path: Path, header: str, rows: list[tuple[str, ...]]) -> None:
    """A table as Common Voice and CoVoST 2 have them."""
    path.write_text(
        "\n".join([header.replace(" ", "\t"), *("\t".join(row) for row in rows)]) + "\n"
    )


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """Folder `en` of Common Voice with the published table of en_de."""
    folder = tmp_path / CORPUS / "en"
    (folder / "clips").mkdir(parents=True)
    for name in ROWS:
        write_clip(folder / "clips" / f"{name}.mp3")
    write_table(
        folder / "validated.tsv",
        "client_id path sentence up_votes",
        [(f"client-{name}", f"{name}.mp3", row[0], "2") for name, row in ROWS.items()],
    )
    write_table(
        folder / "covost_v2.en_de.tsv",
        "path translation split",
        [(f"{name}.mp3", row[1], row[2]) for name, row in ROWS.items()],
    )
    return folder


def split_tables(language: Path, **more: list[tuple[str, ...]]) -> None:
    """Replace the published table by those of the splits, as get_covost_splits.py makes them."""
    for split in STANDARD:
        rows = [
            (f"{name}.mp3", sentence, translation, f"client-{name}")
            for name, (sentence, translation, kind) in ROWS.items()
            if kind.removesuffix("_covost") == split
        ]
        write_table(
            language / f"covost_v2.en_de.{split}.tsv",
            "path sentence translation client_id",
            [*rows, *more.get(split, [])],
        )
    (language / "covost_v2.en_de.tsv").unlink()
    (language / "validated.tsv").unlink()


def ids(folder: Path) -> dict[str, list[str]]:
    """{split: utterance ids} of all manifests in a folder."""
    return {
        path.stem: [row.ID for row in read_manifest(path.with_suffix(".csv"))]
        for path in sorted(folder.glob("*.json"), key=lambda path: list(STANDARD).index(path.stem))
    }


def skipped(folder: Path, split: str) -> dict[str, str]:
    """{id: reason} of a split's skipped list."""
    with open(folder / f"{split}.skipped.csv", newline="") as stream:
        return {row["id"]: row["reason"] for row in csv.DictReader(stream)}


# ------------------------------------------------------------------------------------------- sound
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("layout", ["published", "splits"])
def test_both_layouts_from_every_level(
    language: Path, tmp_path: Path, level: int, layout: str
) -> None:
    if layout == "splits":
        split_tables(language)
    folder = (language, language.parent, language.parent.parent)[level]
    summaries = prepare_covost2(folder, tmp_path / "m", source="en", target="de")
    assert ids(tmp_path / "m") == STANDARD
    assert {
        (one["source"], one["target"], one["protocol"], one["data_root"])
        for one in summaries.values()
    } == {("en", "de", "standard", str(language))}
    rows = {row.ID: row for split in STANDARD for row in read_manifest(tmp_path / f"m/{split}.csv")}
    for name, (sentence, translation, _) in ROWS.items():
        assert (rows[name].text, rows[name].source_text) == (translation, sentence)
        assert len(read_audio(rows[name].wav)) == pytest.approx(16000 * rows[name].duration, abs=1)


def test_tables_may_lie_beside_the_languages(language: Path, tmp_path: Path) -> None:
    shutil.move(language / "covost_v2.en_de.tsv", language.parent)
    prepare_covost2(language.parent, tmp_path / "m", source="en", target="de")
    assert ids(tmp_path / "m") == STANDARD


def test_hours_rates_and_published_sizes_are_said(language: Path, tmp_path: Path, capsys) -> None:
    prepare_covost2(language, tmp_path / "m", source="en", target="de")
    said = capsys.readouterr().out
    assert "train.csv: 2 utterances, 0.000 h" in said
    assert "3 utterances at 48000 Hz: resampled to 16000 Hz" in said
    assert "CoVoST 2 en_de test has 15531 utterances, here are 3" in said


def test_nothing_is_quoted_and_a_backslash_escapes(language: Path, tmp_path: Path) -> None:
    split_tables(
        language, test=[("a2.mp3", '"Open', "tab\\\there and back\\\\slash “so”\u2028on", "c")]
    )
    write_clip(language / "clips/a2.mp3")
    prepare_covost2(language, tmp_path / "m", source="en", target="de")
    row = read_manifest(tmp_path / "m/test.csv")[-1]
    assert row.source_text == '"Open' and row.text == "tab\there and back\\slash “so”\u2028on"


def test_bom_and_crlf_are_accepted(language: Path, tmp_path: Path) -> None:
    for path in language.glob("*.tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    prepare_covost2(language, tmp_path / "m", source="en", target="de")
    assert ids(tmp_path / "m") == STANDARD
    assert read_manifest(tmp_path / "m/dev.csv")[0].text == ROWS["c"][1]


def test_a_second_run_keeps_what_did_not_change(language: Path, tmp_path: Path, capsys) -> None:
    options = {"source": "en", "target": "de"}
    first = prepare_covost2(language, tmp_path / "m", **options)
    assert prepare_covost2(language, tmp_path / "m", **options) == first
    assert capsys.readouterr().out.count("kept, the corpus has not changed") == 3
    write_clip(language / "clips/c.mp3", seconds=1.0)
    again = prepare_covost2(language, tmp_path / "m", ["dev"], **options)
    assert again["dev"]["hours"] > first["dev"]["hours"]


# --------------------------------------------------------------------------------------- protocols
def test_the_folder_says_direction_and_protocol(language: Path, tmp_path: Path) -> None:
    """So that train.py's `prepare` key needs no more than the manifest keys."""
    for protocol in ("standard", "speechbrain"):
        folder = tmp_path / f"covost2_en_de_{protocol}"
        summary = prepare_covost2(language, folder, ["train", "dev"], max_bad_share=0.0)["train"]
        assert summary["protocol"] == protocol
        assert json.loads((folder / "train.json").read_text())["protocol"] == protocol


def test_the_speechbrain_protocol(language: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "covost2_en_de_speechbrain"
    summary = prepare_covost2(language, folder, max_bad_share=0.0)["test"]
    assert ids(folder) == STANDARD | {"test": ["f"]}
    assert skipped(folder, "test") == {
        "d": "fewer than 4 words",
        "e": "character outside the set of en",
    }
    assert summary["counts"]["skipped"] == {} and sum(summary["counts"]["filtered"].values()) == 2
    row = read_manifest(folder / "train.csv")[1]
    assert (row.text, row.source_text) == ("er sagte heute zweimal nein", "he said no twice today")
    assert "left out by the protocol: 1 fewer than 4 words" in capsys.readouterr().out


def test_the_protocol_drops_accented_french() -> None:
    assert plain_text("Il a été là hier.", "fr") is None
    assert plain_text("L\u2019homme a dit oui.", "fr") == "l'homme a dit oui"
    assert plain_text("Ein schöner, großer Tag - 2 Uhr!", "de") == "ein schöner großer tag 2 uhr"
    assert plain_text("Ein Café.", "de") is None and plain_text("schön", "en") is None
    assert plain_text("R&B 'n' soul", "en") == "r&b n soul"


def test_a_protocol_that_leaves_nothing_is_one_message(language: Path, tmp_path: Path) -> None:
    split_tables(language)
    write_table(
        language / "covost_v2.en_de.dev.tsv",
        "path sentence translation",
        [("c.mp3", "No.", "Nein.")],
    )
    with pytest.raises(
        UserError, match="'dev' is empty: the protocol leaves out 1 .1 fewer than 4"
    ):
        prepare_covost2(language, tmp_path / "covost2_en_de_speechbrain", ["dev"])


def test_protocols_and_directions_are_not_mixed(language: Path, tmp_path: Path) -> None:
    prepare_covost2(language, tmp_path / "m", ["train"], source="en", target="de")
    with pytest.raises(UserError, match="holds train of covost2_en_de_standard.*must not be mixed"):
        prepare_covost2(
            language, tmp_path / "m", ["dev"], source="en", target="de", protocol="speechbrain"
        )
    prepare_covost2(  # all of the folder at once is no mixture
        language, tmp_path / "m", source="en", target="de", protocol="speechbrain"
    )
    assert ids(tmp_path / "m")["test"] == ["f"]
    with pytest.raises(UserError, match="named as .* another .*covost2_en_de_speechbrain$"):
        prepare_covost2(language, tmp_path / "covost2_en_de_standard", protocol="speechbrain")
    with pytest.raises(UserError, match="give --source and --target"):
        prepare_covost2(language, tmp_path / "n")
    with pytest.raises(UserError, match="no protocol 'own'; there are standard, speechbrain"):
        prepare_covost2(language, tmp_path / "n", source="en", target="de", protocol="own")


# ------------------------------------------------------------------------------------------ faults
def test_every_bad_row_is_listed_with_its_reason(language: Path, tmp_path: Path) -> None:
    clips = language / "clips"
    split_tables(
        language,
        train=[
            ("a.mp3", "Again.", "Nochmals.", "c"),
            ("gone.mp3", "No clip.", "Kein Clip.", "c"),
            ("html.mp3", "Not audio.", "Kein Ton.", "c"),
            ("empty.mp3", "Empty file.", "Leere Datei.", "c"),
            ("lfs.mp3", "A pointer.", "Ein Zeiger.", "c"),
            ("cut.mp3", "Half.", "Halb.", "c"),
            ("mute.mp3", "Nothing.", " ", "c"),
            ("blank.mp3", "", "Nichts.", "c"),
            ("../../secret.mp3", "Outside.", "Draußen.", "c"),
            ("/etc/passwd", "Outside.", "Draußen.", "c"),
            ("short.mp3", "three columns"),
            ("", "No path.", "Kein Pfad.", "c"),
        ],
    )
    (clips / "html.mp3").write_text("<html>404</html>")
    (clips / "empty.mp3").touch()
    (clips / "lfs.mp3").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_clip(clips / "cut.mp3", 4.0)
    content = (clips / "cut.mp3").read_bytes()
    (clips / "cut.mp3").write_bytes(content[: len(content) // 2])
    options = {"source": "en", "target": "de"}
    with pytest.raises(UserError, match="12 of 14 utterances are unusable"):
        prepare_covost2(language, tmp_path / "m", ["train"], **options)
    prepare_covost2(language, tmp_path / "m", ["train"], max_bad_share=0.9, **options)
    assert ids(tmp_path / "m") == {"train": ["a", "b"]}
    assert skipped(tmp_path / "m", "train") == {
        "a": "second utterance with this id",
        "gone": "missing audio",
        "html": "unreadable audio",
        "empty": "unreadable audio",
        "lfs": "git-lfs pointer instead of audio",
        "cut": "truncated audio",
        "mute": "empty translation",
        "blank": "empty transcript",
        "secret": "path outside the corpus",
        "passwd": "path outside the corpus",
        "covost_v2.en_de.train.tsv, line 14": "row with too few or too many columns",
        "covost_v2.en_de.train.tsv, line 15": "row without path",
    }


def test_a_translation_without_transcript_is_listed(language: Path, tmp_path: Path) -> None:
    lines = (language / "validated.tsv").read_text().splitlines()
    (language / "validated.tsv").write_text("\n".join(lines[:-1]) + "\n")
    prepare_covost2(language, tmp_path / "m", max_bad_share=0.5, source="en", target="de")
    assert skipped(tmp_path / "m", "test") == {"f": "no transcript in validated.tsv"}


def test_a_clip_in_two_splits_is_refused(language: Path, tmp_path: Path) -> None:
    split_tables(language, test=[("a.mp3", *ROWS["a"][:2], "c")])
    with pytest.raises(UserError, match="'test': 1 utterances are in .*train.csv too, first 'a'"):
        prepare_covost2(language, tmp_path / "m", source="en", target="de")
    assert not (tmp_path / "m/test.json").exists()
    assert skipped(tmp_path / "m", "test") == {"a": "also in train"}


def test_tables_that_cannot_be_used(language: Path, tmp_path: Path) -> None:
    options = {"source": "en", "target": "de"}
    table = language / "covost_v2.en_de.tsv"
    content = table.read_bytes()
    table.write_bytes(content.replace(b"translation", b"text", 1))
    with pytest.raises(UserError, match="no column translation; its columns are path, text, split"):
        prepare_covost2(language, tmp_path / "m", **options)
    table.write_bytes(content.replace(b"Das Haus", "Das Häus".encode("latin-1")))
    with pytest.raises(UserError, match="covost_v2.en_de.tsv, line 2: not UTF-8"):
        prepare_covost2(language, tmp_path / "m", **options)
    table.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        prepare_covost2(language, tmp_path / "m", **options)
    table.write_bytes(b"")
    with pytest.raises(UserError, match="has no column path, translation, split"):
        prepare_covost2(language, tmp_path / "m", **options)
    table.write_bytes(content)
    (language / "validated.tsv").unlink()
    with pytest.raises(UserError, match="validated.tsv of Common Voice 4 is needed"):
        prepare_covost2(language, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_folders_and_splits_that_are_not_there(language: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="no such folder"):
        prepare_covost2(tmp_path / "nowhere", tmp_path / "m", source="en", target="de")
    with pytest.raises(UserError, match="no clips in .*expected en/clips"):
        prepare_covost2(language / "clips", tmp_path / "m", source="en", target="de")
    with pytest.raises(
        UserError, match="no table covost_v2.en_fr.tsv.*there is covost_v2.en_de.tsv"
    ):
        prepare_covost2(language, tmp_path / "m", source="en", target="fr")
    with pytest.raises(UserError, match="no split test-clean of en_de.*found: train, dev, test"):
        prepare_covost2(language, tmp_path / "m", ["test-clean"], source="en", target="de")
    split_tables(language)
    (language / "covost_v2.en_de.dev.tsv").unlink()
    prepare_covost2(language, tmp_path / "m", source="en", target="de")
    assert f"not in {language}: en_de dev\n" in capsys.readouterr().out
    shutil.copytree(tmp_path / CORPUS, tmp_path / "cv-corpus-5")
    with pytest.raises(UserError, match="en_de is there several times"):
        prepare_covost2(tmp_path, tmp_path / "m", source="en", target="de")


# ------------------------------------------------------------------------------------ command line
def test_as_a_script_from_anywhere(run_verb, language: Path, tmp_path: Path) -> None:
    folder = "results/covost2_en_de_speechbrain"
    options = ("--source", "en", "--target", "de", "--protocol", "speechbrain")
    done = run_verb(SCRIPT, tmp_path, folder, *options, cwd=tmp_path)
    assert f"{folder}/test.csv: 1 utterances" in done.stdout
    failed = run_verb(SCRIPT, tmp_path, "m", code=2, cwd=tmp_path)
    assert failed.stderr.startswith("error: ") and "--source en --target de" in failed.stderr


def test_main_in_process(language: Path, tmp_path: Path, capsys) -> None:
    (language / "clips/a.mp3").unlink()
    arguments = [str(language), str(tmp_path / "m"), "--source", "en", "--target", "de"]
    assert main([*arguments, "--splits", "train"]) == 2
    assert "error: split 'train': 1 of 2" in capsys.readouterr().err
    assert main([*arguments, "--splits", "train", "--max_bad_share", "0.5"]) == 0


@pytest.mark.parametrize(
    ("source", "target", "counts", "seconds"),
    [
        ("en", "de", {"train": 3, "dev": 1, "test": 1}, 40.9),
        ("fr", "en", {"train": 3, "dev": 1, "test": 3}, 68.7),
    ],
)
@pytest.mark.parametrize("layout", ["published", "splits"])
def test_real_clips(
    shared_data: Path,
    tmp_path: Path,
    source: str,
    target: str,
    counts: dict[str, int],
    seconds: float,
    layout: str,
) -> None:
    """The counts that the fixture's README states, from either kind of table."""
    folder = tmp_path / "covost_mini"
    shutil.copytree(shared_data / "covost_mini", folder)
    unused = "covost_v2.*.t*.tsv" if layout == "published" else "validated.tsv"
    for path in list(folder.rglob(unused)) + list(folder.rglob("covost_v2.*.dev.tsv")):
        if layout == "published" or path.name == "validated.tsv":
            path.unlink()
    summaries = prepare_covost2(folder, tmp_path / "m", source=source, target=target)
    assert {name: one["counts"]["utterances"] for name, one in summaries.items()} == counts
    assert not any(one["counts"]["skipped"] for one in summaries.values())
    total = 3600 * sum(one["hours"] for one in summaries.values())
    assert total == pytest.approx(seconds, abs=0.1)
