"""Tables as Markdown, CSV and HTML, and the list of all points.

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
from speechllm_prune.reporting.analysis import Result
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


def block_label(start_layer: int | None, block_size: int) -> str:
    """The removed layers, 0-based and inclusive, such as `n=6: layers 4-9`."""
    if start_layer is None:
        return "–"
    last = start_layer + block_size - 1
    layers = f"layer {last}" if block_size == 1 else f"layers {start_layer}-{last}"
    return f"n={block_size}: {layers}"


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
