"""report.html: one self-contained page, filled from `page.html`; it needs no network and no scripts."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechllm_prune import __version__
from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData
from speechllm_prune.reporting.compare import matrices_table
from speechllm_prune.reporting.measured import MeasurementComparison
from speechllm_prune.reporting.tables import Table, fixed, span, to_html

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class PageFigure:
    """A figure of the page: inline SVG, a caption, and the files that hold it."""

    svg: str
    caption: str
    files: list[Path] = field(default_factory=list)


@dataclass
class PageContent:
    """What the page shows, already computed."""

    experiments: list[ExperimentData]
    tables: list[Table]
    points: Table
    point_results: list[Result]
    comparisons: list[MeasurementComparison]
    curves: list[PageFigure] = field(default_factory=list)
    heatmaps: list[PageFigure] = field(default_factory=list)
    training: list[PageFigure] = field(default_factory=list)
    compared: Table | None = None
    redundancy: Table | None = None
    translation: Table | None = None


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Replace every `{{ name }}`; a slot without a value, or a value without a slot, is an error.

    Example
    -------
    >>> fill("<b>{{ word }}</b>", {"word": "yes"})
    '<b>yes</b>'
    """
    used = set()

    def value(match: re.Match[str]) -> str:
        used.add(match[1])
        return slots[match[1]]

    # `{{ name }}` in the template's own comment is documentation.
    body = re.sub(r"<!--.*?-->\n?", "", template, flags=re.DOTALL)
    text = re.sub(r"\{\{ (\w+) \}\}", value, body)
    if used != set(slots):
        raise ValueError(f"the template has no slot for {sorted(set(slots) - used)}")
    return text


def render_page(content: PageContent, folder: Path) -> str:
    """The whole page.

    Arguments
    ---------
    content : PageContent
        What to show.
    folder : Path
        Where the page will be written: links are relative to it.
    """
    sections = [
        ("table-1", "Table 1", _tables(content.tables)),
        ("table-2", "Table 2", _optional(content.translation, "table2")),
        (
            "compared",
            "Compared with the first experiment",
            _optional(content.compared, "compared-table"),
        ),
        ("curves", "Pruning curves", _figures(content.curves, folder)),
        (
            "heatmaps",
            "Angular distance and pruning path",
            _figures(content.heatmaps, folder, wide=True),
        ),
        ("redundancy", "Where the small distances lie", _redundancy(content.redundancy)),
        ("text-and-speech", "Text against speech", _comparisons(content.comparisons)),
        ("sanity", "Does the model listen?", _sanity(content.point_results)),
        ("training", "Training", _figures(content.training, folder)),
        ("incomplete", "Incomplete", _incomplete(content.experiments)),
        ("points", "All points", _points(content, folder)),
    ]
    shown = [section for section in sections if section[2]]
    names = ", ".join(experiment.label for experiment in content.experiments)
    notes = list(dict.fromkeys(n for experiment in content.experiments for n in experiment.notes))
    note = "".join(f"<p>{html.escape(text)}</p>" for text in notes)
    navigation = [(key, title) for key, title, _ in shown] + [("provenance", "Provenance")]
    return fill(
        TEMPLATE.read_text(encoding="utf-8"),
        {
            "title": html.escape(f"Decoder layers that can go: {content.experiments[0].name}"),
            "subtitle": html.escape(names),
            "notes": f'<div class="note" role="note">{note}</div>' if note else "",
            "navigation": "".join(f'<li><a href="#{k}">{t}</a></li>' for k, t in navigation),
            "sections": "\n".join(
                f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>\n{body}</section>'
                for key, title, body in shown
            ),
            "provenance": _provenance(content.experiments, folder),
        },
    )


def _colour_verdicts(table: str) -> str:
    return re.sub(r"<td>(within|exceeds)</td>", r'<td class="\1">\1</td>', table)


def _tables(tables: Sequence[Table]) -> str:
    return "\n".join(
        _colour_verdicts(to_html(table, table_id=f"table1-{index}"))
        for index, table in enumerate(tables)
    )


def _optional(table: Table | None, table_id: str) -> str:
    return to_html(table, table_id=table_id) if table else ""


