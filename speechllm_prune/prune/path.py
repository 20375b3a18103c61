"""The pruning path: which block to remove for each block size (paper, section 3.2, equation 2). Plain Python, no torch.

A matrix is a nested sequence or array with row n-1 and column l, NaN where a block does not exist.
"""

from __future__ import annotations

import math
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
