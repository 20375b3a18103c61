"""The pruning path, by hand and against a double loop."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from speechllm_prune.prune.path import bootstrap_share, path_margins, pruning_path, tail_path

NAN = math.nan
MATRIX = [
    [0.30, 0.10, 0.20, 0.05],
    [0.35, 0.15, 0.10, NAN],
    [0.20, 0.25, NAN, NAN],
    [0.40, NAN, NAN, NAN],
]


def test_by_hand() -> None:
    assert pruning_path(MATRIX) == {1: 1, 2: 1, 3: 0}
    assert pruning_path(MATRIX, allow_last=True) == {1: 3, 2: 2, 3: 0, 4: 0}
    assert path_margins(MATRIX) == {1: pytest.approx(0.1), 2: pytest.approx(0.2), 3: None}
    assert path_margins(MATRIX, allow_last=True)[3] == pytest.approx(0.05)


@pytest.mark.parametrize("num_layers", [2, 5, 16])
@pytest.mark.parametrize("allow_last", [False, True])
def test_against_a_double_loop(num_layers: int, allow_last: bool) -> None:
    rng = random.Random(num_layers)
    matrix = torch.full((num_layers, num_layers), NAN, dtype=torch.float64)
    for n in range(1, num_layers + 1):
        for start in range(num_layers - n + 1):
            matrix[n - 1, start] = rng.choice([0.1, 0.2, 0.3])  # many ties
    path = pruning_path(matrix, allow_last)
    assert list(path) == list(range(1, num_layers + (1 if allow_last else 0)))
    for n, start in path.items():
        best = None
        for candidate in range(num_layers - n + (1 if allow_last else 0)):
            if best is None or matrix[n - 1, candidate] < matrix[n - 1, best]:
                best = candidate
        assert start == best  # the smallest of equals
        assert allow_last or start + n <= num_layers - 1  # a receiving layer is left


@pytest.mark.parametrize("kind", [list, torch.tensor, "numpy"])
def test_takes_lists_tensors_and_arrays_and_gives_plain_numbers(kind) -> None:
    matrix = torch.tensor(MATRIX).double().numpy() if kind == "numpy" else kind(MATRIX)
    path = pruning_path(matrix)
    assert path == {1: 1, 2: 1, 3: 0}
    assert all(type(n) is int and type(start) is int for n, start in path.items())


def test_undefined_distances_are_no_candidates() -> None:
    broken = [row[:] for row in MATRIX]
    broken[0][1] = NAN
    assert pruning_path(broken)[1] == 2
    with pytest.raises(ValueError, match="no distance is defined for block size 3"):
        pruning_path([*MATRIX[:2], [NAN] * 4, MATRIX[3]])


def test_tail_path_leaves_the_last_layer() -> None:
    assert tail_path(28) == {n: 27 - n for n in range(1, 28)}
    assert tail_path(2) == {1: 0}


def test_bootstrap_share_against_a_loop() -> None:
    generator = np.random.default_rng(4)
    samples = 0.3 + 0.05 * generator.random((15, 5, 5)).astype(np.float32)
    matrix = samples.astype(np.float64).mean(0)
    path = pruning_path(matrix)
    shares = bootstrap_share(samples, path, draws=200, seed=0)
    counts = np.random.default_rng(0).multinomial(15, [1 / 15] * 15, size=200)
    for n, start in path.items():
        hits = 0
        for weights in counts:
            means = [
                sum(w * float(s[n - 1, l]) for w, s in zip(weights, samples, strict=True))
                for l in range(5 - n)
            ]
            hits += means.index(min(means)) == start
        assert shares[n] == hits / 200
    assert list(shares) == [1, 2, 3, 4] and shares[4] == 1.0
    assert 0 < shares[1] < 1, "near ties swing"
    assert shares == bootstrap_share(samples, path) != bootstrap_share(samples, path, seed=1)
    steady = np.broadcast_to(np.asarray(matrix), (15, 5, 5))
    assert set(bootstrap_share(steady, path).values()) == {1.0}
