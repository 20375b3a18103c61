"""Rows 3, 7, 8, 11, 14, 16: data that breaks after it was prepared, or does not fit the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm_prune.data.manifest import Row
from speechllm_prune.data.pipeline import misfit, refuse_misfits
from speechllm_prune.experiment import sha256_file, write_json
from speechllm_prune.runtime import UserError
from tests.faults.processes import Processes
from tests.faults.test_data import LIBRISPEECH
from tests.recipes.conftest import MakeLeaf
from tests.recipes.verbs import load_json


@pytest.fixture
def prepared(tiny_corpus: Path, make_leaf: MakeLeaf, tmp_path: Path, verbs: Processes):
    """A leaf on a copy of the tiny corpus, prepared; training does not prepare it again."""
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    study = make_leaf(
        data_folder=str(tmp_path / "corpus"), cache_features=False, skip_prep=True, num_workers=1
    )
    study.corpus = tmp_path / "corpus"
    verbs.run(LIBRISPEECH, study.corpus, study.results / "manifests/librispeech")
    return study


def edit(manifest: Path, change: Callable[[str], str]) -> None:
    """Change a manifest as somebody would who wants it to be believed: with its hash."""
    manifest.write_text(change(manifest.read_text()))
    summary = load_json(manifest.with_suffix(".json"))
    write_json(manifest.with_suffix(".json"), summary | {"sha256": sha256_file(manifest)})


def refused_training(prepared, verbs: Processes) -> str:
    message = verbs.run("train", prepared.leaf, code=2).message
    assert not (prepared.root / "train/DONE.json").exists()
    return message


@pytest.mark.parametrize("how", ["deleted", "nan", "shorter", "text"])
def test_rows_03_07_audio_that_changes_after_preparation(
    prepared, verbs: Processes, how: str
) -> None:
    """Out of a worker process, too: one message with the utterance, and what to do."""
    (victim,) = prepared.corpus.rglob("100-1000-0001.*")
    samples, rate = soundfile.read(victim)
    if how == "deleted":
        victim.unlink()
    elif how == "text":
        victim.write_text("this is no audio")
    else:
        samples = (
            samples[: len(samples) // 2] if how == "shorter" else np.full_like(samples, np.nan)
        )
        soundfile.write(victim, samples, rate, subtype="FLOAT")
    message = refused_training(prepared, verbs)
    assert "100-1000-0001" in message
    words = {
        "deleted": "audio files that do not exist",
        "nan": "NaN or infinite samples",
        "shorter": "s long, its manifest says",
        "text": "cannot read the audio file",
    }
    assert words[how] in message and "prepare" in message


def test_row_08_a_wrong_duration(prepared, verbs: Processes) -> None:
    manifest = prepared.results / "manifests/librispeech/train-clean-100.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace("100-1000-0001,0", "100-1000-0001,1"))
    message = refused_training(prepared, verbs)
    assert "has changed since it was written" in message and "librispeech_prepare.py" in message
    manifest.write_text(text)
    edit(manifest, lambda text: text.replace("100-1000-0001,0", "100-1000-0001,1"))
    message = refused_training(prepared, verbs)
    assert "utterance 100-1000-0001" in message and "its manifest says 1." in message


@pytest.mark.parametrize("path", ["../../secret.wav", "/etc/hostname", "a/../../../x.wav", ".", ""])
def test_row_16_paths_that_leave_the_corpus(prepared, verbs: Processes, path: str) -> None:
    manifest = prepared.results / "manifests/librispeech/train-clean-100.csv"
    wav = next(line for line in manifest.read_text().splitlines() if "100-1000-0001" in line)
    edit(manifest, lambda text: text.replace(wav.split(",")[2], path))
    message = refused_training(prepared, verbs)
    assert f"'{path}' is not a path inside data_root" in message and "100-1000-0001" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max_seconds", 0.01), "no training utterance is left (12 longer than 0.01 s)"),
        (("--min_seconds", 99.0), "no training utterance is left (12 shorter than 99.0 s)"),
    ],
)
def test_row_14_nothing_left_after_the_filters(
    prepared, verbs: Processes, options: tuple, words: str
) -> None:
    message = verbs.run("train", prepared.leaf, *options, code=2).message
    assert words in message and "change min_seconds, max_seconds or max_target_tokens" in message


@pytest.mark.parametrize("cache", [False, True])
def test_row_11_longer_than_the_encoder_takes(
    prepared, verbs: Processes, whisper: Path, cache: bool
) -> None:
    """Dropped from training and counted; refused where it would be scored; never cut."""
    folder = prepared.results / "manifests/librispeech"
    options = ("--encoder_hub", whisper, "--cache_features", cache, "--eval_manifests", "[]")
    (victim,) = prepared.corpus.rglob("100-1000-0001.*")
    soundfile.write(victim, 0.1 * np.random.default_rng(0).standard_normal(16000 * 4), 16000)
    verbs.run(LIBRISPEECH, prepared.corpus, folder)
    ended = verbs.run("train", prepared.leaf, *options)
    assert "11 utterances" in ended.out
    assert "dropped 1 longer than the 3 s that the encoder takes" in ended.out
    if cache:
        return
    (victim,) = prepared.corpus.rglob("101-1000-0001.*")  # of dev-clean
    soundfile.write(victim, 0.1 * np.random.default_rng(0).standard_normal(16000 * 4), 16000)
    verbs.run(LIBRISPEECH, prepared.corpus, folder)
    message = verbs.run("train", prepared.leaf, *options, "--overwrite", code=2).message
    assert "librispeech/dev-clean: the model cannot take 1 of 4 utterances" in message
    assert "'101-1000-0001' (4.00 s: longer than the 3 s that the encoder takes)" in message


def test_row_11_longer_than_the_decoder_has_positions(wavlm_layer: Path, qwen2: Path) -> None:
    from types import SimpleNamespace

    from speechllm_prune.models.encoder import load_encoder

    config = SimpleNamespace(max_position_embeddings=100)
    model = SimpleNamespace(
        encoder=load_encoder(str(wavlm_layer)),
        decoder=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)),
        num_positions=lambda samples, targets: samples // 1600 + targets,
    )
    short, long = Row("a", 9.0, "a", "x"), Row("b", 9.0, "b", "x")
    assert misfit(model, short, 10) is None
    assert misfit(model, long, 11) == "more than the 100 positions of the decoder"
    assert misfit(model, Row("c", 0.001, "c", "x"), 1) == "shorter than a frame of the encoder"
    refuse_misfits(model, [short], "m")
    with pytest.raises(UserError, match="m: the model cannot take 1 of 2 utterances, first 'd'"):
        refuse_misfits(model, [short, Row("d", 10.0, "d", "x")], "m")
