"""The tables beside Tables 1 and 2: what Figures 1 and 2 draw, extras, kept share, efficiency, the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from speechllm_prune.reporting.against_paper import kept_share_table, our_systems, paper_table
from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import ExperimentData
from speechllm_prune.reporting.efficiency import efficiency_table
from speechllm_prune.reporting.extras import extras_tables
from speechllm_prune.reporting.relative import figure2_table
from speechllm_prune.reporting.tables import Table, fixed
from speechllm_prune.tasks import TASKS


def further_tables(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    tolerance: float | None = None,
) -> dict[str, list[Table]]:
    """{stem of the file: its tables}; what has nothing to show is left out.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Those with points.
    results : mapping
        {str(experiment folder): judged results}.
    tolerance : float, optional
        By default that of each experiment's YAML.
    """
    found: dict[str, list[Table]] = {}
    if not experiments:
        return found
    for task in TASKS:
        of_task = [experiment for experiment in experiments if experiment.task == task]
        if of_task:
            found[figure2_stem(task)] = [figure2_table(of_task, results)]
    notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    ours = our_systems(experiments, results, tolerance)
    found["kept_share"] = [kept_share_table(ours, notes)]
    found["efficiency"] = [efficiency_table(experiments, results, tolerance)]
    found["extras"] = extras_tables(experiments, results)
    found["paper"] = [paper_table(ours, notes)]
    return {stem: tables for stem, tables in found.items() if any(t.rows for t in tables)}


def figure2_stem(task: str) -> str:
    """Name of the files of Figure 2, which each task has of its own."""
    return "figure2" if task == "asr" else f"figure2_{task}"


def shown_tables(further: Mapping[str, Sequence[Table]]) -> dict[str, list[Table]]:
    """What the verb prints and the page shows of them; the paper's numbers only where one was measured."""
    found = {stem: list(further[stem]) for stem in ("kept_share", "efficiency") if stem in further}
    if "extras" in further:
        found["extras"] = list(further["extras"][::2])  # the summaries; every cut is in the file
    if any(row["ours"] is not None for table in further.get("paper", []) for row in table.records):
        found["paper"] = list(further["paper"])
    return found


def heatmap_tables(experiments: Sequence[ExperimentData]) -> list[Table]:
    """The distances that Figure 1 draws: a row per block size, a column per start layer, the path's block marked."""
    tables = []
    for experiment in experiments:
        for name, measurement in experiment.measurements.items():
            num_layers = measurement.num_layers
            title = f"Angular distance d[n, l]: {experiment.label}, {name} input"
            table = Table(title, ["n", *(f"l={start}" for start in range(num_layers))])
            table.notes = [measurement.note] if measurement.note else []
            for n in range(1, num_layers + 1):
                chosen = measurement.path.get(n)
                cells = ["" if np.isnan(d) else fixed(d, 3) for d in measurement.matrix[n - 1]]
                if chosen is not None:
                    cells[chosen] += " *"
                table.rows.append([str(n), *cells])
                table.records += [
                    {
                        "experiment": experiment.name,
                        "seed": experiment.seed,
                        "measured": name,
                        "block_size": n,
                        "start_layer": start,
                        "angular_distance": float(distance),
                        "on_path": start == chosen,
                        "num_utterances": measurement.count,
                        "note": measurement.note,
                    }
                    for start, distance in enumerate(measurement.matrix[n - 1])
                    if not np.isnan(distance)
                ]
            table.remarks = [
                f"Mean over {measurement.count} utterances, last token: {measurement.last_token}. "
                "*: the block that the pruning path removes."
            ]
            tables.append(table)
    return tables
