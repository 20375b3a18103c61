"""What angular distances say: two measurements compared, and where the redundancy of each one lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechllm_prune.evaluation.agreement import (
    PathAgreement,
    mean_absolute_difference,
    path_agreement,
    spearman_without_row_means,
)
from speechllm_prune.reporting.collect import ExperimentData, Measurement
from speechllm_prune.runtime import UserError


@dataclass(frozen=True)
class MeasurementComparison:
    """Two distance matrices and their paths side by side; only `refused` is set where they must not be compared."""

    first: str
    second: str
    random_decoder: bool = False
    """Whether one of the two is a decoder without pretraining: what agreement is worth."""
    spearman: float | None = None
    spearman_removable: float | None = None
    """The same without the blocks that end at the last layer, whose large distances any decoder shows."""
    mean_difference: float | None = None
    agreement: PathAgreement | None = None
    unequal: tuple[str, ...] = ()
    """What differs between the two without forbidding the comparison."""
    refused: str = ""


def compare_measurements(
    first: Measurement,
    second: Measurement,
    first_label: str,
    second_label: str,
    random_decoder: bool = False,
) -> MeasurementComparison:
    """Compare two measurements, unless they were taken by unequal rules."""
    names = (first_label, second_label, random_decoder)
    for what, one, two in (
        ("number of layers", first.num_layers, second.num_layers),
        ("last_token", first.last_token, second.last_token),
    ):
        if one != two:
            return MeasurementComparison(
                *names, refused=f"{what} is {one} and {two}: not comparable"
            )
    unequal = [
        f"{what} {one} and {two}"
        for what, one, two in (
            ("adapters", first.adapters, second.adapters),
            ("measured on", first.manifest or "a text file", second.manifest or "a text file"),
        )
        if one != two
    ]
    try:
        agreement = path_agreement(first.path, second.path, first.num_layers)
    except ValueError:  # a decoder too shallow to have a choice
        agreement = None
    return MeasurementComparison(
        *names,
        spearman=spearman_without_row_means(first.matrix, second.matrix),
        spearman_removable=spearman_without_row_means(
            without_last_layer(first.matrix), without_last_layer(second.matrix)
        ),
        mean_difference=mean_absolute_difference(first.matrix, second.matrix),
        agreement=agreement,
        unequal=tuple(unequal),
    )


def without_last_layer(matrix: np.ndarray) -> np.ndarray:
    """A copy whose blocks that end at the last layer (l + n = L) are NaN."""
    matrix = np.array(matrix, dtype=float)
    num_layers = len(matrix)
    for n in range(1, num_layers + 1):
        matrix[n - 1, num_layers - n] = np.nan
    return matrix


def compare_all_measurements(experiments: Sequence[ExperimentData]) -> list[MeasurementComparison]:
    """Every measurement against the first one, and text against speech within each experiment.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        The first one is the reference; random-weight decoders among the others show what chance gives.
    """
    several = len(experiments) > 1
    items = [
        (measurement, experiment, f"{experiment.label} {name}" if several else name)
        for experiment in experiments
        for name, measurement in sorted(experiment.measurements.items())
    ]
    comparisons = []
    for position, (first, owner, label) in enumerate(items):
        for second, other, other_label in items[position + 1 :]:
            if owner is other or position == 0 or owner is experiments[0]:
                is_random = owner.is_random_decoder or other.is_random_decoder
                comparisons.append(
                    compare_measurements(first, second, label, other_label, is_random)
                )
    return comparisons


def refuse_unequal_rules(experiments: Sequence[ExperimentData]) -> None:
    """Refuse to compare angles that were taken at different tokens.

    Speech is held against speech and text against text; where two experiments have no input in common, all against all.

    Raises
    ------
    UserError
        Naming the two folders.
    """
    reference, *others = experiments
    for other in others:
        pairs = [
            (first, second)
            for first in reference.measurements.values()
            for second in other.measurements.values()
        ]
        alike = [pair for pair in pairs if pair[0].measure_input == pair[1].measure_input]
        for first, second in alike or pairs:
            if first.last_token != second.last_token:
                raise UserError(
                    f"{first.folder} was measured with last_token {first.last_token}, {second.folder} with last_token "
                    f"{second.last_token}: angles at different tokens are not comparable; measure one of them again: "
                    f"python measure.py LEAF.yaml --last_token {first.last_token} --overwrite"
                )


# ------------------------------------------------------------------------------ one measurement by itself
@dataclass(frozen=True)
class Redundancy:
    """Where the small distances of a measurement lie, over the block sizes at which the path had a choice."""

    path_distance: float
    """Mean distance of the path's blocks, n = 1..L-1."""
    path_depth: float
    """Mean rank of the path's block among all starts that leave the last layer: 0 the first, 1 the deepest."""
    deep_share: float
    """Share of the smallest tenth of all cells that leave the last layer whose block's middle is in the deeper half."""
    last_largest: float
    """Share of the block sizes at which the block that ends at the last layer has the largest distance."""
    last_largest_post_norm: float | None
    """The same if that block's end state is taken after the final norm, as most tools do."""
    mean_share: float | None
    """Mean share of the bootstraps over utterances that choose the path's block."""
    least_stable: int | None
    """The block size with the smallest such share."""


def redundancy_of(measurement: Measurement) -> Redundancy | None:
    """Summarise a measurement; None for a decoder too shallow to have a choice."""
    num_layers, matrix = measurement.num_layers, measurement.matrix
    sizes = [n for n in sorted(measurement.path) if n <= num_layers - 2]
    if not sizes:
        return None
    shares = {n: measurement.bootstrap_share[n] for n in sizes if n in measurement.bootstrap_share}
    post_norm = with_post_norm(measurement)
    return Redundancy(
        float(np.mean([matrix[n - 1, start] for n, start in measurement.path.items()])),
        float(np.mean([measurement.path[n] / (num_layers - 1 - n) for n in sizes])),
        _deep_share(matrix),
        _last_largest(matrix),
        None if post_norm is None else _last_largest(post_norm),
        float(np.mean(list(shares.values()))) if shares else None,
        min(shares, key=lambda n: shares[n]) if shares else None,
    )


def with_post_norm(measurement: Measurement) -> np.ndarray | None:
    """The matrix as tools give it that take h[L] after the final norm; None for files without that row."""
    if measurement.post_norm is None:
        return None
    matrix = np.array(measurement.matrix)
    for start, value in enumerate(measurement.post_norm):
        matrix[measurement.num_layers - start - 1, start] = value
    return matrix


def _deep_share(matrix: np.ndarray) -> float:
    removable = without_last_layer(matrix)
    sizes, starts = np.nonzero(np.isfinite(removable))
    order = np.argsort(removable[sizes, starts], kind="stable")
    smallest = order[: max(1, round(len(order) / 10))]
    # The middle of the layers l..l+n-1 against that of the layers 0..L-1.
    middle = starts[smallest] + sizes[smallest] / 2.0
    return float(np.mean(middle > (len(matrix) - 1) / 2.0))


def _last_largest(matrix: np.ndarray) -> float:
    num_layers = len(matrix)
    rows = [matrix[n - 1, : num_layers - n + 1] for n in range(1, num_layers)]
    return float(np.mean([int(np.argmax(row)) == len(row) - 1 for row in rows]))
