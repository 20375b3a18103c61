"""Exports: a plain causal LM for anyone, a whole SpeechLLM for us, and the same text from every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm_prune import SpeechLLM
from speechllm_prune.experiment import Experiment
from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.decoder import load_decoder
from speechllm_prune.prune.export import export
from speechllm_prune.prune.export_folder import ExportFault
from speechllm_prune.restore import restore
from speechllm_prune.runtime import UserError
from tests.recipes.conftest import MakeLeaf, Study, copy_study
from tests.recipes.verbs import audio_of, good, hypotheses, load_json, refused, snapshot


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


def test_a_finished_training_is_exported_without_its_corpus(study: Study, tmp_path: Path) -> None:
    own = copy_study(study, tmp_path)
    shutil.rmtree(own.root / "train/export", ignore_errors=True)
    good("train", own.leaf, "--data_folder", tmp_path / "nowhere", "--export")
    assert (own.root / "train/export/speechllm.json").is_file()


def test_an_export_names_no_folder_outside_of_it(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported(study, "joint"), folder)
    card = json.loads((folder / "speechllm.json").read_text())
    card["encoder"]["folder"] = "../encoder"
    (folder / "speechllm.json").write_text(json.dumps(card))
    audio = audio_of(study.corpus, "102-1000-0000")
    assert "'../encoder', outside" in refused("transcribe", folder, audio)


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


# ------------------------------------------------------------------------------------------ the folder itself


def test_the_card_has_the_results_that_there_are(study: Study, tmp_path: Path) -> None:
    before = (
        exported(study, "joint") / "README.md"
    ).read_text()  # exported before it was evaluated
    variant = study.variant(2)
    assert "| not measured | not measured | 4 | not measured |" in before
    own = copy_study(study, tmp_path)
    assert "already done" in good("heal", own.leaf, "--block_size", 2, "--export").out
    card = (exported(own, "joint") / "README.md").read_text()
    full, mine = (
        load_json(own.root / "eval" / name / "librispeech-test-clean" / "metrics.json")["value"]
        for name in ("full", variant)
    )
    row = f"| librispeech-test-clean | WER | {full:.2f} | {mine:.2f} | {100 * (mine - full) / full:+.1f} % | 4 |"
    assert row in card and "not measured" not in card
    assert "> **Note:** tiny random models" in card and f"## asr: {variant}" in card
    facts = load_json(exported(own, "joint") / "speechllm.json")
    assert sorted(facts["inputs"]) == [
        f"heal/{variant}/DONE.json",
        f"prune/{variant[:6]}/plan.json",
        "train/DONE.json",
    ]
    assert facts["merge"]["dtype"] == "float32"
    assert 0 < facts["merge"]["max_logit_difference"] < 1e-4
    for file in exported(own, "joint").rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o044 == 0o044, file
    cut = yaml.safe_load((exported(own, "joint") / "mergekit.yml").read_text())
    ranges = [range(*piece["sources"][0]["layer_range"]) for piece in cut["slices"]]
    assert [layer for layers in ranges for layer in layers] == facts["kept_layers"]


def test_an_export_is_there_and_right_or_not_there(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, variant = Experiment(study.results, "tiny", 3407), study.variant(2)
    facts: dict[str, Any] = {
        "variant": variant,
        "num_layers": 6,
        "kept_layers": load_json(exported(study, "joint") / "speechllm.json")["kept_layers"],
        "results": [],
    }
    hparams = load_hparams(study.root / "train" / "hyperparams.yaml")
    folder = tmp_path / "place" / "export"

    def attempt() -> Path:
        model = restore(experiment, variant, hparams, "cpu")
        return export(model, folder, hparams, "hash", **facts)

    def broken(*arguments: Any, **options: Any) -> Any:
        decoder, tokenizer = load_decoder(*arguments, **options)
        decoder.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] += 1e-6
        return decoder, tokenizer

    monkeypatch.setattr("speechllm_prune.prune.export.load_decoder", broken)
    with pytest.raises(ExportFault, match="layers.1.mlp.up_proj"):
        attempt()
    assert list(folder.parent.iterdir()) == []
    monkeypatch.undo()
    (folder.parent / ".export.writing").mkdir()  # left by a process that was killed
    assert attempt() == folder and list(folder.parent.iterdir()) == [folder]
    before = snapshot(folder)
    monkeypatch.setattr("speechllm_prune.prune.export.load_decoder", broken)
    with pytest.raises(ExportFault):
        attempt()
    assert list(folder.parent.iterdir()) == [folder] and snapshot(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    folder = tmp_path / "mine"
    with pytest.raises(UserError, match="is no export"):
        attempt()
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


def test_a_full_model_with_lora_and_a_whisper_window(
    make_leaf: MakeLeaf, whisper: Path, tmp_path: Path
) -> None:
    """The unpruned model is exported by train.py; its stage-1 adapters are merged; 3 seconds are the limit."""
    study = make_leaf(encoder_hub=str(whisper), decoder_lora_rank=4, lr=1.0e-2)
    good("train", study.leaf, "--export")
    folder = study.root / "train" / "export"
    expected = hypotheses(study.root, "full")
    files = [audio_of(study.corpus, name) for name in expected]
    model = SpeechLLM.from_pretrained(folder)
    assert model.transcribe(files) == list(expected.values())
    ours = restore(Experiment(study.results, "tiny", 3407), "full", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.decoder(ids).logits, rtol=0, atol=1e-4)
    assert load_json(folder / "speechllm.json")["kept_layers"] == [0, 1, 2, 3, 4, 5]
    soundfile.write(tmp_path / "fits.wav", np.zeros(3 * 16000), 16000)
    soundfile.write(tmp_path / "long.wav", np.zeros(3 * 16000 + 1), 16000)
    assert good("transcribe", folder, tmp_path / "fits.wav").code == 0
    message = refused("transcribe", folder, files[0], tmp_path / "long.wav")
    assert "long.wav is 3.0 s long, the encoder takes at most 3 s" in message
    with pytest.raises(UserError, match="at most 3 s"):
        model.transcribe_batch(torch.zeros(1, 4 * 16000), torch.ones(1))


# ------------------------------------------------------------------------------------------ transcribe.py and friends


def test_files_folders_and_lists(study: Study, tmp_path: Path) -> None:
    expected = hypotheses(study.root, study.variant(2))
    files = {name: audio_of(study.corpus, name) for name in expected}
    (tmp_path / "audio" / "deep").mkdir(parents=True)
    first, second, *others = files.values()
    shutil.copy(first, tmp_path / "audio" / "deep" / first.name)
    shutil.copy(second, tmp_path / "audio" / second.name)
    (tmp_path / "audio" / "notes.md").write_text("no audio")
    lines = ["# two files", "", *(str(file) for file in others), f"audio/{second.name}"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    folder = exported(study, "joint")
    out = good(
        "transcribe", folder, tmp_path / "audio", tmp_path / "list.txt", "--batch_size", 1
    ).out
    printed = [line.split("\t") for line in out.splitlines()]
    names = list(expected)
    by_stem = {Path(path).stem: text for path, text in printed}
    assert by_stem == {name: " ".join(text.split()) for name, text in expected.items()}
    in_folder = sorted([f"deep/{first.name}", second.name])
    assert [path for path, _ in printed] == [
        *(str(tmp_path / "audio" / name) for name in in_folder),
        *(str(file) for file in others),
        str(tmp_path / "audio" / second.name),
    ]
    assert len(names) == 4
    (tmp_path / "list.txt").write_text("gone.flac\n")
    assert "gone.flac" in refused("transcribe", folder, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("# nothing\n")
    assert "names no audio file" in refused("transcribe", folder, tmp_path / "list.txt")


def test_audio_beyond_the_decoders_positions_is_refused(study: Study) -> None:
    model = SpeechLLM.from_pretrained(exported(study, "joint"))
    model.decoder.config.max_position_embeddings = 20
    with pytest.raises(UserError, match="positions of the decoder, which has 20"):
        model.transcribe([torch.zeros(16000 * 3)])


def test_relative_lengths_are_checked(study: Study) -> None:
    model = SpeechLLM.from_pretrained(exported(study, "joint"))
    wavs = torch.zeros(2, 16000)
    for lengths in (torch.tensor([1.0]), torch.tensor([[1.0], [1.0]])):
        with pytest.raises(UserError, match="takes"):
            model.transcribe_batch(wavs, lengths)
    for lengths in (
        torch.tensor([1.0, 16000.0]),
        torch.tensor([1.0, 0.0]),
    ):  # samples are no shares
        with pytest.raises(UserError, match="shares"):
            model.transcribe_batch(wavs, lengths)


def test_from_the_hub_into_savedir(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repo: str, revision: str | None = None, local_dir: Any = None) -> str:
        asked.append((repo, local_dir))
        return str(shutil.copytree(exported(study, "joint"), local_dir))

    def offline(*arguments: Any, **options: Any) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    options = {"device": "cpu"}
    SpeechLLM.from_hparams("somebody/asr", savedir=tmp_path / "saved", run_opts=options)
    assert asked == [("somebody/asr", tmp_path / "saved")]
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="no folder here, and cannot be had from the hub"):
        SpeechLLM.from_hparams("somebody/asr")
    with pytest.raises(UserError, match="is not an export folder"):
        SpeechLLM.from_hparams(tmp_path / "nowhere")
