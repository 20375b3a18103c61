"""Real speech and a real decoder through the verbs. Nothing is learned in these few steps; they show that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.conftest import MakeLeaf
from tests.recipes.verbs import good, load_json, load_rows


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
