"""Figures of a report: pruning curves, distance heatmaps, the training curve. Matplotlib without a display.

Each function returns a Figure; `save_figure` writes it as PNG and SVG, `inline_svg` makes it part of a page that may be
dark or light. Colours are from the Okabe-Ito set, and every series has its own marker: nothing is told by colour alone.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData, Measurement

INK = "#010203"
"""Colour of text and axes: on a page it becomes the page's own text colour."""
GROUND = "#fefeff"
"""Background: on a page it becomes transparent."""
STYLE = {
    "none": ("#D55E00", "o"),
    "decoder": ("#E69F00", "s"),
    "projector": ("#56B4E9", "^"),
    "joint": ("#009E73", "D"),
}
LINES = ("-", "--", ":", "-.")
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "speechllm-prune",  # equal input, equal file
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class HeatmapPanel:
    """One matrix of a heatmap figure: distances [L, L] and the path {n: l} drawn on it."""

    title: str
    matrix: np.ndarray
    path: Mapping[int, int]


def panel_of(measurement: Measurement, prefix: str = "") -> HeatmapPanel:
    """A measurement as a panel, its title saying what was averaged over how many utterances."""
    title = f"{prefix}{measurement.measure_input} input"
    title += "" if measurement.adapters == "none" else f", adapters {measurement.adapters}"
    title += f"\n{measurement.count} utterances"
    return HeatmapPanel(title, measurement.matrix, measurement.path)


