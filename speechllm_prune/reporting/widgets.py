"""Parts of the page that answer to pointer and keyboard: heatmap, tolerance slider, aligned utterances. No torch here.

Each is complete as written here, at the default tolerance; the template's script makes it move. What the script needs
is in `data-` attributes, escaped like all text.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechllm_prune.evaluation.scoring import Piece
from speechllm_prune.reporting.analysis import Choice, Result, choose_blocks
from speechllm_prune.reporting.collect import ExperimentData, Measurement
from speechllm_prune.reporting.forgetting import MOST_HEALED_FIRST, SCORE
from speechllm_prune.reporting.table1 import joint_verdict
from speechllm_prune.reporting.tables import block_label, fixed, percent
from speechllm_prune.reporting.utterances import Worst

SHOWN_WORDS = 60
"""Aligned words shown of an utterance."""
MARKERS = {
    "joint": "M0-6L6 0L0 6L-6 0Z",
    "projector": "M0-6L6 5H-6Z",
    "decoder": "M-5-5H5V5H-5Z",
    "none": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
}
CHANGE_TICKS = (-0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
MOST = 2.0
"""Where the slider ends, if it does not begin above."""
LARGEST = 1e300
"""Stands for infinity, which JSON does not have."""


def _data(value: Any) -> str:
    return html.escape(json.dumps(value, separators=(",", ":"), allow_nan=False))


def healing_name(mode: str) -> str:
    """A heal mode as it is called on the page."""
    return "no healing" if mode == "none" else f"{mode} healing"


# ---------------------------------------------------------------------------------------------- heatmap
def heatmaps(measurements: Sequence[Measurement], names: Sequence[str]) -> str:
    """Distance matrices on one colour scale, each with its path; a block under the pointer or the cursor is read out.

    Arguments
    ---------
    measurements : sequence of Measurement
        To be shown side by side.
    names : sequence of str
        A title for each.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low = min(float(np.nanmin(measurement.matrix)) for measurement in measurements)
    high = max(float(np.nanmax(measurement.matrix)) for measurement in measurements)

    def colour(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.5
        return str(to_hex(colormaps["viridis"](share)))

    maps = [
        _heatmap(measurement, name, colour)
        for measurement, name in zip(measurements, names, strict=True)
    ]
    stops = ",".join(colour(low + (high - low) * index / 8) for index in range(9))
    scale = (
        f'<p class="scale">d[n, l]: {low:.3f} <span style="background: linear-gradient(90deg, {stops})"></span> '
        f"{high:.3f} &nbsp; <svg viewBox='-8 -6 16 12' width='16' height='12' aria-hidden='true'>"
        "<circle r='5' class='dot'/></svg> pruning path</p>"
    )
    return f'<div class="heatmaps">{"".join(maps)}</div>{scale}'


def _heatmap(measurement: Measurement, name: str, colour: Any) -> str:
    num_layers = measurement.num_layers
    cell = max(14, min(30, 360 // num_layers))
    left, top = 46, 8
    side = cell * num_layers

    def x(start: int) -> int:
        return left + cell * start

    def y(size: int) -> int:
        return top + cell * (num_layers - size)

    body = []
    values: list[list[float | None]] = []
    for size in range(1, num_layers + 1):
        row = [float(v) for v in measurement.matrix[size - 1, : num_layers - size + 1]]
        values.append([None if math.isnan(value) else round(value, 4) for value in row])
        body += [
            f'<rect x="{x(start)}" y="{y(size)}" width="{cell}" height="{cell}" fill="{colour(value)}"/>'
            for start, value in enumerate(row)
            if not math.isnan(value)
        ]
    half = cell / 2
    dots = [(x(l) + half, y(n) + half) for n, l in sorted(measurement.path.items())]
    line = " ".join(f"{a:g},{b:g}" for a, b in dots)
    body += [f'<polyline class="{kind}" points="{line}"/>' for kind in ("under", "over")]
    body += [
        f'<circle class="dot" cx="{a:g}" cy="{b:g}" r="{max(2.5, cell / 7):g}"/>' for a, b in dots
    ]
    step = -(-num_layers // 12)
    body += [
        f'<text x="{x(l) + half:g}" y="{top + side + 16}" text-anchor="middle">{l}</text>'
        for l in range(0, num_layers, step)
    ]
    body += [
        f'<text x="{left - 6}" y="{y(n) + half + 4:g}" text-anchor="end">{n}</text>'
        for n in range(step, num_layers + 1, step)
    ]
    middle = top + side / 2
    body += [
        f'<text x="{left + side / 2:g}" y="{top + side + 36}" text-anchor="middle">start layer l</text>',
        f'<text x="14" y="{middle:g}" text-anchor="middle" transform="rotate(-90 14 {middle:g})">block size n</text>',
        f'<rect class="cursor" width="{cell}" height="{cell}" visibility="hidden"/>',
    ]
    width, height = left + side + 8, top + side + 44
    label = (
        f"Angular distance, {name}, {measurement.count} utterances. Arrow keys move from block to block, "
        "Home goes to the path's block."
    )
    data = {
        "values": values,
        "path": {str(n): l for n, l in measurement.path.items()},
        "margin": {str(n): value for n, value in measurement.margin.items()},
        "cell": cell,
        "left": left,
        "top": top,
    }
    return (
        f'<div class="heatmap" data-map="{_data(data)}">'
        f"<p><b>{html.escape(name)}</b>, {measurement.count} utterances</p>"
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" tabindex="0" role="application" '
        f'aria-roledescription="heatmap" aria-label="{html.escape(label)}">{"".join(body)}</svg>'
        '<output class="readout"></output></div>'
    )


# ------------------------------------------------------------------------------------- tolerance slider
@dataclass(frozen=True)
class _Axes:
    """Where a block size and a relative degradation lie in the drawing; the script moves the line by the same rule."""

    sizes: list[int]
    low: float
    high: float
    left: float = 62.0
    top: float = 10.0
    width: float = 420.0
    height: float = 250.0

    def x(self, size: int) -> float:
        first, last = self.sizes[0] - 0.5, self.sizes[-1] + 0.5
        return round(self.left + self.width * (size - first) / (last - first), 1)

    def y(self, change: float) -> float:
        low, high = math.asinh(10 * self.low), math.asinh(10 * self.high)
        share = (high - math.asinh(10 * change)) / (high - low)
        return round(self.top + self.height * share, 1)


def tolerance_chooser(
    experiment: ExperimentData, results: Sequence[Result], tolerance: float, key: str
) -> str:
    """A slider for the tolerance, the curve of the worst set that it is laid against, and the blocks it chooses.

    Empty if no block on the experiment's own path was tested.

    Arguments
    ---------
    experiment, results
        As read by `collect` and judged by `analyse`.
    tolerance : float
        Where the slider stands at first.
    key : str
        Makes the ids unique in the page.
    """
    choices = [choose_blocks(experiment, results, tolerance, mode) for mode in MOST_HEALED_FIRST]
    choices = [choice for choice in choices if choice.tested]
    if not choices:
        return ""
    sets = choices[0].eval_sets
    modes = [
        {
            "mode": healing_name(choice.heal_mode),
            "tested": [_tested(n, found, sets) for n, found in choice.tested.items()],
        }
        for choice in choices
    ]
    axes = _axes(choices, tolerance)
    data = {
        "sets": sets,
        "tolerance": tolerance,
        "modes": modes,
        "axes": {"low": axes.low, "high": axes.high, "top": axes.top, "height": axes.height},
    }
    most = math.ceil(100 * max(MOST, tolerance))
    percents = f"{100 * tolerance:.10f}".rstrip("0").rstrip(".")
    decimals = len(percents.partition(".")[2])
    # A browser moves a slider to the nearest step: one of them must be the table's own tolerance.
    step = f"{10.0**-decimals:g}" if decimals <= 2 else "any"
    step = "0.5" if float(percents) % 0.5 == 0 else step
    metric = SCORE[experiment.points[0].metric]
    heads = ["healing", "rule", "n", "% drop", "removed", *(f"{s} {metric}" for s in sets)]
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in [*heads, "verdict"])
    title = f"{experiment.label}: chosen blocks"
    return (
        f'<div class="chooser" data-chooser="{_data(data)}"><h3>{html.escape(experiment.label)}</h3>'
        f'<p class="slider"><label for="{key}-slider">Tolerance: how much worse than the unpruned model</label>'
        f'<input id="{key}-slider" type="range" min="0" max="{most}" step="{step}" value="{percents}" '
        f'autocomplete="off" aria-describedby="{key}-told"><output id="{key}-told" for="{key}-slider">'
        f"{percents} % worse is accepted.</output></p>"
        f'<div class="split"><div>{_chart(experiment, choices, axes, tolerance)}</div>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(title)}">'
        f'<table id="{key}-chosen"><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(_chosen_rows(choice) for choice in choices)
        + "</tbody></table></div></div></div>"
    )


def _tested(n: int, found: Mapping[str, Result], sets: Sequence[str]) -> dict[str, Any]:
    """What the script must know of a block size: changes and intervals to judge, texts to show."""

    def interval(name: str) -> list[float] | None:
        of = found[name].degradation_interval if name in found else None
        return [min(of.low, LARGEST), min(of.high, LARGEST)] if of else None

    return {
        "n": n,
        "cells": _cells(n, found, sets),
        "change": {name: found[name].degradation if name in found else None for name in sets},
        "interval": {name: interval(name) for name in sets if name in found},
    }


def _cells(n: int, found: Mapping[str, Result], sets: Sequence[str]) -> list[str]:
    """The cells of a chosen block, from `n` to the last set."""
    point = next(iter(found.values())).point
    layers = block_label(point.start_layer, n).partition(": ")[2]
    scores = [
        f"{fixed(found[name].point.value)} ({percent(found[name].degradation)})"
        if name in found
        else fixed(None)
        for name in sets
    ]
    return [str(n), fixed(point.drop_percent, 1), layers, *scores]


def _chosen_rows(choice: Choice) -> str:
    rows = []
    for rule, n in (("largest", choice.largest), ("safe", choice.safe)):
        blank = ["none", "–", "–", *("–" for _ in choice.eval_sets), "–"]
        if n is not None:
            found = choice.tested[n]
            judged = joint_verdict([found.get(name) for name in choice.eval_sets])
            blank = [*_cells(n, found, choice.eval_sets), judged]
        head = html.escape(healing_name(choice.heal_mode))
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in [rule, *blank])
        rows.append(f'<tr><th scope="row">{head}</th>{cells}</tr>')
    return "\n".join(rows)


def _worst_change(found: Mapping[str, Result], sets: Sequence[str]) -> float | None:
    changes = [found[name].degradation if name in found else None for name in sets]
    known = [change for change in changes if change is not None]
    return max(known) if known and len(known) == len(changes) else None


def _axes(choices: Sequence[Choice], tolerance: float) -> _Axes:
    sizes = sorted({n for choice in choices for n in choice.tested})
    worst = [_worst_change(f, c.eval_sets) for c in choices for f in c.tested.values()]
    known = [change for change in worst if change is not None]
    low = min([0.0, *known])
    return _Axes(sizes, 1.1 * low - 0.02, 1.1 * max([MOST, tolerance, *known]))


def _chart(
    experiment: ExperimentData, choices: Sequence[Choice], axes: _Axes, tolerance: float
) -> str:
    """Relative degradation on the worst set against block size; the points that the rules choose are ringed."""
    right, bottom = axes.left + axes.width, axes.top + axes.height
    body, last = [], math.inf
    for tick in (tick for tick in CHANGE_TICKS if axes.low <= tick <= axes.high):
        y = axes.y(tick)
        if last - y < 18:  # too close to the one below
            continue
        last = y
        body.append(f'<line class="grid" x1="{axes.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        body.append(
            f'<text x="{axes.left - 6}" y="{y + 4}" text-anchor="end">{100 * tick:g}</text>'
        )
    step = -(-len(axes.sizes) // 16)
    body += [
        f'<text x="{axes.x(n)}" y="{bottom + 18}" text-anchor="middle">{n}</text>'
        for n in axes.sizes[::step]
    ]
    line = axes.y(tolerance)
    body.append(f'<line class="tolerance" x1="{axes.left}" x2="{right}" y1="{line}" y2="{line}"/>')
    for index, choice in enumerate(choices):
        body.append(_series(index, choice, axes))
    layers = experiment.points[0].num_layers
    middle = axes.top + axes.height / 2
    body += [
        f'<text x="{axes.left + axes.width / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"block size n (of {layers} layers)</text>",
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        "change on the worst set (%)</text>",
    ]
    names = "".join(
        f'<li class="{c.heal_mode}"><svg viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">'
        f'<path class="mark" d="{MARKERS[c.heal_mode]}"/></svg> {healing_name(c.heal_mode)}</li>'
        for c in choices
    )
    return (
        f'<svg class="chart" viewBox="0 0 {right + 8} {bottom + 46}" role="img" aria-label="Relative degradation '
        f'on the worst evaluation set against block size; the table has the chosen points.">{"".join(body)}</svg>'
        f'<ul class="legend">{names}<li><svg viewBox="-11 -11 22 22" width="22" height="22" aria-hidden="true">'
        '<circle class="ring" r="9"/></svg> largest n within tolerance</li><li><svg viewBox="-14 -14 28 28" width="28" '
        'height="28" aria-hidden="true"><circle class="ring safe" r="12"/></svg> safe n</li></ul>'
    )


def _series(index: int, choice: Choice, axes: _Axes) -> str:
    drawn = [
        (n, axes.x(n), axes.y(change))
        for n, found in choice.tested.items()
        if (change := _worst_change(found, choice.eval_sets)) is not None
    ]
    line = " ".join(f"{x},{y}" for _, x, y in drawn)
    points = []
    for n, x, y in drawn:
        chosen = [
            name
            for name, which in (("largest", choice.largest), ("safe", choice.safe))
            if which == n
        ]
        points.append(
            f'<g class="{" ".join(["point", *chosen])}" data-mode="{index}" data-n="{n}" '
            f'transform="translate({x} {y})">'
            f'<path class="mark" d="{MARKERS[choice.heal_mode]}"/><circle class="ring largest" r="9"/>'
            '<circle class="ring safe" r="12"/></g>'
        )
    return f'<g class="{choice.heal_mode}"><polyline points="{line}"/>{"".join(points)}</g>'


# ------------------------------------------------------------------------------------ worst utterances
def worst_list(worst: Worst) -> str:
    """The worst utterances of a point, reference above hypothesis, with S, D or I below every error."""
    items = []
    for utterance, told in worst.utterances:
        about = f"{utterance.id} ({utterance.duration:.1f} s): {told}"
        items.append(f"<li><p>{html.escape(about)}</p>{alignment(utterance.pieces)}</li>")
    return f'<ol class="worst">{"".join(items)}</ol>' if items else "<p>No errors.</p>"


def alignment(pieces: Sequence[Piece], limit: int = SHOWN_WORDS) -> str:
    """An aligned utterance: marked by letters as well as by colour, and as two plain sentences for screen readers.

    Example
    -------
    >>> alignment([("equal", ["a"], ["a"]), ("delete", ["b"], [])]).count("<span class")
    3
    """
    columns = [
        (
            ref[index] if ref else "***",
            hyp[index] if hyp else "***",
            "" if kind == "equal" else kind[0].upper(),
        )
        for kind, ref, hyp in pieces
        for index in range(max(len(ref), len(hyp)))
    ]
    shown = [("ref", "hyp", "head"), *columns[:limit]]
    cells = "".join(
        f'<span class="w {mark}"><b>{html.escape(ref)}</b><i>{html.escape(hyp)}</i>'
        f"<u>{'' if mark == 'head' else mark}</u></span>"
        for ref, hyp, mark in shown
    )
    left = len(columns) - limit
    more = f"<p>and {left} more words: see the file</p>" if left > 0 else ""
    ref, hyp = (
        html.escape(" ".join(column[side] for column in columns[:limit] if column[side] != "***"))
        for side in (0, 1)
    )
    return (
        f'<div class="aligned" aria-hidden="true">{cells}</div>{more}'
        f'<p class="unseen">Reference: {ref}. Hypothesis: {hyp}.</p>'
    )
