"""The report as a whole: the verb, its files, the page and the figures. All scores and distances are made up."""

from __future__ import annotations

import csv
import html.parser
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from speechllm_prune.reporting import figures
from speechllm_prune.reporting.analysis import analyse
from speechllm_prune.reporting.build import Report, build_report
from speechllm_prune.reporting.collect import collect
from speechllm_prune.reporting.page import fill
from tests.unit import fake_results as fake

CLEAN, OTHER, DEV = "librispeech-test-clean", "librispeech-test-other", "loquacious-dev"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete experiment. Read only."""
    return fake.write_experiment(tmp_path_factory.mktemp("complete") / "results" / "demo" / "1")


@pytest.fixture(scope="module")
def built(complete: Path) -> Report:
    """The report of the complete experiment. Read only."""
    return build_report([complete])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """One evaluation set, no training log, of the test's own: few figures to draw."""
    seed_folder = tmp_path / "results" / "tiny" / "1"
    fake.write_experiment(seed_folder, (2, 4), num_utterances=20, sets=fake.SETS[:1])
    (seed_folder / "train" / "train_log.txt").unlink()
    return seed_folder


# ---------------------------------------------------------------------------------------------- the verb
class Page(html.parser.HTMLParser):
    """Collects what a test needs of a page: ids, links and what would be fetched; and that tags nest."""

    VOID = {"meta", "input", "br", "img", "link", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "a":
            self.links.append(values["href"] or "")
        elif tag in ("img", "script", "link", "image", "iframe"):
            self.fetched += [values[k] or "" for k in ("src", "href", "xlink:href") if k in values]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def test_report_writes_everything(built, complete):
    folder = complete / "report"
    assert built.folder == folder
    assert built.table1 == (folder / "table1.md").read_text()
    assert "| + Pruning | 66.7 |" in built.table1
    names = {path.name for path in folder.iterdir()}
    expected = {"table1.md", "table1.csv", "points.md", "points.csv", "matrices.md", "report.html"}
    expected |= {"heatmap_speech_text.png", "heatmap_speech_text.svg", "training_curve.png"}
    expected |= {f"pruning_curve_{n}.{s}" for n in (CLEAN, OTHER, DEV) for s in ("png", "svg")}
    assert expected <= names
    for name in ("table1.md", "points.md", "matrices.md", "report.html"):
        assert fake.NOTE in (folder / name).read_text(), name
    for name in ("table1.csv", "points.csv"):
        with open(folder / name, newline="") as stream:
            assert {row["note"] for row in csv.DictReader(stream)} == {fake.NOTE}
    assert all((folder / name).stat().st_size > 5000 for name in names if name.endswith(".png"))


def test_page_is_self_contained_and_its_links_lead_somewhere(built):
    made = built
    text = made.page.read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(url.startswith("data:") for url in page.fetched)
    assert "@import" not in text and "url(http" not in text
    local = [link for link in page.links if not link.startswith("#")]
    assert len(local) > 2 * 55
    assert all((made.folder / link).is_file() for link in local)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    for section in ("table-1", "curves", "heatmaps", "text-and-speech", "sanity", "points"):
        assert f'id="{section}"' in text
    assert 'id="incomplete"' not in text  # nothing is
    assert figures.INK not in text and figures.GROUND not in text  # figures take the page's colours
    assert "another utterance" in text and "config hash" in text


def test_reports_of_equal_files_are_equal(tiny):
    def everything() -> dict[str, bytes]:
        folder = build_report([tiny]).folder
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert everything() == everything()


def test_what_a_folder_says_cannot_break_the_page(tmp_path):
    seed_folder = tmp_path / "results" / "a<b>&c" / "1"
    evil = '<script>alert("x")</script>'
    fake.write_point(seed_folder, "full", "librispeech", "test-clean", [1, 0, 2], note=evil)
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(4), decoder_hub=evil)
    text = build_report([seed_folder]).page.read_text()
    assert evil not in text and "&lt;script&gt;" in text
    assert Page(text).open == []


