"""Mistakes of users: one clear message with the remedy, exit code 2, no traceback, nothing written that misleads."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm_prune import load_hparams
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import good, load_json, refused, snapshot, write_leaf

SPLIT = "LibriSpeech/train-clean-100"


# ---------------------------------------------------------------------------------------------- data
@pytest.fixture
def corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to damage."""
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    return tmp_path / "corpus"


def test_missing_folder(make_leaf: MakeLeaf) -> None:
    assert "/no/such/folder" in refused("train", make_leaf(data_folder="/no/such/folder").leaf)
    message = refused("train", make_leaf(data_folder=None).leaf)
    assert "--data_folder" in message


def test_missing_split(make_leaf: MakeLeaf, corpus: Path) -> None:
    shutil.rmtree(corpus / "LibriSpeech/dev-clean")
    message = refused("train", make_leaf(data_folder=str(corpus)).leaf)
    assert "dev-clean" in message and "train-clean-100" in message  # what is wanted, what there is


def test_a_split_that_only_evaluation_needs_is_a_warning(make_leaf: MakeLeaf, corpus: Path) -> None:
    shutil.rmtree(corpus / "LibriSpeech/test-other")
    study = make_leaf(data_folder=str(corpus))
    outcome = good("train", study.leaf)
    assert "librispeech/test-other" in outcome.err and "prepare.py" in outcome.err
    message = refused("evaluate", study.leaf)
    assert "python recipes/LibriSpeech/librispeech_prepare.py" in message
    assert {path.name for path in (study.root / "eval/full").iterdir()} == {
        "librispeech-test-clean"
    }


def test_empty_split(make_leaf: MakeLeaf, corpus: Path) -> None:
    for file in (corpus / SPLIT).rglob("*.*"):
        file.unlink()
    assert "train-clean-100" in refused("train", make_leaf(data_folder=str(corpus)).leaf)


def skipped(study: Study) -> dict[str, str]:
    """{utterance id: reason} of the training split."""
    with open(study.results / "manifests/librispeech/train-clean-100.skipped.csv") as stream:
        return {row["id"]: row["reason"] for row in csv.DictReader(stream)}


def test_bad_rows_are_counted_and_listed(make_leaf: MakeLeaf, corpus: Path) -> None:
    """Audio without transcript, transcript without audio, unreadable and empty audio; nothing is lost silently."""
    empty, second, third, fourth = sorted(
        (path for path in (corpus / SPLIT).rglob("*") if path.suffix in (".flac", ".wav")),
        key=lambda path: path.stem,
    )[1:5]
    soundfile.write(
        empty, np.zeros(0), 16000
    )  # a wav; a flac without samples cannot be read at all
    second.write_bytes(b"this is no audio")
    third.unlink()
    shutil.copy(fourth, fourth.with_stem("100-1000-9999"))
    study = make_leaf(data_folder=str(corpus))
    message = refused("train", study.leaf)
    assert "max_bad_share" in message and "train-clean-100" in message
    assert not (study.root / "train").exists()
    outcome = good("train", study.leaf, "--max_bad_share", 0.5)
    reasons = skipped(study)
    assert reasons == {
        empty.stem: "zero-length audio",
        second.stem: "unreadable audio",
        third.stem: "transcript without audio",
        "100-1000-9999": "audio without transcript",
    }
    counts = load_json(study.results / "manifests/librispeech/train-clean-100.json")["counts"]
    assert counts["utterances"] == 9 and sum(counts["skipped"].values()) == 4
    assert "skipped" in outcome.out and "train-clean-100: 9 utterances" in outcome.out


def test_another_sample_rate_is_resampled_and_said(make_leaf: MakeLeaf) -> None:
    study = make_leaf()
    outcome = good("train", study.leaf)
    assert "1 utterances at 8000 Hz: resampled to 16000 Hz" in outcome.out


