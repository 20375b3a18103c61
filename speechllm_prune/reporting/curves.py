"""Pruning curves: the score of one evaluation set, and Figure 2 of the paper, the relative degradation on all of them.

One experiment: every way of healing has its colour, marker and line. Several: colour and line are the healing, the
marker is the experiment, so that the legend stays a sum of both and not their product.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData
from speechllm_prune.reporting.figures import INK, RC, STYLE, errorbar
from speechllm_prune.reporting.relative import next_smaller, on_text_path, series_label

LINES = {"none": ":", "decoder": "-.", "projector": "--", "joint": "-"}
FURTHER = (("#0072B2", "v"), ("#000000", ">"), ("#9A7D0A", "<"), ("#707070", "X"), ("#8B4513", "p"))
"""Healing with extras, by order."""
TEXT_PATH = ("#CC79A7", "h")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
"""Of experiments."""
GREY = "#707070"
Interval = tuple[float, float, float]
"""Value, lower and upper end, in the unit of the axis."""


@dataclass
class _Series:
    label: str
    colour: str
    marker: str
    line: Any
    results: list[Result]
    hollow: bool = False


def _of_set(
    results: Mapping[str, Sequence[Result]], experiment: ExperimentData, name: str
) -> list[Result]:
    return [
        result
        for result in results[str(experiment.folder)]
        if result.point.eval_set == name and SHUFFLED not in result.point.tag
    ]


def _series(
    experiment: ExperimentData, judged: Sequence[Result], extras: bool, strays: bool
) -> list[_Series]:
    """A series per way of healing along the own path, the text-derived path, and what lies on neither."""
    found: dict[tuple[int, str], _Series] = {}
    tags = sorted({(r.point.heal_mode, r.point.tag) for r in judged if r.point.tag})
    for result in sorted(judged, key=lambda r: r.point.block_size):
        point = result.point
        if not point.is_pruned or (point.tag and not extras):
            continue
        colour, marker = STYLE.get(point.heal_mode, FURTHER[0])
        line: Any = LINES.get(point.heal_mode, "-")
        if point.tag:
            colour, marker = FURTHER[tags.index((point.heal_mode, point.tag)) % len(FURTHER)]
            line = (0, (5, 1, 1, 1, 1, 1))
        label = series_label(point.heal_mode, point.tag)
        order = list(STYLE).index(point.heal_mode) if point.heal_mode in STYLE else len(STYLE)
        rank = order + (10 if point.tag else 0)
        assert point.start_layer is not None
        own = "own" in experiment.sources(point.start_layer, point.block_size)
        text = point.heal_mode == "joint" and not point.tag and on_text_path(experiment, point)
        if own:
            new = _Series(label, colour, marker, line, [])
            found.setdefault((rank, label), new).results.append(result)
        if text:
            name = f"{label}, text-derived path"
            new = _Series(name, *TEXT_PATH, (0, (1, 1)), [], hollow=True)
            found.setdefault((20, name), new).results.append(result)
        if not own and not text and strays:
            name = f"{label}, block of another path"
            new = _Series(name, colour, marker, "none", [], hollow=True)
            found.setdefault((30 + rank, name), new).results.append(result)
    return [found[key] for key in sorted(found)]


def _draw_series(
    axis: Any,
    series: Sequence[_Series],
    value_of: Callable[[Result], Interval | None],
    marker: str | None,
    shift: tuple[int, int],
) -> None:
    """Draw each series a little beside the others, or the bars of equal block sizes hide one another.

    `marker` is the experiment's where several are overlaid; `shift`: which of how many experiments this is.
    """
    total = max(1, len(series)) * shift[1]
    step = min(0.5, 3.5 / total)
    for index, one in enumerate(series):
        drawn = [(r.point.drop_percent, v) for r in one.results if (v := value_of(r)) is not None]
        # No line across a depth that another series has and this one was not tested at.
        gaps = {r.point.drop_percent for s in series for r in s.results} - {x for x, _ in drawn}
        drawn = sorted([*drawn, *((x, (float("nan"),) * 3) for x in gaps)])
        offset = step * (index * shift[1] + shift[0] - (total - 1) / 2)
        errorbar(
            axis,
            [x + offset for x, _ in drawn],
            [value for _, value in drawn],
            color=one.colour,
            marker=marker or one.marker,
            linestyle=one.line,
            markerfacecolor="none" if one.hollow else one.colour,
            markersize=9 if one.hollow and not marker else 6,
            label=one.label,
        )


def _score(result: Result) -> Interval:
    interval, value = result.interval, result.point.value
    return (value, interval.low, interval.high) if interval else (value, value, value)


def _degradation(result: Result) -> Interval | None:
    """Relative degradation in percent; None where it is undecided."""
    if result.degradation is None:
        return None
    interval, value = result.degradation_interval, 100.0 * result.degradation
    return (value, 100.0 * interval.low, 100.0 * interval.high) if interval else (value,) * 3


def _draw_controls(
    axis: Any,
    judged: Sequence[Result],
    value_of: Callable[[Result], Interval | None],
) -> int:
    """Controls stand left of the unpruned model, which has 0 % removed too; returns how many there are."""
    place = 0
    for result in judged:
        point, value = result.point, value_of(result)
        if point.control and not point.tag and value is not None:
            place += 1
            errorbar(
                axis,
                [-1.2 * place],
                [value],
                color=STYLE[point.heal_mode][0],
                marker="*",
                markersize=10,
                linestyle="none",
                label=f"control, {point.heal_mode} healing (n={point.block_size})",
            )
    return place


# ------------------------------------------------------------------------------------ score, one set
def pruning_curve(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    eval_set: str,
    tolerance: float | None = None,
) -> Figure:
    """Score against the share of removed layers on one evaluation set, a line per way of healing along the own path.

    WER is on a scale that is linear up to 1 % and logarithmic above: the unhealed models reach several times the rest.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Overlaid; those without the set are left out.
    results : mapping
        {str(experiment folder): judged results}.
    eval_set : str
        `<corpus>-<split>`.
    tolerance : float, optional
        Drawn as the largest accepted score where there is one experiment; by default the experiment's own.
    """
    shown = [e for e in experiments if _of_set(results, e, eval_set)]
    all_results = [r for e in shown for r in _of_set(results, e, eval_set)]
    metric = all_results[0].point.metric
    several = len(shown) > 1
    with rc_context(RC):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axis = figure.subplots()
        controls = 0
        for index, experiment in enumerate(shown):
            judged = _of_set(results, experiment, eval_set)
            marker = MARKERS[index % len(MARKERS)] if several else None
            allowed = experiment.tolerance if tolerance is None else tolerance
            _draw_unpruned(axis, judged, allowed, marker)
            series = _series(experiment, judged, extras=not several, strays=not several)
            _draw_series(axis, series, _score, marker, (index, len(shown)))
            if not several:
                controls = _draw_controls(axis, judged, _score)
        if metric == "wer":
            axis.set_yscale("symlog", linthresh=1.0, linscale=0.4)
            lowest = min(_score(result)[1] for result in all_results)
            axis.set_ylim(bottom=0 if lowest < 1.0 else 0.8 * lowest)
            _log_ticks(axis, [0, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000])
        axis.set_xlim(left=-1.2 * (controls + 1.5))
        axis.set_xlabel("decoder layers removed (%)")
        better = "lower" if metric == "wer" else "higher"
        axis.set_ylabel(f"{metric.upper()} ({'%, ' if metric == 'wer' else ''}{better} is better)")
        axis.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
        _layer_axis(axis, {e.points[0].num_layers for e in shown})
        axis.set_title(f"{_title(eval_set, all_results)}; bars: 95 % interval", fontsize=10)
        _legend(figure, [axis], shown if several else [])
    return figure


def _title(eval_set: str, results: Sequence[Result]) -> str:
    counts = sorted({result.point.num_utterances for result in results})
    return f"{eval_set} ({', '.join(map(str, counts))} utterances)"


def _draw_unpruned(
    axis: Any, judged: Sequence[Result], tolerance: float, marker: str | None
) -> None:
    full = next((result for result in judged if result.point.is_full), None)
    if full is None:
        return
    style: dict[str, Any] = {"color": INK, "linestyle": "-", "label": "unpruned"}
    if marker:
        style["linestyle"] = (
            "none"  # one line per experiment across the figure would hide the curves
        )
    else:
        sign = 1 if full.point.metric == "wer" else -1
        axis.axhline(full.point.value, color=INK, linewidth=1.2)
        axis.axhline(
            full.point.value * (1 + sign * tolerance),
            color=GREY,
            linewidth=1.2,
            linestyle=(0, (1, 2)),
            label=f"tolerance: {100 * tolerance:g} % worse",
        )
    # The marker carries the legend entry, so that it differs from the curves in more than its colour.
    errorbar(axis, [0.0], [_score(full)], marker=marker or "P", **style)


def _log_ticks(axis: Any, ticks: Sequence[float]) -> None:
    bottom, top = axis.get_ylim()
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


def _legend(figure: Figure, axes: Sequence[Any], experiments: Sequence[ExperimentData]) -> None:
    """Below the panels: one entry per label; where experiments are overlaid, their markers as entries of their own."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if experiments:
        for label, handle in list(handles.items()):
            line = handle[0] if hasattr(handle, "lines") else handle
            if line.get_linestyle() in ("None", "none"):
                handles.pop(label)  # unpruned: its marker is the experiment's
            else:
                handles[label] = Line2D([], [], linewidth=1.6)
                handles[label].update_from(line)
                handles[label].set_marker("none")
        for index, experiment in enumerate(experiments):
            marker = MARKERS[index % len(MARKERS)]
            name = textwrap.fill(experiment.label.replace("_", "_ "), 48).replace("_ ", "_")
            handles[name] = Line2D([], [], color=INK, marker=marker, linestyle="none")
    width = max(len(line) for label in handles for line in label.split("\n"))
    columns = int(np.clip(13.5 * figure.get_figwidth() / (width + 7), 1, 4))
    rows = sum(label.count("\n") + 1 for label in handles) / columns
    figure.set_figheight(
        figure.get_figheight() + 0.2 * rows + 0.3
    )  # or a long legend squeezes the panels
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        handlelength=2.6,
    )


