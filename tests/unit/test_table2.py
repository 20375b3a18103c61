"""Table 2 from made-up results: which path chose which block, and what is said where there is one run only."""

import csv
import json
import re

import pytest

from speechllm_prune.reporting.build import build_report
from tests.unit import fake_results as fake

SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CORPUS = "covost2_en_de_standard"
TEST = (CORPUS, "test")


def write_bleu(seed_folder, variant, value, **changes):
    """A translation point; without hyps.jsonl there is no interval, and the table needs none."""
    record = {"task": "ast", "metric": "bleu", "value": value, "signature": SIGNATURE}
    folder = fake.write_point(seed_folder, variant, *TEST, [1] * 20, **record | changes)
    (folder / "hyps.jsonl").unlink()


def write_path(seed_folder, starts):
    """A measurement whose path has these start layers for n = 1, 2, .. (of 12 layers)."""
    matrix = fake.distance_matrix(12)
    for n, start in starts.items():
        matrix[n - 1, start] = 0.001
    fake.write_measurement(seed_folder, "speech", matrix)
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    assert all(path[str(n)] == start for n, start in starts.items())


@pytest.fixture
def folders(tmp_path):
    """ASR and En-De with equal blocks at n = 2 and unequal ones at n = 4 and 6 (6: not run on the ASR path)."""
    asr = tmp_path / "results" / "asr" / "1"
    fake.write_point(asr, "full", "librispeech", "test-clean", [1] * 20)
    write_path(asr, {2: 9, 4: 5, 6: 2})
    ast = tmp_path / "results" / "ende" / "1"
    write_path(ast, {2: 9, 4: 7, 6: 4})
    write_bleu(ast, "full", 80.0)
    for variant, value in (("l09n02", 76.0), ("l07n04", 72.0), ("l05n04", 40.0), ("l04n06", 30.0)):
        write_bleu(ast, f"{variant}-joint", value)
        write_bleu(ast, f"{variant}-none", 1.0)
    return ast, asr


def table_rows(folder):
    """The cells of table2.md below the head."""
    lines = (folder / "table2.md").read_text().splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
    return rows[0], rows[2:]


def test_same_block_is_said_and_not_repeated_as_a_score(folders):
    report = build_report(folders)
    columns, rows = table_rows(report.folder)
    assert columns == [
        *("direction", "protocol", "n", "% drop", "own path", "BLEU, own path", "ASR path"),
        *("BLEU, ASR path", "utterances", "signature"),
    ]
    by_n = {row[2]: row for row in rows}
    assert list(by_n) == ["0", "2", "4", "6"]
    assert all(row[:2] == ["En-De", "standard"] for row in rows)
    assert all(row[-2:] == ["20", SIGNATURE] for row in rows)
    assert by_n["0"][3:8] == ["–", "–", "80.00", "–", "–"]
    layers = "n=2: layers 9-10"
    assert by_n["2"][3:8] == ["16.7", layers, "76.00 (+5.0 %)", layers, "same block"]
    assert by_n["4"][4:8] == [
        *("n=4: layers 7-10", "72.00 (+10.0 %)", "n=4: layers 5-8", "40.00 (+50.0 %)"),
    ]
    assert by_n["6"][7] == "not measured"
    assert report.table1.count("same block") >= 1, "the verb prints the table"
    assert 'id="table2"' in report.page.read_text()


def test_records_have_one_score_where_there_is_one_run(folders):
    report = build_report(folders)
    rows = list(csv.DictReader((report.folder / "table2.csv").open()))
    by_n = {int(row["block_size"]): row for row in rows}
    assert by_n[2]["same_block"] == "True" and by_n[2]["asr_bleu"] == ""
    assert by_n[4]["same_block"] == "False" and float(by_n[4]["asr_bleu"]) == 40.0
    assert by_n[4]["asr_path_of"] == "asr" and by_n[6]["asr_bleu"] == ""


def test_the_remark_counts_equal_blocks_over_the_whole_path(folders):
    ast, asr = folders
    paths = [json.loads((f / "measure/speech/path.json").read_text())["path"] for f in (ast, asr)]
    equal = sum(paths[0][n] == paths[1][n] for n in paths[0])
    assert 0 < equal < 11
    report = build_report(folders)
    assert f"of all 11 block sizes, both paths choose the same block at {equal}." in report.table1


def test_without_an_asr_experiment_nothing_is_compared(folders):
    report = build_report(folders[:1])
    _, rows = table_rows(report.folder)
    assert {row[7] for row in rows[1:]} == {"no ASR path"}
    assert "no ASR path, since no ASR experiment" in report.table1


def test_the_asr_experiment_is_found_through_the_plans(folders):
    ast, asr = folders
    plan = {"start_layer": 5, "block_size": 4, "path_sources": [f"{asr}/measure/speech/path.json"]}
    fake.write(ast / "prune" / "l05n04" / "plan.json", fake.COMMON | plan)
    _, rows = table_rows(build_report([ast]).folder)
    assert [row[7] for row in rows] == ["–", "same block", "40.00 (+50.0 %)", "not measured"]


def test_an_asr_path_of_another_decoder_is_not_used(folders):
    ast, asr = folders
    file = asr / "measure/speech/path.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder_hub": "another"}))
    _, rows = table_rows(build_report(folders).folder)
    assert {row[7] for row in rows[1:]} == {"no ASR path"}


def test_protocol_of_the_record_wins_over_the_name(folders):
    ast, _ = folders
    write_bleu(ast, "full", 80.0, protocol="speechbrain")
    _, rows = table_rows(build_report(folders).folder)
    assert rows[0][1] == "speechbrain"


def test_a_report_of_asr_alone_has_no_table2(tmp_path):
    seed_folder = fake.write_experiment(tmp_path / "results" / "demo" / "1", (2, 4), 40)
    report = build_report([seed_folder])
    assert not (report.folder / "table2.md").exists()
    assert "Table 2" not in report.table1
