"""The report as a whole: the verb, its files, the page and the figures. All scores and distances are made up."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import html.parser
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from speechllm_prune.evaluation.statistics import Interval, largest_blocks, verdict
from speechllm_prune.reporting import curves, figures
from speechllm_prune.reporting.analysis import Result, analyse, choose_blocks
from speechllm_prune.reporting.build import Report, build_report
from speechllm_prune.reporting.collect import Measurement, collect
from speechllm_prune.reporting.page import TEMPLATE, fill
from speechllm_prune.reporting.table1 import joint_verdict
from speechllm_prune.reporting.widgets import alignment, heatmaps
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


# ------------------------------------------------------------------------------------ what answers the reader
def rows_of(text: str, table_id: str) -> list[list[str]]:
    """Cells of a table's body."""
    body = re.search(rf'<table id="{table_id}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert body is not None
    return [
        [
            html.unescape(re.sub(r"<[^>]+>", "", cell))
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row)
        ]
        for row in re.findall(r"<tr>.*?</tr>", body[1])
    ]


def random_block(generator: random.Random, n: int, sets: list[str]) -> dict:
    """A tested block size with changes on and around tolerances, and sets that are missing."""
    change, interval = {}, {}
    for name in sets:
        value = generator.choice([generator.uniform(-0.5, 1.5), 0.25, 0.25 + 1e-12, 0.1, None])
        ends = sorted(generator.choice([generator.uniform(-0.5, 1.5), 0.25]) for _ in range(2))
        change[name] = value
        interval[name] = generator.choice([ends, ends, None])
    return {"n": n, "change": change, "interval": interval}


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine (node) to run")
def test_the_page_chooses_as_python_does():
    generator = random.Random(0)
    cases = []
    for _ in range(300):
        sets = ["clean", "other", "dev"][: generator.randint(0, 3)]
        sizes = generator.sample(range(1, 20), generator.randint(0, 6))
        blocks = [random_block(generator, n, sets) for n in sizes]
        tolerance = generator.choice([0.0, 0.1, 0.25, 0.5, generator.random()])
        cases.append({"blocks": blocks, "tolerance": tolerance, "sets": sets})
    rules = re.search(r'<script id="rules">(.*?)</script>', TEMPLATE.read_text(), re.DOTALL)
    assert rules is not None
    program = (
        rules[1]
        + """
      const told = JSON.parse(require("fs").readFileSync(0)).map(({ blocks, tolerance, sets }) => [
        largestBlocks(blocks, tolerance, sets), blocks.map((one) => jointVerdict(one, tolerance, sets))]);
      console.log(JSON.stringify(told));
    """
    )
    done = subprocess.run(
        ["node", "-e", program], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    outcomes = set()
    for case, (chosen, verdicts) in zip(cases, json.loads(done.stdout), strict=True):
        blocks, tolerance, sets = case["blocks"], case["tolerance"], case["sets"]
        expected = largest_blocks({b["n"]: b["change"] for b in blocks}, tolerance, sets)
        assert (chosen["largest"], chosen["safe"]) == expected, case
        outcomes.add((expected[0] is None, expected[0] == expected[1]))
        for block, found in zip(blocks, verdicts, strict=True):
            one = [
                verdict(Interval(*ends) if (ends := block["interval"][name]) else None, tolerance)
                for name in sets
            ]
            results = [Result(None, verdict=word) for word in one]  # type: ignore[arg-type]
            assert found == joint_verdict(results), (block, tolerance)
    assert len(outcomes) == 3  # none, both alike, safe smaller: the cases are not all of one kind


def test_the_slider_begins_with_what_table_1_says(built, complete):
    text = built.page.read_text()
    experiment = collect(complete)
    choice = choose_blocks(experiment, analyse(experiment), 0.25)
    rows = rows_of(text, "chooser-0-chosen")
    assert [row[0] for row in rows[:2]] == ["joint healing"] * 2 and len(rows) == 8
    assert [row[2] for row in rows[:2]] == [str(choice.largest), str(choice.safe)]
    (pruned,) = (row for row in rows_of(text, "table1-0") if row[0] == "+ Pruning")
    assert all(cell in rows[0] for cell in pruned[3:6])  # the scores
    data = json.loads(html.unescape(re.search(r'data-chooser="([^"]*)"', text)[1]))
    assert data["sets"] == experiment.eval_sets
    joint = {block["n"]: block["change"] for block in data["modes"][0]["tested"]}
    assert joint == {
        n: {name: found[name].degradation for name in found} for n, found in choice.tested.items()
    }


def test_heatmap_has_a_cell_per_block_and_the_path():
    matrix = fake.distance_matrix(5)
    matrix[1, 1] = np.nan
    measurement = measurement_of(matrix)
    text = heatmaps([measurement], ["speech <input>"])
    assert text.count("<rect x=") == 14 and "speech &lt;input&gt;" in text
    data = json.loads(html.unescape(re.search(r'data-map="([^"]*)"', text)[1]))
    assert [len(row) for row in data["values"]] == [5, 4, 3, 2, 1]
    assert data["values"][1][1] is None
    assert data["values"][2][1] == round(matrix[2, 1], 4)
    assert data["path"] == {str(n): l for n, l in measurement.path.items()}


def measurement_of(matrix: np.ndarray) -> Measurement:
    """A measurement as read from files."""
    path = {n: int(np.nanargmin(matrix[n - 1, : len(matrix) - n])) for n in range(1, len(matrix))}
    margin = dict.fromkeys(path, 0.5)
    return Measurement(
        "speech", matrix, 40, len(matrix), "sequence", "", path, margin, "", Path("unused"), {}
    )


def test_alignment_marks_errors_by_letter_and_says_both_sides():
    text = alignment(
        [
            ("equal", ["a"], ["a"]),
            ("substitute", ["b", "<i>"], ["c", "d"]),
            ("delete", ["e"], []),
            ("insert", [], ["f"]),
        ]
    )
    assert re.findall(r'class="w (\w*)"', text) == ["head", "", "S", "S", "D", "I"]
    assert re.findall(r"<u>(.*?)</u>", text) == ["", "", "S", "S", "D", "I"]
    assert "Reference: a b &lt;i&gt; e. Hypothesis: a c d f." in text
    long = alignment([("equal", ["a"] * 70, ["a"] * 70)])
    assert long.count('class="w ') == 61 and "and 10 more words" in long


def test_no_script_but_the_templates_own_may_run(built):
    text = built.page.read_text()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert len(scripts) == 2 and policy.startswith("default-src 'none';")
    allowed = re.search(r"script-src (.*)", policy)[1]
    assert allowed.split() == [f"'sha256-{digest}'" for digest in digests]
    assert not re.search(
        r"<[^>]*\son\w+=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    )


def test_transcripts_are_text(tiny):
    evil = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)>'
    for file in tiny.glob("eval/*/*/hyps.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        worst = max(rows, key=lambda row: row["substitutions"])
        worst["hyp"], worst["id"] = worst["hyp"].replace("x", "<script>", 1), f"{worst['id']}{evil}"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = build_report([tiny]).page.read_text()
    assert Page(text).open == []
    assert html.escape(evil) in text  # as the id of a worst utterance
    assert evil not in text and "<img" not in text


def test_page_says_what_pruning_forgets_and_where_its_numbers_come_from(built, complete):
    text = built.page.read_text()
    assert 'id="forgetting"' in text and 'id="worst"' in text
    table = rows_of(text, "forgotten-0")
    assert table[0][0] == "WER %, all" and len(table[0]) == 2 + 1 + 4
    with open(complete / "report" / "forgetting.csv", newline="") as stream:
        records = list(csv.DictReader(stream))
    assert {row["note"] for row in records} == {fake.NOTE}
    assert {row["heal_mode"] for row in records} == {"none", "decoder", "projector", "joint"}
    assert "Not said: words by their frequency" in text  # no training manifest here
    footer = text[text.index('id="provenance"') :]
    for fact in ("c" * 12, "0" * 40, "librispeech/test-clean dddddddddddd", fake.NOTE, "made-up"):
        assert fact in footer, fact
    assert len(text) < 2_000_000


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
    axis = curves.pruning_curve([data], results, OTHER, 0.25).axes[0]
    drawn = {container.get_label(): container for container in axis.containers}
    modes = {"no healing", "decoder healing", "projector healing", "joint healing"}
    modes |= {"joint healing, text-derived path", "unpruned"}
    assert set(drawn) == modes | {"control, joint healing (n=8)"}
    expected = [
        r.point.value
        for r in results[str(data.folder)]
        if r.point.eval_set == OTHER and r.point.is_pruned and r.point.heal_mode == "joint"
    ]
    assert drawn["joint healing"].lines[0].get_ydata().tolist() == expected
    assert "shuffled" not in " ".join(drawn)


def test_no_training_log_no_training_curve(tiny):
    assert figures.training_curve(collect(tiny)) is None
