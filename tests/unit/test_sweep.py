"""Which points a sweep has, what is refined, and what the time left is computed from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speechllm_prune import sweep, sweep_estimate
from speechllm_prune.experiment import Variant
from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.estimate import H100, estimate
from speechllm_prune.sweep import Point, Progress, on_paths, parse_paths, plan_points, shard_of
from speechllm_prune.sweep_coarse import coarse_sizes, sizes_in_gap
from speechllm_prune.sweep_estimate import Costs, training_passes
from tests.conftest import REPO_ROOT


def test_points_on_paths() -> None:
    points = plan_points([1, 2], ["none", "joint"], 6, control=True)
    starts = {"own": {1: 3, 2: 3}, "text": {1: 3, 2: 2}}
    placed = on_paths(points, starts)
    assert [(p.block_size, p.heal_mode, p.start_layer, p.control, p.paths) for p in placed] == [
        (1, "none", 3, False, ("own", "text")),
        (1, "joint", 3, False, ("own", "text")),
        (2, "none", 3, False, ("own",)),
        (2, "none", 2, False, ("text",)),
        (2, "joint", 3, False, ("own",)),
        (2, "joint", 2, False, ("text",)),
        (2, "joint", 3, True, ("own",)),
        (2, "joint", 2, True, ("text",)),
    ]
    assert on_paths(points, {"": {1: 4, 2: 4}})[0].paths == ()
    assert on_paths(points, {"own": {2: 3}})[0].block_size == 2, "sizes that a path leaves out"


def test_shards_of_merged_points_are_a_partition() -> None:
    points = on_paths(
        plan_points([], ["none", "joint"], 12, False),
        {"own": dict.fromkeys(range(1, 7), 3), "tail": {n: 11 - n for n in range(1, 7)}},
    )
    parts = [shard_of(points, f"{i}/5") for i in range(1, 6)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, points))
    assert len({(p.start_layer, p.block_size, p.heal_mode) for p in points}) == len(points)


def test_a_file_with_a_comma_is_one_path(tmp_path: Any) -> None:
    file = tmp_path / "a,b.json"
    assert parse_paths(str(file)) == [str(tmp_path / "a"), "b.json"]
    file.write_text("{}")
    assert parse_paths(str(file)) == [str(file)]


@pytest.mark.parametrize("num_sizes", range(1, 17))
def test_the_coarse_plan_finds_what_the_whole_grid_finds(num_sizes: int) -> None:
    """Where scores get worse with n, wherever the tolerance falls."""
    sizes = list(range(1, num_sizes + 1))
    for edge in range(num_sizes + 1):  # 1..edge are accepted
        tested = coarse_sizes(sizes)
        largest = max((n for n in tested if n <= edge), default=None)
        tested = sorted([*tested, *sizes_in_gap(sizes, tested, largest)])
        assert max((n for n in tested if n <= edge), default=0) == edge
        assert edge == num_sizes or edge + 1 in tested, "and the first that is refused"
        assert len(set(tested)) == len(tested) <= len(coarse_sizes(sizes)) + 2


def test_sizes_with_holes() -> None:
    assert coarse_sizes([2, 4, 6, 8, 10]) == [2, 8]
    assert sizes_in_gap([2, 4, 6, 8, 10], [2, 8], 2) == [4, 6]
    assert sizes_in_gap([2, 4, 6, 8, 10], [2, 8], 8) == [10]


def test_costs_grow_with_the_work() -> None:
    costs = Costs(12, 0.5, 0.1, 10, 2, "GPU", "from somewhere")

    def seconds(name: str, to_heal: bool = True, audio: float = 100.0) -> float:
        return costs.seconds(Variant.parse(name), to_heal, audio)

    assert seconds("l07n04-none", False) == 100 * 8 * 0.1
    assert seconds("l07n04-joint") == 10 * 16 * 0.5 + 80
    assert seconds("l07n04-joint", False, 0.0) == 0
    assert seconds("control-l07n04-joint") == 10 * 24 * 0.5 + 120
    assert seconds("l07n04-decoder") < seconds("l07n04-projector") == seconds("l07n04-decoder+all")
    assert training_passes(12, Variant.parse("l07n04-none+comp")) == 0
    assert costs.describe([1800.0, 1800.0]) == "about 2 GPU hours (60 min), from somewhere"
    unknown = Costs(12, None, 0.1, 10, 1, "CPU", "from nothing")
    assert unknown.seconds(Variant.parse("l07n04-none"), False, 1.0) is not None
    assert unknown.seconds(Variant.parse("l07n04-joint"), True, 1.0) is None
    assert unknown.describe([None]) == "time unknown (from nothing)"


def bench_of(tmp_path: Path, **changes: Any) -> Any:
    """As much of a workbench as the estimate looks at: a finished training on two GPUs, scored once."""
    leaf = REPO_ROOT / "hparams/librispeech_qwen7b.yaml"
    hparams = load_hparams(leaf, {"data_folder": "unused", **changes})
    return SimpleNamespace(
        hparams=hparams,
        device="cuda:0",
        run=SimpleNamespace(leaf=str(leaf)),
        experiment=SimpleNamespace(root=tmp_path),
        is_prepared=lambda key: True,
    )


def test_hours_are_computed_from_facts_until_something_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_estimate, "decoder_depth", lambda bench: 28)
    monkeypatch.setattr(sweep_estimate, "audio_seconds", lambda bench, keys: 1000.0 * len(keys))
    bench = bench_of(tmp_path)
    costs, step = Costs.of(bench), estimate(bench.hparams, 2, H100).step_seconds
    control = Variant.parse("control-l18n08-joint")  # as deep as stage 1, hence as slow
    assert costs.seconds(control, True, 0.0) == pytest.approx(bench.hparams["heal_steps"] * step)
    assert 0 < costs.seconds(control, False, 18000.0) < 3600, "five hours of speech"
    assert "GPU hours" in costs.describe([1.0]) and "computed for 2 x 989" in costs.describe([1.0])

    def write(file: str, **record: Any) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(record))

    scored = {"corpus": "a", "split": "b", "seconds": 56.0, "device": "cuda:1"}
    write(
        "train/DONE.json", timing={"seconds_per_step": 5.6, "num_processes": 2, "device": "cuda:0"}
    )
    write("eval/full/a-b/metrics.json", variant="full", **scored)
    costs = Costs.of(bench)
    assert costs.seconds(control, True, 0.0) == pytest.approx(bench.hparams["heal_steps"] * 5.6)
    assert costs.seconds(Variant.parse("l18n08-none"), False, 500.0) == pytest.approx(20.0)
    assert costs.num_processes == 2 and "1 trainings and 1 decodings timed" in costs.source
    # Healings are nearer than stage 1, and another device says nothing.
    timing = {"seconds_per_step": 2.0, "num_processes": 2, "device": "cuda:0"}
    write("heal/l18n08-joint/DONE.json", timing=timing)
    write("heal/l00n01-joint/DONE.json", timing=timing | {"device": "cpu"})
    write("heal/l18n08-none+comp/DONE.json")
    costs = Costs.of(bench)
    assert costs.seconds(Variant.parse("l18n08-joint"), True, 0.0) == pytest.approx(20000.0)
    elsewhere = bench_of(tmp_path / "empty", decoder_hub="somewhere/else")
    assert Costs.of(elsewhere).describe([None]).startswith("time unknown")


def test_the_time_left_is_not_spoilt_by_finished_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    points = [Point(n, "joint") for n in (1, 2, 3, 4)]
    todo = {points[1]: 10.0, points[2]: 30.0, points[3]: None}  # not known: 20 as the mean
    monkeypatch.setattr(sweep, "seconds_left", lambda bench, points: (todo, None))
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    progress = Progress(SimpleNamespace(rank=0, shows_progress=False), points)
    for point, seconds in zip(points, (1.0, 20.0, 60.0, 40.0), strict=True):
        now[0] += seconds
        progress.finished(point)
    assert capsys.readouterr().out.splitlines() == [
        "[1/4] n=1 joint: was already done",
        "[2/4] n=2 joint: 20 s, about 2 min left",  # twice as slow as thought: 2 * 50 s
        "[3/4] n=3 joint: 60 s, about 40 s left",
        "[4/4] n=4 joint: 40 s",
    ]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    points = [Point(1, "none"), Point(2, "none")]
    seconds = dict.fromkeys(points, 1.0)
    monkeypatch.setattr(sweep, "seconds_left", lambda bench, points: (seconds, None))
    progress = Progress(SimpleNamespace(rank=0, shows_progress=True), points)
    progress.finished(points[0])
    progress.finished(points[1], "failed after ")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "2/2" in captured.err and "left" in captured.err
