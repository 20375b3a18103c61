"""What a report must not say: rules judged on sets that are not there, results of a model that is no more, times and
healings that are not alike. All scores are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import report
from speechllm_prune.experiment import sha256_file
from speechllm_prune.reporting.against_paper import kept_share_table, our_systems, paper_table
from speechllm_prune.reporting.analysis import analyse, check_comparable, choose_blocks
from speechllm_prune.reporting.build import build_report
from speechllm_prune.reporting.collect import collect
from speechllm_prune.reporting.efficiency import savings
from speechllm_prune.reporting.extras import extras_tables
from speechllm_prune.reporting.figures import errorbar
from speechllm_prune.reporting.find import find_experiments
from speechllm_prune.reporting.table1 import table1
from speechllm_prune.reporting.translation import asr_path_for
from speechllm_prune.reporting.widgets import _worst_change, tolerance_chooser
from speechllm_prune.runtime import UserError
from tests.unit import fake_results as fake

CLEAN, OTHER, DEV = "librispeech-test-clean", "librispeech-test-other", "loquacious-dev"
VALID = ("librispeech", "dev-clean")


def judged(*folders: Path):
    experiments = [collect(folder) for folder in folders]
    return experiments, {str(e.folder): analyse(e) for e in experiments}


def on_path(seed_folder: Path, n: int) -> str:
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    return f"l{path[str(n)]:02d}n{n:02d}"


def score(seed_folder: Path, variant: str, *sets: tuple[str, str], errors: int = 20) -> None:
    counts = [errors // 20 + (index < errors % 20) for index in range(20)]
    for corpus, split in sets:
        fake.write_point(seed_folder, variant, corpus, split, counts)


def change(file: Path, **changes: object) -> None:
    fake.write(file, json.loads(file.read_text()) | changes)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A measured path and the settings; the points are the test's."""
    seed_folder = tmp_path / "results" / "bare" / "1"
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(12))
    fake.write_settings(seed_folder)
    fake.write(seed_folder / "train" / "DONE.json", fake.COMMON)
    return seed_folder


@pytest.fixture
def three(bare: Path) -> Path:
    """Unpruned and n = 2 on three sets."""
    for variant in ("full", f"{on_path(bare, 2)}-joint"):
        score(bare, variant, *fake.SETS)
    return bare


# ------------------------------------------------------------------------------------------ sets not there
def test_nothing_is_chosen_where_only_the_dev_set_was_scored(bare):
    for variant in ("full", f"{on_path(bare, 2)}-joint", f"{on_path(bare, 4)}-joint"):
        score(bare, variant, VALID)
    data, results = judged(bare)
    choice = choose_blocks(data[0], results[str(bare)], 0.25)
    assert (choice.largest, choice.safe, choice.tested, choice.on_dev) == (None, None, {}, 4)
    assert _worst_change({}, []) is None
    made = build_report([bare])
    assert "| + Pruning | no evaluation set scored |" in made.table1
    assert "largest n within tolerance" not in made.table1
    assert "| + Pruning, n by dev | 33.3 | n=4" in made.table1
    assert not (made.folder / "figure2.png").exists()


def test_sizes_scored_on_dev_only_are_not_tested(three):
    score(three, "full", VALID)
    score(three, f"{on_path(three, 1)}-joint", VALID, errors=60)
    for n in (2, 4):
        score(three, f"{on_path(three, n)}-joint", VALID)
    data, results = judged(three)
    choice = choose_blocks(data[0], results[str(three)], 0.25)
    assert list(choice.tested) == [2] and (choice.largest, choice.safe) == (2, 2)
    assert (choice.on_dev, list(choice.dev_tested)) == (4, [1, 2, 4])
    (row,) = (row for row in table1(data, results, "asr").rows if row[0] == "+ Pruning, n by dev")
    assert row[2].startswith("n=4") and row[3:6] == ["not measured"] * 3


def test_a_set_of_eval_manifests_without_the_unpruned_model_is_said(three):
    assert collect(three).incomplete == []
    for name in (OTHER, DEV):
        (three / "eval/full" / name / "metrics.json").unlink()
        (three / "eval/full" / name).rename(three / name)
    data, results = judged(three)
    assert data[0].eval_sets == [CLEAN]
    lines = [line for line in data[0].incomplete if line.startswith("eval/full: not evaluated")]
    assert [OTHER in lines[0], DEV in lines[1]] == [True, True] and "--variant full" in lines[0]
    remarks = " ".join(table1(data, results, "asr").remarks)
    assert f"not applied to {OTHER}, {DEV} of its eval_manifests" in remarks


