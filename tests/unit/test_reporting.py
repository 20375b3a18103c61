"""Reports from experiment folders written by the published schemas. All scores and distances here are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import report
from speechllm_prune.hparams import identity, resolve_hparams
from speechllm_prune.reporting.analysis import (
    analyse,
    check_comparable,
    choose_blocks,
)
from speechllm_prune.reporting.build import build_report
from speechllm_prune.reporting.collect import collect, read_train_log
from speechllm_prune.reporting.compare import points_of_equal_depth
from speechllm_prune.reporting.find import find_experiments
from speechllm_prune.reporting.measured import compare_all_measurements, compare_measurements
from speechllm_prune.reporting.table1 import table1
from speechllm_prune.reporting.tables import points_table, to_html, to_markdown
from speechllm_prune.runtime import UserError
from tests.unit import fake_results as fake

CLEAN, OTHER, DEV = "librispeech-test-clean", "librispeech-test-other", "loquacious-dev"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete experiment. Read only."""
    return fake.write_experiment(tmp_path_factory.mktemp("complete") / "results" / "demo" / "1")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small experiment of the test's own."""
    return fake.write_experiment(tmp_path / "results" / "small" / "1", (2, 4), num_utterances=40)


def set_scores(seed_folder: Path, block: str, errors: dict[str, int], mode: str = "joint") -> None:
    """Rewrite one block's points: total errors of 100 utterances (1,000 words) per split."""
    for corpus, split in fake.SETS:
        total = errors[split]
        counts = [total // 100 + (index < total % 100) for index in range(100)]
        fake.write_point(seed_folder, f"{block}-{mode}", corpus, split, counts)


@pytest.fixture
def graded(tmp_path: Path) -> Path:
    """Three sets with 100 errors in 1,000 words unpruned, and a path of blocks; the points are the test's."""
    seed_folder = tmp_path / "results" / "graded" / "1"
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(12))
    for corpus, split in fake.SETS:
        fake.write_point(seed_folder, "full", corpus, split, [1] * 100)
    return seed_folder


def block_on_path(seed_folder: Path, n: int) -> str:
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    return f"l{path[str(n)]:02d}n{n:02d}"


def judged_table(seed_folder: Path, tolerance: float | None = None):
    data = collect(seed_folder)
    results = {str(data.folder): analyse(data, tolerance)}
    return data, table1([data], results, "asr", tolerance), results


# ----------------------------------------------------------------------------------------------- reading
def test_everything_of_a_complete_folder_is_read(complete):
    data = collect(complete)
    assert len(data.points) == 3 * (1 + 4 * 4 + 1) + 1
    assert data.eval_sets == [CLEAN, OTHER, DEV]
    assert set(data.measurements) == {"speech", "text"}
    assert data.incomplete == []
    assert data.trained
    assert not data.is_random_decoder
    control = next(p for p in data.points if p.control)
    assert (control.block_size, control.drop_percent, control.is_pruned) == (8, 0.0, False)
    deepest = next(p for p in data.points if p.variant.endswith("n08-joint") and not p.control)
    assert deepest.drop_percent == pytest.approx(100 * 8 / 12)


def test_train_log_lines_are_parsed(tmp_path):
    path = tmp_path / "train_log.txt"
    path.write_text(
        "step: 50, lr: 1.00e-03 - train loss: 1.23 - valid loss: 9.00e-01, valid wer: 4.20\n"
        "Epoch loaded: 2 - test WER: nan text: /a/b:c\n\n"
    )
    first, second = read_train_log(path)
    assert first == {
        "step": 50,
        "lr": 1e-3,
        "train loss": 1.23,
        "valid loss": 0.9,
        "valid wer": 4.2,
    }
    assert second["Epoch loaded"] == 2
    assert read_train_log(tmp_path / "none.txt") == []