def heatmap_figure(panels: Sequence[HeatmapPanel], columns: int | None = None) -> Figure:
    """Angular distance of every block, block size upwards and start layer to the right, all panels on one scale.

    Arguments
    ---------
    panels : sequence of HeatmapPanel
        Drawn side by side.
    columns : int, optional
        Panels in a line; by default all.
    """
    columns = columns or len(panels)
    lines = -(-len(panels) // columns)
    low = min(float(np.nanmin(panel.matrix)) for panel in panels)
    high = max(float(np.nanmax(panel.matrix)) for panel in panels)
    with rc_context(RC):
        figure = Figure(figsize=(4.6 * columns + 1.0, 4.4 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        axes = axes[: len(panels)]
        for axis, panel in zip(axes, panels, strict=True):
            num_layers = len(panel.matrix)
            image = axis.imshow(
                np.ma.masked_invalid(panel.matrix),
                origin="lower",
                extent=(-0.5, num_layers - 0.5, 0.5, num_layers + 0.5),
                cmap="viridis",
                vmin=low,
                vmax=high,
                interpolation="nearest",
            )
            sizes = sorted(panel.path)
            starts = [panel.path[n] for n in sizes]
            # Dark under light: visible on both ends of the colour scale.
            axis.plot(starts, sizes, color="black", linewidth=3.0, alpha=0.6)
            axis.plot(
                starts,
                sizes,
                color="white",
                linewidth=1.2,
                marker="o",
                markersize=max(2.0, 60 / (num_layers + 6)),
                markerfacecolor="#D55E00",
                markeredgecolor="white",
                markeredgewidth=0.8,
            )
            axis.set_title(panel.title, fontsize=10)
            axis.set_xlabel("start layer l (first removed layer)")
            axis.set_ylabel("block size n (layers removed)")
            for one in (axis.xaxis, axis.yaxis):
                one.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
        bar.set_label("angular distance d[n, l] (0 to 1)")
        handle = Line2D(
            [], [], color="#555555", marker="o", markerfacecolor="#D55E00", label="pruning path"
        )
        axes[0].legend(handles=[handle], loc="upper right", fontsize=9)
    return figure


def pruning_curve(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    eval_set: str,
    tolerance: float,
) -> Figure:
    """Score against the share of removed layers on one evaluation set, a line per heal mode along the own path.

    WER is on a scale that is linear up to 1 % and logarithmic above: the unhealed models reach several times the rest.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Overlaid, each with its own line style.
    results : mapping
        {str(experiment folder): judged results}.
    eval_set : str
        `<corpus>-<split>`.
    tolerance : float
        Drawn as the largest accepted score.
    """
    shown = [e for e in experiments if e.baseline(eval_set) or _of_set(results, e, eval_set)]
    metric = next(r.point.metric for e in shown for r in _of_set(results, e, eval_set))
    counts = {r.point.num_utterances for e in shown for r in _of_set(results, e, eval_set)}
    with rc_context(RC):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axis = figure.subplots()
        for index, experiment in enumerate(shown):
            suffix = f", {experiment.label}" if len(shown) > 1 else ""
            judged = _of_set(results, experiment, eval_set)
            _draw_baseline(axis, experiment, judged, tolerance, suffix, LINES[index % len(LINES)])
            _draw_modes(axis, experiment, judged, suffix, LINES[index % len(LINES)])
            _draw_controls(axis, judged, suffix)
        if metric == "wer":
            axis.set_yscale("symlog", linthresh=1.0, linscale=0.4)
            lowest = min(_lower_end(r) for e in shown for r in _of_set(results, e, eval_set))
            axis.set_ylim(bottom=0 if lowest < 1.0 else 0.8 * lowest)
            _log_ticks(axis)
        controls = max(sum(r.point.control for r in _of_set(results, e, eval_set)) for e in shown)
        axis.set_xlim(left=-1.2 * (controls + 1.5))
        axis.set_xlabel("decoder layers removed (%)")
        better = "lower" if metric == "wer" else "higher"
        axis.set_ylabel(f"{metric.upper()} ({'%, ' if metric == 'wer' else ''}{better} is better)")
        axis.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
        _layer_axis(axis, {e.points[0].num_layers for e in shown})
        axis.set_title(
            f"{eval_set} ({', '.join(map(str, sorted(counts)))} utterances; bars: 95 % interval)",
            fontsize=10,
        )
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9
        )
    return figure


def _of_set(
    results: Mapping[str, Sequence[Result]], experiment: ExperimentData, name: str
) -> list[Result]:
    return [
        result
        for result in results[str(experiment.folder)]
        if result.point.eval_set == name and SHUFFLED not in result.point.tag
    ]


def _draw_baseline(
    axis: Any,
    experiment: ExperimentData,
    judged: Sequence[Result],
    tolerance: float,
    suffix: str,
    line: str,
) -> None:
    full = next((result for result in judged if result.point.is_full), None)
    if full is None:
        return
    sign = 1 if full.point.metric == "wer" else -1
    axis.axhline(full.point.value, color=INK, linewidth=1.2, linestyle=line)
    # The marker carries the legend entry, so that it differs from the curves in more than its colour.
    _errorbar(axis, [0.0], [full], color=INK, marker="P", linestyle=line, label="unpruned" + suffix)
    axis.axhline(
        full.point.value * (1 + sign * tolerance),
        color="#808080",
        linewidth=1.0,
        linestyle=(0, (1, 2)),
        label=f"tolerance: {100 * tolerance:g} % worse" + suffix,
    )


def _draw_modes(
    axis: Any, experiment: ExperimentData, judged: Sequence[Result], suffix: str, line: str
) -> None:
    series: dict[tuple[str, str, bool], list[Result]] = {}
    for result in judged:
        point = result.point
        if point.is_pruned:
            assert point.start_layer is not None
            own = "own" in experiment.sources(point.start_layer, point.block_size)
            series.setdefault((point.heal_mode, point.tag, own), []).append(result)
    order = list(STYLE)
    keys = sorted(
        series, key=lambda key: (order.index(key[0]) if key[0] in order else 9, key[1], not key[2])
    )
    for index, (mode, tag, own) in enumerate(keys):
        found = sorted(series[mode, tag, own], key=lambda result: result.point.block_size)
        colour, marker = STYLE.get(mode, ("#0072B2", "v"))
        name = "no healing" if mode == "none" else f"{mode} healing"
        name += f" + {tag}" if tag else ""
        _errorbar(
            axis,
            # A little beside each other, or the bars of equal block sizes hide one another.
            [r.point.drop_percent + 0.5 * (index - (len(keys) - 1) / 2) for r in found],
            found,
            color=colour,
            marker=marker,
            linestyle=(line if not tag else "--") if own else "none",
            markerfacecolor=colour if own else "none",
            label=name + ("" if own else ", block of another path") + suffix,
        )


def _draw_controls(axis: Any, judged: Sequence[Result], suffix: str) -> None:
    controls = [result for result in judged if result.point.control]
    for index, result in enumerate(controls):
        point = result.point
        label = f"control: nothing removed, {point.heal_mode} healing as for n={point.block_size}"
        # Beside the unpruned model's marker, which also has 0 % removed.
        _errorbar(
            axis,
            [-1.2 * (index + 1)],
            [result],
            color=STYLE[point.heal_mode][0],
            marker="*",
            markersize=10,
            linestyle="none",
            label=label + suffix,
        )


def _errorbar(axis: Any, x: Sequence[float], results: Sequence[Result], **style: Any) -> None:
    values = [result.point.value for result in results]
    below = [r.point.value - r.interval.low if r.interval else 0.0 for r in results]
    above = [r.interval.high - r.point.value if r.interval else 0.0 for r in results]
    bars = [np.maximum(below, 0.0), np.maximum(above, 0.0)]
    style = {"markersize": 6, "linewidth": 1.6, "elinewidth": 0.9, "capsize": 2.5} | style
    axis.errorbar(x, values, yerr=bars, **style)


def _lower_end(result: Result) -> float:
    return result.interval.low if result.interval else result.point.value


def _log_ticks(axis: Any) -> None:
    bottom, top = axis.get_ylim()
    ticks = [0, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000]
    axis.set_yticks([tick for tick in ticks if bottom <= tick <= top])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _layer_axis(axis: Any, layer_counts: set[int]) -> None:
    """The same axis in layers, where all decoders shown are equally deep."""
    if len(layer_counts) != 1:
        return
    num_layers = layer_counts.pop()
    top = axis.secondary_xaxis(
        "top", functions=(lambda x: x * num_layers / 100.0, lambda n: n * 100.0 / num_layers)
    )
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_xlabel(f"block size n (of {num_layers} layers)")
    top.spines["top"].set_visible(True)


def training_curve(experiment: ExperimentData) -> Figure | None:
    """Validation score and loss by step, to see whether training reached its plateau; None without any."""
    log = [entry for entry in experiment.train_log if "step" in entry]
    keys = [key for key in ("valid wer", "valid bleu", "valid loss") if any(key in e for e in log)]
    if not keys:
        return None
    with rc_context(RC):
        figure = Figure(figsize=(7.2, 2.2 * len(keys) + 0.6), layout="constrained")
        axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
        for axis, key in zip(axes, keys, strict=True):
            found = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*found, strict=True), color="#0072B2", marker="o", markersize=4)
            axis.set_ylabel({"valid wer": "WER (%)", "valid bleu": "BLEU"}.get(key, "loss"))
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
        axes[0].set_title("training, on the validation subset", fontsize=10)
        axes[-1].set_xlabel("optimiser steps")
    return figure


# ----------------------------------------------------------------------------------------------- output
def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; equal figures give equal files. Returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.parent / f"{stem.name}{suffix}" for suffix in (".png", ".svg")]
    with rc_context(RC):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: it is most of the work of drawing
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def inline_svg(svg: str, name: str, description: str) -> str:
    """A saved figure as an `<svg>` element that takes the colours of its page and scales with its column.

    Arguments
    ---------
    svg : str
        Text of an SVG file of `save_figure`.
    name : str
        Prefix of all ids in it, so that several figures fit in one page.
    description : str
        What a screen reader says.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(GROUND, "none")
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', svg)
    if size is None:
        raise ValueError(f"{name} is not an SVG figure of ours")
    label = html.escape(description)
    style = f'role="img" aria-label="{label}" style="max-width: {float(size[1]) * 1.45:.0f}px"'
    return svg.replace(size[0], style, 1)
