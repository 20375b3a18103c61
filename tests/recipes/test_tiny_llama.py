"""The page on a real decoder (docs/tiny_llama.md): its script at reduced size, and what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import RunVerb
from tests.numerics import reference_decoder as reference
from tests.numerics.test_distance_reference import naive_distances


def cells(page: str, first: str) -> list[str]:
    """Cells of the table line that begins with `first`."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("| ").split("|")][1:]


@pytest.fixture
def folders(shared_data: Path) -> tuple[Path, Path]:
    """A small trained Llama, and a corpus with transcripts."""
    decoder, text = shared_data / "tiny_llama", shared_data / "librispeech_mini"
    for folder in (decoder, text):
        if not folder.is_dir():
            pytest.skip(f"no {folder.name} in {shared_data}")
    return decoder, text


@pytest.mark.slow
def test_script_at_reduced_size(
    run_verb: RunVerb, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Matrix, path and losses against float64 loops on the same real weights."""
    decoder, text = folders
    run_verb("benchmarks/tiny_llama.py", decoder, text, tmp_path / "out", "--limit", 3)
    page = (tmp_path / "out" / "tiny_llama.md").read_text()
    assert "Text: 3 transcripts" in page
    assert "<svg" in (tmp_path / "out" / "tiny_llama.svg").read_text()
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    lines = [
        line.split(" ", 1)[1].lower()
        for file in sorted(text.rglob("*.trans.txt"))
        for line in file.read_text().splitlines()
    ][:3]
    weights, sizes = reference.weights_of(model), reference.sizes_of(model.config)
    sentences = [tokenizer(line).input_ids for line in lines]
    rows = [weights["model.embed_tokens.weight"][ids] for ids in sentences]
    expected = naive_distances(weights, sizes, rows)
    for n in range(1, 6):
        found = [float(cell) for cell in cells(page, f"n={n}") if cell]
        np.testing.assert_allclose(found, expected["matrix"][n - 1, : 6 - n], rtol=0, atol=1e-4)
    after = [float(cell) for cell in cells(page, "[l, L), after the final norm")]
    np.testing.assert_allclose(after, expected["post_norm"], rtol=0, atol=1e-4)
    start = int(cells(page, "2")[0])
    assert start == int(np.argmin(expected["matrix"][1, :3]))
    kept = [layer for layer in range(5) if not start <= layer < start + 2]
    losses = []
    for ids, row in zip(sentences, rows, strict=True):
        scores = torch.from_numpy(reference.logits(weights, sizes, row, kept))[:-1]
        losses += (-scores.log_softmax(-1)[range(len(ids) - 1), ids[1:]]).tolist()
    assert float(cells(page, "2")[3]) == pytest.approx(np.mean(losses), abs=1e-3)


def test_page_is_of_this_model_and_names_its_command(
    folders: tuple[Path, Path], repo_root: Path
) -> None:
    page = (repo_root / "docs" / "tiny_llama.md").read_text()
    command = shlex.split(re.search(r"^python .*$", page, re.MULTILINE)[0])
    assert (repo_root / command[1]).is_file() and command[-1] == "docs"
    assert "MIT" in page and (repo_root / "docs" / "tiny_llama.svg").stat().st_size < 60_000
    from speechllm_prune.experiment import sha256_file

    assert sha256_file(folders[0] / "model.safetensors")[:12] in page


def test_a_folder_without_transcripts_is_refused(
    run_verb: RunVerb, qwen2: Path, tmp_path: Path
) -> None:
    process = run_verb("benchmarks/tiny_llama.py", qwen2, tmp_path, tmp_path / "out", code=2)
    assert "holds no *.trans.txt" in process.stderr and "Traceback" not in process.stderr
