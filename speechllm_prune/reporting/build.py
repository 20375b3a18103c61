"""Make a report: read experiment folders, judge their points, write tables, figures and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm_prune.reporting.analysis import (
    TOLERANCE,
    Result,
    analyse,
    check_comparable,
)
from speechllm_prune.reporting.collect import ExperimentData, collect
from speechllm_prune.reporting.compare import (
    matrices_table,
    points_of_equal_depth,
    redundancy_table,
)
from speechllm_prune.reporting.find import find_experiments
from speechllm_prune.reporting.forgetting import what_pruning_forgets
from speechllm_prune.reporting.further import (
    figure2_stem,
    further_tables,
    heatmap_tables,
    shown_tables,
)
from speechllm_prune.reporting.measured import (
    compare_all_measurements,
    refuse_unequal_rules,
    with_post_norm,
)
from speechllm_prune.reporting.output import ReportFolder
from speechllm_prune.reporting.page import PageContent, PageFigure, render_page
from speechllm_prune.reporting.table1 import table1
from speechllm_prune.reporting.tables import Table, points_table, to_markdown
from speechllm_prune.reporting.translation import table2
from speechllm_prune.reporting.widgets import heatmaps, tolerance_chooser
from speechllm_prune.runtime import UserError


@dataclass
class Report:
    """A written report: its folder, its page, Tables 1 and 2 as text, and what is incomplete."""

    folder: Path
    page: Path
    table1: str
    incomplete: list[str]
    further: str = ""
    """Kept share, efficiency, extras and, where measured, the paper's numbers beside ours, as text."""
    compared: str = ""
    """With `compare`: what was set beside each other, as text."""


def report_folder(experiments: Sequence[ExperimentData]) -> Path:
    """Where a report goes: the `report/` of the one experiment that has points, else `results/report/`.

    Experiments with measurements only (a random-weight decoder) are material to compare with, and do not count; if
    none has points, the first one counts.
    """
    with_points = [experiment for experiment in experiments if experiment.points]
    owner = (with_points or list(experiments))[0]
    if len(with_points) <= 1:
        return owner.folder / "report"
    return owner.folder.resolve().parent.parent / "report"


def load_experiments(folders: Sequence[str | Path]) -> list[ExperimentData]:
    """Read the experiments named on the command line, those with points first.

    Raises
    ------
    UserError
        If a folder is missing, if nothing in any of them can be reported, or if their numbers must not be mixed.
    """
    experiments = [collect(folder) for folder in find_experiments(folders)]
    if not any(experiment.points or experiment.measurements for experiment in experiments):
        names = ", ".join(str(experiment.folder) for experiment in experiments)
        problems = "".join(f"\n  {text}" for e in experiments for text in e.incomplete)
        raise UserError(
            f"nothing to report in {names}: no evaluated point and no measured distance; run: "
            f"python evaluate.py LEAF.yaml --variant full{problems}"
        )
    experiments.sort(key=lambda experiment: not experiment.points)
    check_comparable(experiments)
    return experiments


