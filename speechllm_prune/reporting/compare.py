"""Tables that set experiments beside each other: points of equal depth, distance matrices with their paths, and where
the redundancy of each measured decoder lies."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from speechllm_prune.evaluation.statistics import paired_bootstrap
from speechllm_prune.reporting.analysis import Result, read_rows, same_data
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData, Measurement, Point
from speechllm_prune.reporting.measured import MeasurementComparison, Redundancy, redundancy_of
from speechllm_prune.reporting.tables import MISSING, Table, block_label, fixed, span


def points_of_equal_depth(
    experiments: Sequence[ExperimentData], results: Mapping[str, Sequence[Result]]
) -> Table:
    """Every point of the first experiment beside the others' points with equal set, block size and healing.

    The blocks may differ: that is what comparing paths, tasks or seeds is about. Where an experiment has several
    blocks of one size, the one on its own path counts.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        The first one is the reference.
    results : mapping
        {str(experiment folder): judged results}.
    """
    reference, *others = experiments
    columns = ["evaluation set", "healing", "n", reference.label, "experiment", "its score"]
    table = Table("Points of equal depth", [*columns, "difference [95 %]", "blocks"])
    table.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    first = _by_depth(reference, results)
    for other in others:
        for key, point in _by_depth(other, results).items():
            if key in first:
                _add_pair(table, first[key], point, other.label)
    table.remarks = [
        "Difference: score of the experiment minus that of the first one, in points, with the paired bootstrap "
        "interval where both saw the same utterances. 'other data': seeds whose corpora differ; nothing is paired."
    ]
    return table


def _by_depth(
    experiment: ExperimentData, results: Mapping[str, Sequence[Result]]
) -> dict[tuple[str, bool, int, str, str], Point]:
    found: dict[tuple[str, bool, int, str, str], Point] = {}
    for result in results[str(experiment.folder)]:
        point = result.point
        if SHUFFLED in point.tag:
            continue
        key = (point.eval_set, point.control, point.block_size, point.heal_mode, point.tag)
        on_path = point.start_layer is not None and "own" in experiment.sources(
            point.start_layer, point.block_size
        )
        if on_path or key not in found:
            found[key] = point
    return found


def _add_pair(table: Table, one: Point, two: Point, label: str) -> None:
    interval = None
    equal = same_data(one, two)
    # Other utterances, or no hyps.jsonl: the difference stands without an interval.
    with contextlib.suppress(ValueError):
        if equal:
            interval = paired_bootstrap(*read_rows(one), *read_rows(two), one.metric).difference
    healing = "control" if one.control else one.heal_mode + (f"+{one.tag}" if one.tag else "")
    blocks = [block_label(p.start_layer, p.block_size) for p in (one, two) if p.is_pruned]
    table.rows.append(
        [
            one.eval_set,
            "unpruned" if one.is_full else healing,
            str(one.block_size),
            fixed(one.value),
            label,
            fixed(two.value),
            f"{two.value - one.value:+.2f}{span(interval)}{'' if equal else ' (other data)'}",
            "–" if not blocks else "same" if len(set(blocks)) == 1 else " / ".join(blocks),
        ]
    )
    table.records.append(
        {
            "eval_set": one.eval_set,
            "block_size": one.block_size,
            "first_experiment": one.experiment,
            "first_seed": one.seed,
            "first_variant": one.variant,
            "first_value": one.value,
            "experiment": two.experiment,
            "seed": two.seed,
            "variant": two.variant,
            "value": two.value,
            "difference": two.value - one.value,
            "difference_low": interval.low if interval else None,
            "difference_high": interval.high if interval else None,
            "same_data": equal,
            "note": two.note,
        }
    )


def matrices_table(comparisons: Sequence[MeasurementComparison]) -> Table:
    """Matrices and paths side by side, one line per pair."""
    columns = ["first", "second", "decoder", "Spearman", "Spearman, last layer left out"]
    columns += [
        "mean |difference|",
        "same block",
        "mean |start difference|",
        "overlap",
        "the paths",
    ]
    table = Table("Distance matrices and paths compared", columns)
    for pair in comparisons:
        kind = "random weights in one" if pair.random_decoder else "as trained"
        kind = "; ".join([kind, *pair.unequal])
        if pair.refused:
            table.rows.append([pair.first, pair.second, kind, *["–"] * 6, pair.refused])
            continue
        agreement = pair.agreement
        cells = [
            fixed(pair.spearman, 3),
            fixed(pair.spearman_removable, 3),
            fixed(pair.mean_difference, 4),
        ]
        if agreement is None:
            cells += ["–", "–", "–", "too few layers for a choice"]
        else:
            cells += [
                f"{agreement.exact_share:.0%} of {agreement.num_compared}",
                f"{agreement.mean_offset:.2f} layers",
                f"{agreement.overlap:.0%}",
                agreement.statement,
            ]
        table.rows.append([pair.first, pair.second, kind, *cells])
        table.records.append(
            {
                "first": pair.first,
                "second": pair.second,
                "random_decoder": pair.random_decoder,
                "unequal": "; ".join(pair.unequal),
                "spearman_without_row_means": pair.spearman,
                "spearman_last_layer_left_out": pair.spearman_removable,
                "mean_absolute_difference": pair.mean_difference,
                "same_block_share": agreement.exact_share if agreement else None,
                "mean_start_difference": agreement.mean_offset if agreement else None,
                "removed_layer_overlap": agreement.overlap if agreement else None,
                "tail_rule_share": agreement.tail_share if agreement else None,
            }
        )
    table.remarks = [
        "Spearman: rank correlation after each row's mean is taken out, because distances grow with block size in any "
        "decoder; once more without the blocks that end at the last layer, whose distances are large in any decoder.",
        "Same block: share of the block sizes with a choice at which both paths start at the same layer; overlap: mean "
        "share of removed layers that both remove. Where both only follow the tail rule (the deepest block that leaves "
        "the last layer), agreement carries no information.",
    ]
    if any(pair.random_decoder for pair in comparisons):
        table.remarks.append(
            "Lines with random weights show what agreement is worth: a decoder that learned nothing."
        )
    return table


def redundancy_table(experiments: Sequence[ExperimentData]) -> Table | None:
    """Where the small distances of every measurement lie: what the paper says of its Figure 1; None without any."""
    several = len(experiments) > 1
    columns = ["measured", "adapters", "utterances", "mean distance of the path's blocks"]
    columns += ["depth of the path (0 first, 1 deepest)", "smallest tenth in the deeper half"]
    columns += ["block with the last layer largest", "after the final norm", "bootstrap agreement"]
    table = Table("Where the small distances lie", columns)
    table.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    for experiment in experiments:
        for name, measurement in sorted(experiment.measurements.items()):
            found = redundancy_of(measurement)
            if found is not None:
                label = f"{experiment.label} {name}" if several else name
                _add_redundancy(table, label, measurement, found)
    table.remarks = [
        "Mean distance: over n = 1..L-1. Depth: rank of the path's block among the starts that leave the last layer. "
        "Smallest tenth: of all cells without the last layer. The next two: share of the block sizes at which the "
        "block that ends at the last layer has the largest distance, its end state taken before the final norm, as "
        "everywhere here, and after it, as `hidden_states` of transformers gives it: if only the second is high, the "
        "norm makes it so. Bootstrap: mean share of 200 resampled sets of utterances that choose the same block."
    ]
    return table if table.rows else None


def _add_redundancy(table: Table, label: str, measurement: Measurement, found: Redundancy) -> None:
    stable = MISSING
    if found.mean_share is not None and found.least_stable is not None:
        least = measurement.bootstrap_share[found.least_stable]
        stable = f"{found.mean_share:.0%}, least {least:.0%} at n={found.least_stable}"
    after = found.last_largest_post_norm
    table.rows.append(
        [
            label,
            measurement.adapters,
            str(measurement.count),
            fixed(found.path_distance, 4),
            fixed(found.path_depth, 2),
            f"{found.deep_share:.0%}",
            f"{found.last_largest:.0%}",
            MISSING if after is None else f"{after:.0%}",
            stable,
        ]
    )
    table.records.append(
        {
            "measured": label,
            "adapters": measurement.adapters,
            "last_token": measurement.last_token,
            "num_utterances": measurement.count,
            "mean_path_distance": found.path_distance,
            "path_depth": found.path_depth,
            "smallest_tenth_in_deeper_half": found.deep_share,
            "last_layer_largest": found.last_largest,
            "last_layer_largest_post_norm": after,
            "mean_bootstrap_share": found.mean_share,
            "least_stable_n": found.least_stable,
            "note": measurement.note,
        }
    )
