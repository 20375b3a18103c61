"""Tables from judged results: Table 1 of the paper and the list of all points, as Markdown, CSV and HTML.

A table is built once, as text cells for reading and as unrounded rows for CSV; the renderers know nothing of pruning.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from speechllm_prune.evaluation.statistics import Interval
from speechllm_prune.reporting.analysis import TOLERANCE, Choice, Result, choose_blocks
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData

MISSING = "not measured"


@dataclass
class Table:
    """A table for reading (`columns`, `rows` of text) and for machines (`records`)."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Sentences below the table."""
    notes: list[str] = field(default_factory=list)
    """`results_note`s: what the numbers were made with. Printed above the table, always."""
    records: list[dict[str, Any]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------- formatting
def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals, halves rounded away from zero as in print.

    Example
    -------
    >>> fixed(6.25, 1), fixed(None), fixed(float("inf"))
    ('6.3', 'not measured', '∞')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return str(abs(rounded) if rounded == 0 else rounded)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as signed percent, such as `+17.4 %`."""
    if share is None:
        return "undecided"
    text = fixed(100.0 * share, digits)
    return f"{text if text.startswith('-') else '+' + text} %"


def span(interval: Interval | None, digits: int = 2, factor: float = 1.0) -> str:
    """An interval in brackets, or nothing."""
    if interval is None:
        return ""
    return f" [{fixed(factor * interval.low, digits)}, {fixed(factor * interval.high, digits)}]"


def to_markdown(table: Table) -> str:
    """Render for reading, notes first."""
    lines = [f"## {table.title}", ""]
    for note in table.notes:
        lines += [f"> **Note:** {note}", ""]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines += [line(table.columns), "|" + "---|" * len(table.columns)]
    lines += [line(row) for row in table.rows]
    if table.remarks:
        lines += ["", *(f"- {remark}" for remark in table.remarks)]
    return "\n".join(lines) + "\n"


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Render unrounded values; an empty cell is a value that does not exist."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def to_html(
    table: Table, links: Sequence[Mapping[str, str]] | None = None, table_id: str = ""
) -> str:
    """Render as an HTML table in a region that scrolls sideways and can be reached by keyboard.

    Arguments
    ---------
    table : Table
        Its notes are left to the page, which shows them once.
    links : sequence of mapping, optional
        {text: address} per row, shown in an additional last column.
    table_id : str
        The element's id.
    """
    escape = html.escape
    heads = [*table.columns, *(["files"] if links else [])]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = []
    for index, row in enumerate(table.rows):
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        cells += [f"<td>{escape(cell)}</td>" for cell in row[1:]]
        if links:
            anchors = (
                f'<a href="{escape(url)}">{escape(text)}</a>' for text, url in links[index].items()
            )
            cells.append(f"<td>{' '.join(anchors)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in table.remarks)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f'<table id="{escape(table_id)}"><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
        f"{f'<ul>{remarks}</ul>' if remarks else ''}"
    )


# --------------------------------------------------------------------------------------------- Table 1
def table1(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    task: str,
    tolerance: float | None = None,
    heal_mode: str = "joint",
) -> Table:
    """The paper's Table 1: the unpruned model and the largest tested block within tolerance on all sets at once.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Those with points; the ones of another task are skipped.
    results : mapping
        {str(experiment folder): judged results}.
    task : str
        `asr` or `ast`.
    tolerance : float, optional
        By default 0.25 for ASR, 0.10 for AST.
    heal_mode : str
        Whose points may be chosen.
    """
    tolerance = TOLERANCE[task] if tolerance is None else tolerance
    metric = "WER" if task == "asr" else "BLEU"
    chosen = [e for e in experiments if any(p.task == task for p in e.points)]
    eval_sets = list(dict.fromkeys(name for e in chosen for name in e.eval_sets))
    columns = ["model", "% drop", "block", *(f"{name} {metric} %" for name in eval_sets), "verdict"]
    table = Table(f"Table 1: {metric}, unpruned and pruned ({heal_mode} healing)", columns)
    table.notes = list(dict.fromkeys(note for e in chosen for note in e.notes))
    for experiment in chosen:
        judged = results[str(experiment.folder)]
        choice = choose_blocks(experiment, judged, tolerance, heal_mode)
        _add_row(table, experiment.label, "full", {}, judged, eval_sets, choice)
        if not choice.tested:
            table.rows.append(["+ Pruning", "not tested", "", *("" for _ in eval_sets), ""])
        elif choice.largest is None:
            cells = ["none within tolerance", "", *("" for _ in eval_sets), ""]
            table.rows.append(["+ Pruning", *cells])
        else:
            found = choice.tested[choice.largest]
            _add_row(table, "+ Pruning", "largest", found, judged, eval_sets, choice)
            if choice.safe is not None and choice.safe != choice.largest:
                found = choice.tested[choice.safe]
                _add_row(table, "+ Pruning, safe", "safe", found, judged, eval_sets, choice)
        for name, found in _controls(judged, heal_mode).items():
            _add_row(table, f"control ({name})", "control", found, judged, eval_sets, choice)
        table.remarks.append(_choice_remark(experiment, choice))
        table.remarks += _sets_remark(experiment)
    table.remarks.append(
        f"Rule: the largest tested n whose relative degradation, unrounded, is at most {tolerance:g} on all "
        "evaluation sets at once; safe n: every smaller tested n passes too. In brackets: change relative to the "
        "unpruned model, positive is worse. Verdict: whether the 95 % paired bootstrap interval of that change lies "
        "within the tolerance on all sets, exceeds it on one, or leaves it undecided."
    )
    if any("control-" in record["variant"] for record in table.records):
        table.remarks.append(
            "Control: nothing removed, the same healing for the same steps: what healing gives without a cut."
        )
    return table


def _controls(results: Sequence[Result], heal_mode: str) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.point.control and result.point.heal_mode == heal_mode:
            found.setdefault(result.point.variant, {})[result.point.eval_set] = result
    return found


def joint_verdict(results: Sequence[Result]) -> str:
    """`exceeds` if it does on any set, `within` if on all, else `undecided`."""
    verdicts = {result.verdict for result in results}
    if "exceeds" in verdicts:
        return "exceeds"
    return "within" if verdicts == {"within"} else "undecided"


def _add_row(
    table: Table,
    label: str,
    row_kind: str,
    found: Mapping[str, Result],
    results: Sequence[Result],
    eval_sets: Sequence[str],
    choice: Choice,
) -> None:
    """One line of Table 1 and its CSV records, one per evaluation set."""
    if row_kind == "full":
        found = {result.point.eval_set: result for result in results if result.point.is_full}
    cells = []
    for name in eval_sets:
        result = found.get(name)
        if result is None:
            cells.append(MISSING)
            continue
        point = result.point
        change = "" if point.is_full else f" ({percent(result.degradation)})"
        cells.append(fixed(point.value) + change)
        table.records.append(
            {
                "experiment": point.experiment,
                "seed": point.seed,
                "row": row_kind,
                "variant": point.variant,
                "eval_set": name,
                "metric": point.metric,
                "value": point.value,
                "relative_degradation": result.degradation,
                "verdict": "" if point.is_full else result.verdict,
                "drop_percent": point.drop_percent,
                "start_layer": point.start_layer,
                "block_size": point.block_size,
                "tolerance": choice.tolerance,
                "largest_n": choice.largest,
                "safe_n": choice.safe,
                "tested_n": " ".join(map(str, choice.tested)),
                "num_utterances": point.num_utterances,
                "note": point.note,
            }
        )
    any_point = next((result.point for result in found.values()), None)
    pruned = any_point is not None and any_point.is_pruned
    table.rows.append(
        [
            label,
            fixed(any_point.drop_percent, 1) if pruned and any_point else "–",
            block_label(any_point.start_layer, any_point.block_size)
            if pruned and any_point
            else "–",
            *cells,
            joint_verdict(list(found.values())) if row_kind != "full" and found else "–",
        ]
    )


def block_label(start_layer: int | None, block_size: int) -> str:
    """The removed layers, 0-based and inclusive, such as `n=6: layers 4-9`."""
    if start_layer is None:
        return "–"
    last = start_layer + block_size - 1
    layers = f"layer {last}" if block_size == 1 else f"layers {start_layer}-{last}"
    return f"n={block_size}: {layers}"


def _choice_remark(experiment: ExperimentData, choice: Choice) -> str:
    name = f"{experiment.label}, {choice.heal_mode} healing on its own path: "
    if not choice.tested:
        return name + (
            "not tested (needs measure/speech and points on its path: python measure.py LEAF.yaml, "
            "python sweep.py LEAF.yaml)"
        )
    layers = experiment.points[0].num_layers
    return name + (
        f"tested n = {', '.join(map(str, choice.tested))} of {layers} layers; largest n within tolerance: "
        f"{choice.largest or 'none'}; safe n: {choice.safe or 'none'}."
    )


def _sets_remark(experiment: ExperimentData) -> list[str]:
    full = [point for point in experiment.points if point.is_full]
    if not full:
        command = "python evaluate.py LEAF.yaml --variant full"
        return [f"{experiment.label}: the unpruned model was not evaluated; run: {command}"]
    counts = ", ".join(
        f"{p.eval_set} {p.num_utterances}" for p in sorted(full, key=lambda p: p.eval_set)
    )
    return [f"{experiment.label}, utterances: {counts}."]


# ------------------------------------------------------------------------------------------ all points
def points_table(
    experiments: Sequence[ExperimentData], results: Mapping[str, Sequence[Result]]
) -> tuple[Table, list[Result]]:
    """All points with intervals; also returns the results in the order of the rows."""
    several = len(experiments) > 1
    columns = ["variant", "evaluation set", "n", "% drop", "score % [95 %]", "change [95 %]"]
    columns += ["verdict", "vs no healing [95 %]", "utterances", "remark"]
    table = Table("All points", columns)
    table.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    ordered: list[Result] = []
    for experiment in experiments:
        for result in results[str(experiment.folder)]:
            ordered.append(result)
            prefix = f"{experiment.label}: " if several else ""
            table.rows.append(_point_row(result, prefix))
            table.records.append(_point_record(result))
    table.remarks = [
        "Score: corpus WER (lower is better) or BLEU (higher is better). Change: relative to the unpruned model, "
        "positive is worse. 'vs no healing': healed minus unhealed score of the same cut, in points. Intervals: "
        "bootstrap over utterances (1,000 draws), paired where two systems are compared; one seed of training each."
    ]
    return table, ordered


def _point_row(result: Result, prefix: str = "") -> list[str]:
    point = result.point
    no_change = point.is_full or SHUFFLED in point.tag
    change = percent(result.degradation) + span(result.degradation_interval, 1, 100.0)
    if result.degradation is None and result.difference is not None:
        change = f"{result.difference:+.2f} points" + span(result.difference_interval)
    healing = "" if result.healing is None else f"{result.healing:+.2f}"
    return [
        prefix + point.variant,
        point.eval_set,
        str(point.block_size) if point.is_pruned else "0",
        fixed(point.drop_percent, 1),
        f"{point.metric.upper()} {fixed(point.value)}{span(result.interval)}",
        "–" if no_change else change,
        "–" if no_change else result.verdict,
        (healing + span(result.healing_interval)) or "–",
        str(point.num_utterances),
        result.remark,
    ]


def _point_record(result: Result) -> dict[str, Any]:
    point = result.point

    def bounds(name: str, interval: Interval | None) -> dict[str, Any]:
        return {
            f"{name}_low": interval.low if interval else None,
            f"{name}_high": interval.high if interval else None,
        }

    return {
        "experiment": point.experiment,
        "seed": point.seed,
        "variant": point.variant,
        "eval_set": point.eval_set,
        "task": point.task,
        "metric": point.metric,
        "num_layers": point.num_layers,
        "start_layer": point.start_layer,
        "block_size": point.block_size,
        "drop_percent": point.drop_percent,
        "heal_mode": point.heal_mode,
        "tag": point.tag,
        "control": point.control,
        "value": point.value,
        **bounds("value", result.interval),
        "relative_degradation": result.degradation,
        **bounds("relative_degradation", result.degradation_interval),
        "verdict": result.verdict,
        "minus_full": result.difference,
        **bounds("minus_full", result.difference_interval),
        "minus_unhealed": result.healing,
        **bounds("minus_unhealed", result.healing_interval),
        "num_utterances": point.num_utterances,
        "num_capped": point.record.get("num_capped"),
        "num_parameters": point.record.get("num_parameters"),
        "peak_memory_bytes": point.record.get("peak_memory_bytes"),
        "rtfx": point.record.get("rtfx"),
        "remark": result.remark,
        "note": point.note,
    }