def test_several_experiments_share_a_folder_and_are_compared(tiny):
    fake.write_experiment(tiny.parent / "2", (2, 4), num_utterances=20, sets=fake.SETS[:1])
    made = build_report([tiny.parent], compare=True)
    assert made.folder == (tiny.parent.parent / "report").resolve()
    text = (made.folder / "compared.md").read_text()
    assert "tiny (seed 2)" in text
    with open(made.folder / "compared.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1 + 2 * 4 + 1
    assert {float(row["difference"]) for row in rows} == {0.0}  # equal made-up scores


def test_a_measured_only_experiment_does_not_move_the_report(tiny, capsys):
    random = fake.write_random_decoder(tiny.parent.parent / "tiny_random" / "1")
    assert report.main([str(random), str(tiny.parent)]) == 0  # in whatever order
    folder = tiny / "report"
    printed = capsys.readouterr().out
    assert "| + Pruning |" in printed and printed.rstrip().endswith(str(folder / "report.html"))
    assert (folder / "heatmap_tiny_random_1_speech_text.png").is_file()
    assert "random weights" in (folder / "report.html").read_text()
    assert not (tiny.parent.parent / "report").exists()


def test_a_measured_only_experiment_alone_has_a_report(tmp_path):
    random = fake.write_random_decoder(tmp_path / "results" / "demo_random" / "1")
    made = build_report([random])
    assert made.folder == random / "report"
    assert made.table1 == ""
    assert not (made.folder / "table1.md").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no experiment folder given"),
        (["--json"], "--json goes with --paper"),
        (["nowhere"], "python train.py"),
        (["EMPTY"], "holds no experiment"),
        (["STARTED"], "python evaluate.py"),
        (["TINY", "--tolerance", "-1"], "--tolerance"),
        (["TINY", "--tolerance", "nan"], "--tolerance"),
        (["TINY", "--compare"], "at least two"),
        (["TINY", "--paper"], "takes no experiment folder"),
    ],
)
def test_mistakes_are_told_in_one_message(tiny, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "started" / "train").mkdir(parents=True)
    places = {"EMPTY": tmp_path / "empty", "STARTED": tmp_path / "started", "TINY": tiny}
    assert report.main([str(places.get(a, a)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error


def test_a_report_never_imports_torch(tiny, repo_root):
    code = (
        "import sys, report; code = report.main([sys.argv[1]]); "
        "heavy = {'torch', 'transformers', 'speechbrain'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- tables and figures
def test_template_and_values_must_match():
    with pytest.raises(KeyError):
        fill("{{ missing }}", {})
    with pytest.raises(ValueError, match="extra"):
        fill("text", {"extra": "1"})


def test_heatmap_draws_the_path_where_the_matrix_has_it(complete):
    measurement = collect(complete).measurements["speech"]
    figure = figures.heatmap_figure([figures.panel_of(measurement)])
    axis = figure.axes[0]
    path = axis.lines[-1]
    assert dict(zip(path.get_ydata(), path.get_xdata(), strict=True)) == measurement.path
    image = axis.images[0]
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower" and (left, right, bottom, top) == (-0.5, 11.5, 0.5, 12.5)
    # The cell under (l, n) is row n - 1, column l.
    assert np.array_equal(image.get_array().filled(np.nan), measurement.matrix, equal_nan=True)


def test_two_panels_share_one_scale(complete):
    panels = [figures.panel_of(m) for m in collect(complete).measurements.values()]
    limits = {axis.images[0].get_clim() for axis in figures.heatmap_figure(panels).axes[:2]}
    values = np.concatenate([panel.matrix.ravel() for panel in panels])
    assert limits == {(np.nanmin(values), np.nanmax(values))}


def test_pruning_curve_has_a_line_per_heal_mode_with_its_scores(complete):
    data = collect(complete)
    results = {str(data.folder): analyse(data)}
    axis = figures.pruning_curve([data], results, OTHER, 0.25).axes[0]
    drawn = {container.get_label(): container for container in axis.containers}
    modes = {"no healing", "decoder healing", "projector healing", "joint healing"}
    assert set(drawn) == modes | {"unpruned", "control: nothing removed, joint healing as for n=8"}
    expected = [
        r.point.value
        for r in results[str(data.folder)]
        if r.point.eval_set == OTHER and r.point.is_pruned and r.point.heal_mode == "joint"
    ]
    assert drawn["joint healing"].lines[0].get_ydata().tolist() == expected
    assert "shuffled" not in " ".join(drawn)


def test_no_training_log_no_training_curve(tiny):
    assert figures.training_curve(collect(tiny)) is None