def test_half_written_and_missing_files_are_listed_and_the_rest_is_reported(small, capsys):
    block = block_on_path(small, 4)
    (small / "eval" / f"{block}-joint" / CLEAN / "metrics.json").write_text('{"schema": 1, "val')
    (small / "eval" / f"{block}-none" / DEV / "metrics.json").unlink()
    (small / "heal" / f"{block}-joint").mkdir(parents=True)
    (small / "measure" / "text" / "distances.safetensors").write_bytes(b"half")
    fake.write(small / "prune" / block / "plan.json", {"schema": 1})
    data = collect(small)
    text = "\n".join(data.incomplete)
    assert f"eval/{block}-joint/{CLEAN}" in text and "not valid JSON" in text
    assert f"eval/{block}-none/{DEV}" in text and "does not exist" in text
    assert f"heal/{block}-joint: not finished" in text
    assert "measure/text" in text and "measure.py" in text
    assert f"prune/{block}: no 'start_layer' in it" in text
    # n = 4 lacks a set, so it is tested but cannot be accepted.
    choice = choose_blocks(data, analyse(data), 1e9)
    assert (list(choice.tested), choice.largest) == ([2, 4], 2)
    assert report.main([str(small)]) == 0
    assert "incomplete: small (seed 1): heal/" in capsys.readouterr().err
    page = (small / "report" / "report.html").read_text()
    assert 'id="incomplete"' in page and f"heal/{block}-joint: not finished" in page


def test_metrics_that_contradict_their_folder_are_listed(small):
    block = block_on_path(small, 2)
    path = small / "eval" / f"{block}-joint" / CLEAN / "metrics.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"start_layer": 0}))
    assert "metrics.json says start layer 0" in "\n".join(collect(small).incomplete)
    path.write_text(json.dumps(record | {"variant": "full"}))
    assert "metrics.json is of variant full" in "\n".join(collect(small).incomplete)
    path.write_text(json.dumps(record | {"value": None}))
    assert "no value" in "\n".join(collect(small).incomplete)


def test_a_score_that_its_utterances_do_not_give_has_no_interval(small):
    path = small / "eval" / "full" / CLEAN / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"value": 77.0}))
    full = next(r for r in analyse(collect(small)) if r.point.is_full and r.point.eval_set == CLEAN)
    assert full.interval is None
    assert "metrics.json 77.000" in full.remark


def test_all_seeds_below_a_name_are_found_but_no_debug_run(tmp_path):
    for seed in ("1", "2", "2-debug", "report"):
        (tmp_path / "demo" / seed / "eval").mkdir(parents=True)
    found = find_experiments([tmp_path / "demo", tmp_path / "demo" / "2"])
    assert [folder.name for folder in found] == ["1", "2"]
    assert [f.name for f in find_experiments([tmp_path / "demo" / "2-debug"])] == ["2-debug"]


# --------------------------------------------------------------------------------------------- Table 1
def test_paper_rule_takes_the_largest_passing_block_and_safe_the_unbroken_one(graded):
    blocks = {n: block_on_path(graded, n) for n in (2, 4, 6, 8)}
    same = {"test-clean": 100, "test-other": 100, "dev": 100}
    set_scores(graded, blocks[2], same)
    set_scores(graded, blocks[4], same | {"dev": 126})  # one set is enough to fail
    set_scores(graded, blocks[6], same | {"dev": 125})  # on the bound: accepted
    set_scores(graded, blocks[8], same | {"test-other": 126})
    data, table, _ = judged_table(graded)
    rows = {row[0]: row for row in table.rows}
    assert rows["+ Pruning"][1:3] == ["50.0", "n=6: layers 4-9"]
    assert rows["+ Pruning"][5] == "12.50 (+25.0 %)"
    assert rows["+ Pruning, safe"][1:3] == ["16.7", "n=2: layers 9-10"]
    largest = [record for record in table.records if record["row"] == "largest"]
    assert {record["eval_set"] for record in largest} == {CLEAN, OTHER, DEV}
    assert {(r["largest_n"], r["safe_n"], r["tested_n"]) for r in largest} == {(6, 2, "2 4 6 8")}
    assert data.label == "graded (seed 1)"


def test_a_tolerance_of_the_command_line_moves_the_choice(graded):
    same = {"test-clean": 100, "test-other": 100, "dev": 100}
    set_scores(graded, block_on_path(graded, 2), same | {"dev": 104})
    set_scores(graded, block_on_path(graded, 4), same | {"dev": 120})
    assert judged_table(graded, 0.05)[1].rows[1][2].startswith("n=2")
    assert judged_table(graded, 0.25)[1].rows[1][2].startswith("n=4")
    assert judged_table(graded, 0.01)[1].rows[1][1] == "none within tolerance"


