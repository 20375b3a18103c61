"""Extras over seeds, kept share, efficiency, the paper's numbers beside ours. All scores are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import report
from speechllm_prune.evaluation.statistics import paired_bootstrap
from speechllm_prune.reporting.against_paper import kept_share_table, our_systems, paper_table
from speechllm_prune.reporting.analysis import analyse, read_rows
from speechllm_prune.reporting.collect import ExperimentData, collect
from speechllm_prune.reporting.efficiency import efficiency_table, savings
from speechllm_prune.reporting.extras import extras_tables
from speechllm_prune.reporting.further import further_tables, shown_tables
from speechllm_prune.reporting.paper import TABLE1, removed_layers
from tests.unit import fake_results as fake

SIZES = (2, 4)
CLEAN = ("librispeech", "test-clean")
EXTRAS = {"joint": 0.30, "joint+kl": 0.24, "joint+all": 0.42, "none": 0.60, "none+comp": 0.45}


def judged(*folders: Path) -> tuple[list[ExperimentData], dict]:
    experiments = [collect(folder) for folder in folders]
    return experiments, {str(e.folder): analyse(e) for e in experiments}


def on_path(seed_folder: Path, n: int) -> str:
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    return f"l{path[str(n)]:02d}n{n:02d}"


def write_extras(seed_folder: Path, draw: int, rates: dict[str, float] = EXTRAS) -> Path:
    """One evaluation set of a seed with a corpus of its own, and the ids of every other seed."""
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(12))
    options = {"inputs": {"manifests/librispeech/test-clean.csv": f"{draw}" * 64}}

    def point(variant: str, rate: float) -> None:
        errors = fake.draw_errors(rate, 150, seed=draw)
        fake.write_point(seed_folder, variant, *CLEAN, errors, **options)

    point("full", 0.05)
    for n in SIZES:
        for healing, rate in rates.items():
            point(f"{on_path(seed_folder, n)}-{healing}", rate)
    return seed_folder


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Two seeds; +all is worse than joint in the first one and better in the second."""
    first = write_extras(tmp_path / "results/demo/1", 1)
    return [first, write_extras(tmp_path / "results/demo/2", 2, EXTRAS | {"joint+all": 0.22})]


# ----------------------------------------------------------------------------------------------- extras
def test_extras_are_listed_by_seed_and_averaged(seeds):
    summary, details = extras_tables(*judged(*seeds))
    rows = {(row[0], row[1]): row for row in summary.rows}
    assert set(rows) == {
        *((name, "joint") for name in EXTRAS if name != "joint"),
        ("none+comp", "none"),
    }
    assert rows["joint+kl", "joint"][-1] == "helps"
    assert rows["none", "joint"][-1] == "hurts"
    assert rows["none+comp", "joint"][-1] == "hurts"
    assert rows["none+comp", "none"][-1] == "helps"
    assert rows["joint+all", "joint"][-2:] == ["2 / 2 / 0", "no difference shown"]
    of_seed = {
        row["seed"]: row["difference"]
        for row in summary.records
        if (row["healing"], row["held_against"]) == ("joint+kl", "joint")
    }
    assert rows["joint+kl", "joint"][-3] == f"{sum(of_seed.values()) / 2:+.2f}"
    assert len(details.rows) == len(SIZES) * len(EXTRAS)
    assert details.columns[3:7] == [
        *("seed 1: score", "seed 1: minus joint", "seed 2: score", "seed 2: minus joint"),
    ]


def test_the_interval_of_a_seed_is_that_of_its_own_utterances(seeds):
    """Both seeds have the same ids: pooled or paired across them, the intervals would differ."""
    _, together = extras_tables(*judged(*seeds))
    _, alone = extras_tables(*judged(seeds[1]))
    keys = ("healing", "block_size", "difference", "difference_low", "difference_high")
    second = [[row[k] for k in keys] for row in together.records if row["seed"] == "2"]
    assert second == [[row[k] for k in keys] for row in alone.records]
    points = {point.variant: point for point in collect(seeds[1]).points}
    block = on_path(seeds[1], 4)
    joint, kl = (read_rows(points[f"{block}-{name}"]) for name in ("joint", "joint+kl"))
    expected = paired_bootstrap(*joint, *kl).difference
    found = next(
        row for row in alone.records if (row["healing"], row["block_size"]) == ("joint+kl", 4)
    )
    assert (found["difference_low"], found["difference_high"]) == (expected.low, expected.high)


def test_one_seed_is_no_verdict_and_no_extras_no_table(seeds, tmp_path):
    summary, _ = extras_tables(*judged(seeds[0]))
    assert {row[-1] for row in summary.rows} == {"one seed only"}
    assert {row[-3] for row in summary.rows} == {"–"}
    plain = fake.write_experiment(tmp_path / "results/plain/1", (2,), 20, sets=fake.SETS[:1])
    assert extras_tables(*judged(plain)) == []


def test_a_cut_that_one_seed_lacks_has_no_mean(seeds):
    folder = seeds[1] / "eval" / f"{on_path(seeds[1], 4)}-joint+kl" / "-".join(CLEAN)
    (folder / "metrics.json").unlink()
    _, details = extras_tables(*judged(*seeds))
    row = next(row for row in details.rows if row[1:3] == ["4", "joint+kl"])
    assert row[-3:] == ["not measured"] * 3


