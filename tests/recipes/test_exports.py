"""Exports: a plain causal LM for anyone, a whole SpeechLLM for us, and the same text from every door."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm_prune import SpeechLLM
from speechllm_prune.experiment import Experiment
from speechllm_prune.restore import restore
from tests.recipes.conftest import Study
from tests.recipes.verbs import audio_of, good, hypotheses, load_json, refused


def exported(study: Study, mode: str) -> Path:
    """An export folder of the study."""
    variant = study.variant(2, mode)
    stage = f"prune/{variant[:6]}" if mode == "none" else f"heal/{variant}"
    return study.root / stage / "export"


@pytest.mark.parametrize("mode", ["none", "joint"])
def test_transformers_loads_an_export_as_the_same_model(study: Study, mode: str) -> None:
    folder = exported(study, mode)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.num_hidden_layers == 4 == len(theirs.model.layers)
    ours = restore(Experiment(study.results, "tiny", 3407), study.variant(2, mode), device="cpu")
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        a, b = theirs.eval()(ids).logits, ours.decoder(ids).logits
    if mode == "none":
        assert torch.equal(a, b)
    else:  # the adapters are merged: another order of additions
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "seven Green, boxes\n"
    assert tokenizer(text).input_ids == ours.tokenizer(text).input_ids
    generated = theirs.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


@pytest.mark.parametrize("mode", ["none", "joint"])
def test_an_export_transcribes_as_evaluate_did(study: Study, mode: str) -> None:
    expected = hypotheses(study.root, study.variant(2, mode))
    files = [audio_of(study.corpus, name) for name in expected]
    model = SpeechLLM.from_pretrained(exported(study, mode))
    for batch_size in (1, 3, 8):
        assert model.transcribe(files, batch_size=batch_size) == list(expected.values())
    backwards = model.transcribe(files[::-1], batch_size=2)
    assert backwards[::-1] == list(expected.values())


def test_as_speechbrain_users_expect(study: Study, tmp_path: Path) -> None:
    expected = hypotheses(study.root, study.variant(2))
    files = [audio_of(study.corpus, name) for name in expected]
    model = SpeechLLM.from_hparams(source=exported(study, "joint"), savedir=tmp_path / "unused")
    assert [model.transcribe_file(file) for file in files] == list(expected.values())
    wavs = [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files]
    assert model.transcribe(wavs) == list(expected.values())
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    lengths = torch.tensor([len(wav) / padded.shape[1] for wav in wavs])
    assert model.transcribe_batch(padded, lengths) == list(expected.values())


def test_an_export_needs_nothing_of_the_place_where_it_was_made(
    study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(exported(study, "joint"), folder)
    card = load_json(folder / "speechllm.json")
    for name, fields in {
        "schema": 1,
        "variant": study.variant(2),
        "num_layers": 6,
        "frame_stack": 5,
        "note": "tiny random models",
    }.items():
        assert card[name] == fields
    assert card["tasks"] == [
        {"name": "asr", "prompt": "Transcribe speech to text.", "text_case": "lower"}
    ]
    start = int(study.variant(2)[1:3])
    assert card["kept_layers"] == [n for n in range(6) if n not in (start, start + 1)]
    assert card["encoder"]["folder"] == "encoder" and card["encoder"]["hub"] is None
    file = audio_of(study.corpus, next(iter(hypotheses(study.root, "full"))))
    assert SpeechLLM.from_pretrained(folder).transcribe_file(file)
    config = (folder / "config.json").read_text()
    assert str(study.values["decoder_hub"]) not in config


def test_what_cannot_be_transcribed(study: Study, tmp_path: Path) -> None:
    folder, fine = exported(study, "joint"), audio_of(study.corpus, "102-1000-0000")
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(10), 16000)
    assert "is not an export folder" in refused("transcribe", tmp_path, fine)
    assert "nowhere.wav" in refused("transcribe", folder, tmp_path / "nowhere.wav")
    assert "text.wav" in refused("transcribe", folder, fine, tmp_path / "text.wav")
    assert "no audio" in refused("transcribe", folder, tmp_path / "empty.wav")
    assert "too short" in refused("transcribe", folder, tmp_path / "short.wav")
    assert "asr" in refused("transcribe", folder, fine, "--task", "ast")
    assert "batch_size" in refused("transcribe", folder, fine, "--batch_size", 0)
    assert "device" in refused("transcribe", folder, fine, "--device", "potato")


def test_another_rate_is_resampled(study: Study, tmp_path: Path) -> None:
    """Two channels with the same sound are that sound; 8 kHz is accepted and gives some text."""
    name, text = next(iter(hypotheses(study.root, study.variant(2)).items()))
    samples, rate = soundfile.read(audio_of(study.corpus, name))
    soundfile.write(tmp_path / "stereo.flac", np.stack([samples, samples], axis=1), rate)
    model = SpeechLLM.from_pretrained(exported(study, "joint"))
    assert model.transcribe_file(tmp_path / "stereo.flac") == text
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, samples[::2], rate // 2)
    assert good("transcribe", exported(study, "joint"), slow).out.startswith(f"{slow}\t")