def test_the_paper_is_compared_on_all_of_its_sets_or_not_at_all(tmp_path):
    seed_folder = tmp_path / "results" / "qwen" / "1"
    fake.write_experiment(seed_folder, (8,), 20, 28)
    fake.write_settings(seed_folder, decoder_hub="Qwen/Qwen2.5-7B")

    def ours() -> dict[str, float | None]:
        return {
            r["what"]: r["ours"] for r in paper_table(our_systems(*judged(seed_folder)), []).records
        }

    assert ours()["Qwen2.5-7B: % drop"] is not None
    (seed_folder / "eval/full" / DEV / "metrics.json").unlink()
    found = ours()
    assert found["Qwen2.5-7B: % drop"] is None
    assert found["kept share of layers, 7-8B, %"] is None
    assert found["Qwen2.5-7B: LibriSpeech test-clean WER %"] is not None  # one set, one number
    for name in (CLEAN, OTHER):
        (seed_folder / "eval/full" / name / "metrics.json").unlink()
    assert ours()["Qwen2.5-7B: % drop"] is None  # not 0: nothing was judged
    (row,) = (
        r
        for r in kept_share_table(our_systems(*judged(seed_folder)), []).records
        if r["tier"] == "7-8B"
    )
    assert row["ours"] is None and row["systems"] == ""


def test_a_set_that_was_not_scored_leaves_the_verdict_undecided(three):
    variant = f"control-{on_path(three, 2)}-joint"
    score(three, variant, fake.SETS[0])
    table = table1(*judged(three), "asr")
    assert [row[6] for row in table.rows[1:]] == ["within", "undecided"]


def test_both_directions_need_both(tmp_path):
    folders = {}
    for name, source, target, drop in (
        ("a", "en", "de", 9),
        ("b", "en", "de", 5),
        ("c", "fr", "en", 6),
    ):
        folder = folders[name] = tmp_path / "results" / name / "1"
        fake.write_measurement(folder, "speech", fake.distance_matrix(28))
        options = {"task": "ast", "metric": "bleu", "num_layers": 28, "value": 30.0}
        corpus = f"covost2_{source}_{target}_standard"
        for variant in ("full", f"{on_path(folder, drop)}-joint"):
            fake.write_point(folder, variant, corpus, "test", [1] * 20, **options)
        keys = {"eval_manifests": [f"{corpus}/test"], "decoder_hub": "Qwen/Qwen2.5-7B"}
        fake.write_settings(folder, task="ast", tolerance=0.1, **keys)

    def drop_of(*names: str) -> float | None:
        table = paper_table(our_systems(*judged(*(folders[name] for name in names))), [])
        return next(r["ours"] for r in table.records if "both directions" in r["what"])

    assert drop_of("a", "b") is None
    assert drop_of("a", "b", "c") == pytest.approx(100 * 6 / 28)  # (9 + 5) / 2 and 6
    assert drop_of("b", "c") == pytest.approx(100 * 5 / 28)


# ------------------------------------------------------------------------------------------------- stale
def made_from(seed_folder: Path, *stages: str) -> dict[str, str]:
    names = [f"{stage}/DONE.json" for stage in stages]
    return {name: sha256_file(seed_folder / name) for name in names}


def test_results_of_a_model_that_is_no_more_are_left_out(three, tmp_path, capsys):
    variant = f"{on_path(three, 2)}-joint"
    healed = three / "heal" / variant / "DONE.json"
    fake.write(healed, fake.COMMON | {"inputs": made_from(three, "train")})
    for file in three.glob("eval/*/*/metrics.json"):
        stages = ("train",) if "full" in str(file) else ("train", f"heal/{variant}")
        manifest = json.loads(file.read_text())["inputs"]
        change(file, inputs=manifest | made_from(three, *stages) | {"prune/x/plan.json": "0" * 64})
    change(three / "measure/speech/path.json", inputs=made_from(three, "train"))
    moved = tmp_path / "elsewhere" / "bare" / "1"
    moved.parent.mkdir(parents=True)
    three.rename(moved)
    data = collect(moved)
    assert data.incomplete == [] and len(data.points) == 6 and "speech" in data.measurements

    change(moved / "heal" / variant / "DONE.json", num_steps=7)  # healed again
    data = collect(moved)
    assert {p.variant for p in data.points} == {"full"}
    assert data.incomplete == [
        f"eval/{variant}: left out on {CLEAN}, {OTHER}, {DEV}: heal/{variant}/DONE.json changed since; "
        f"run: python evaluate.py LEAF.yaml --variant {variant} --overwrite"
    ]
    change(moved / "train" / "DONE.json", config_hash="e" * 64)  # trained again
    for file in moved.glob("eval/full/*/metrics.json"):  # and evaluated
        inputs = json.loads(file.read_text())["inputs"]
        change(file, inputs=inputs | made_from(moved, "train"))
    data = collect(moved)
    assert {p.variant for p in data.points} == {"full"} and data.measurements == {}
    text = "\n".join(data.incomplete)
    assert "measure/speech: left out, train/DONE.json changed since" in text
    assert f"heal/{variant}: train/DONE.json changed since" in text
    # Evaluated again, yet healed before the training: still of no use.
    for file in moved.glob(f"eval/{variant}/*/metrics.json"):
        inputs = json.loads(file.read_text())["inputs"]
        change(file, inputs=inputs | made_from(moved, "train", f"heal/{variant}"))
    assert {p.variant for p in collect(moved).points} == {"full"}


