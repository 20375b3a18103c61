"""Selectors: one interface, paths that leave the last layer, and what each one needs."""

from __future__ import annotations

import math

import pytest

from speechllm_prune.prune.path import pruning_path, tail_path
from speechllm_prune.prune.selectors import SELECTORS, BlockLosses, Evidence, best_blocks, select
from speechllm_prune.runtime import UserError

NAN = math.nan
L = 5
DISTANCE = [
    [0.50, 0.10, 0.30, 0.20, 0.01],
    [0.60, 0.40, 0.15, 0.02, NAN],
    [0.70, 0.55, 0.03, NAN, NAN],
    [0.80, 0.04, NAN, NAN, NAN],
    [0.90, NAN, NAN, NAN, NAN],
]
INFLUENCE = [
    [0.05, 0.10, 0.30, 0.20, 0.01],
    [0.60, 0.40, 0.45, 0.02, NAN],
    [0.70, 0.55, 0.03, NAN, NAN],
    [0.80, 0.04, NAN, NAN, NAN],
    [0.90, NAN, NAN, NAN, NAN],
]
LOSS = {(1, 1): 3.0, (3, 1): 2.0, (2, 2): 4.0, (1, 2): 4.0, (1, 3): 5.0, (0, 4): 9.0}
EVIDENCE = Evidence(L, DISTANCE, INFLUENCE, LOSS, given={"1": 3, "2": 0, "3": 1, "4": 0}, seed=7)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_gives_a_block_of_every_size_that_leaves_the_last_layer(name: str) -> None:
    path = select(name, EVIDENCE)
    assert list(path) == [1, 2, 3, 4]
    assert all(
        type(n) is int and type(start) is int and 0 <= start < L - n for n, start in path.items()
    )


def test_each_selector_decides_by_its_own_evidence() -> None:
    assert select("angular", EVIDENCE) == pruning_path(DISTANCE) == {1: 1, 2: 2, 3: 1, 4: 0}
    assert select("influence", EVIDENCE) == {1: 0, 2: 1, 3: 1, 4: 0}
    assert select("tail", EVIDENCE) == tail_path(L) == {1: 3, 2: 2, 3: 1, 4: 0}
    assert select("given", EVIDENCE) == {1: 3, 2: 0, 3: 1, 4: 0}
    assert select("rerank", EVIDENCE) == {1: 3, 2: 1, 3: 1, 4: 0}  # ties: the smallest l


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("angular", "distance"),
        ("influence", "influence"),
        ("given", "given"),
        ("rerank", "loss"),
    ],
)
def test_missing_evidence_is_named(name: str, part: str) -> None:
    with pytest.raises(UserError, match=f"needs '{part}'"):
        select(name, Evidence(L))


def test_an_unknown_selector_and_a_path_of_another_decoder_are_refused() -> None:
    with pytest.raises(UserError, match="'best' is not one of angular, influence"):
        select("best", EVIDENCE)
    with pytest.raises(UserError, match=r"start_layer 4 is outside 0\.\.3"):
        select("given", Evidence(L, given={"2": 4}))


def test_random_paths_follow_the_seed_and_reach_every_block() -> None:
    paths = [select("random", Evidence(L, seed=seed)) for seed in range(200)]
    assert paths[3] == select("random", Evidence(L, seed=3))
    assert {path[2] for path in paths} == {0, 1, 2} and {path[1] for path in paths} == {0, 1, 2, 3}


def test_best_blocks_are_sorted_and_leave_the_last_layer() -> None:
    assert best_blocks(DISTANCE, 2) == [(1, 1), (3, 1), (2, 2), (1, 2), (1, 3), (0, 3), (0, 4)]
    with_last = min((value, start) for start, value in enumerate(DISTANCE[0]))  # the wrong way
    assert with_last[1] == 4 and (4, 1) not in best_blocks(DISTANCE, 99)
    assert len(best_blocks(DISTANCE, 99)) == 10


def test_mean_losses_are_per_label() -> None:
    losses = BlockLosses({(0, 1): 6.0}, full=3.0, num_labels=4)
    assert losses.mean == {(0, 1): 1.5} and losses.all_reduce() is losses