def _redundancy(table: Table | None) -> str:
    return to_html(table, table_id="redundancy-table") if table else ""


def _figures(figures: Sequence[PageFigure], folder: Path, wide: bool = False) -> str:
    if not figures:
        return ""
    parts = []
    for figure in figures:
        links = " ".join(
            f'<a href="{html.escape(_relative(path, folder))}">{path.suffix[1:].upper()}</a>'
            for path in figure.files
        )
        caption = f"<figcaption>{html.escape(figure.caption)} {links}</figcaption>"
        # Focusable, because on a narrow screen the drawing scrolls sideways instead of becoming illegible.
        parts.append(f'<figure tabindex="0">{figure.svg}{caption}</figure>')
    kind = "figures wide" if wide else "figures"
    return f'<div class="{kind}">{"".join(parts)}</div>'


def _comparisons(comparisons: Sequence[MeasurementComparison]) -> str:
    return to_html(matrices_table(comparisons), table_id="matrices") if comparisons else ""


def _sanity(results: Sequence[Result]) -> str:
    """Full model against the same model hearing another utterance's audio."""
    rows = []
    for result in results:
        point = result.point
        if SHUFFLED not in point.tag:
            continue
        for other in results:
            same = (other.point.experiment, other.point.seed, other.point.eval_set) == (
                point.experiment,
                point.seed,
                point.eval_set,
            )
            if same and other.point.is_full:
                scores = [f"{fixed(r.point.value)}{span(r.interval)}" for r in (other, result)]
                name = f"{point.experiment} (seed {point.seed}), {point.eval_set}"
                rows.append([name, point.metric.upper(), *scores])
    if not rows:
        return ""
    columns = ["set", "metric", "own audio [95 %]", "another utterance's audio [95 %]"]
    table = Table("Audio shuffled between utterances", columns, rows)
    table.remarks = [
        "A model that guesses from its prompt and language alone would score alike in both columns."
    ]
    return to_html(table, table_id="shuffled")


def _incomplete(experiments: Sequence[ExperimentData]) -> str:
    items = [
        f"<li>{html.escape(f'{experiment.label}: {text}')}</li>"
        for experiment in experiments
        for text in experiment.incomplete
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _points(content: PageContent, folder: Path) -> str:
    if not content.points.rows:
        return ""
    links = [
        {
            name.partition(".")[0]: _relative(result.point.folder / name, folder)
            for name in ("metrics.json", "hyps.jsonl", "wer.txt", "bleu.txt")
            if (result.point.folder / name).is_file()
        }
        for result in content.point_results
    ]
    table = _colour_verdicts(to_html(content.points, links, table_id="all-points"))
    return (
        '<p class="filter"><label for="points-filter">Show rows with</label>'
        '<input id="points-filter" type="search" data-filters="all-points" aria-describedby="points-shown" '
        'placeholder="such as: joint test-clean"><span id="points-shown" role="status" class="faint"></span></p>'
        + table
    )


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _provenance(experiments: Sequence[ExperimentData], folder: Path) -> str:
    items = []
    for experiment in experiments:
        records = [point.record for point in experiment.points]
        records += [measurement.record for measurement in experiment.measurements.values()]

        def distinct(key: str, width: int = 60, records: list = records) -> str:
            values = {str(record.get(key))[:width] for record in records}
            return ", ".join(sorted(values)) or "none"

        facts = {
            "folder": _relative(experiment.folder, folder),
            "points": str(len(experiment.points)),
            "package version": distinct("package_version"),
            "git commit": distinct("git_commit"),
            "config hash": distinct("config_hash", 12),
        }
        for name, measurement in sorted(experiment.measurements.items()):
            record = measurement.record
            facts[f"distances, {name}"] = (
                f"{measurement.count} utterances of {measurement.manifest or 'a text file'}, last token: "
                f"{measurement.last_token}, decoder {record.get('decoder_hub', 'unknown')}"
            )
        body = "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>"
            for key, text in facts.items()
        )
        items.append(f"<h3>{html.escape(experiment.label)}</h3><dl>{body}</dl>")
    about = f"Made by speechllm-prune {__version__} from the files named above, nothing typed in."
    return "".join(items) + f"<p>{html.escape(about)}</p>"
