"""The pruning path: which block to remove for each block size (paper, section 3.2, equation 2). Plain Python, no torch.

A matrix is a nested sequence or array with row n-1 and column l, NaN where a block does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def pruning_path(matrix: Any, allow_last: bool = False) -> dict[int, int]:
    """The start layer with the smallest distance for every block size.

    Arguments
    ---------
    matrix : array-like
        [L, L] distances, row n-1, column l.
    allow_last : bool
        Whether a block may contain the last layer, which leaves no receiving layer to heal.

    Returns
    -------
    dict
        {n: l*} for n = 1..L-1 (1..L with `allow_last`); ties go to the smallest l.

    Example
    -------
    >>> nan = float("nan")
    >>> pruning_path([[0.3, 0.1, 0.2], [0.4, 0.2, nan], [0.5, nan, nan]])
    {1: 1, 2: 0}
    >>> pruning_path([[0.3, 0.1, 0.2], [0.4, 0.2, nan], [0.5, nan, nan]], allow_last=True)
    {1: 1, 2: 1, 3: 0}
    """
    return {n: ranked[0][1] for n, ranked in _ranked(matrix, allow_last).items()}


def path_margins(matrix: Any, allow_last: bool = False) -> dict[int, float | None]:
    """Distance of the runner-up minus that of the best block, for every block size; None where there is no choice.

    Example
    -------
    >>> path_margins([[0.5, 0.25, 0.1], [0.4, 0.2, float("nan")], [0.5, float("nan"), float("nan")]])
    {1: 0.25, 2: None}
    """
    ranked = _ranked(matrix, allow_last)
    return {
        n: blocks[1][0] - blocks[0][0] if len(blocks) > 1 else None for n, blocks in ranked.items()
    }


def bootstrap_share(
    samples: Any, path: Mapping[int, int], draws: int = 200, seed: int = 0
) -> dict[int, float]:
    """Share of resampled sets of utterances whose path takes the same block, for every block size.

    Arguments
    ---------
    samples : array-like
        [N, L, L] distances of the single utterances, in an order that does not depend on how they were measured.
    path : mapping
        The path {n: l} of all utterances together.
    draws, seed : int, int
        Number of resampled sets, random seed.

    Example
    -------
    >>> steady, swinging = [[0.1, 0.3, 0.9], [0.5, 0, 0], [1, 0, 0]], [[0.7, 0.3, 0.9], [0.5, 0, 0], [1, 0, 0]]
    >>> bootstrap_share([steady, steady], {1: 0, 2: 0})
    {1: 1.0, 2: 1.0}
    >>> 0.5 < bootstrap_share([steady, steady, steady, swinging], {1: 0, 2: 0})[1] < 1.0
    True
    """
    import numpy as np

    samples = np.asarray(samples, dtype=np.float64)
    num_utterances, num_layers = samples.shape[:2]
    chances = np.full(num_utterances, 1.0 / num_utterances)
    counts = np.random.default_rng(seed).multinomial(num_utterances, chances, size=draws)
    means = np.tensordot(counts / num_utterances, samples, axes=1)
    return {
        n: float(np.mean(means[:, n - 1, : num_layers - n].argmin(axis=1) == start))
        for n, start in path.items()
    }


def tail_path(num_layers: int) -> dict[int, int]:
    """The deepest block of every size that leaves the last layer: l = L - 1 - n.

    Example
    -------
    >>> tail_path(4)
    {1: 2, 2: 1, 3: 0}
    """
    return {n: num_layers - 1 - n for n in range(1, num_layers)}


def _ranked(matrix: Any, allow_last: bool) -> dict[int, list[tuple[float, int]]]:
    num_layers = len(matrix)
    result = {}
    for n in range(1, num_layers + 1 if allow_last else num_layers):
        starts = range(num_layers - n + 1 if allow_last else num_layers - n)
        values = [(float(matrix[n - 1][start]), start) for start in starts]
        values = [(value, start) for value, start in values if not math.isnan(value)]
        if not values:
            raise ValueError(f"no distance is defined for block size {n}")
        result[n] = sorted(values)
    return result
