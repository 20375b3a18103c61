#!/usr/bin/env python3
"""C7: decoder positions lost to padding, and steps that wait for the slowest of 8 ranks.

    python benchmarks/padding.py

Our batches are those of the training sampler, over one pass, with `batch_size: 4` as in the leaves and with a budget of
positions (`batch_positions`) worth 400 s of audio; the layout has no hole, so padded positions are rows x longest. The
other side is `DynamicBatchSampler` of the installed speechbrain package at 400 s with 200 buckets, laid out as its
SpeechLLM recipe does it: the speech of a batch is padded and the text of a batch is padded. Lengths are drawn to look
like LibriSpeech's training set (100,000 utterances, mean 12.4 s, most between 12 and 17 s, none longer), with 3.4
target tokens a second: no file of the corpus is read.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speechbrain.dataio.sampler import DynamicBatchSampler

from benchmarks.common import PROMPT_TOKENS, STACK, Result, check, script
from speechllm_prune.data.batching import EndlessBatchSampler
from speechllm_prune.models.projector import stacked_length

UTTERANCES, RANKS, SECONDS, BUCKETS = 100_000, 8, 400, 200
FRAMES_PER_SECOND, TOKENS_PER_SECOND = 50, 3.4
Batches = list[list[int]]


def draw(count: int) -> tuple[list[float], list[int], list[int]]:
    """Seconds, speech positions and target tokens of some utterances."""
    generator = random.Random(0)
    seconds, speech, targets = [], [], []
    for _ in range(count):
        long = generator.random() < 0.7
        length = generator.gauss(14.5, 1.2) if long else generator.uniform(1.5, 13.5)
        seconds.append(min(17.0, length))
        speech.append(stacked_length(int(FRAMES_PER_SECOND * seconds[-1]), STACK))
        targets.append(max(1, round(TOKENS_PER_SECOND * seconds[-1] * generator.gauss(1, 0.15))))
    return seconds, speech, targets


def wasted(real: int, padded: int) -> float:
    """Percent of the padded positions that are padding."""
    return 100 * (1 - real / padded)


def straggling(ranks: list[list[int]]) -> float:
    """Percent that the largest rank of a step is above the mean of its step, on average over the steps."""
    steps = list(zip(*ranks, strict=True))
    return 100 * (fmean(max(step) for step in steps) / fmean(fmean(step) for step in steps) - 1)


def our_batches(sizes: list[int], world: int = 1, **how: int) -> list[Batches]:
    """One pass of the training sampler, for every rank."""
    return [
        EndlessBatchSampler(sizes, rank=rank, world_size=world, **how).batches_of_pass(0)
        for rank in range(world)
    ]


def measure(tiny: bool) -> list[Result]:
    """Padding and straggling of our sampler in the settings below, and of SpeechBrain's."""
    seconds, speech, targets = draw(4000 if tiny else UTTERANCES)
    sizes = [s + PROMPT_TOKENS + t for s, t in zip(speech, targets, strict=True)]
    budget = {"batch_size": 1, "batch_positions": round(SECONDS * sum(sizes) / sum(seconds))}

    def padded(batch: list[int]) -> int:
        return len(batch) * max(sizes[i] for i in batch)

    def apart(batch: list[int]) -> int:
        longest = max(speech[i] for i in batch) + max(targets[i] for i in batch)
        return len(batch) * (longest + PROMPT_TOKENS)

    theirs: Batches = list(
        DynamicBatchSampler(seconds, SECONDS, BUCKETS, lengths_list=seconds, shuffle=True)
    )
    their_share = f"{wasted(sum(sizes), sum(map(apart, theirs))):.2f} %"
    # As its DistributedSamplerWrapper deals them out: batch i to rank i modulo the number of ranks.
    whole = len(theirs) // RANKS * RANKS
    waiting = straggling([list(map(apart, theirs[r:whole:RANKS])) for r in range(RANKS)])
    results = []
    for label, world, how in (
        ("4 rows a batch", 1, {"batch_size": 4}),
        (f"{SECONDS} s a batch", 1, budget),
        ("4 rows a batch", RANKS, {"batch_size": 4}),
        (f"{SECONDS} s a batch", RANKS, budget),
    ):
        ranks = our_batches(sizes, world, **how)
        seen = sorted(i for batches in ranks for batch in batches for i in batch)
        check(seen == list(range(len(sizes))), "not every utterance once")
        counts = [list(map(padded, batches)) for batches in ranks]
        share = wasted(sum(sizes), sum(map(sum, counts)))
        name = f"{label}, {world} rank{'s' if world > 1 else ''}"
        shown = their_share if how is budget else ""
        results.append(
            Result(f"C7 padding, {name}", share, "<= 1 %", f"{share:.2f} %", shown, "0 %")
        )
        if world > 1:
            late, shown = straggling(counts), f"{waiting:.2f} %" if how is budget else ""
            goal = f"C7 waiting for the slowest, {name}"
            results.append(Result(goal, late, "<= 2 %", f"{late:.2f} %", shown, "0 %"))
    return results


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