def test_only_blocks_on_the_own_path_and_the_asked_healing_count(graded):
    same = {"test-clean": 100, "test-other": 100, "dev": 100}
    set_scores(graded, "l00n04", same)  # another path's block
    set_scores(graded, block_on_path(graded, 4), same, mode="none")
    set_scores(graded, f"{block_on_path(graded, 2)}", same, mode="joint+kl")
    table = judged_table(graded)[1]
    assert table.rows[1][:2] == ["+ Pruning", "not tested"]
    plan = {"start_layer": 0, "block_size": 4, "path_sources": ["own"]}
    fake.write(graded / "prune" / "l00n04" / "plan.json", plan)
    assert judged_table(graded)[1].rows[1][2] == "n=4: layers 0-3"


def test_a_set_without_the_unpruned_model_reads_not_measured(graded):
    block = block_on_path(graded, 2)
    set_scores(graded, block, {"test-clean": 100, "test-other": 100, "dev": 100})
    (graded / "eval" / f"{block}-joint" / DEV / "metrics.json").unlink()
    data, table, _ = judged_table(graded)
    assert table.rows[1][1] == "none within tolerance"  # not accepted without all sets
    for folder in (graded / "eval" / "full").iterdir():
        (folder / "metrics.json").unlink()
    table = judged_table(graded)[1]
    assert table.rows[0][3:5] == ["not measured", "not measured"]
    assert any("unpruned model was not evaluated" in remark for remark in table.remarks)


def test_the_control_stands_beside_and_is_never_chosen(complete):
    table = judged_table(complete)[1]
    control = next(row for row in table.rows if row[0].startswith("control"))
    assert control[1:3] == ["–", "–"]
    assert {r["drop_percent"] for r in table.records if r["row"] == "control"} == {0.0}


