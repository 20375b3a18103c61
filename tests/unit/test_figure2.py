"""Figure 2 and the pruning curves: what is drawn where, and that nothing is cut off. All scores are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from speechllm_prune.reporting import curves, figures
from speechllm_prune.reporting.analysis import analyse
from speechllm_prune.reporting.collect import ExperimentData, collect
from speechllm_prune.reporting.relative import TEXT, figure2_table, next_smaller
from speechllm_prune.reporting.tables import Table
from tests.unit import fake_results as fake

CLEAN, OTHER = "librispeech-test-clean", "librispeech-test-other"


def judged(*folders: Path) -> tuple[list[ExperimentData], dict]:
    experiments = [collect(folder) for folder in folders]
    return experiments, {str(e.folder): analyse(e) for e in experiments}


def write(root: Path, name: str, hub: str, sizes: tuple[int, ...] = (2, 4), seed: int = 1, **keys):
    folder = fake.write_experiment(
        root / "results" / name / str(seed), sizes, 30, sets=fake.SETS[:2]
    )
    manifests = [f"{corpus}/{split}" for corpus, split in reversed(fake.SETS[:2])]
    fake.write_settings(folder, decoder_hub=hub, **({"eval_manifests": manifests} | keys))
    return folder


def scale_errors(folder: Path, split: str, errors: int) -> None:
    """Give the unpruned model this many errors in every utterance of ten words."""
    fake.write_point(folder, "full", "librispeech", split, [errors] * 30)


def labelled(axis) -> dict[str, np.ndarray]:
    return {c.get_label(): c.lines[0].get_xydata() for c in axis.containers}


def extents(figure):
    """Everything written or framed in a figure, in its pixels."""
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in axis.texts + [axis.title]]
    for axis in figure.axes:
        for one in (axis.xaxis, axis.yaxis):
            low, high = sorted(one.get_view_interval())
            ticks = [tick for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [one.label, *(tick.label1 for tick in ticks)]
    boxes = [t.get_window_extent() for t in texts if t.get_visible() and t.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    return [box for box in boxes if box.width > 0 and box.height > 0]


def assert_nothing_is_cut_off(figure) -> None:
    width, height = figure.bbox.width, figure.bbox.height
    for box in extents(figure):
        assert box.x0 >= -1 and box.y0 >= -1, box
        assert box.x1 <= width + 1 and box.y1 <= height + 1, (box, width, height)


# ------------------------------------------------------------------------------------------- one experiment
def test_a_panel_per_set_shows_every_mode_against_the_unpruned_model(tmp_path):
    folder = write(tmp_path, "demo", "made-up", tolerance=0.3)
    experiments, results = judged(folder)
    figure = curves.figure2(experiments, results)
    assert [axis.get_title() for axis in figure.axes] == [
        f"{OTHER} (30 utterances)",  # in the order of the experiment
        f"{CLEAN} (30 utterances)",
    ]
    drawn = labelled(figure.axes[0])
    modes = {"no healing", "decoder healing", "projector healing", "joint healing"}
    assert set(drawn) == modes | {
        "joint healing, text-derived path",
        "control, joint healing (n=4)",
    }
    expected = [
        100 * r.degradation
        for r in results[str(folder)]
        if r.point.eval_set == OTHER and r.point.variant.endswith("-none")
    ]
    assert drawn["no healing"][:, 1].tolist() == pytest.approx(expected)
    assert drawn["no healing"][:, 0] == pytest.approx([100 * 2 / 12, 100 * 4 / 12], abs=2.0)
    levels = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert levels["unpruned"] == 0.0 and levels["tolerance: 30 % worse"] == 30.0
    assert_nothing_is_cut_off(figure)


def test_the_text_path_is_its_own_series_with_a_gap_where_it_was_not_tested(tmp_path):
    folder = write(tmp_path, "demo", "made-up", (2, 4, 6))
    text = fake.distance_matrix(12)
    text[3, 0] = 0.001  # at n = 4 text chooses another block
    fake.write_measurement(folder, "text", text)
    experiments, results = judged(folder)
    series = labelled(curves.figure2(experiments, results).axes[0])[
        "joint healing, text-derived path"
    ]
    assert np.isnan(series[:, 1]).tolist() == [False, True, False]
    row = next(row for row in figure2_table(experiments, results).rows if row[2] == "4")
    assert row[-2] == "not measured" and row[-3] != "not measured"
    fake.write_point(folder, "l00n04-joint", "librispeech", "test-other", [5] * 30)
    experiments, results = judged(folder)
    series = labelled(curves.figure2(experiments, results).axes[0])[
        "joint healing, text-derived path"
    ]
    full = experiments[0].baseline(OTHER).value
    assert series[1, 1] == pytest.approx(100 * (50.0 - full) / full)
    found = [r for r in figure2_table(experiments, results).records if r["series"] == TEXT]
    assert {r["variant"] for r in found if r["block_size"] == 4} == {"l00n04-joint"}


def test_an_undecided_degradation_is_left_out_and_said(tmp_path):
    folder = write(tmp_path, "demo", "made-up")
    scale_errors(folder, "test-other", 0)
    experiments, results = judged(folder)
    figure = curves.figure2(experiments, results)
    assert all(np.isnan(xy[:, 1]).all() for xy in labelled(figure.axes[0]).values())
    assert not np.isnan(labelled(figure.axes[1])["joint healing"][:, 1]).any()
    row = figure2_table(experiments, results).rows[0]
    assert row[4].startswith("undecided")


# --------------------------------------------------------------------------------------- next smaller tier
def test_the_next_smaller_tier_is_of_the_family_and_one_step_down(tmp_path):
    names = {"7b": "Qwen2.5-7B", "3b": "Qwen2.5-3B", "1b": "Qwen2.5-1.5B", "llama": "Llama-3.2-3B"}
    folders = {key: write(tmp_path, key, f"hub/{name}") for key, name in names.items()}
    folders["lora"] = write(tmp_path, "lora", "hub/Qwen2.5-7B", decoder_lora_rank=16)
    for key, errors in (("7b", 2), ("3b", 3), ("1b", 4), ("llama", 5), ("lora", 1)):
        scale_errors(folders[key], "test-clean", errors)
    experiments, results = judged(*folders.values())
    by_name = {experiment.name: experiment for experiment in experiments}
    found = {e.name: next_smaller(e, experiments, CLEAN) for e in experiments}
    assert found["7b"].label == "3b (seed 1)" and found["7b"].degradation == pytest.approx(0.5)
    assert found["lora"].label == "3b (seed 1)" and found["lora"].degradation == pytest.approx(2.0)
    assert found["3b"].label == "1b (seed 1)"
    assert found["1b"] is None and found["llama"] is None
    pair = [by_name["7b"], by_name["1b"]]
    assert next_smaller(pair[0], pair, CLEAN) is None  # two steps down is not the next
    figure = curves.figure2([by_name["7b"], by_name["3b"]], results)
    panel = next(axis for axis in figure.axes if "clean" in axis.get_title())
    dashed = [
        line.get_ydata()[0] for line in panel.lines if "next smaller" in str(line.get_label())
    ]
    assert dashed == pytest.approx([50.0])


def test_other_decoders_are_a_tier_below_by_size_and_on_the_same_data(tmp_path):
    large, small = (write(tmp_path, name, f"made/{name}") for name in ("large", "small"))

    def with_fields(folder: Path, **changes) -> None:
        for file in folder.glob("eval/full/*/metrics.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def found():
        experiments, _ = judged(large, small)
        return next_smaller(experiments[0], experiments, CLEAN)

    assert found() is None  # equally large
    with_fields(small, decoder_parameters=800)
    assert found() is None  # nearly so
    with_fields(small, decoder_parameters=500)
    assert found().label == "small (seed 1)"
    with_fields(small, inputs={"manifests/librispeech/test-clean.csv": "e" * 64})
    assert found() is None


# ------------------------------------------------------------------------------------ several experiments
@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six experiments with long names and very different scales. Read only."""
    root = tmp_path_factory.mktemp("six")
    folders = []
    for index in range(6):
        name = f"an_experiment_with_quite_a_long_name_of_its_own_number_{index}"
        folders.append(write(root, name, "hub/Qwen2.5-7B", (2, 4, 6), seed=index))
        scale_errors(folders[-1], "test-clean", 1 + index)
    for file in folders[0].glob("eval/l*-none/*test-clean/metrics.json"):
        fake.write_point(
            folders[0], file.parent.parent.name, "librispeech", "test-clean", [60] * 30
        )
    return folders


