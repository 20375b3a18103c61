"""The demo's corpus: read by the real LibriSpeech preparation, reproducible, complete or absent."""

import hashlib
import json
import os

import pytest

pytest.importorskip("espeakng_loader", reason="the optional extra [demo] is not installed")

import soundfile

from recipes.Demo import synthesise as demo
from recipes.LibriSpeech.librispeech_prepare import prepare_librispeech
from speechllm_prune.runtime import UserError

SMALL = demo.SETTINGS | {
    "splits": {name: split | {"count": 8} for name, split in demo.SPLITS.items()},
    "lm_text": {"narrow": 50, "wide": 50},
    "utterances_per_chapter": 4,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    assert demo.synthesise(folder, seed=7, settings=SMALL)
    return folder


def transcripts(folder, split):
    files = (folder / "LibriSpeech" / split).glob("*/*/*.trans.txt")
    return dict(
        line.split(" ", 1) for file in files for line in file.read_text().strip().splitlines()
    )


def audio_hashes(folder):
    return {
        file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.flac")
    }


def test_librispeech_preparation_reads_every_split(corpus, tmp_path):
    summaries = prepare_librispeech(corpus, tmp_path)
    assert set(summaries) == set(demo.SPLITS)
    for split in demo.SPLITS:
        rows = (tmp_path / f"{split}.csv").read_text().splitlines()
        assert len(rows) == 1 + 8
        assert all(text.isupper() for text in transcripts(corpus, split).values())


def test_utterance_ids_are_unique_and_speakers_are_listed(corpus):
    ids = [uttid for split in demo.SPLITS for uttid in transcripts(corpus, split)]
    assert len(ids) == len(set(ids)) == 8 * len(demo.SPLITS)
    listed = {
        int(line.split("|")[0])
        for line in (corpus / "LibriSpeech" / "SPEAKERS.TXT").read_text().splitlines()
        if not line.startswith(";")
    }
    assert {int(uttid.split("-")[0]) for uttid in ids} <= listed


def test_out_of_domain_files_have_another_rate(corpus):
    rates = {
        split: {
            soundfile.info(f).samplerate for f in (corpus / "LibriSpeech" / split).rglob("*.flac")
        }
        for split in demo.SPLITS
    }
    assert rates.pop("ood") == {22050}
    assert all(rate == {16000} for rate in rates.values())


def test_labels_are_for_train_alone_and_end_within_the_audio(corpus):
    labels = [json.loads(line) for line in (corpus / "frame_labels.jsonl").read_text().splitlines()]
    assert {row["id"] for row in labels} == set(transcripts(corpus, "train-clean-100"))
    for row in labels:
        text = transcripts(corpus, "train-clean-100")[row["id"]].lower()
        assert " ".join(word for word, _ in row["words"]) == text
        (audio,) = (corpus / "LibriSpeech").rglob(f"{row['id']}.flac")
        for kind in ("words", "phonemes"):
            starts = [start for _, start in row[kind]]
            assert starts == sorted(starts)
            assert starts[-1] <= soundfile.info(audio).duration + 0.01


def test_full_size_texts_of_different_parts_are_disjoint():
    texts = demo.corpus_texts(3407, demo.SETTINGS)
    every = [text for part in texts.values() for text in part]
    assert len(every) == len(set(every))
    for split in ("test-clean", "test-other", "ood"):
        assert len(texts[split]) >= 150
        assert sum(len(text.split()) for text in texts[split]) >= 1000


def test_unseen_voices_are_in_no_other_split():
    def numbers(voices):
        return {number for number, _, _ in demo.speakers(voices)}

    assert not numbers("seen") & numbers("unseen")
    voices = {split: settings["voices"] for split, settings in demo.SPLITS.items()}
    assert voices["test-other"] == "unseen"
    assert {voices["train-clean-100"], voices["dev-clean"], voices["test-clean"]} == {"seen"}


def test_same_seed_gives_the_same_samples_and_another_seed_others(corpus, tmp_path):
    demo.synthesise(tmp_path / "again", seed=7, settings=SMALL)
    demo.synthesise(tmp_path / "other", seed=8, settings=SMALL)
    assert audio_hashes(tmp_path / "again") == audio_hashes(corpus)
    assert not set(audio_hashes(tmp_path / "other").values()) & set(audio_hashes(corpus).values())


def test_complete_corpus_is_kept_and_other_settings_replace_it(tmp_path):
    out = tmp_path / "corpus"
    assert demo.synthesise(out, seed=7, settings=SMALL)
    before = os.stat(out / "synthesis.json").st_mtime_ns
    assert not demo.synthesise(out, seed=7, settings=SMALL)
    assert os.stat(out / "synthesis.json").st_mtime_ns == before
    assert demo.synthesise(out, seed=7, settings=SMALL | {"rate": [180, 200]})
    assert os.stat(out / "synthesis.json").st_mtime_ns != before


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "speakers_txt", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.synthesise(tmp_path / "corpus", seed=7, settings=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to me")
    with pytest.raises(UserError, match="holds other files"):
        demo.synthesise(tmp_path, seed=7, settings=SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_package_is_a_user_error(monkeypatch, tmp_path):
    import sys

    from recipes.Demo.espeak import Espeak

    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"\[demo\]"):
        Espeak()
