"""Real speech and a real decoder through the verbs. Nothing is learned in these few steps; they show that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.Loquacious.loquacious_prepare import main as loquacious_prepare
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import good, load_json, load_rows, refused


@pytest.fixture
def librispeech_mini(shared_data: Path) -> Path:
    """61 utterances of LibriSpeech in its own layout."""
    if not (shared_data / "librispeech_mini").is_dir():
        pytest.skip(f"no librispeech_mini in {shared_data}")
    return shared_data / "librispeech_mini"


@pytest.fixture
def tiny_llama(shared_data: Path) -> Path:
    """A small Llama that has been trained (stories260K)."""
    if not (shared_data / "tiny_llama" / "config.json").is_file():
        pytest.skip(f"no tiny_llama in {shared_data}")
    return shared_data / "tiny_llama"


def splits_of(corpus: Path) -> dict[str, str]:
    """{split: manifest key} of a corpus in LibriSpeech layout."""
    root = corpus / "LibriSpeech" if (corpus / "LibriSpeech").is_dir() else corpus
    names = {path.name for path in root.iterdir() if path.is_dir()}
    return {name: f"librispeech/{name}" for name in sorted(names) if "-" in name}


@pytest.mark.slow
def test_librispeech(make_leaf: MakeLeaf, librispeech_mini: Path) -> None:
    splits = splits_of(librispeech_mini)
    train = next(key for name, key in splits.items() if name.startswith("train"))
    dev = next(key for name, key in splits.items() if name.startswith("dev"))
    tests = [key for name, key in splits.items() if name.startswith("test")]
    study = make_leaf(
        data_folder=str(librispeech_mini),
        train_manifests=[train],
        valid_manifest=dev,
        measure_manifest=dev,
        eval_manifests=tests,
        num_steps=4,
        valid_interval=2,
        heal_steps=2,
        valid_utterances=4,
        max_tokens_per_second=1.0,  # random models never stop by themselves
    )
    good("train", study.leaf)
    good("measure", study.leaf)
    good("sweep", study.leaf, "--block_sizes", "2", "--heal_modes", "joint")
    out = good("report", study.root).out
    for key in tests:
        for variant in ("full", study.variant(2)):
            folder = study.root / "eval" / variant / key.replace("/", "-")
            metrics, rows = load_json(folder / "metrics.json"), load_rows(folder / "hyps.jsonl")
            assert metrics["num_utterances"] == len(rows) > 0 and metrics["reference_words"] > 20
            assert all(row["ref"].isupper() and row["duration"] > 1 for row in rows)
        assert key.replace("/", "-") in out
    distance = load_file(study.root / "measure/speech/distances.safetensors")["distance"]
    assert torch.isfinite(distance[0]).all()


SHORT = {
    "num_steps": 2,
    "valid_interval": 1,
    "heal_steps": 1,
    "valid_utterances": 2,
    "max_tokens_per_second": 1.0,
}


def corpus_of(shared_data: Path, name: str) -> Path:
    """A folder of the real sample data."""
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} in {shared_data}")
    return shared_data / name


def whole_study(study: Study) -> None:
    """Train, measure, heal, evaluate, report."""
    good("train", study.leaf)
    good("measure", study.leaf)
    good("sweep", study.leaf, "--block_sizes", "2", "--heal_modes", "joint")
    distance = load_file(study.root / "measure/speech/distances.safetensors")["distance"]
    assert torch.isfinite(distance[0]).all()


@pytest.mark.slow
def test_loquacious(make_leaf: MakeLeaf, shared_data: Path) -> None:
    """Audio from parquet rows, by the prepare hook; WER for each source that the ids tell."""
    study = make_leaf(
        data_folder=str(corpus_of(shared_data, "loquacious_mini")),
        prepare="recipes.Loquacious.loquacious_prepare.prepare_loquacious",
        train_manifests=["loquacious/train"],
        valid_manifest="loquacious/dev",
        measure_manifest="loquacious/dev",
        eval_manifests=["loquacious/dev", "loquacious/test"],
        num_workers=1,
        cache_features=False,
        **SHORT,
    )
    whole_study(study)
    for split, count in (("dev", 4), ("test", 3)):
        for variant in ("full", study.variant(2)):
            metrics = load_json(study.root / f"eval/{variant}/loquacious-{split}/metrics.json")
            assert metrics["num_utterances"] == count and metrics["reference_words"] > 10
            assert "protocol" not in metrics
            # All of the fixture is LibriSpeech, so that the one source has all the errors.
            (source,) = metrics["by_source"].items()
            assert source[0] == "librispeech" and source[1]["num_utterances"] == count
            assert source[1]["value"] == pytest.approx(metrics["value"])
            assert source[1]["reference_words"] == metrics["reference_words"]
    assert "loquacious-test" in good("report", study.root).out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "protocol", "num_tests"),
    [("fr", "en", "standard", 3), ("en", "de", "speechbrain", 1)],
)
def test_covost2(
    make_leaf: MakeLeaf,
    shared_data: Path,
    source: str,
    target: str,
    protocol: str,
    num_tests: int,
) -> None:
    """mp3 at 48 kHz to BLEU; the names of the manifests are all that preparation needs."""
    corpus = f"covost2_{source}_{target}_{protocol}"
    study = make_leaf(
        data_folder=str(corpus_of(shared_data, "covost_mini")),
        task="ast",
        target_language=target,
        text_case="keep",
        prompt=f"Translate {source} speech to {target} text.",
        prepare="recipes.CoVoST2.covost2_prepare.prepare_covost2",
        train_manifests=[f"{corpus}/train"],
        valid_manifest=f"{corpus}/dev",
        measure_manifest=f"{corpus}/dev",
        eval_manifests=[f"{corpus}/test"],
        **SHORT,
    )
    whole_study(study)
    summary = load_json(study.results / f"manifests/{corpus}/test.json")
    for variant in ("full", study.variant(2)):
        folder = study.root / f"eval/{variant}/{corpus}-test"
        metrics, rows = load_json(folder / "metrics.json"), load_rows(folder / "hyps.jsonl")
        assert metrics["protocol"] == summary["protocol"] == protocol
        assert metrics["metric"] == "bleu" and "case:mixed" in metrics["signature"]
        assert len(rows) == metrics["num_utterances"] == num_tests
        assert all(
            (row["ref"] == row["ref"].lower()) == (protocol == "speechbrain") for row in rows[:1]
        )
    assert f"{corpus}-test" in good("report", study.root).out


@pytest.mark.slow
def test_another_corpus_is_prepared_by_its_own_command(
    make_leaf: MakeLeaf, librispeech_mini: Path, shared_data: Path
) -> None:
    """As in the paper: trained on LibriSpeech, evaluated on Loquacious dev as well."""
    study = make_leaf(
        data_folder=str(librispeech_mini),
        eval_manifests=["loquacious/dev"],
        **SHORT,
    )
    outcome = good("train", study.leaf)
    assert "warning: the evaluation manifest loquacious/dev is not prepared" in outcome.err
    message = refused("evaluate", study.leaf)
    folder = study.results / "manifests/loquacious"
    assert f"recipes/Loquacious/loquacious_prepare.py DATA_FOLDER {folder}" in message
    data = str(corpus_of(shared_data, "loquacious_mini"))
    assert loquacious_prepare([data, str(folder), "--splits", "dev"]) == 0
    good("evaluate", study.leaf)
    metrics = load_json(study.root / "eval/full/loquacious-dev/metrics.json")
    assert metrics["num_utterances"] == 4 and list(metrics["by_source"]) == ["librispeech"]


@pytest.mark.slow
def test_a_trained_llama_on_text(
    make_leaf: MakeLeaf, tiny_llama: Path, librispeech_mini: Path, tmp_path: Path
) -> None:
    """Text mode from a file, without data and training. In a model that has learned, deep neighbours are close."""
    sentences = [
        line.split(" ", 1)[1].lower()
        for file in sorted(librispeech_mini.rglob("*.trans.txt"))
        for line in file.read_text().splitlines()
    ]
    assert len(sentences) > 20
    (tmp_path / "sentences.txt").write_text("\n".join(sentences) + "\n")
    study = make_leaf(decoder_hub=str(tiny_llama))
    options = ("--measure_input", "text", "--text_file", tmp_path / "sentences.txt")
    good("measure", study.leaf, *options)
    found = load_json(study.root / "measure/text/path.json")
    layers = load_json(tiny_llama / "config.json")["num_hidden_layers"]
    assert found["count"] == len(sentences) and found["num_layers"] == layers
    distance = load_file(study.root / "measure/text/distances.safetensors")["distance"]
    smallest = [row[~row.isnan()].min().item() for row in distance]
    assert smallest == sorted(smallest), "more layers change more"
    good("prune", study.leaf, "--block_size", 1, "--path", "text")
