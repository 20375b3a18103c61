"""The translation demo: the real corpus layout, a decoder that sees no evaluation text, leaves that fit run_ast.sh."""

import json
import random
import re
import subprocess

import pytest
import soundfile
import torch
import yaml

from recipes.Demo import bootstrap as cli
from recipes.Demo import parallel
from recipes.Demo.corpus_ast import is_translation_corpus, load_speech, load_text, read_tsv
from recipes.Demo.stand_in_translator import TASKS, TaskText, example_of, translator_settings
from speechllm_prune import load_hparams
from speechllm_prune.models.decoder import load_decoder
from speechllm_prune.runtime import UserError
from tests.conftest import REPO_ROOT

SCRIPT = REPO_ROOT / "recipes" / "Demo" / "run_ast.sh"
LEAVES = {"ende": ("en", "de"), "fren": ("fr", "en")}


# ------------------------------------------------------------ script and leaves
def test_the_script_is_sound_bash_and_refuses_what_it_does_not_know():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert (
        "run_ast.sh"
        in subprocess.run(
            ["bash", SCRIPT, "--help"], check=True, capture_output=True, text=True
        ).stdout
    )
    for arguments in (["--fast"], ["a", "b"]):
        done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_task_and_prompt_are_what_the_decoder_has_learned(name):
    source, target = LEAVES[name]
    leaf = load_hparams(REPO_ROOT / "hparams" / f"demo_{name}.yaml")
    assert TASKS[f"ast_{source}_{target}"][:3] == (source, target, leaf["prompt"])
    assert (leaf["task"], leaf["target_language"], leaf["text_case"]) == ("ast", target, "keep")
    corpus = f"demo_{source}_{target}_standard"
    keys = [*leaf["train_manifests"], leaf["valid_manifest"], leaf["measure_manifest"]]
    assert [*keys, *leaf["eval_manifests"]] == [
        f"{corpus}/{split}" for split in ("train", "dev", "dev", "test")
    ]
    real = load_hparams(
        REPO_ROOT / "hparams" / f"covost2_{name}_qwen7b.yaml", {"data_folder": "corpus"}
    )
    for key in ("prompt", "task", "target_language", "text_case", "tolerance"):
        assert leaf[key] == real[key], f"{key} differs from the leaf of the paper"


def test_the_asr_prompt_is_that_of_the_english_demo():
    assert TASKS["asr_en"][2] == load_hparams(REPO_ROOT / "hparams" / "demo.yaml")["prompt"]


def test_script_and_leaves_name_the_same_folders():
    script = SCRIPT.read_text()
    assert "manifests=$results/manifests$suffix" in script
    assert "$manifests/demo_$1_$2_standard" in script
    assert set(re.findall(r"^prepare (\w+ \w+)$", script, re.M)) == {
        " ".join(direction) for direction in LEAVES.values()
    }
    for name in LEAVES:
        text = (REPO_ROOT / "hparams" / f"demo_{name}.yaml").read_text()
        values = yaml.safe_load(text)
        assert "recipes/Demo/run_ast.sh" in text
        assert values["experiment_name"] == f"demo_{name}" and f"demo_{name}/$seed" in script
        assert values["data_folder"] == "results/corpora/demo_ast"
        assert values["decoder_hub"] == "results/stand_ins/demo_ast/decoder"
    assert "corpus=$results/corpora/demo_ast$suffix" in script
    assert "models=$results/stand_ins/demo_ast$suffix" in script


