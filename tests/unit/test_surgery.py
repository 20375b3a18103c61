"""Plans: the arithmetic of a block. What removing one does to a model is in tests/numerics/test_surgery.py."""

from __future__ import annotations

import pytest

from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.runtime import UserError


def test_a_block_is_half_open() -> None:
    plan = PrunePlan(6, 2, 3)
    assert plan.kept_layers == [0, 1, 5]
    assert plan.receiving_layer == 5
    assert plan.name == "l02n03"


@pytest.mark.parametrize(("start", "size"), [(0, 5), (4, 1), (0, 1)])
def test_kept_removed_and_receiver_fit_together(start: int, size: int) -> None:
    plan = PrunePlan(6, start, size)
    assert len(plan.kept_layers) == 6 - size
    # The receiver keeps its weights and takes the place of the first removed layer.
    assert plan.kept_layers[start] == plan.receiving_layer == start + size


def test_a_block_at_the_end_has_no_receiver() -> None:
    plan = PrunePlan(6, 4, 2)
    assert plan.receiving_layer is None and plan.kept_layers == [0, 1, 2, 3]


def test_a_control_keeps_everything_and_has_the_same_receiver() -> None:
    plan = PrunePlan(6, 2, 3, control=True)
    assert plan.kept_layers == [0, 1, 2, 3, 4, 5] and plan.receiving_layer == 5


@pytest.mark.parametrize(
    ("start", "size", "message"),
    [
        (0, 0, r"block_size 0 is outside 1..5 \(the decoder has 6 layers\)"),
        (0, 6, "block_size 6 is outside 1..5"),
        (-1, 2, "start_layer -1 is outside 0..4"),
        (5, 2, "start_layer 5 is outside 0..4 for block_size 2 of 6 layers"),
    ],
)
def test_refusals_say_what_is_allowed(start: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrunePlan(6, start, size)
