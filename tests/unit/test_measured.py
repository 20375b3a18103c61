"""What reports say of angular distances: compared with `--compare`, and each measurement by itself. Numbers made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import report
from speechllm_prune.evaluation.agreement import ranks, spearman_without_row_means
from speechllm_prune.reporting import figures
from speechllm_prune.reporting.build import build_report
from speechllm_prune.reporting.collect import collect
from speechllm_prune.reporting.measured import (
    compare_measurements,
    redundancy_of,
    refuse_unequal_rules,
    with_post_norm,
)
from speechllm_prune.runtime import UserError
from tests.unit import fake_results as fake

LAYERS = 6


def plain_matrix(last: float = 0.0, seed: int = 0) -> np.ndarray:
    """Distances that fall with depth, blocks with the last layer `last` further away."""
    matrix = np.full((LAYERS, LAYERS), np.nan)
    noise = np.random.default_rng(seed)
    for n in range(1, LAYERS + 1):
        for start in range(LAYERS - n + 1):
            matrix[n - 1, start] = 0.1 * n - 0.02 * start + 0.001 * noise.random()
            matrix[n - 1, start] += last if start + n == LAYERS else 0.0
    return matrix


def measured(folder: Path, kind: str = "speech", matrix: np.ndarray | None = None, **changes):
    fake.write_measurement(folder, kind, plain_matrix() if matrix is None else matrix, **changes)
    return collect(folder).measurements[kind]


def test_redundancy_by_hand(tmp_path: Path) -> None:
    post_norm = np.linspace(0.9, 0.8, LAYERS)
    shares = {"1": 1.0, "2": 0.5, "3": 0.9, "4": 0.8, "5": 1.0}
    found = measured(tmp_path / "a", post_norm=post_norm, bootstrap_share=shares)
    summary = redundancy_of(found)
    matrix = plain_matrix()
    # Distances fall with depth: the path is the tail rule, and nothing that ends at the top is large.
    assert found.path == {n: LAYERS - 1 - n for n in range(1, LAYERS)}
    assert summary.path_depth == 1.0 and summary.last_largest == 0.0
    expected = np.mean([matrix[n - 1, LAYERS - 1 - n] for n in range(1, LAYERS)])
    assert summary.path_distance == pytest.approx(expected)
    # After the norm all of them are: the claim is the norm's doing.
    assert summary.last_largest_post_norm == 1.0
    assert summary.mean_share == pytest.approx(np.mean([1.0, 0.5, 0.9, 0.8]))  # n = 5 has no choice
    assert summary.least_stable == 2
    changed = with_post_norm(found)
    for n in range(1, LAYERS + 1):
        for start in range(LAYERS - n + 1):
            top = start + n == LAYERS
            assert changed[n - 1, start] == (post_norm[start] if top else matrix[n - 1, start])
    # 15 cells leave the last layer; the smallest tenth is two: n = 1 at layers 4 and 3, both in the deeper half.
    assert summary.deep_share == 1.0
    falling = measured(tmp_path / "b", matrix=0.7 - plain_matrix())
    assert redundancy_of(falling).deep_share < 1.0


def test_without_the_new_fields_it_reads_not_measured(tmp_path: Path) -> None:
    summary = redundancy_of(measured(tmp_path))
    assert summary.last_largest_post_norm is None and summary.mean_share is None
    folder = build_report(
        [fake.write_experiment(tmp_path / "x" / "1", (2,), 20, sets=fake.SETS[:1])]
    ).folder
    assert "not measured" in (folder / "redundancy.md").read_text()


def test_a_decoder_without_a_choice_has_no_line(tmp_path: Path) -> None:
    two = np.array([[0.1, 0.2], [0.3, np.nan]])
    assert redundancy_of(measured(tmp_path, matrix=two, num_layers=2)) is None


def test_spearman_is_not_fooled_by_what_every_decoder_shows() -> None:
    """The raw rank correlation of unrelated matrices is high, because both grow with n: that one is not reported."""
    draws = [np.random.default_rng(seed).random((LAYERS, LAYERS)) for seed in (1, 2)]
    one, two = (
        np.where(np.isnan(plain_matrix()), np.nan, np.arange(LAYERS)[:, None] + 0.3 * draw)
        for draw in draws
    )
    both = np.isfinite(one)
    raw = np.corrcoef(ranks(one[both]), ranks(two[both]))[0, 1]
    assert raw > 0.9 > 0.6 > abs(spearman_without_row_means(one, two))


# ----------------------------------------------------------------------------------------------- --compare
@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two systems that were only measured: a frozen one, and one with LoRA measured with adapters on and off."""
    first, second = tmp_path / "frozen" / "1", tmp_path / "lora" / "1"
    options = {"num_layers": LAYERS, "bootstrap_share": {str(n): 1.0 for n in range(1, LAYERS)}}
    post_norm = np.full(LAYERS, 0.9)
    fake.write_measurement(first, "speech", plain_matrix(), post_norm, **options)
    fake.write_measurement(first, "text", plain_matrix(seed=1), post_norm, **options)
    lora = options | {"decoder_lora_rank": 16}
    fake.write_measurement(second, "speech", 0.5 * plain_matrix(), post_norm, **lora)
    off = lora | {"measure_lora": False}
    fake.write_measurement(second, "speech-no_lora", plain_matrix(), post_norm, **off)
    assert not any(collect(folder).is_random_decoder for folder in (first, second))
    return first, second