# -------------------------------------------------------------------------------------------- efficiency
def test_times_are_without_the_warm_up_and_of_equal_conditions_only(three):
    variant = f"{on_path(three, 2)}-joint"
    before = [three / "eval/full" / name / "metrics.json" for name in (CLEAN, OTHER, DEV)]
    after = [three / "eval" / variant / name / "metrics.json" for name in (CLEAN, OTHER, DEV)]

    def seconds() -> tuple[float, float] | None:
        data, results = judged(three)
        return savings(data[0], results[str(three)])[2].seconds

    for file in before:
        change(file, seconds=100.0, rtfx=20.0)
    for file in after:
        change(file, seconds=1.0, rtfx=40.0)
    assert seconds() == pytest.approx((3 * 40 / 20, 3 * 40 / 40))  # 20 utterances of 2 s
    for file in (*before, *after):
        change(file, timed_seconds=3.0, timed_audio_seconds=30.0)
    assert seconds() == (9.0, 9.0)
    change(after[0], timed_audio_seconds=20.0)  # another share of the audio was timed
    assert seconds() is None
    change(after[0], timed_audio_seconds=30.0)
    keys = ("device", "device_name", "precision", "features_cached", "eval_batch_size")
    for key in (*keys, "eval_batch_positions", "num_processes", "decode_graphs"):
        for file in before:
            change(file, **{key: 1})
        assert seconds() is None, f"{key} is missing on one side"
        for file in after:
            change(file, **{key: 1})
        assert seconds() is not None


# ------------------------------------------------------------------------------- seeds, decoders, healing
def test_two_folders_of_one_seed_are_refused(three, tmp_path, capsys):
    other = tmp_path / "copy" / "bare" / "1"
    fake.write_experiment(other, (2,), 20)
    with pytest.raises(UserError, match="are both bare \\(seed 1\\)"):
        check_comparable([collect(three), collect(other)])
    assert report.main([str(three), str(other)]) == 2
    assert "results/OTHER_NAME/<seed>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ({"decoder_hub": "a"}, {"decoder_hub": "b"}, False),
        ({"decoder_hub": "a"}, {"decoder_hub": "a"}, True),
        ({"decoder_hub": "made-up"}, {}, True),
        ({"decoder_hub": "a"}, {"decoder_hub": "a", "decoder_fingerprint": "f"}, True),
    ],
)
def test_the_asr_path_is_of_the_same_decoder_also_without_an_own_path(tmp_path, ours, theirs, same):
    asr, ast = tmp_path / "results/asr/1", tmp_path / "results/ast/1"
    score(asr, "full", fake.SETS[0])
    fake.write_measurement(asr, "speech", fake.distance_matrix(12), **theirs)
    fake.write_point(
        ast, "full", "covost2_en_de_standard", "test", [1] * 20, task="ast", metric="bleu"
    )
    fake.write_settings(ast, task="ast", **ours)
    experiments = [collect(ast), collect(asr)]
    assert (asr_path_for(experiments[0], experiments) is not None) is same


def test_fingerprints_decide_over_names(tmp_path):
    folders = [tmp_path / "results" / name / "1" for name in ("ast", "asr")]
    fake.write_point(
        folders[0], "full", "c_en_de_standard", "test", [1] * 20, task="ast", metric="bleu"
    )
    score(folders[1], "full", fake.SETS[0])
    for found, same in (("f", True), ("g", False)):
        for folder, hub, mark in zip(
            folders, ("x", "y" if same else "x"), ("f", found), strict=True
        ):
            facts = {"decoder_hub": hub, "decoder_fingerprint": mark}
            fake.write_measurement(folder, "speech", fake.distance_matrix(12), **facts)
        experiments = [collect(folder) for folder in folders]
        assert (asr_path_for(experiments[0], experiments) is not None) is same