# ------------------------------------------------------------------------------------------- Figure 2
def figure2(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    tolerance: float | None = None,
) -> Figure:
    """The paper's Figure 2: relative degradation against the share of removed layers, a panel per evaluation set.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Of one task, overlaid in every panel.
    results : mapping
        {str(experiment folder): judged results}.
    tolerance : float, optional
        By default that of each experiment's YAML.
    """
    sets = list(dict.fromkeys(name for e in experiments for name in e.eval_sets))
    several = len(experiments) > 1
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    with rc_context(RC):
        size = (max(7.2, 4.1 * columns + 0.6), 3.7 * lines + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        axes = list(grid.ravel()[: len(sets)])
        for unused in grid.ravel()[len(sets) :]:
            unused.set_axis_off()
        for axis, name in zip(axes, sets, strict=True):
            _draw_panel(axis, name, experiments, results, tolerance)
        _degradation_scale(axes)
        axes[0].set_xlim(left=min(axes[0].get_xlim()[0], -1.5))
        for axis in grid[:, 0]:
            axis.set_ylabel("relative degradation (%), positive is worse")
        for axis in axes[-columns:]:
            axis.set_xlabel("decoder layers removed (%)")
            axis.xaxis.set_tick_params(labelbottom=True)
        figure.suptitle("bars: 95 % paired bootstrap interval over utterances", fontsize=9)
        _legend(figure, axes, experiments if several else [])
    return figure


def _draw_panel(
    axis: Any,
    eval_set: str,
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    tolerance: float | None,
) -> None:
    several = len(experiments) > 1
    axis.axhline(0.0, color=INK, linewidth=1.2, label="unpruned")
    for allowed in sorted({e.tolerance if tolerance is None else tolerance for e in experiments}):
        label = f"tolerance: {100 * allowed:g} % worse"
        axis.axhline(100 * allowed, color=GREY, linewidth=1.4, linestyle=(0, (1, 2)), label=label)
    all_results = []
    for index, experiment in enumerate(experiments):
        judged = _of_set(results, experiment, eval_set)
        all_results += judged
        marker = MARKERS[index % len(MARKERS)] if several else None
        series = _series(experiment, judged, extras=False, strays=False)
        _draw_series(axis, series, _degradation, marker, (index, len(experiments)))
        if not several:
            _draw_controls(axis, judged, _degradation)
        smaller = next_smaller(experiment, experiments, eval_set)
        if smaller is not None:
            axis.axhline(
                100.0 * smaller.degradation,
                color="#000000",
                linewidth=1.1,
                linestyle=(0, (6, 3)),
                label="unpruned next smaller tier of the model marked at the right end"
                if several
                else f"unpruned next smaller tier: {smaller.label}",
            )
            if several:  # beside each other: two models may have nearly the same line
                place, height = 1.0 + 0.02 * index, 100.0 * smaller.degradation
                transform = axis.get_yaxis_transform()
                style = {"color": "#000000", "marker": marker, "markersize": 5, "clip_on": False}
                axis.plot([place], [height], transform=transform, **style)
    axis.set_title(_title(eval_set, all_results), fontsize=10)
    axis.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)


def _degradation_scale(axes: Sequence[Any]) -> None:
    """Linear up to 50 % and logarithmic beyond where something degrades by more than 150 %."""
    bottom = min(axis.dataLim.y0 for axis in axes)
    if axes[0].get_ylim()[1] > 150:
        axes[0].set_yscale("symlog", linthresh=50.0, linscale=1.6)
        ticks = [-100, -50, -25, 0, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000]
        axes[0].set_ylim(bottom=min(bottom - 8.0, -20.0))
        _log_ticks(axes[0], ticks)