def build_report(
    folders: Sequence[str | Path], tolerance: float | None = None, compare: bool = False
) -> Report:
    """Write the whole report.

    Arguments
    ---------
    folders : sequence of str or Path
        Experiment folders, `results/<name>` or `results/<name>/<seed>`.
    tolerance : float, optional
        Largest accepted relative degradation of all tasks; by default that of each experiment's YAML.
    compare : bool
        Whether to set the points, matrices and paths of several experiments beside each other.
    """
    experiments = load_experiments(folders)
    with_points = [experiment for experiment in experiments if experiment.points]
    if compare and len(experiments) < 2:
        raise UserError(
            f"--compare needs at least two experiments, and {experiments[0].folder} is one; "
            "run: python report.py results/FIRST results/SECOND --compare"
        )
    if compare:
        refuse_unequal_rules(experiments)
    folder = ReportFolder(report_folder(experiments))
    results = {str(e.folder): analyse(e, tolerance) for e in with_points}
    tables = [
        table1(with_points, results, task, tolerance)
        for task in TOLERANCE
        if any(experiment.points[0].task == task for experiment in with_points)
    ]
    points, ordered = points_table(with_points, results)
    content = PageContent(
        experiments, tables, points, ordered, compare_all_measurements(experiments)
    )
    compared: list[Table] = []
    if compare and len(with_points) > 1:
        content.compared = points_of_equal_depth(with_points, results)
        folder.tables("compared", [content.compared])
        compared.append(content.compared)
    if tables:
        folder.tables("table1", tables)
        folder.tables("points", [points])
    if content.comparisons:
        matrices = matrices_table(content.comparisons)
        matrices.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
        folder.tables("matrices", [matrices])
        compared.append(matrices)
    content.redundancy = redundancy_table(experiments)
    if content.redundancy is not None:
        folder.tables("redundancy", [content.redundancy])
        compared.append(content.redundancy)
    content.translation = table2(with_points, results)
    if content.translation is not None:
        folder.tables("table2", [content.translation])
    further = further_tables(with_points, results, tolerance)
    content.further = shown_tables(further)
    if heatmaps_as_text := heatmap_tables(experiments):
        further["heatmaps"] = heatmaps_as_text
    for stem, found in further.items():
        folder.tables(stem, found)
    _draw_tables(content, folder)
    _add_choosers(content, with_points, results, tolerance)
    _add_forgotten(content, with_points, results, folder)
    _add_curves(content, with_points, results, tolerance, folder)
    if compare:
        _add_common_heatmap(content, folder)
    _add_heatmaps(content, folder)
    page = folder.text("report.html", render_page(content, folder.path))
    folder.remove_old()
    shown = [*tables, *([content.translation] if content.translation else [])]
    text = "\n".join(to_markdown(table) for table in shown)
    incomplete = [f"{e.label}: {line}" for e in experiments for line in e.incomplete]
    side_by_side = "\n".join(to_markdown(table) for table in compared) if compare else ""
    more = "\n".join(to_markdown(table) for found in content.further.values() for table in found)
    return Report(folder.path, page, text, incomplete, more, side_by_side)


def _draw_tables(content: PageContent, folder: ReportFolder) -> None:
    """The tables that one shows to others, as pictures too."""
    from speechllm_prune.reporting import figures

    translation = [content.translation] if content.translation else []
    for stem, tables in (("table1", content.tables), ("table2", translation)):
        if tables:
            folder.figure(stem, figures.table_figure(tables))
    for stem, tables in content.further.items():
        folder.figure(stem, figures.table_figure(tables))


def _add_choosers(
    content: PageContent,
    experiments: Sequence[ExperimentData],
    results: dict[str, list[Result]],
    tolerance: float | None,
) -> None:
    for index, experiment in enumerate(experiments):
        allowed = experiment.tolerance if tolerance is None else tolerance
        judged = results[str(experiment.folder)]
        content.choosers.append(tolerance_chooser(experiment, judged, allowed, f"chooser-{index}"))


def _add_forgotten(
    content: PageContent,
    experiments: Sequence[ExperimentData],
    results: dict[str, list[Result]],
    folder: ReportFolder,
) -> None:
    content.forgotten = [what_pruning_forgets(e, results[str(e.folder)]) for e in experiments]
    tables = [table for one in content.forgotten for table in one.tables]
    if tables:
        folder.tables("forgetting", tables)


