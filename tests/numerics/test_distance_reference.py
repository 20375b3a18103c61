"""Distances against a decoder written as float64 loops (`reference_decoder.py`).

Both families, both paddings, both token rules, adapters on and off, on one rank and on two.
"""

from __future__ import annotations

import functools
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.prune.path import bootstrap_share, pruning_path
from speechllm_prune.prune.surgery import remove_layers
from tests import tiny
from tests.numerics import distance_cases as cases
from tests.numerics import reference_decoder as reference

TOLERANCE = 2e-5


def naive_angle(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """arccos of the cosine in units of pi, and 1 - cosine, in float64."""
    cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return math.acos(min(1.0, max(-1.0, cosine))) / math.pi, 1.0 - cosine


def naive_distances(weights, sizes, rows: list[np.ndarray], kept=None) -> dict[str, np.ndarray]:
    """Means over rows of everything `Distances` holds, at each row's last position."""
    num_layers = sizes.num_layers if kept is None else len(kept)
    samples = np.full((len(rows), num_layers, num_layers), np.nan)
    influence = samples.copy()
    post_norm = np.zeros((len(rows), num_layers))
    for number, row in enumerate(rows):
        states = reference.residual_stream(weights, sizes, row, kept)
        normed = reference.final_norm(weights, sizes, states[-1])[-1]
        last = [state[-1] for state in states]
        for start in range(num_layers):
            post_norm[number, start] = naive_angle(last[start], normed)[0]
            for n in range(1, num_layers - start + 1):
                distance, bent = naive_angle(last[start], last[start + n])
                samples[number, n - 1, start], influence[number, n - 1, start] = distance, bent
    return {
        "matrix": samples.mean(axis=0),
        "influence": influence.mean(axis=0),
        "post_norm": post_norm.mean(axis=0),
        "samples": np.nan_to_num(samples),
    }


def assert_close(found: dict, expected: dict[str, np.ndarray], count: int) -> None:
    assert found["count"] == count and found["matrix"].dtype == np.float64
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.fixture(params=["qwen2", "llama"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@functools.cache
def expected_of(encoder: Path, decoder: Path, rule: str, adapters: bool) -> dict[str, np.ndarray]:
    model = cases.build_adapted(encoder, decoder)
    weights = reference.weights_of(model.decoder, adapters)
    rows = [row.double().numpy() for row in cases.rows_of(model, rule)]
    return naive_distances(weights, reference.sizes_of(model.decoder.config), rows)


def test_every_case_on_one_rank(wavlm_layer: Path, family: Path) -> None:
    found = cases.measure_all(wavlm_layer, family, (4, 2, 0, 1, 3))
    for rule, side, adapters in cases.CASES:
        expected = expected_of(wavlm_layer, family, rule, adapters)
        assert_close(found[rule, side, adapters], expected, 5)
    # None of the conditions is vacuous: each of them moves the matrix by far more than the tolerance.
    for other in (("prompt", "right", True), ("sequence", "right", False)):
        moved = found["sequence", "right", True]["matrix"] - found[other]["matrix"]
        assert np.nanmax(abs(moved)) > 100 * TOLERANCE, other


@pytest.mark.slow
def test_every_case_on_two_ranks(
    wavlm_layer: Path, family: Path, tmp_path: Path, repo_root: Path
) -> None:
    """Three and two utterances: everything is per utterance, and in the same order as on one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(wavlm_layer), str(family), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.numerics.distance_cases", *arguments],
            cwd=repo_root,
            env=tiny.environment(repo_root) | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for rank in range(2):
        arrays = np.load(tmp_path / f"rank{rank}.npz")
        for rule, side, adapters in cases.CASES:
            names = ("matrix", "influence", "post_norm", "samples", "count")
            found = {name: arrays[f"{rule}/{side}/{adapters}/{name}"] for name in names}
            expected = expected_of(wavlm_layer, family, rule, adapters)
            assert_close(found, expected, 5)
            path = pruning_path(found["matrix"])
            assert path == pruning_path(expected["matrix"])
            shares = bootstrap_share(found["samples"], path)
            assert shares == bootstrap_share(expected["samples"], path)
            assert min(shares.values()) > 0 and shares[5] == 1.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_whole_and_pruned(family: Path, side: str) -> None:
    """Token ids instead of embeddings, on the decoder and on what is left of it."""
    decoder = AutoModelForCausalLM.from_pretrained(family).eval()
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 300, (n,), generator=generator) for n in (4, 1, 7)]
    length = 9
    table = torch.full((3, length), 11)
    mask = torch.zeros(3, length, dtype=torch.long)
    for row, sentence in enumerate(ids):
        fill = length - len(sentence)
        place = slice(0, len(sentence)) if side == "right" else slice(fill, length)
        table[row, place], mask[row, place] = sentence, 1
    batch = {"input_ids": table, "attention_mask": mask}
    weights, sizes = reference.weights_of(decoder), reference.sizes_of(decoder.config)
    rows = [weights["model.embed_tokens.weight"][sentence.numpy()] for sentence in ids]
    found = cases.as_arrays(measure_distances(decoder, [batch]))
    assert_close(found, naive_distances(weights, sizes, rows), 3)
    kept = remove_layers(decoder, 1, 3)
    found = cases.as_arrays(measure_distances(decoder, [batch]))
    assert_close(found, naive_distances(weights, sizes, rows, kept), 3)
