"""Figures of a report: distance heatmaps, the training curve; style and output of all. Matplotlib without a display.

Each function returns a Figure; `save_figure` writes it as PNG and SVG, `inline_svg` makes it part of a page that may be
dark or light. Colours are from the Okabe-Ito set, and every series has its own marker: nothing is told by colour alone.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from speechllm_prune.reporting.collect import ExperimentData, Measurement
from speechllm_prune.reporting.tables import Table

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
MOST_COLUMNS = 4
"""Heatmaps in a line."""
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


def heatmap_figure(panels: Sequence[HeatmapPanel | None], columns: int | None = None) -> Figure:
    """Angular distance of every block, block size upwards and start layer to the right, all panels on one scale.

    Arguments
    ---------
    panels : sequence of HeatmapPanel
        Drawn side by side; None leaves its place empty.
    columns : int, optional
        Panels in a line; by default all, at most 4.
    """
    columns = columns or min(len(panels), MOST_COLUMNS)
    lines = -(-len(panels) // columns)
    low = min(float(np.nanmin(panel.matrix)) for panel in panels if panel)
    high = max(float(np.nanmax(panel.matrix)) for panel in panels if panel)
    with rc_context(RC):
        figure = Figure(figsize=(4.6 * columns + 1.0, 4.4 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        axes = axes[: len(panels)]
        for axis, panel in zip(axes, panels, strict=True):
            if panel is None:
                axis.set_axis_off()
                continue
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


def table_figure(tables: Sequence[Table]) -> Figure:
    """Tables as a picture, one below the other, each with its notes and without its remarks."""
    height, widest = 0.16, 34  # of a line, in inches; of a cell, in letters
    lines: list[tuple[list[str], list[float], bool]] = []
    for table in tables:
        cells = [
            [textwrap.fill(cell, widest) for cell in row] for row in (table.columns, *table.rows)
        ]
        widths = [max(map(_inches, column)) + 0.15 for column in zip(*cells, strict=True)]
        for text in (table.title, *(f"Note: {note}" for note in table.notes)):
            whole = textwrap.fill(text, max(60, round(10 * sum(widths))))
            lines.append(([whole], [_inches(whole)], False))
        lines += [(row, widths, index in (0, len(cells) - 1)) for index, row in enumerate(cells)]
        lines.append(([""], [0.0], False))
    down = np.cumsum([(1.4 + max(c.count("\n") for c in row)) * height for row, _, _ in lines])
    size = (max(sum(widths) for _, widths, _ in lines) + 0.3, down[-1] + 0.2)
    with rc_context(RC):
        figure = Figure(figsize=size)
        axis = figure.add_axes(
            (0, 0, 1, 1), xlim=(-0.15, size[0] - 0.15), ylim=(size[1] - 0.1, -0.1)
        )
        axis.set_axis_off()
        for top, bottom, (row, widths, ruled) in zip([0.0, *down], down, lines, strict=False):
            for cell, across in zip(row, np.cumsum([0.0, *widths]), strict=False):
                axis.text(across, top, cell, va="top", fontsize=8)
            if ruled:
                axis.axhline(bottom - 0.06, color=INK, linewidth=0.7)
    return figure


def _inches(text: str) -> float:
    """Width of a text at 8 points."""
    font = FontProperties(size=8)
    measure = text_to_path.get_text_width_height_descent
    return max(measure(line, font, False)[0] for line in text.split("\n")) / 72.0


# ----------------------------------------------------------------------------------------------- output
def errorbar(
    axis: Any, x: Sequence[float], values: Sequence[tuple[float, float, float]], **style: Any
) -> None:
    """Points with bars from their lower to their upper ends; a bar without end is an arrow to the edge of the axis.

    Arguments
    ---------
    axis : matplotlib.axes.Axes
        Where to draw.
    x, values : sequences
        Places, and there a value with its lower and upper end.
    style
        Of `axis.errorbar`.
    """
    points = np.array(values, dtype=float).reshape(-1, 3)
    bars = np.abs(points[:, 1:] - points[:, :1])
    endless = np.isinf(bars)
    bars = np.where(np.isfinite(bars), bars, 0.0).T
    style = {"markersize": 6, "linewidth": 1.5, "elinewidth": 0.9, "capsize": 2.0} | style
    axis.errorbar(x, points[:, 0], yerr=bars, **style)
    for index, edge in zip(*np.nonzero(endless), strict=True):
        arrow = {"arrowstyle": "->", "color": style["color"], "linewidth": style["elinewidth"]}
        axis.annotate(
            "",
            xy=(x[index], float(edge)),
            xycoords=axis.get_xaxis_transform(),
            xytext=(x[index], points[index, 0]),
            arrowprops=arrow | {"shrinkA": 0.0, "shrinkB": 0.0},
        )


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