def test_bleu_is_judged_downwards_with_its_own_tolerance(tmp_path):
    seed_folder = tmp_path / "results" / "ast" / "1"
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(12))
    refs = [f"the dog number {index} runs over the green hill today" for index in range(30)]
    block = block_on_path(seed_folder, 2)
    for variant, changed in (("full", 0), (f"{block}-joint", 4)):
        hyps = [ref.replace("green", "red") if i < changed else ref for i, ref in enumerate(refs)]
        from sacrebleu.metrics import BLEU

        bleu = BLEU()
        value = bleu.corpus_score(hyps, [refs]).score
        folder = fake.write_point(
            seed_folder,
            variant,
            "covost2_en_de_standard",
            "test",
            [0] * 30,
            task="ast",
            metric="bleu",
            value=value,
            signature=str(bleu.get_signature()),
        )
        rows = [
            {"id": str(i), "ref": r, "hyp": h}
            for i, (r, h) in enumerate(zip(refs, hyps, strict=True))
        ]
        (folder / "hyps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = collect(seed_folder)
    results = analyse(data)
    pruned = next(result for result in results if result.point.is_pruned)
    assert 0 < pruned.degradation < 0.10
    assert pruned.degradation_interval.low <= pruned.degradation <= pruned.degradation_interval.high
    assert pruned.interval.high <= 100.0
    table = table1([data], {str(data.folder): results}, "ast")
    assert table.title.startswith("Table 1: BLEU") and table.rows[1][2].startswith("n=2")
    made = build_report([seed_folder])
    assert (made.folder / "pruning_curve_covost2_en_de_standard-test.png").is_file()


def test_points_table_pairs_healed_with_unhealed(complete):
    data = collect(complete)
    table, ordered = points_table([data], {str(data.folder): analyse(data)})
    assert len(table.rows) == len(data.points) == len(ordered)
    found = {(r["variant"], r["eval_set"]): r for r in table.records}
    block = block_on_path(complete, 8)
    joint, none = found[f"{block}-joint", OTHER], found[f"{block}-none", OTHER]
    assert joint["minus_unhealed"] == pytest.approx(joint["value"] - none["value"])
    assert (
        joint["minus_unhealed_high"] < 0
    )  # the made-up joint errors are a subset of those of none
    assert none["minus_unhealed"] is None
    assert none["verdict"] == "exceeds"
    assert found["full", OTHER]["relative_degradation"] is None


def set_dev(seed_folder: Path, variant: str, total: int) -> None:
    counts = [total // 100 + (index < total % 100) for index in range(100)]
    fake.write_point(seed_folder, variant, "librispeech", "dev-clean", counts)


def test_n_by_dev_only_is_chosen_there_and_shown_on_the_evaluation_sets(graded):
    fake.write_settings(graded)
    blocks = {n: block_on_path(graded, n) for n in (2, 4, 6)}
    same = {"test-clean": 100, "test-other": 100, "dev": 100}
    for n, on_test in ((2, 100), (4, 190), (6, 100)):
        set_scores(graded, blocks[n], same | {"test-clean": on_test})
    data, table, _ = judged_table(graded)
    assert table.rows[1][0] == "+ Pruning"
    assert table.rows[1][-4:] == ["6", "2", "not measured", "2 4 6"]
    assert "--eval_manifests librispeech/dev-clean" in " ".join(table.remarks)
    assert {row["dev_n"] for row in table.records} == {"not measured"}
    set_dev(graded, "full", 100)
    for n, on_dev in ((2, 100), (4, 100), (6, 130)):
        set_dev(graded, f"{blocks[n]}-joint", on_dev)
    data, table, _ = judged_table(graded)
    assert data.dev_set == "librispeech-dev-clean" and data.dev_set not in data.eval_sets
    assert "librispeech-dev-clean WER %" not in table.columns
    assert table.rows[1][-4:] == ["6", "2", "4", "2 4 6"]
    rows = {row[0]: row for row in table.rows}
    assert rows["+ Pruning, n by dev"][2].startswith("n=4")
    assert rows["+ Pruning, n by dev"][3] == "19.00 (+90.0 %)"
    assert rows["+ Pruning, n by dev"][6] == "exceeds"
    # Other variants need not be decoded on dev.
    assert not [line for line in data.incomplete if line.startswith("eval/")]


def test_a_dev_set_that_is_an_evaluation_set_too_stays_one(graded):
    fake.write_settings(graded, valid_manifest="loquacious/dev")
    data = collect(graded)
    assert data.dev_set == "" and DEV in data.eval_sets
    set_scores(graded, block_on_path(graded, 2), {"test-clean": 100, "test-other": 100, "dev": 100})
    assert judged_table(graded)[1].rows[1][-2] == "not measured"


def test_sets_stand_in_the_order_of_the_experiment(graded):
    order = ["loquacious/dev", "librispeech/test-other", "librispeech/test-clean"]
    fake.write_settings(graded, eval_manifests=order)
    data, table, results = judged_table(graded)
    assert data.eval_sets == [DEV, OTHER, CLEAN]
    assert [name.removesuffix(" WER %") for name in table.columns[3:6]] == data.eval_sets
    listed = [result.point.eval_set for result in results[str(data.folder)]]
    assert list(dict.fromkeys(listed)) == data.eval_sets
    fake.write_settings(graded, eval_manifests=["librispeech/test-other"])
    assert collect(graded).eval_sets == [OTHER, CLEAN, DEV]  # those it does not name stand behind


def test_the_tolerance_of_the_yaml_counts_unless_one_is_given(graded):
    same = {"test-clean": 100, "test-other": 100, "dev": 100}
    set_scores(graded, block_on_path(graded, 2), same | {"dev": 104})
    set_scores(graded, block_on_path(graded, 4), same | {"dev": 120})
    assert judged_table(graded)[1].rows[1][2].startswith("n=4")  # no archive: the task's 0.25
    fake.write_settings(graded, tolerance=0.05)
    table = judged_table(graded)[1]
    assert table.rows[1][2].startswith("n=2") and "at most 0.05 on all" in " ".join(table.remarks)
    assert {row["tolerance"] for row in table.records} == {0.05}
    data = collect(graded)
    at = {r.point.block_size: r.verdict for r in analyse(data) if r.point.eval_set == DEV}
    assert at[4] == "exceeds"
    assert judged_table(graded, 0.25)[1].rows[1][2].startswith("n=4")


@pytest.mark.parametrize(
    ("leaf", "overrides", "expected"),
    [
        ("task: ast", {}, 0.1),
        ("task: asr", {}, 0.25),
        ("task: asr", {"task": "ast"}, 0.1),
        ("task: ast\ntolerance: 0.2", {}, 0.2),
        ("task: ast", {"tolerance": 0.3}, 0.3),
    ],
)
def test_a_leaf_without_a_tolerance_is_archived_with_its_tasks(
    tmp_path, repo_root, leaf, overrides, expected
):
    base = repo_root / "hparams" / "base" / "speechllm.yaml"
    file = tmp_path / "leaf.yaml"
    file.write_text(f"base: {base}\n{leaf}\n")
    assert identity(resolve_hparams(file, overrides))["tolerance"] == expected


def test_an_archive_that_cannot_be_read_is_listed(small):
    (small / "train" / "hyperparams.yaml").write_text("a: [1")
    data = collect(small)
    assert "train/hyperparams.yaml: cannot be read" in "\n".join(data.incomplete)
    assert data.tolerance == 0.25


# ---------------------------------------------------------------------------------- what must not be mixed
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_utterances": 41}, "num_utterances"),
        ({"reference_words": 7}, "reference_words"),
        ({"text_normaliser": "none"}, "text_normaliser"),
        ({"inputs": {"manifests/librispeech/test-clean.csv": "e" * 64}}, "the manifest of"),
        ({"num_layers": 13}, "13"),
    ],
)
def test_other_data_or_scoring_under_one_name_is_refused(small, capsys, changes, what):
    path = small / "eval" / f"{block_on_path(small, 2)}-joint" / CLEAN / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(what)):
        check_comparable([collect(small)])
    assert report.main([str(small)]) == 2
    assert str(path.parent) in capsys.readouterr().err