def test_compare_prints_and_writes_everything(pair, capsys) -> None:
    assert report.main([*map(str, pair), "--compare"]) == 0
    out = capsys.readouterr().out
    assert "agreement carries no information" in out
    assert "as trained; adapters none and on" in out and "adapters on and off" in out
    assert "| lora (seed 1) speech | on | 40 |" in out
    folder = pair[0] / "report"
    with open(folder / "redundancy.csv", newline="") as stream:
        rows = {row["measured"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {
        "frozen (seed 1) speech",
        "frozen (seed 1) text",
        "lora (seed 1) speech",
        "lora (seed 1) speech-no_lora",
    }
    on, off = rows["lora (seed 1) speech"], rows["lora (seed 1) speech-no_lora"]
    assert float(on["mean_path_distance"]) == pytest.approx(0.5 * float(off["mean_path_distance"]))
    assert float(on["last_layer_largest_post_norm"]) == 1.0 > float(on["last_layer_largest"])
    with open(folder / "matrices.csv", newline="") as stream:
        lines = {(r["first"], r["second"]): r for r in csv.DictReader(stream)}
    same = lines["frozen (seed 1) speech", "lora (seed 1) speech-no_lora"]
    assert float(same["mean_absolute_difference"]) == 0.0
    assert float(same["spearman_without_row_means"]) == 1.0
    page = (folder / "report.html").read_text()
    assert 'id="redundancy"' in page and (folder / "heatmap_compared.svg").is_file()
    assert "end state after the final norm" in (folder / "heatmap_compared.svg").read_text()


def test_without_compare_nothing_of_it_is_printed(pair, capsys) -> None:
    assert report.main([*map(str, pair)]) == 0
    assert "Where the small" not in capsys.readouterr().out
    assert (pair[0] / "report" / "redundancy.md").is_file()
    assert not (pair[0] / "report" / "heatmap_compared.svg").exists()


def test_unequal_token_rules_are_refused(pair, capsys) -> None:
    record = json.loads((pair[1] / "measure/speech/path.json").read_text())
    fake.write(pair[1] / "measure/speech/path.json", record | {"last_token": "prompt"})
    assert report.main([*map(str, pair), "--compare"]) == 2
    message = capsys.readouterr().err
    assert "last_token sequence" in message and "last_token prompt" in message
    assert "--last_token sequence --overwrite" in message
    assert report.main([*map(str, pair)]) == 0, "a plain report says so in a line"
    assert "not comparable" in (pair[0] / "report" / "matrices.md").read_text()


def test_where_no_input_is_shared_all_are_held_against_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "1", tmp_path / "b" / "1"
    measured(first, "speech", last_token="prompt")
    measured(second, "text")
    with pytest.raises(UserError, match="not comparable"):
        refuse_unequal_rules([collect(first), collect(second)])
    measured(first, "text")
    refuse_unequal_rules([collect(first), collect(second)])  # text against text


def test_unequal_manifests_are_said(tmp_path: Path) -> None:
    one = measured(tmp_path / "a", measure_manifest="x/dev")
    two = measured(tmp_path / "b", measure_manifest="y/dev")
    assert compare_measurements(one, two, "1", "2").unequal == ("measured on x/dev and y/dev",)
    assert compare_measurements(one, one, "1", "1").unequal == ()


def test_panels_share_one_scale_and_show_their_path() -> None:
    panels = [
        figures.HeatmapPanel(name, matrix, {1: 2, 2: 1})
        for name, matrix in (
            ("a", plain_matrix()),
            ("b", 0.3 * plain_matrix()),
            ("c", plain_matrix(0.4)),
        )
    ]
    figure = figures.heatmap_figure(panels, columns=2)
    images = [axis.images[0] for axis in figure.axes if axis.images and axis.get_title()]
    assert len(images) == 3 and len({image.get_clim() for image in images}) == 1
    for axis in (axis for axis in figure.axes if axis.get_title()):
        assert axis.lines[0].get_xydata().tolist() == [[2, 1], [1, 2]]