def write_healing(seed_folder: Path, variant: str, **changes: object) -> None:
    facts = {"num_steps": 60, "heal_mode": "joint", "lora": {"rank": 8, "alpha": 16}}
    fake.write(seed_folder / "heal" / variant / "DONE.json", fake.COMMON | facts | changes)


def test_a_control_is_called_the_same_healing_only_if_it_was(three):
    cut = f"{on_path(three, 2)}-joint"
    control = f"control-{cut}"
    score(three, control, *fake.SETS)

    def remark() -> str:
        return next(r for r in table1(*judged(three), "asr").remarks if control in r)

    assert "cannot be said" in remark()
    write_healing(three, cut)
    write_healing(three, control)
    assert "the same healing for the same steps" in remark()
    write_healing(three, control, num_steps=120, lora={"rank": 4, "alpha": 16})
    assert (
        "not healed as" in remark() and "num_steps 120 and 60" in remark() and "lora " in remark()
    )
    write_healing(three, control, config_hash="a" * 64)  # a learning rate, say
    assert "config hash aaa" in remark()


def test_extras_of_other_steps_are_named(three):
    cut = f"{on_path(three, 2)}-joint"
    score(three, f"{cut}+kl", *fake.SETS, errors=18)
    write_healing(three, cut)

    def remarks() -> str:
        return " ".join(extras_tables(*judged(three))[0].remarks)

    assert "do not both state their steps and LoRA" in remarks()
    write_healing(three, f"{cut}+kl", config_hash="a" * 64)
    assert "Not healed alike" not in remarks() and "do not both" not in remarks()
    write_healing(three, f"{cut}+kl", num_steps=90)
    assert f"Not healed alike: seed 1: {cut}+kl and {cut}: num_steps 90 and 60." in remarks()


# ------------------------------------------------------------------------------------- drawing and files
def test_a_bar_without_end_is_an_arrow_to_the_edge(tmp_path):
    axis = Figure().subplots()
    values = [(3.0, 0.0, np.inf), (1.0, 0.5, 2.0), (1.0, -np.inf, 2.0)]
    errorbar(axis, [10.0, 20.0, 30.0], values, color="#000000")
    assert [(text.xy, text.xyann) for text in axis.texts] == [
        ((10.0, 1.0), (10.0, 3.0)),
        ((30.0, 0.0), (30.0, 1.0)),
    ]
    (bars,) = axis.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[0.0, 3.0], [0.5, 2.0], [1.0, 2.0]]
    axis.figure.savefig(tmp_path / "x.svg")


@pytest.mark.slow
def test_an_earlier_reports_files_go_and_nobody_elses(three):
    folder = build_report([three]).folder
    (folder / "mine.md").write_text("kept")
    (folder / "heatmap_of_mine.txt").write_text("kept")
    (folder / "table2.md").write_text("old")
    assert (folder / f"pruning_curve_{DEV}.png").is_file()
    before = {path.name for path in folder.iterdir()}
    for file in three.glob(f"eval/*/{DEV}/*"):
        file.unlink()
    build_report([three])
    after = {path.name for path in folder.iterdir()}
    gone = {f"pruning_curve_{DEV}.png", f"pruning_curve_{DEV}.svg", "table2.md"}
    assert before - after == gone and after <= before


def test_the_folder_of_reports_is_skipped_beside_experiments(three, capsys):
    reports = three.parent.parent / "report"
    reports.mkdir()
    assert find_experiments([three.parent, reports]) == [three]
    assert f"note: {reports} is a report" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no experiment"):
        find_experiments([reports])


@pytest.mark.parametrize(
    ("tolerance", "value", "step"),
    [
        (0.25, "25", "0.5"),
        (0.125, "12.5", "0.5"),
        (0.333, "33.3", "0.1"),
        (1 / 3, "33.3333333333", "any"),
    ],
)
def test_the_slider_can_stand_at_the_tolerance_of_the_table(three, tolerance, value, step):
    data, results = judged(three)
    text = tolerance_chooser(data[0], results[str(three)], tolerance, "key")
    assert f'step="{step}" value="{value}"' in text and f"{value} % worse is accepted" in text
