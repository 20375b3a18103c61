"""report.html: one self-contained page, filled from `page.html`. It needs no network; without scripts it says the same.

Its content policy lets no script run but the template's own, so that not even text that got past the escaping could.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechllm_prune import __version__
from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData
from speechllm_prune.reporting.compare import matrices_table
from speechllm_prune.reporting.forgetting import Forgotten, train_inputs
from speechllm_prune.reporting.measured import MeasurementComparison
from speechllm_prune.reporting.tables import Table, fixed, span, to_html
from speechllm_prune.reporting.widgets import healing_name, worst_list

BROAD = 800
"""A figure of more pixels than this has a line of its own."""
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class PageFigure:
    """A figure of the page: what is drawn (HTML), a caption, and the files that hold it."""

    drawing: str
    caption: str
    files: list[Path] = field(default_factory=list)
    interactive: bool = False
    """Whether the drawing has controls of its own, and fits a narrow screen by itself."""


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
    further: dict[str, list[Table]] = field(default_factory=dict)
    """{stem of its files: tables}."""
    choosers: list[str] = field(default_factory=list)
    """A tolerance slider per experiment (HTML)."""
    forgotten: list[Forgotten] = field(default_factory=list)


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
        ("tolerance", "How much worse may it get?", _choosers(content.choosers)),
        (
            "compared",
            "Compared with the first experiment",
            _optional(content.compared, "compared-table"),
        ),
        ("curves", "Pruning curves", _figures(content.curves, folder)),
        ("further", "Kept share, efficiency, extras", _further(content.further)),
        (
            "heatmaps",
            "Angular distance and pruning path",
            _figures(content.heatmaps, folder, wide=True),
        ),
        ("redundancy", "Where the small distances lie", _redundancy(content.redundancy)),
        ("text-and-speech", "Text against speech", _comparisons(content.comparisons)),
        ("forgetting", "What pruning forgets", _forgotten(content.forgotten)),
        ("worst", "Worst utterances", _worst(content, folder)),
        ("sanity", "Does the model listen?", _sanity(content.point_results)),
        ("training", "Training", _figures(content.training, folder)),
        ("incomplete", "Incomplete", _incomplete(content.experiments)),
        ("points", "All points", _points(content, folder)),
    ]
    shown = [section for section in sections if section[2]]
    names = ", ".join(experiment.label for experiment in content.experiments)
    notes = list(dict.fromkeys(n for experiment in content.experiments for n in experiment.notes))
    note = "".join(f"<p>{html.escape(text)}</p>" for text in notes)
    template = TEMPLATE.read_text(encoding="utf-8")
    navigation = [(key, title) for key, title, _ in shown] + [("provenance", "Provenance")]
    return fill(
        template,
        {
            "scripts": script_hashes(template),
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


def script_hashes(template: str) -> str:
    """The scripts of a page as a content policy names them.

    Example
    -------
    >>> script_hashes("<script>1</script>")
    "'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='"
    """
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", template, flags=re.DOTALL)
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _colour_verdicts(table: str) -> str:
    return re.sub(r"<td>(within|exceeds)</td>", r'<td class="\1">\1</td>', table)


def _tables(tables: Sequence[Table]) -> str:
    return "\n".join(
        _colour_verdicts(to_html(table, table_id=f"table1-{index}"))
        for index, table in enumerate(tables)
    )


def _optional(table: Table | None, table_id: str) -> str:
    return to_html(table, table_id=table_id) if table and table.rows else ""


def _further(tables: Mapping[str, Sequence[Table]]) -> str:
    return "\n".join(
        to_html(table, table_id=f"{stem}-{index}")
        for stem, found in tables.items()
        for index, table in enumerate(found)
    )


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
        kind = 'class="interactive"' if figure.interactive else 'tabindex="0"'
        width = re.search(r"max-width: (\d+)px", figure.drawing)
        if not figure.interactive and width and int(width[1]) > BROAD:
            kind += ' class="broad"'
        parts.append(f"<figure {kind}>{figure.drawing}{caption}</figure>")
    kind = "figures wide" if wide else "figures"
    return f'<div class="{kind}">{"".join(parts)}</div>'


def _choosers(choosers: Sequence[str]) -> str:
    if not any(choosers):
        return ""
    return (
        "<p>A block is accepted if it is at most this much worse than the unpruned model, unrounded, on all evaluation "
        "sets at once. Largest: the paper's rule, the largest accepted n. Safe: every smaller tested n is accepted "
        "too. Blocks of the experiment's own path; verdict as in Table 1.</p>" + "".join(choosers)
    )


def _forgotten(forgotten: Sequence[Forgotten]) -> str:
    tables = [table for one in forgotten for table in one.tables]
    problems = [problem for one in forgotten for problem in one.problems]
    if not tables and not problems:
        return ""
    options = [
        f'<section class="option" data-name="{html.escape(table.title)}">'
        f"{to_html(table, table_id=f'forgotten-{index}')}</section>"
        for index, table in enumerate(tables)
    ]
    items = "".join(f"<li>Not said: {html.escape(problem)}</li>" for problem in problems)
    about = (
        "In brackets: 95 % bootstrap interval over utterances. A wrong word counts in the group of the reference word, "
        "an inserted one in its own: the groups of words add up to the WER. A group that the references do not have is "
        "left out, with its insertions. Seen: how often the word stands in the training text. Numbers: words with a "
        "digit once the text is normalised. Repetition loop: a phrase of up to 8 words three times in a row or more, "
        "and more often than in the reference. Translations: words missing from the hypothesis, whatever their order."
    )
    picks = f'<div class="pick" data-label="Show the table of">{"".join(options)}</div>'
    return f"<p>{about}</p>{f'<ul>{items}</ul>' if items else ''}{picks if options else ''}"


def _worst(content: PageContent, folder: Path) -> str:
    options = []
    for worst in (worst for one in content.forgotten for worst in one.worst):
        point = worst.point
        healing = "unpruned" if point.is_full else healing_name(point.heal_mode)
        name = (
            f"{point.experiment} (seed {point.seed}), {point.eval_set}, {point.variant}: {healing}"
        )
        links = " ".join(
            f'<a href="{html.escape(_relative(point.folder / file, folder))}">{file}</a>'
            for file in (f"{point.metric}.txt", "hyps.jsonl")
            if (point.folder / file).is_file()
        )
        options.append(
            f'<section class="option" data-name="{html.escape(name)}"><h3>{html.escape(name)}</h3>'
            f"{worst_list(worst)}<p>All: {links}</p></section>"
        )
    about = (
        "The utterances with the most word errors, or with the lowest sentence BLEU. Above the reference, below it the "
        "hypothesis; S substituted, D deleted, I inserted word. In a translation these are differences from one "
        "reference, not always errors."
    )
    picks = f'<div class="pick" data-label="Show the utterances of">{"".join(options)}</div>'
    return f"<p>{about}</p>{picks}" if options else ""


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
        | _plan_link(result, folder)
        for result in content.point_results
    ]
    table = _colour_verdicts(to_html(content.points, links, table_id="all-points"))
    return (
        '<p class="filter"><label for="points-filter">Show rows with</label>'
        '<input id="points-filter" type="search" data-filters="all-points" aria-describedby="points-shown" '
        'placeholder="such as: joint test-clean"><span id="points-shown" role="status" class="faint"></span></p>'
        + table
    )


def _plan_link(result: Result, folder: Path) -> dict[str, str]:
    point = result.point
    if not point.is_pruned:
        return {}
    block = f"l{point.start_layer:02d}n{point.block_size:02d}"
    plan = point.folder.parents[2] / "prune" / block / "plan.json"
    return {"plan": _relative(plan, folder)} if plan.is_file() else {}


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _provenance(experiments: Sequence[ExperimentData], folder: Path) -> str:
    items = []
    for experiment in experiments:
        body = "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>"
            for key, text in _facts(experiment, folder).items()
        )
        items.append(f"<h3>{html.escape(experiment.label)}</h3><dl>{body}</dl>")
    about = f"Made by speechllm-prune {__version__} from the files named above, nothing typed in."
    return "".join(items) + f"<p>{html.escape(about)}</p>"


def _facts(experiment: ExperimentData, folder: Path) -> dict[str, str]:
    """What the numbers of an experiment were made with."""
    points = [point.record for point in experiment.points]
    records = points + [measurement.record for measurement in experiment.measurements.values()]

    def distinct(key: str, width: int = 80, among: Sequence[Mapping[str, Any]] = records) -> str:
        values = {str(record[key])[:width] for record in among if record.get(key) is not None}
        return ", ".join(sorted(values)) or "not stated"

    settings = experiment.settings
    inputs = [record.get("inputs") or {} for record in records] + [train_inputs(experiment.folder)]
    data = {
        "/".join(Path(name).with_suffix("").parts[-2:]): str(digest)[:12]
        for files in inputs
        for name, digest in files.items()
        if name.endswith(".csv")
    }
    facts = {
        "folder": _relative(experiment.folder, folder),
        "note": "; ".join(experiment.notes) or "none",
        "seed": experiment.seed,
        "points": str(len(experiment.points)),
        "package version": distinct("package_version"),
        "git commit": distinct("git_commit"),
        "config hash": distinct("config_hash", 12),
        "data (sha256)": ", ".join(f"{name} {data[name]}" for name in sorted(data)) or "not stated",
        "trained on": ", ".join(map(str, settings.get("train_manifests") or [])) or "not stated",
        "encoder": str(settings.get("encoder_hub") or "not stated"),
        "decoder": str(settings.get("decoder_hub") or distinct("decoder_hub")),
        "versions": _versions(experiment.folder),
    }
    if points:
        facts["decoded in"] = (
            f"{distinct('precision', 80, points)} on {distinct('device', 80, points)}"
        )
        kind = "signature" if experiment.points[0].metric == "bleu" else "text_normaliser"
        facts[kind.replace("_", " ")] = distinct(kind, 80, points)
    for name, measurement in sorted(experiment.measurements.items()):
        facts[f"distances, {name}"] = (
            f"{measurement.count} utterances of {measurement.manifest or 'a text file'}, last token: "
            f"{measurement.last_token}, decoder {measurement.record.get('decoder_hub', 'unknown')}"
        )
    return facts


def _versions(folder: Path) -> str:
    file = folder / "train" / "env.log"
    if not file.is_file():
        return "not stated"
    return ", ".join(file.read_text(encoding="utf-8", errors="replace").splitlines())