@pytest.mark.parametrize("which", ["figure2", "pruning_curve"])
def test_overlaid_experiments_have_markers_and_the_legend_is_a_sum(six, which):
    experiments, results = judged(*six)
    if which == "figure2":
        figure = curves.figure2(experiments, results)
    else:
        figure = curves.pruning_curve(experiments, results, CLEAN)
    axis = next(axis for axis in figure.axes if "clean" in axis.get_title())
    joint = [c for c in axis.containers if c.get_label() == "joint healing"]
    assert len(joint) == 6
    assert len({c.lines[0].get_marker() for c in joint}) == 6
    assert len({c.lines[0].get_color() for c in joint}) == 1
    styles = {
        label: next(c for c in axis.containers if c.get_label() == label).lines[0].get_linestyle()
        for label in ("no healing", "decoder healing", "projector healing", "joint healing")
    }
    assert len(set(styles.values())) == 4  # told apart in grey
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(entries) == len(set(entries)) < 6 + 10
    assert sum("number_" in entry.replace("\n", "") for entry in entries) == 6
    assert_nothing_is_cut_off(figure)


def test_the_legend_takes_no_height_from_the_panels(six):
    experiments, results = judged(*six)
    heights = []
    for shown in (experiments[:1], experiments):
        figure = curves.pruning_curve(shown, results, CLEAN)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height / figure.dpi)
    assert min(heights) > 2.2, heights


def test_extras_have_series_that_differ(tmp_path):
    folder = write(tmp_path, "demo", "made-up", (2,))
    block = next(path.name for path in (folder / "eval").glob("l*-joint"))
    for tag in ("kl", "comp", "all"):
        fake.write_point(folder, f"{block}+{tag}", "librispeech", "test-clean", [1] * 30)
    experiments, results = judged(folder)
    axis = curves.pruning_curve(experiments, results, CLEAN).axes[0]
    drawn = {c.get_label(): c.lines[0] for c in axis.containers}
    names = [f"joint healing + {tag}" for tag in ("kl", "comp", "all")] + ["joint healing"]
    assert len({drawn[name].get_marker() for name in names}) == 4
    assert len({drawn[name].get_color() for name in names}) == 4
    assert "joint healing + kl" not in labelled(curves.figure2(experiments, results).axes[0])


# ------------------------------------------------------------------------------------- tables as pictures
def test_a_table_as_a_picture_is_cut_off_nowhere_and_columns_do_not_overlap():
    rows = [["W" * 20, "a word " * 20, "3"], ["m", "", "12.53 [1.00, 2.00]"]]
    table = Table("A title " * 10, ["first", "second", "third with a long head"], rows)
    table.notes = ["a note " * 30]
    figure = figures.table_figure([table, Table("Another", ["x"], [["1"]])])
    assert_nothing_is_cut_off(figure)
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    for index, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[index + 1 :])
