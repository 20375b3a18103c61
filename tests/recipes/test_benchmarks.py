"""Benchmarks run at a tiny size, where both sides must give the same; how long they take is never tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import common, cpu, decoding, loader, padding, rerank, train_step, wavlm_attention
from benchmarks.common import Result


def run_tiny(name: str, folder: Path) -> list[Result]:
    """Results of a script, through its command line."""
    file = folder / "results.json"
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.main(["--tiny", "--json", str(file)]) in (0, 1)  # speed at this size says nothing
    return [Result(**facts) for facts in json.loads(file.read_text())["results"]]


@pytest.fixture(autouse=True)
def _memory_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for each side would cost most of the time of these tests."""
    for module in (train_step, wavlm_attention):

        def peak(file: str, side: str, tiny: bool, module: ModuleType = module) -> float:
            return common.extra_peak_mib(module.sides(tiny)[side])

        monkeypatch.setattr(module, "peak_of_side", peak)


@pytest.mark.parametrize("name", cpu.NAMES)
def test_every_benchmark_at_its_tiny_size(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_tiny(name, tmp_path)
    out = capsys.readouterr().out
    assert any(result.gate for result in results)
    assert all(f"| {result.goal}" in out and result.cells()[4] in out for result in results)


@pytest.mark.slow
def test_memory_is_that_of_one_call_in_a_process_of_its_own() -> None:
    assert 0 < common.peak_of_side(train_step.__file__, "ours", tiny=True) < 200


def test_peak_memory_counts_what_is_freed_again() -> None:
    def call() -> None:
        torch.ones(2**24)  # 64 MiB

    assert 50 < common.extra_peak_mib(call) < 100
    assert common.extra_peak_mib(lambda: None) < 20


def test_counts_hold_at_any_size(tmp_path: Path) -> None:
    passed = {result.goal: result for result in run_tiny("distance_pass", tmp_path)}
    assert passed["C6 calls of lm_head"].value == 0
    assert passed["C6 bytes kept: one position of every layer"].value == 1
    for result in run_tiny("checkpoint", tmp_path):
        assert result.is_met


def test_the_sides_of_the_training_step_have_one_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = train_step.setting(tiny=True)
    loss = train_step.check_same(model, batch)
    assert 5 < loss < 8  # about log(500)
    # Padding in the middle of a row without its own position ids is another function, as the recipe has it.
    shifted = float(train_step.speechbrain_step(model, batch))
    assert abs(shifted - loss) > 1e-7
    monkeypatch.setattr(train_step, "our_step", lambda m, b: torch.tensor(1.0).requires_grad_())
    with pytest.raises((SystemExit, AttributeError)):
        train_step.check_same(model, batch)


@torch.no_grad()
def test_three_searches_give_the_same_tokens_and_each_row_its_length() -> None:
    sides, prefix, ends = decoding.searches(tiny=True)
    rows = sides["ours"]()
    assert [len(row) for row in rows] == ends.tolist()
    assert sides["generate"]() == rows and sides["speechbrain"]() == rows
    assert len({tuple(row[:2]) for row in rows}) > 1


def test_both_loaders_give_the_same_waveforms_and_tokens(tmp_path: Path) -> None:
    rows = loader.synthetic_rows(tmp_path, 3, 0.5)
    tokenizer = loader.tokenizer_for(rows)
    batches, ours = loader.our_pass(rows, tokenizer)
    theirs = loader.speechbrain_pass(rows, tokenizer, batches)
    loader.check_same(ours(), theirs())
    with pytest.raises(SystemExit, match="differ"):
        other = ours()
        other[0].audio += 1
        loader.check_same(other, theirs())


def test_a_missed_gate_is_an_exit_code_with_the_table_and_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(tiny: bool) -> list[Result]:
        product = torch.ones(4, 4)
        return [
            Result("good", 2.0, ">= 1.7x"),
            Result("bad", 1.5, ">= 1.7x", profile=lambda: product @ product),
            Result("shown", 0.1),
        ]

    file = tmp_path / "results.json"
    assert common.script("A test.", measure, ["--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "| 1.50x MISSED |" in out and "2.00x MISSED" not in out and "aten::mm" in out
    assert list(json.loads(file.read_text())["profiles"]) == ["bad"]
    assert common.script("A test.", lambda tiny: measure(tiny)[::2], []) == 0


def test_gates_read_both_ways() -> None:
    found = [Result("", value, gate).is_met for value, gate in ((3, "<= 3 %"), (3.1, "<= 3 %"))]
    found += [Result("", value, ">= 3000").is_met for value in (3000, 2999)]
    found += [Result("", 1.0, "").is_met]
    assert found == [True, False, True, False, True]


@pytest.mark.slow
def test_a_benchmark_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert cpu.main(["checkpoint", "--tiny", "--out", str(tmp_path)]) == 0
    assert "| C10 checkpoint" in next(tmp_path.glob("*-cpu.md")).read_text()


def test_everything_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([2.0, 1.0])  # the second run misses the gate

    def run_one(name: str, tiny: bool) -> tuple[list[Result], dict[str, str]]:
        result = Result(f"C0 {name}", next(found), ">= 1.7x", "1 s", "2 s")
        return [result], {} if result.is_met else {result.goal: "all of it in mm"}

    monkeypatch.setattr(cpu, "run_one", run_one)
    assert cpu.main(["loader", "--runs", "2", "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*-cpu.md")
    text = file.read_text()
    assert text in capsys.readouterr().out
    for part in (
        "| C0 loader | >= 1.7x | 1 s  | 2 s    | 2.00x | -     |",
        "Run 2: C0 loader: 1.00x MISSED",
        "## Missed: C0 loader\n\n```\nall of it in mm",
        "- load average",
        f"torch {torch.__version__.split('+')[0]}",
        "- commit: ",
        "- command: python benchmarks/cpu.py loader --runs 2",
    ):
        assert part in text
    with pytest.raises(SystemExit):
        cpu.main(["nothing"])
    assert "no benchmark nothing; there are train_step" in capsys.readouterr().err


def test_a_benchmark_that_breaks_is_a_missed_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "NAMES", ("no_such_script",))
    assert cpu.main(["--out", str(tmp_path)]) == 1
    assert "no_such_script: no result" in next(tmp_path.glob("*-cpu.md")).read_text()


def test_padding_is_counted_by_hand() -> None:
    assert padding.wasted(8, 10) == pytest.approx(20)
    assert padding.straggling([[4, 2], [2, 2]]) == pytest.approx(20)


def test_naive_and_shared_losses_run_the_layers_they_claim() -> None:
    decoder = common.qwen2(4, 32, 1000)
    batches = rerank.make_batches(32, 2, length=8)
    _, naive = rerank.naive_losses(decoder, [(1, 1), (0, 2)], batches)
    shared = rerank.block_losses(decoder, [(1, 1), (0, 2)], batches).layer_evaluations
    assert naive == 2 * (3 + 2) and shared == 2 * (4 + 2 + 2)