def test_the_verb_takes_two_seeds_with_corpora_of_their_own(seeds, capsys):
    assert report.main([str(folder) for folder in seeds]) == 0
    out = capsys.readouterr().out
    assert "Extras of demo" in out and "every cut" not in out
    folder = seeds[0].parent.parent / "report"
    text = (folder / "extras.md").read_text()
    assert "every cut" in text and fake.NOTE in text
    with open(folder / "extras.csv", newline="") as stream:
        assert {row["seed"] for row in csv.DictReader(stream)} == {"1", "2"}
    assert 'id="extras-0"' in (folder / "report.html").read_text()
    stems = ("table1", "figure2", "kept_share", "efficiency", "extras")
    for stem in stems:
        assert all((folder / f"{stem}{s}").is_file() for s in (".md", ".csv", ".png", ".svg")), stem
    assert (folder / "paper.md").is_file() and (folder / "heatmaps.csv").is_file()


# ------------------------------------------------------------------------------------------- efficiency
def set_fields(seed_folder: Path, variant: str, **changes: object) -> None:
    for file in (seed_folder / "eval" / variant).glob("*/metrics.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A GPU's numbers: two sets, 20 s each before and 13 s after; half of 16 GiB."""
    seed_folder = tmp_path / "results" / "fast" / "1"
    fake.write_experiment(seed_folder, (2,), num_utterances=20, sets=fake.SETS[:2])
    gpu = {"device": "cuda", "precision": "bfloat16", "features_cached": False}
    timed = {"timed_audio_seconds": 30.0}
    set_fields(
        seed_folder, "full", timed_seconds=20.0, peak_memory_bytes=16 * 2**30, **gpu, **timed
    )
    after = {"num_parameters": 800, "decoder_parameters": 700}
    variant = f"{on_path(seed_folder, 2)}-joint"
    set_fields(
        seed_folder,
        variant,
        timed_seconds=13.0,
        peak_memory_bytes=8 * 2**30,
        **gpu,
        **after,
        **timed,
    )
    return seed_folder


def test_both_readings_of_a_speedup(fast):
    experiments, results = judged(fast)
    saving = savings(experiments[0], results[str(fast)])[2]
    assert saving.seconds == (40.0, 26.0) and saving.memory_gib == (16.0, 8.0)
    assert saving.time_saved == pytest.approx(35.0)
    assert saving.speed_gained == pytest.approx(100 * (40 / 26 - 1))
    table = efficiency_table(experiments, results)
    assert table.rows[0][1:] == [
        *("2 *", "16.7", "40.00 -> 26.00", "-35.0 %", "+53.8 %", "16.00 -> 8.00"),
        *("1,000 -> 800 (-20.0 %)", "900 -> 700 (-22.2 %)", "cuda, bfloat16"),
    ]
    assert "1.54x" in table.remarks[1] and "1.35x" in table.remarks[1]
    assert table.records[0]["time_saved_percent"] == pytest.approx(35.0)


def test_unlike_conditions_and_a_cpu_are_not_compared(fast):
    set_fields(fast, "full", device="cpu")
    row = efficiency_table(*judged(fast)).rows[0]
    assert row[3:7] == ["not measured"] * 4 and row[-1] == "not alike: device"
    assert row[7].startswith("1,000 -> 800")  # counts depend on no machine
    set_fields(fast, f"{on_path(fast, 2)}-joint", device="cpu")
    row = efficiency_table(*judged(fast)).rows[0]
    assert row[3] == "40.00 -> 26.00"
    assert row[6] == "not measured"  # a process's high-water mark says nothing of one model


# ----------------------------------------------------------------------------- the paper's numbers and ours
def write_system(root: Path, name: str, hub: str, sizes: tuple[int, ...], **keys: object) -> Path:
    system = next(s for s in TABLE1 if s.model == hub.rpartition("/")[2])
    seed_folder = root / "results" / name / "1"
    fake.write_experiment(seed_folder, sizes, 40, system.num_layers)
    fake.write_settings(seed_folder, decoder_hub=hub, **keys)
    return seed_folder


def cells(table) -> dict[str, tuple]:
    return {row["what"]: (row["paper"], row["ours"], row["difference"]) for row in table.records}


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two 7-8B systems, one with its LoRA baseline, and one decoder that the paper has not. Read only."""
    root = tmp_path_factory.mktemp("systems")
    qwen = write_system(root, "qwen", "Qwen/Qwen2.5-7B", (7, 8))
    lora = write_system(root, "lora", "Qwen/Qwen2.5-7B", (5,), decoder_lora_rank=16)
    llama = write_system(root, "llama", "/models/Llama-3.1-8B", (8, 13))
    other = fake.write_experiment(root / "results/other/1", (2,), 40)
    fake.write_settings(other)
    return [qwen, lora, llama, other]


def test_numbers_of_the_paper_stand_beside_ours(systems):
    experiments, results = judged(*systems)
    table = paper_table(our_systems(experiments, results), [])
    found = cells(table)
    points = {(p.variant, p.split): p.value for p in experiments[0].points}
    clean = points["full", "test-clean"]
    what = "Qwen2.5-7B: LibriSpeech test-clean WER %"
    assert found[what] == (2.01, clean, pytest.approx(clean - 2.01))
    pruned = points[f"{on_path(systems[0], 8)}-joint", "test-other"]
    what = "Qwen2.5-7B + Pruning (n=8): LibriSpeech test-other WER %"
    assert found[what] == (4.83, pruned, pytest.approx(pruned - 4.83))
    decoder = points[f"{on_path(systems[0], 8)}-decoder", "test-clean"]
    what = "Qwen2.5-7B, decoder-only healing (n=8): LibriSpeech test-clean WER %"
    assert found[what][:2] == (5.93, decoder)
    largest = our_systems(experiments, results)[0].choice.largest
    assert found["Qwen2.5-7B: % drop"][:2] == (28.6, pytest.approx(100 * largest / 28))
    assert found["Qwen2.5-7B + LoRA + Pruning (n=5): Loquacious dev WER %"][1] is not None
    assert found["Qwen2.5-3B: LibriSpeech test-clean WER %"] == (2.22, None, None)
    rows = {row[1]: row for row in table.rows}
    assert rows["Qwen2.5-3B: % drop"][2:] == ["30.6", "not measured", "not measured"]
    measured = sum(ours is not None for _, ours, _ in found.values())
    assert f"{measured} of {len(found)} numbers measured" in table.remarks[0]
    assert len(found) == len(table.records)


def test_every_printed_cell_has_a_line(systems):
    table = paper_table(our_systems(*judged(systems[3])), [])
    assert all(row["ours"] is None for row in table.records)
    printed = sorted(row["paper"] for row in table.records if row["place"] == "Table 1")
    assert printed == sorted(v for s in TABLE1 for v in (s.drop, *s.unpruned, *s.pruned))
    assert sum(row["place"] == "Table 2" for row in table.records) == 2 + 4 * 4


def test_a_tier_is_the_mean_of_its_families_without_lora(systems):
    experiments, results = judged(*systems)
    ours = our_systems(experiments, results)
    kept = {one.experiment.name: 100 - one.drop for one in ours}
    table = kept_share_table(ours, [])
    rows = {row["tier"]: row for row in table.records}
    mean = (kept["qwen"] + kept["llama"]) / 2
    assert rows["7-8B"]["ours"] == pytest.approx(mean)
    assert rows["7-8B"]["difference"] == pytest.approx(mean - 63.8)
    assert rows["3-4B"]["ours"] is None
    assert rows["Qwen2.5-7B + LoRA"]["ours"] == pytest.approx(kept["lora"])
    assert rows["not in the paper"]["ours"] == pytest.approx(kept["other"])


def test_efficiency_is_taken_at_the_depth_of_the_paper(systems):
    experiments, results = judged(systems[2])
    assert removed_layers(40.0, 32) == 13
    found = cells(paper_table(our_systems(experiments, results), []))
    start = "Llama-3.1-8B without 40 % (n=13): "
    assert found[start + "wall-clock, read as time saved, %"] == (35.0, 0.0, -35.0)
    assert found[start + "peak GPU memory before, GiB"] == (15.72, None, None)


def test_bleu_stands_beside_table_2(tmp_path):
    folders = []
    for source, target in (("en", "de"), ("fr", "en")):
        folder = tmp_path / "results" / f"{source}_{target}" / "1"
        fake.write_measurement(folder, "speech", fake.distance_matrix(28))
        options = {"task": "ast", "metric": "bleu", "num_layers": 28}
        split = (f"covost2_{source}_{target}_standard", "test")
        for variant, bleu in (("full", 30.0), (f"{on_path(folder, 9)}-joint", 28.5)):
            fake.write_point(folder, variant, *split, [1] * 20, **options, value=bleu)
        manifest = {"eval_manifests": ["/".join(split)], "valid_manifest": f"{split[0]}/dev"}
        hub = {"decoder_hub": "Qwen/Qwen2.5-7B", "task": "ast", "tolerance": 0.10}
        fake.write_settings(folder, **manifest, **hub)
        folders.append(folder)
    found = cells(paper_table(our_systems(*judged(*folders)), []))
    assert found["En-De, unpruned: BLEU"] == (27.66, 30.0, pytest.approx(2.34))
    assert found["Fr-En, AST path, n=9: BLEU"][:2] == (36.12, 28.5)
    assert found["Fr-En, ASR path, n=9: BLEU"] == (36.12, None, None)
    assert found["En-De, AST path, n=6: BLEU"][1] is None
    assert found["% drop within 10 % in both directions"][1] == pytest.approx(100 * 9 / 28)


def test_the_paper_is_shown_only_where_something_of_it_was_measured(systems):
    assert "paper" in shown_tables(further_tables(*judged(systems[0])))
    tables = further_tables(*judged(systems[3]))
    assert "paper" not in shown_tables(tables)
    assert tables["paper"][0].rows[0][3:] == ["not measured", "not measured"]