def _add_curves(
    content: PageContent,
    experiments: Sequence[ExperimentData],
    results: dict[str, list[Result]],
    tolerance: float | None,
    folder: ReportFolder,
) -> None:
    from speechllm_prune.reporting import curves, figures

    for task in TOLERANCE:
        of_task = [e for e in experiments if e.task == task]
        if any(experiment.eval_sets for experiment in of_task):
            caption = (
                "Figure 2: relative degradation against the share of removed layers, positive is worse. Bars: 95 % "
                "paired bootstrap interval over utterances; dotted: tolerance; dashed: the unpruned model of the next "
                "smaller tier, if it is in this report; control: nothing removed, healed all the same. Points of "
                "equal depth are drawn slightly apart."
            )
            figure = curves.figure2(of_task, results, tolerance)
            content.curves.append(_page_figure(figure, folder, figure2_stem(task), caption))
        for name in dict.fromkeys(name for e in of_task for name in e.eval_sets):
            figure = curves.pruning_curve(of_task, results, name, tolerance)
            caption = (
                f"{name}: score against the share of removed layers. Bars: 95 % bootstrap interval over utterances; "
                "dotted: the largest accepted score; control: nothing removed, healed all the same. Points of equal "
                "depth are drawn slightly apart."
            )
            stem = f"pruning_curve_{name}"
            content.curves.append(_page_figure(figure, folder, stem, caption))
    for experiment in experiments:
        training = figures.training_curve(experiment)
        if training is not None:
            stem = f"training_curve{_suffix(experiment, experiments)}"
            caption = f"{experiment.label}: validation during training, before anything is removed."
            content.training.append(_page_figure(training, folder, stem, caption))


def _add_heatmaps(content: PageContent, folder: ReportFolder) -> None:
    from speechllm_prune.reporting import figures

    for experiment in content.experiments:
        measured = experiment.measurements
        if not measured:
            continue
        suffix = _suffix(experiment, content.experiments[:1])
        panels = [figures.panel_of(m) for m in measured.values()]
        figure = figures.heatmap_figure(panels)
        kind = ", a decoder with random weights" if experiment.is_random_decoder else ""
        caption = (
            f"{experiment.label}{kind}: angular distance between the input of layer l and that of layer l + n, at the "
            f"last token. Dark blocks change little. Line: the block that the pruning path removes at each n"
            f"{'; both panels on one scale' if len(measured) > 1 else ''}."
        )
        files = folder.figure(f"heatmap{suffix}_{'_'.join(measured)}", figure)
        names = [panel.title.partition("\n")[0] for panel in panels]
        drawing = heatmaps(list(measured.values()), names)
        content.heatmaps.append(PageFigure(drawing, caption, files, interactive=True))


def _add_common_heatmap(content: PageContent, folder: ReportFolder) -> None:
    """All measurements of all experiments on one scale, and below them what the final norm would make of them."""
    from speechllm_prune.reporting import figures

    measured = [(e, m) for e in content.experiments for _, m in sorted(e.measurements.items())]
    if len(measured) < 2:
        return
    panels = [figures.panel_of(m, f"{e.label}: ") for e, m in measured]
    below = [
        figures.HeatmapPanel(f"{panel.title}\nend state after the final norm", matrix, panel.path)
        for panel, (_, m) in zip(panels, measured, strict=True)
        if (matrix := with_post_norm(m)) is not None
    ]
    complete = len(below) == len(panels)
    columns = min(len(panels), figures.MOST_COLUMNS)
    placed: list[figures.HeatmapPanel | None] = []
    for start in range(0, len(panels), columns):
        for line in (panels, below) if complete else (panels,):
            here = line[start : start + columns]
            placed += [*here, *[None] * (columns - len(here))]
    figure = figures.heatmap_figure(placed, columns)
    caption = (
        "All measurements on one scale. Line: the block that the pruning path removes at each n."
    )
    if complete:
        caption += (
            " Below: the blocks that end at the last layer as they look if that layer's output is taken after the "
            "final norm, as most tools do; the paths are those above."
        )
    content.heatmaps.append(_page_figure(figure, folder, "heatmap_compared", caption))


def _suffix(experiment: ExperimentData, only: Sequence[ExperimentData]) -> str:
    """Nothing for the one experiment that needs no name in its file names, else its name and seed."""
    alone = len(only) == 1 and only[0] is experiment
    return "" if alone else f"_{experiment.name}_{experiment.seed}"


def _page_figure(figure: Any, folder: ReportFolder, stem: str, caption: str) -> PageFigure:
    from speechllm_prune.reporting import figures

    files = folder.figure(stem, figure)
    svg = next(path for path in files if path.suffix == ".svg").read_text(encoding="utf-8")
    return PageFigure(figures.inline_svg(svg, stem, caption), caption, files)