def test_audio_that_vanishes_or_breaks_after_preparation(make_leaf: MakeLeaf, corpus: Path) -> None:
    study = make_leaf(data_folder=str(corpus), cache_features=False, skip_prep=True)
    good("train", study.leaf, "--skip_prep", "False")
    (victim,) = corpus.rglob("101-1000-0000.*")
    victim.write_bytes(b"broken")
    message = refused("measure", study.leaf)
    assert "101-1000-0000" in message
    victim.unlink()
    assert "101-1000-0000" in refused("measure", study.leaf)


def test_an_edited_manifest_is_noticed(own_study: Study) -> None:
    file = own_study.results / "manifests/librispeech/test-clean.csv"
    file.write_text(file.read_text().replace("SEVEN", "EIGHT") + "\n")
    message = refused("evaluate", own_study.leaf, "--overwrite")
    assert "changed" in message and "librispeech_prepare.py" in message


# ---------------------------------------------------------------------------------------------- YAML
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lrr": 1}, ("unknown key 'lrr'", "did you mean 'lr'", "line ")),
        ({"lr": "fast"}, ("'lr' takes a number", "'fast'")),
        ({"lr": 0}, ("'lr' must be above 0",)),
        ({"batch_size": 2.5}, ("'batch_size' takes a whole number",)),
        ({"cache_features": "perhaps"}, ("'cache_features' takes True or False",)),
        ({"task": "translation"}, ("'task' is one of asr, ast",)),
        ({"seed": None, "precision": "fp8"}, ("'precision' is one of",)),
        ({"opt_class": "torch.optim.Adam"}, ("'opt_class' takes an object", "!name:")),
        ({"train_manifests": []}, ("train_manifests is empty",)),
        ({"train_manifests": ["train-clean-100"]}, ("'train-clean-100' is no manifest key",)),
        ({"eval_manifests": ["librispeech/test-clean", "x"]}, ("'x' is no manifest key",)),
        ({"valid_manifest": "librispeech/../../x"}, ("no manifest key",)),
        ({"experiment_name": "../outside"}, ("experiment_name '../outside'",)),
        ({"experiment_name": ""}, ("experiment_name ''",)),
        ({"encoder_hub": "/no/model"}, ("encoder_hub", "/no/model does not exist")),
        ({"device": "potato"}, ("device 'potato'",)),
        ({"max_seconds": 0.01}, ("no training utterance is left", "12 longer than 0.01 s")),
        ({"prepare": "os.system"}, ("'os.system' is not in an allowed package",)),
        ({"prepare": "recipes.no.such"}, ("cannot find 'recipes.no.such'",)),
        ({"skip_prep": True}, ("does not exist; prepare it with: python recipes/LibriSpeech",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_leaf(make_leaf: MakeLeaf, changes: dict, words: tuple[str, ...]) -> None:
    study = make_leaf(experiment_name="wrong")
    leaf = write_leaf(study.leaf, study.values | changes)
    message = refused("train", leaf)
    assert all(word in message for word in words), message
    assert not list(study.results.rglob("DONE.json")), "a refused run must not count as done"


def test_wrong_model_folders(make_leaf: MakeLeaf, qwen2: Path, wavlm_layer: Path) -> None:
    message = refused("train", make_leaf(encoder_hub=str(qwen2)).leaf)
    assert "encoder_hub" in message and "qwen2" in message and "wavlm" in message
    message = refused("train", make_leaf(decoder_hub=str(wavlm_layer)).leaf)
    assert "decoder_hub" in message and len(message) < 1000
    message = refused("train", make_leaf(encoder_hub=str(qwen2.parent)).leaf)
    assert "encoder_hub" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "LEAF"),
        (("nowhere.yaml",), "nowhere.yaml does not exist"),
        (("{leaf}", "stray"), "usage"),
        (("{leaf}", "--lrr", "1"), "unknown key 'lrr'; did you mean 'lr'?"),
        (("{leaf}", "--lr"), "'lr' takes a number"),
        (("{leaf}", "--lr", "fast"), "'lr' takes a number"),
        (("{leaf}", "--opt_class", "!name:os.system"), "tags are not allowed"),
        (("{leaf}", "--prompt=!new:os.system"), "tags are not allowed"),
        (("{leaf}", "--over"), "unknown key 'over'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_command_line(trained: Study, arguments: tuple[str, ...], words: str) -> None:
    given = [argument.replace("{leaf}", str(trained.leaf)) for argument in arguments]
    assert words in refused("train", *given)


def test_not_yaml_at_all(trained: Study, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("base: [unclosed\n")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    for name in ("broken.yaml", "list.yaml"):
        assert name in refused("train", tmp_path / name)
    assert "is not a YAML file" in refused("train", tmp_path)
    near = trained.leaf.with_name("tny.yaml")
    assert f"did you mean {trained.leaf}?" in refused("train", near)


# ---------------------------------------------------------------------------------------------- order of the stages
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (("measure",), "python train.py"),
        (("heal", "--block_size", 2), "python train.py"),
        (("evaluate",), "python train.py"),
        (("sweep",), "python train.py"),
        (("prune", "--block_size", 2), "python measure.py"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_stage_before_its_predecessor(make_leaf: MakeLeaf, command: tuple, remedy: str) -> None:
    study = make_leaf()
    message = refused(command[0], study.leaf, *command[1:])
    assert f"{remedy} {study.leaf}" in message and str(study.root) in message
    assert not study.results.exists()


def test_variants_before_their_stages(own_study: Study) -> None:
    evaluate = ("evaluate", own_study.leaf, "--variant")
    assert "--block_size 2 --start_layer 1" in refused(*evaluate, "l01n02-none")
    good("prune", own_study.leaf, "--block_size", 2, "--start_layer", 1)
    message = refused(*evaluate, "control-l01n02-decoder+x")
    for part in ("heal.py", "--start_layer 1", "--heal_mode decoder", "--control", "--tag x"):
        assert part in message
    (own_study.root / "measure/speech/DONE.json").unlink()
    message = refused("prune", own_study.leaf, "--block_size", 2)
    assert "is not finished" in message and "python measure.py" in message


def test_text_mode_needs_no_training(make_leaf: MakeLeaf, tmp_path: Path) -> None:
    (tmp_path / "sentences.txt").write_text("four little dogs\n\n  near the old house \n")
    study = make_leaf()
    options = ("--measure_input", "text", "--text_file", tmp_path / "sentences.txt")
    good("measure", study.leaf, *options)
    found = load_json(study.root / "measure/text/path.json")
    assert found["count"] == 2 and found["measure_manifest"] is None
    assert found["text_file"] == str(tmp_path / "sentences.txt")
    assert not (study.root / "train").exists()
    good("prune", study.leaf, "--block_size", 2, "--path", "text")
    (tmp_path / "sentences.txt").write_text("another text\n")
    assert "sentences.txt" in refused("measure", study.leaf, *options)


# ---------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("measure", "--measure_input", "text", "--text_file", "/no/file"), "/no/file"),
        (("measure", "--measure_input", "text", "--text_file", "{empty}"), "holds no sentence"),
        (("measure", "--measure_input", "text", "--last_token", "prompt"), "no prompt"),
        (("measure", "--measure_input", "image"), "speech, text"),
        (("prune",), "--block_size"),
        (("prune", "--block_size", 6), "outside 1..5"),
        (("prune", "--block_size", -1), "0 or more"),
        (("prune", "--block_size", 2, "--start_layer", 5), "outside 0..4"),
        (("prune", "--block_size", 2, "--path", "nowhere"), "'nowhere' is neither"),
        (("prune", "--block_size", 2, "--path", "{deep}"), "of 12 layers, this one has 6"),
        (("prune", "--block_size", 2, "--path", "{empty}"), "not valid JSON"),
        (("prune", "--block_size", 2, "--path", "{other}"), "is not a path.json"),
        (("heal", "--block_size", 2, "--heal_mode", "none"), "decoder, projector, joint"),
        (("heal", "--block_size", 2, "--start_layer", 4), "no receiving layer"),
        (("heal", "--block_size", 2, "--tag", "../up"), "tag '../up'"),
        (("heal", "--block_size", 2, "--tag", "a b"), "tag 'a b'"),
        (("evaluate", "--variant", "l4n6"), "'l4n6' is no variant"),
        (("evaluate", "--variant", "full+shuffled_audio"), "--shuffle_audio"),
        (("evaluate", "--eval_manifests", "librispeech/none"), "librispeech_prepare.py"),
        (("sweep", "--shard", "3/2"), "'3/2' is not i/N"),
        (("sweep", "--shard", "1"), "'1' is not i/N"),
        (("sweep", "--shard", "0/0"), "is not i/N"),
        (("sweep", "--block_sizes", "2,9"), "9 is outside 1..5"),
        (("sweep", "--block_sizes", "two"), "whole numbers"),
        (("sweep", "--heal_modes", "joint,magic"), "'magic' is not one of"),
        (("sweep", "--path", "nowhere"), "'nowhere' is neither"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_values(own_study: Study, tmp_path: Path, command: tuple, words: str) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "deep").write_text('{"num_layers": 12, "path": {"2": 7}}')
    (tmp_path / "other").write_text('{"a": 1}')
    before = snapshot(own_study.results)
    given = [str(part) for part in command[1:]]
    for name in ("empty", "deep", "other"):
        given = [part.replace(f"{{{name}}}", str(tmp_path / name)) for part in given]
    assert words in refused(command[0], own_study.leaf, *given)
    after = snapshot(own_study.results)
    new = set(after) - set(before)
    assert {name: after[name] for name in before} == before
    assert new <= {"tiny/3407/prune/l04n02/plan.json"}  # a sound plan, only not one to heal


def test_report_mistakes(trained: Study, tmp_path: Path) -> None:
    assert "report.py results/" in refused("report")
    assert str(tmp_path / "none") in refused("report", tmp_path / "none")
    assert "no experiment" in refused("report", tmp_path)
    assert "--tolerance" in refused("report", trained.root, "--tolerance", -1)
    assert "--compare" in refused("report", trained.root, "--compare")


# ---------------------------------------------------------------------------------------------- hub models offline
def test_the_paper_leaf_lacks_nothing_but_the_weights(
    repo_root: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hparams/librispeech_qwen7b.yaml` as it stands resolves offline; training it says what to download."""
    leaf = repo_root / "hparams/librispeech_qwen7b.yaml"
    hparams = load_hparams(leaf, {"data_folder": "corpus"})
    assert hparams["decoder_hub"] == "Qwen/Qwen2.5-7B" and hparams["num_steps"] == 100_000
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    for split in ("train-clean-360", "train-other-500"):
        rename_speaker(tmp_path / "corpus/LibriSpeech", split)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    options = ("--data_folder", tmp_path / "corpus", "--results_folder", tmp_path / "results")
    message = refused("train", leaf, *options)
    assert "hf download microsoft/wavlm-large" in message and "--encoder_hub FOLDER" in message
    message = refused("measure", leaf, *options, "--measure_input", "text")
    assert "hf download Qwen/Qwen2.5-7B" in message and "--decoder_hub FOLDER" in message


def rename_speaker(corpus: Path, split: str) -> None:
    """Copy test-clean as another split, under utterance ids of its own."""
    for file in (corpus / "test-clean").rglob("*.*"):
        speaker = str(200 + len(split))
        target = (
            corpus / split / speaker / file.parent.name / file.name.replace("102-", f"{speaker}-")
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".txt":
            target.write_text(file.read_text().replace("102-", f"{speaker}-"))
        else:
            shutil.copy(file, target)