def test_unequal_last_token_rules_are_not_compared(complete, tmp_path):
    fake.write_measurement(tmp_path, "text", fake.distance_matrix(12), last_token="prompt")
    speech = collect(complete).measurements["speech"]
    text = collect(tmp_path).measurements["text"]
    found = compare_measurements(speech, text, "speech", "text")
    assert found.spearman is None
    assert found.refused == "last_token is sequence and prompt: not comparable"


def test_measurements_are_compared_beside_a_random_decoder(complete, tmp_path):
    random = fake.write_random_decoder(tmp_path / "results" / "demo_random" / "1")
    comparisons = compare_all_measurements([collect(complete), collect(random)])
    trained = [c for c in comparisons if not c.random_decoder]
    others = [c for c in comparisons if c.random_decoder]
    assert [(c.first, c.second) for c in trained] == [
        ("demo (seed 1) speech", "demo (seed 1) text")
    ]
    assert len(others) == 5
    assert trained[0].spearman > 0.9 > 0.5 > max(c.spearman for c in others)


def test_markdown_and_html_keep_odd_characters(complete):
    table = judged_table(complete)[1]
    table.rows = [["a|b <i>", *table.rows[0][1:]]]
    assert "a\\|b <i>" in to_markdown(table)
    assert "a|b &lt;i&gt;" in to_html(table)


def with_other_data(seed_folder: Path) -> Path:
    """Make all points of an experiment ones of another corpus under the same names, with the same utterance ids."""
    for file in seed_folder.glob("eval/*/*/metrics.json"):
        record = json.loads(file.read_text())
        inputs = dict.fromkeys(record["inputs"], "e" * 64)
        file.write_text(json.dumps(record | {"inputs": inputs}))
    return seed_folder


def test_seeds_with_corpora_of_their_own_stand_side_by_side_and_are_never_paired(small):
    other = with_other_data(fake.write_experiment(small.parent / "2", (2, 4), num_utterances=40))
    experiments = [collect(small), collect(other)]
    check_comparable(experiments)
    results = {str(e.folder): analyse(e) for e in experiments}
    assert [row[0] for row in table1(experiments, results, "asr").rows if "seed" in row[0]] == [
        "small (seed 1)",
        "small (seed 2)",
    ]
    table = points_of_equal_depth(experiments, results)
    assert table.records and {row["difference_low"] for row in table.records} == {None}
    assert all("(other data)" in row[6] for row in table.rows)
    assert {row["same_data"] for row in table.records} == {False}


def test_other_data_is_refused_between_experiments_and_within_a_seed(small):
    other = fake.write_experiment(small.parent.parent / "another" / "2", (2, 4), num_utterances=40)
    check_comparable([collect(small), collect(other)])
    with_other_data(other)
    with pytest.raises(UserError, match="the manifest of"):
        check_comparable([collect(small), collect(other)])
    # A third one may have the corpus of either seed, and no third corpus.
    second = with_other_data(fake.write_experiment(small.parent / "2", (2, 4), num_utterances=40))
    check_comparable([collect(small), collect(second), collect(other)])
    file = next(second.glob("eval/l*-joint/*/metrics.json"))
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"inputs": dict.fromkeys(record["inputs"], "f" * 64)}))
    with pytest.raises(UserError, match="the manifest of"):
        check_comparable([collect(small), collect(second)])


def test_seeds_scored_by_other_rules_are_refused(small):
    other = with_other_data(fake.write_experiment(small.parent / "2", (2, 4), num_utterances=40))
    for file in other.glob("eval/*/*/metrics.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"text_normaliser": "none"}))
    with pytest.raises(UserError, match="text_normaliser"):
        check_comparable([collect(small), collect(other)])
