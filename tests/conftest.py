"""Shared fixtures: tiny models on disk, a tiny synthetic corpus, the real sample data where present, and verbs as
subprocesses. Session fixtures are shared by all tests: read them, or copy them first."""

from __future__ import annotations

import os

# Before torch and transformers are imported: the tests share few cores, and none of them may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import tiny

REPO_ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root of this checkout."""
    return REPO_ROOT


# ---------------------------------------------------------------------------------------------- models
@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this session are written."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def wavlm_layer(models_folder: Path) -> Path:
    """Folder of a WavLM built like WavLM-large: layer norm in the convolutions, normalised input."""
    return tiny.write_wavlm(models_folder / "wavlm_layer", "layer")


@pytest.fixture(scope="session")
def wavlm_group(models_folder: Path) -> Path:
    """Folder of a WavLM built like WavLM-base: group norm over time in the first convolution, raw input."""
    return tiny.write_wavlm(models_folder / "wavlm_group", "group")


@pytest.fixture(scope="session")
def whisper(models_folder: Path) -> Path:
    """Folder of a Whisper with a window of 3 seconds."""
    return tiny.write_whisper(models_folder / "whisper")


@pytest.fixture(scope="session")
def qwen2(models_folder: Path) -> Path:
    """Folder of a Qwen2 with 6 layers and untied embeddings; pad is eos, no bos."""
    return tiny.write_decoder(models_folder / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def qwen2_tied(models_folder: Path) -> Path:
    """Folder of a Qwen2 with 6 layers whose lm_head is its embedding matrix."""
    return tiny.write_decoder(models_folder / "qwen2_tied", "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def llama(models_folder: Path) -> Path:
    """Folder of a Llama with 6 layers; bos in front of every text, no pad."""
    return tiny.write_decoder(models_folder / "llama", "llama")


@pytest.fixture(params=["qwen2", "qwen2_tied", "llama"])
def decoder_folder(request: pytest.FixtureRequest) -> Path:
    """Each decoder folder in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["wavlm_layer", "wavlm_group", "whisper"])
def encoder_folder(request: pytest.FixtureRequest) -> Path:
    """Each encoder folder in turn."""
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------------------------------------- data
@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic corpus (tones, no speech) in LibriSpeech layout: the folder that holds `LibriSpeech/`.

    train-clean-100 has 12 utterances (one of them 8 kHz), dev-clean 4, test-clean 4, test-other 3.
    """
    return tiny.write_corpus(tmp_path_factory.mktemp("tiny_corpus"))


@pytest.fixture(scope="session")
def tiny_manifests(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest folder with `librispeech/<split>.csv` of the synthetic corpus, made by the real preparation."""
    from recipes.LibriSpeech.librispeech_prepare import prepare_librispeech

    folder = tmp_path_factory.mktemp("manifests")
    prepare_librispeech(tiny_corpus, folder / "librispeech")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real sample data (librispeech_mini, fsdd_mini, ...): $SPEECHLLM_PRUNE_DATA, else ../shared/data."""
    folder = Path(os.environ.get("SPEECHLLM_PRUNE_DATA") or REPO_ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real sample data at {folder}; SPEECHLLM_PRUNE_DATA names another place")
    return folder


# ---------------------------------------------------------------------------------------------- processes
RunVerb = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run_verb(tmp_path: Path) -> RunVerb:
    """Run a script of this checkout in a process of its own, as a user does.

    `run_verb("train.py", leaf, "--seed", 1)` returns the CompletedProcess (text). The exit code must be `code`
    (default 0), or the test fails showing the output. It runs in `cwd` (default: the test's `tmp_path`).
    """

    def run(
        script: str,
        *arguments: object,
        code: int = 0,
        cwd: Path | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [sys.executable, str(REPO_ROOT / script), *map(str, arguments)],
            cwd=cwd or tmp_path,
            env=tiny.environment(REPO_ROOT),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if process.returncode != code:
            pytest.fail(
                f"{script} {' '.join(map(str, arguments))}: exit code {process.returncode}, expected {code}\n"
                f"--- stdout\n{process.stdout[-4000:]}\n--- stderr\n{process.stderr[-4000:]}"
            )
        return process

    return run
