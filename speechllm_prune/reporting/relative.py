"""Figure 2 as numbers: relative degradation by depth and healing, beside the next smaller tier. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechllm_prune.evaluation.statistics import relative_degradation
from speechllm_prune.experiment import HEAL_MODES
from speechllm_prune.reporting.analysis import Result, same_data
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData, Point
from speechllm_prune.reporting.paper import TIERS, System, system_of
from speechllm_prune.reporting.tables import MISSING, Table, fixed, percent, span

TEXT = "joint, text-derived path"
TIER_STEP = 0.75
"""Share of the decoder parameters at which a model that is not the paper's counts as a tier below."""


@dataclass(frozen=True)
class NextSmaller:
    """The unpruned model of the next smaller tier, as a degradation of the larger one."""

    label: str
    value: float
    degradation: float


def series_label(heal_mode: str, tag: str = "") -> str:
    """`no healing`, `joint healing`, `joint healing + kl`."""
    name = "no healing" if heal_mode == "none" else f"{heal_mode} healing"
    return f"{name} + {tag}" if tag else name


def on_text_path(experiment: ExperimentData, point: Point) -> bool:
    """Whether the path measured on text removes this block."""
    text = experiment.measurements.get("text")
    return text is not None and text.path.get(point.block_size) == point.start_layer


def system_of_experiment(experiment: ExperimentData) -> System | None:
    """The system of the paper's Table 1 that an experiment repeats."""
    hub = str(experiment.settings.get("decoder_hub") or "")
    return system_of(hub, bool(experiment.settings.get("decoder_lora_rank")))


def next_smaller(
    experiment: ExperimentData, experiments: Sequence[ExperimentData], eval_set: str
) -> NextSmaller | None:
    """The experiment of the report that is one tier below, on the same utterances; None without one.

    Decoders of the paper have its families and tiers; among others it is the largest that is a quarter smaller or more.
    """
    full = experiment.baseline(eval_set)
    found = []
    for other in experiments:
        theirs = other.baseline(eval_set)
        if full is None or theirs is None or other.settings.get("decoder_lora_rank"):
            continue
        if same_data(full, theirs) and _is_below(other, theirs, experiment, full):
            size = theirs.record.get("decoder_parameters") or 0
            found.append((size, other.label, theirs.value))
    if full is None or not found:
        return None
    _, label, value = max(found)
    degradation = relative_degradation(full.value, value, full.metric)
    return None if degradation is None else NextSmaller(label, value, degradation)


def _is_below(other: ExperimentData, theirs: Point, larger: ExperimentData, full: Point) -> bool:
    small, large = system_of_experiment(other), system_of_experiment(larger)
    if small is None or large is None:
        sizes = [point.record.get("decoder_parameters") or 0 for point in (theirs, full)]
        return small is large and 0 < sizes[0] <= TIER_STEP * sizes[1]
    step = TIERS.index(small.tier) - TIERS.index(large.tier)
    return small.family == large.family and step == 1


def figure2_table(
    experiments: Sequence[ExperimentData], results: Mapping[str, Sequence[Result]]
) -> Table:
    """What Figure 2 draws, a row per experiment, evaluation set and block size.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Of one task.
    results : mapping
        {str(experiment folder): judged results}.
    """
    columns = ["model", "evaluation set", "n", "% drop", *map(series_label, HEAL_MODES), TEXT]
    table = Table(
        "Figure 2: relative degradation against the share of removed layers",
        [*columns, "next smaller tier, unpruned"],
    )
    table.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    for experiment in experiments:
        for eval_set in experiment.eval_sets:
            _add_set(table, experiment, experiments, eval_set, results[str(experiment.folder)])
    table.remarks = [
        "Relative to the unpruned model of the row, positive is worse, with the 95 % paired bootstrap interval over "
        "utterances. Blocks are those of the own path; the text-derived path is that of measure/text. Next smaller "
        "tier: the unpruned model one size below, if it is in this report."
    ]
    return table


def _add_set(
    table: Table,
    experiment: ExperimentData,
    experiments: Sequence[ExperimentData],
    eval_set: str,
    judged: Sequence[Result],
) -> None:
    smaller = next_smaller(experiment, experiments, eval_set)
    by_size: dict[int, dict[str, Result]] = {}
    for result in judged:
        point = result.point
        if point.eval_set != eval_set or not point.is_pruned or point.tag or SHUFFLED in point.tag:
            continue
        assert point.start_layer is not None
        if "own" in experiment.sources(point.start_layer, point.block_size):
            by_size.setdefault(point.block_size, {})[point.heal_mode] = result
        if point.heal_mode == "joint" and on_text_path(experiment, point):
            by_size.setdefault(point.block_size, {})[TEXT] = result
    for n, found in sorted(by_size.items()):
        example = next(iter(found.values())).point
        table.rows.append(
            [
                experiment.label,
                eval_set,
                str(n),
                fixed(example.drop_percent, 1),
                *(_cell(found.get(name)) for name in (*HEAL_MODES, TEXT)),
                f"{percent(smaller.degradation)} ({smaller.label})" if smaller else MISSING,
            ]
        )
        for name in (*HEAL_MODES, TEXT):
            if name in found:
                table.records.append(_record(name, found[name], smaller))


def _cell(result: Result | None) -> str:
    if result is None:
        return MISSING
    return percent(result.degradation) + span(result.degradation_interval, 1, 100.0)


def _record(series: str, result: Result, smaller: NextSmaller | None) -> dict[str, object]:
    point, interval = result.point, result.degradation_interval
    return {
        "experiment": point.experiment,
        "seed": point.seed,
        "eval_set": point.eval_set,
        "series": series,
        "variant": point.variant,
        "block_size": point.block_size,
        "drop_percent": point.drop_percent,
        "relative_degradation": result.degradation,
        "relative_degradation_low": interval.low if interval else None,
        "relative_degradation_high": interval.high if interval else None,
        "next_smaller_tier": smaller.label if smaller else None,
        "next_smaller_degradation": smaller.degradation if smaller else None,
        "num_utterances": point.num_utterances,
        "note": point.note,
    }
