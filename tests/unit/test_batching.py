"""Which utterances go together, in which order, on which rank; and how they are padded."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from speechllm_prune.data.batching import (
    EndlessBatchSampler,
    collate,
    cut_batches,
    sorted_batches,
)
from speechllm_prune.runtime import UserError


def librispeech_like(count: int, seed: int = 0) -> list[int]:
    """Decoder positions of utterances: two thirds near 14-16 s, the rest spread over 1.5-14 s, at 10 Hz plus text."""
    rng = random.Random(seed)
    seconds = [
        rng.uniform(12, 16.5) if rng.random() < 0.65 else rng.uniform(1.5, 12) for _ in range(count)
    ]
    return [round(10 * s) + 6 + round(3.8 * s) for s in seconds]


def all_ranks(world_size: int, **options) -> list[EndlessBatchSampler]:
    return [
        EndlessBatchSampler(rank=r, world_size=world_size, **options) for r in range(world_size)
    ]


OPTIONS = [
    {"batch_size": 4},
    {"batch_size": 1},
    {"batch_size": 7, "pool_batches": 3},
    {"batch_size": 4, "batch_positions": 600, "pool_batches": 5},
    {"batch_size": 4, "batch_positions": 100, "pool_batches": 2},
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [8, 9, 65, 401])
def test_every_utterance_once_per_pass_in_equally_many_batches(
    world_size: int, options: dict, count: int
) -> None:
    samplers = all_ranks(world_size, sizes=librispeech_like(count), **options)
    for pass_number in range(3):
        batches = [sampler.batches_of_pass(pass_number) for sampler in samplers]
        assert len({len(own) for own in batches}) == 1
        assert all(batch for own in batches for batch in own)
        seen = Counter(index for own in batches for batch in own for index in batch)
        assert seen == Counter(range(count))


@pytest.mark.parametrize("options", OPTIONS)
def test_batches_keep_their_limit(options: dict) -> None:
    sizes = librispeech_like(500)
    for batch in EndlessBatchSampler(sizes, **options).batches_of_pass(0):
        longest = max(sizes[i] for i in batch)
        if options.get("batch_positions"):
            assert len(batch) == 1 or longest * len(batch) <= options["batch_positions"]
        else:
            assert len(batch) <= options["batch_size"]


def test_batch_positions_are_used_well() -> None:
    sizes = librispeech_like(5000)
    batches = EndlessBatchSampler(sizes, 1, batch_positions=4000, pool_batches=20).batches_of_pass(
        0
    )
    filled = [max(sizes[i] for i in batch) * len(batch) for batch in batches]
    assert sum(filled) / len(filled) > 0.85 * 4000


def test_passes_differ_and_depend_on_the_seed_alone() -> None:
    sizes = librispeech_like(100)
    sampler = EndlessBatchSampler(sizes, 4, seed=5)
    passes = [sampler.batches_of_pass(number) for number in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    membership = [{frozenset(batch) for batch in own} for own in passes]
    assert (
        len(membership[0] & membership[1]) < 10
    )  # other batches, not only another order of the same
    random.seed(99)
    torch.manual_seed(99)
    again = EndlessBatchSampler(sizes, 4, seed=5)
    assert [again.batches_of_pass(number) for number in (1, 0)] == [passes[1], passes[0]]
    assert EndlessBatchSampler(sizes, 4, seed=6).batches_of_pass(0) != passes[0]


def test_batches_are_not_in_the_order_of_length() -> None:
    sizes = librispeech_like(2000)
    batches = EndlessBatchSampler(sizes, 4).batches_of_pass(0)
    lengths = [max(sizes[i] for i in batch) for batch in batches]
    n = len(lengths)
    mean, spread = sum(lengths) / n, sum((x - sum(lengths) / n) ** 2 for x in lengths)
    lag = sum((a - mean) * (b - mean) for a, b in itertools.pairwise(lengths)) / spread
    assert abs(lag) < 0.15


def test_little_padding_and_balanced_ranks_on_lengths_as_in_librispeech() -> None:
    sizes = librispeech_like(8000)
    world = all_ranks(2, sizes=sizes, batch_size=4)
    real = padded = 0
    imbalance = []
    for step in zip(*(sampler.batches_of_pass(0) for sampler in world), strict=True):
        costs = [max(sizes[i] for i in batch) * len(batch) for batch in step]
        padded += sum(costs)
        real += sum(sizes[i] for batch in step for i in batch)
        imbalance.append(1 - min(costs) / max(costs))
    assert 1 - real / padded < 0.03
    assert sum(imbalance) / len(imbalance) < 0.03
    shuffled = list(range(8000))
    random.Random(0).shuffle(shuffled)
    careless = sum(4 * max(sizes[i] for i in shuffled[f : f + 4]) for f in range(0, 8000, 4))
    assert 1 - real / careless > 0.15  # what the pools save


@pytest.mark.parametrize("position", [0, 1, 24, 25])
def test_resumes_where_it_was(position: int) -> None:
    sizes = librispeech_like(101)  # 26 batches a pass
    reference = EndlessBatchSampler(sizes, 4, seed=3)
    expected = list(itertools.islice(iter(reference), 80))
    assert expected[26:52] == reference.batches_of_pass(1)
    running = EndlessBatchSampler(sizes, 4, seed=3)
    used = 26 + position
    for _ in range(used):
        running.advance()
    state = running.state_dict()
    assert state == {"pass": 1, "position": position, "utterances": 101}
    resumed = EndlessBatchSampler(sizes, 4, seed=3)
    resumed.load_state_dict(state)
    assert list(itertools.islice(iter(resumed), 80 - used)) == expected[used:]


def test_a_pass_ends_exactly_at_its_last_batch() -> None:
    sampler = EndlessBatchSampler(librispeech_like(101), 4)
    for _ in range(26):
        sampler.advance()
    assert (sampler.pass_number, sampler.position) == (1, 0)
    sampler.advance()
    assert (sampler.pass_number, sampler.position) == (1, 1)


def test_passes_of_different_length_are_counted_right() -> None:
    sampler = EndlessBatchSampler(librispeech_like(300), 1, batch_positions=700, pool_batches=4)
    lengths = [len(sampler.batches_of_pass(number)) for number in range(6)]
    assert len(set(lengths)) > 1  # else this test says nothing
    for _ in range(sum(lengths)):
        sampler.advance()
    assert (sampler.pass_number, sampler.position) == (6, 0)


def test_reading_ahead_does_not_move_the_position() -> None:
    sampler = EndlessBatchSampler(librispeech_like(30), 4)
    list(itertools.islice(iter(sampler), 5))  # a loader's workers prefetch
    assert (sampler.pass_number, sampler.position) == (0, 0)


def test_refuses_other_data_and_too_little() -> None:
    state = EndlessBatchSampler([1] * 10, 2).state_dict()
    with pytest.raises(UserError, match="10 training utterances, now there are 9"):
        EndlessBatchSampler([1] * 9, 2).load_state_dict(state)
    with pytest.raises(UserError, match="2 training utterances cannot feed 3 processes"):
        EndlessBatchSampler([1, 1], 2, world_size=3)


def test_cut_batches() -> None:
    sizes = [5, 6, 7, 20, 3, 3]
    assert cut_batches([0, 1, 2, 3, 4, 5], sizes, 4) == [[0, 1, 2, 3], [4, 5]]
    # 14 positions: 7 x 2 fits, 7 x 3 does not; 20 stands alone and does not pull its neighbours in.
    assert cut_batches([0, 1, 2, 3, 4, 5], sizes, 1, 14) == [[0, 1], [2], [3], [4, 5]]
    assert cut_batches([3, 4, 5], sizes, 1, 14) == [[3], [4, 5]]
    assert cut_batches([], sizes, 4) == []


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_sorted_batches_hold_every_utterance_once_longest_first(world_size: int) -> None:
    sizes = librispeech_like(37)
    ranks = [sorted_batches(sizes, 4, rank, world_size) for rank in range(world_size)]
    assert sorted(i for own in ranks for batch in own for i in batch) == list(range(37))
    for own in ranks:
        order = [sizes[i] for batch in own for i in batch]
        assert order == sorted(order, reverse=True)
    # A machine that is too small says so at the first batch.
    assert max(sizes) in [sizes[i] for i in ranks[0][0]]


def test_collate_pads_and_keeps_true_lengths() -> None:
    items = [
        {
            "id": str(n),
            "audio": torch.full((n,), float(n)),
            "target_ids": [n],
            "text": "x",
            "duration": n / 2,
        }
        for n in (3, 5, 1)
    ]
    batch = collate(items)
    assert batch.ids == ["3", "5", "1"] and batch.audio_lengths == [3, 5, 1] and len(batch) == 3
    assert batch.audio.tolist() == [[3, 3, 3, 0, 0], [5, 5, 5, 5, 5], [1, 0, 0, 0, 0]]
    assert batch.target_ids == [[3], [5], [1]] and batch.durations == [1.5, 2.5, 0.5]
    assert not batch.has_features
    features = collate([item | {"audio": torch.ones(4, 2)} for item in items])
    assert features.has_features and features.audio_lengths == [4, 4, 4]