# ------------------------------------------------------------ the corpus
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The corpus at a few utterances per split."""
    pytest.importorskip("espeakng_loader", reason="the optional extra [demo] is not installed")
    from recipes.Demo import synthesise_ast

    splits = synthesise_ast.SETTINGS["splits"]
    small = {name: of_split | {"count": 6} for name, of_split in splits.items()}
    settings = synthesise_ast.SETTINGS | {"splits": small, "lm_text": 60}
    folder = tmp_path_factory.mktemp("ast") / "corpus"
    assert synthesise_ast.synthesise(folder, seed=7, settings=settings)
    assert not synthesise_ast.synthesise(folder, seed=7, settings=settings)
    return folder


@pytest.mark.parametrize("direction", LEAVES.values(), ids="-".join)
def test_the_real_preparation_reads_the_corpus(corpus, direction, tmp_path):
    from recipes.CoVoST2.covost2_prepare import prepare_covost2
    from speechllm_prune.data.manifest import read_manifest

    source, target = direction
    summaries = prepare_covost2(corpus / "cv", tmp_path, source=source, target=target)
    assert set(summaries) == {"train", "dev", "test"}
    for split, summary in summaries.items():
        assert summary["counts"]["utterances"] == 6 and not summary["counts"]["skipped"]
        for row in read_manifest(tmp_path / f"{split}.csv"):
            english = parallel.spoken(row.source_text if source == "en" else row.text)
            assert row.source_text == parallel.translate(english, source)
            assert row.text == parallel.translate(english, target)
            assert soundfile.info(row.wav).format == "MP3"


def test_no_evaluation_sentence_is_elsewhere(corpus):
    from recipes.Demo import synthesise

    english = {}
    for table in corpus.glob("cv/*/covost_v2.*.*.tsv"):
        column = "sentence" if table.parent.name == "en" else "translation"
        english[table.stem] = [parallel.spoken(row[column]) for row in read_tsv(table)]
    english["lm"] = [parallel.spoken(row["en"]) for row in load_text(corpus).sentences]
    asr = synthesise.corpus_texts(7, synthesise.SETTINGS)
    english |= {f"asr {split}": asr[split] for split in synthesise.SPLITS}
    every = [sentence for part in english.values() for sentence in part]
    assert len(every) == len(set(every))


def test_french_labels_name_the_words_that_are_spoken(corpus):
    speech = load_speech(corpus, "fr")
    labels = speech.labels()
    assert set(labels) == set(speech.train) and len(labels) == 6
    for uttid, (audio, text) in speech.train.items():
        assert " ".join(word for word, _ in labels[uttid]["words"]) == text
        duration = soundfile.info(audio).duration
        assert labels[uttid]["phonemes"][-1][1] <= duration + 0.01


def test_a_language_that_is_not_spoken_is_a_user_error(corpus):
    with pytest.raises(UserError, match="languages found: en, fr"):
        load_speech(corpus, "de")


# ------------------------------------------------------------ the decoder
@pytest.fixture
def text_folder(tmp_path):
    """Parallel text of 40 sentences, of which one is spoken in dev."""
    from recipes.Demo import grammar
    from recipes.Demo.synthesise_ast import SPLIT_COLUMNS, write_tsv

    rng = random.Random(5)
    english = sorted({grammar.sentence(rng) for _ in range(45)})[:40]
    rows = [
        {lang: parallel.translate(line, lang) for lang in parallel.LANGUAGES} for line in english
    ]
    write_tsv(tmp_path / "lm_parallel.tsv", parallel.LANGUAGES, rows)
    for split, row in (("train", rows[0]), ("dev", rows[1])):
        spoken = {"path": "a.mp3", "sentence": row["fr"], "translation": row["en"]}
        table = tmp_path / "cv" / "fr" / f"covost_v2.fr_en.{split}.tsv"
        table.parent.mkdir(parents=True, exist_ok=True)
        write_tsv(table, SPLIT_COLUMNS, [spoken | {"client_id": "x"}])
    return tmp_path, rows


def small_settings():
    settings = translator_settings("qwen2", seed=1)
    architecture = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    architecture = settings["architecture"] | architecture
    return settings | {"architecture": architecture, "steps": 2, "held_out": 10, "batch_size": 8}


def test_evaluation_text_never_reaches_the_decoder(text_folder, monkeypatch):
    folder, rows = text_folder
    assert is_translation_corpus(folder)
    text = load_text(folder)
    assert rows[0] in text.sentences and rows[1] not in text.sentences
    read = []
    original = TaskText.__call__

    def spy(self, example, rng, plain=None):
        read.append(example)
        return original(self, example, rng, plain)

    monkeypatch.setattr(TaskText, "__call__", spy)
    assert cli.bootstrap("decoder", text, folder / "models", small_settings(), fresh=False)
    assert {example.task for example in read} == set(TASKS)
    held_back = {form for line in rows[1].values() for form in (line, parallel.spoken(line))}
    assert not held_back & {part for e in read for part in (e.source, e.target)}
    record = json.loads((folder / "models" / "decoder" / "bootstrap.json").read_text())
    assert {f"held_out_exact_match_{task}" for task in TASKS} <= set(record)
    assert not cli.bootstrap("decoder", text, folder / "models", small_settings(), fresh=False)


def test_example_layout_is_source_prompt_target(text_folder):
    folder, rows = text_folder
    cli.bootstrap("decoder", load_text(folder), folder / "models", small_settings(), fresh=False)
    _, tokenizer = load_decoder(str(folder / "models" / "decoder"))
    layout = TaskText(tokenizer, small_settings() | {"stretch": [1.0], "pause": 0.0})
    for task, (source, _, prompt, _) in TASKS.items():
        example = example_of(rows[3], task)
        ids, labels, heard = layout(example, random.Random(1), plain=False)
        assert tokenizer.decode(ids[:heard]) == f" {parallel.spoken(rows[3][source])}"
        assert tokenizer.decode(ids[heard:]) == prompt + example.target
        learned = [label for label in labels if label >= 0]
        assert tokenizer.decode(learned[:-1]) == example.target
        assert learned[-1] == tokenizer.eos_token_id
        assert torch.tensor(labels[: heard + 1]).lt(0).all()


def test_bootstrap_of_a_translation_corpus_by_the_command(text_folder, capsys, monkeypatch):
    folder, _ = text_folder
    monkeypatch.setattr(
        "recipes.Demo.stand_in_translator.translator_settings",
        lambda family, seed: small_settings(),
    )
    arguments = ["--corpus", str(folder), "--stand_ins", str(folder / "models")]
    assert cli.main(["decoder", *arguments]) == 0
    assert "held_out_exact_match_ast_en_de" in capsys.readouterr().out
    assert cli.main(["encoder", *arguments]) == 2
    assert "give --language" in capsys.readouterr().err
