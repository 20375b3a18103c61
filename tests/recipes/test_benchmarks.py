"""Benchmarks run on a tiny shape and count what they claim; how long they take is never tested."""

from __future__ import annotations

import pytest

from benchmarks import distance_pass


def test_distance_pass_never_calls_the_output_layer(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layers": 3, "width": 128, "batch": 2, "positions": 10, "repeats": 1}
    distance_pass.main([part for name, n in sizes.items() for part in (f"--{name}", str(n))])
    out = capsys.readouterr().out
    assert "3 layers, width 128, 2 x 10 positions" in out
    assert "lm_head called 0 times" in out
