"""How far two distance matrices, and the pruning paths that follow from them, agree. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


def _common_entries(
    first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"the matrices have the shapes {first.shape} and {second.shape}")
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise ValueError("the matrices have no defined entry in common")
    return first, second, both


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of their ranks.

    Example
    -------
    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman_without_row_means(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two distance matrices after each row's mean is taken out of it.

    Distances grow with block size (the row) in any decoder, so the raw correlation is high even for unrelated ones;
    what remains here is whether both find the same layers redundant at equal block size. Entries that are NaN in
    either matrix are skipped. NaN if either matrix is constant within its rows.

    Arguments
    ---------
    first, second : numpy.ndarray
        Matrices [L, L] of `measure`.

    Example
    -------
    >>> matrix = np.array([[0.3, 0.2, 0.1], [0.5, 0.4, np.nan], [0.6, np.nan, np.nan]])
    >>> round(spearman_without_row_means(matrix, matrix + 0.01), 6)
    1.0
    """
    first, second, both = _common_entries(first, second)
    residuals = []
    for matrix in (first, second):
        total = np.where(both, matrix, 0.0).sum(axis=1)
        mean = total / np.maximum(both.sum(axis=1), 1)
        # Rounded far below any distance that matters: or the noise of subtracting would break ties.
        residuals.append(np.round((matrix - mean[:, None])[both], 12))
    one, two = (ranks(values) - (len(values) + 1) / 2.0 for values in residuals)
    scale = np.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / scale) if scale > 0 else float("nan")


def mean_absolute_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of |first - second| over the entries defined in both."""
    first, second, both = _common_entries(first, second)
    return float(np.abs(first - second)[both].mean())


@dataclass(frozen=True)
class PathAgreement:
    """How far two pruning paths agree, over the block sizes at which there was a choice."""

    num_compared: int
    exact_share: float
    mean_offset: float
    """Mean |difference of start layers|, in layers."""
    overlap: float
    """Mean share of the removed layers that both remove."""
    tail_share: float
    """Share of block sizes at which both take the deepest block that leaves the last layer."""
    statement: str


def path_agreement(
    first: Mapping[int, int], second: Mapping[int, int], num_layers: int
) -> PathAgreement:
    """Compare two pruning paths {n: l}.

    Arguments
    ---------
    first, second : mapping
        Paths whose blocks leave the last layer, of decoders with equally many layers.
    num_layers : int
        Layers of the decoder. n = L - 1 leaves a single possible block and is not compared.

    Example
    -------
    >>> path_agreement({1: 6, 2: 5}, {1: 6, 2: 3}, num_layers=8).overlap
    0.5
    """
    sizes = sorted(n for n in set(first) & set(second) if n < num_layers - 1)
    if not sizes:
        raise ValueError("the paths share no block size at which there is a choice")
    offsets = [abs(first[n] - second[n]) for n in sizes]
    exact = float(np.mean([offset == 0 for offset in offsets]))
    overlap = float(
        np.mean([max(0, n - offset) / n for n, offset in zip(sizes, offsets, strict=True)])
    )
    tail_share = float(np.mean([first[n] == second[n] == num_layers - 1 - n for n in sizes]))
    if tail_share == 1.0:
        statement = (
            "both paths are the tail rule (the deepest block that leaves the last layer): "
            "agreement carries no information"
        )
    elif tail_share >= 0.5:
        statement = (
            f"at {tail_share:.0%} of the block sizes both paths follow the tail rule: "
            "weak evidence, look at the matrices"
        )
    else:
        statement = f"the paths take the same block at {exact:.0%} of {len(sizes)} block sizes"
    return PathAgreement(len(sizes), exact, float(np.mean(offsets)), overlap, tail_share, statement)
