"""Batches: which utterances go together, in which order, on which rank, and how they are padded.

The training sampler is endless and deterministic: batch number p of pass q is a function of the seed alone, so a run
resumes at (pass, position) without replaying anything.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm_prune.runtime import UserError


@dataclass
class Batch:
    """One padded batch.

    Arguments
    ---------
    ids : list of str
        Utterance ids.
    audio : Tensor
        (B, N) waveforms at 16 kHz, or (B, T, D) cached encoder features.
    audio_lengths : list of int
        True number of samples or frames.
    target_ids : list of lists of int
        Target token ids without eos.
    texts : list of str
        References as in the corpus.
    durations : list of float
        Seconds.
    """

    ids: list[str]
    audio: Tensor
    audio_lengths: list[int]
    target_ids: list[list[int]]
    texts: list[str]
    durations: list[float]

    @property
    def has_features(self) -> bool:
        """Whether `audio` holds cached encoder features."""
        return self.audio.dim() == 3

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its audio on a device; lengths and ids stay on the host, where the layout is computed."""
        return replace(self, audio=self.audio.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """For the loader: audio in memory from which a copy to the GPU need not be waited for."""
        return replace(self, audio=self.audio.pin_memory())

    def __len__(self) -> int:
        return len(self.ids)


def collate(items: Sequence[dict]) -> Batch:
    """Pad the items of a `DynamicItemDataset` (keys id, audio, target_ids, text, duration)."""
    return Batch(
        ids=[item["id"] for item in items],
        audio=pad_sequence([item["audio"] for item in items], batch_first=True),
        audio_lengths=[len(item["audio"]) for item in items],
        target_ids=[item["target_ids"] for item in items],
        texts=[item["text"] for item in items],
        durations=[item["duration"] for item in items],
    )


def cut_batches(
    order: Sequence[int], sizes: Sequence[int], batch_size: int, batch_positions: int = 0
) -> list[list[int]]:
    """Cut an ordered list of utterances into batches.

    Arguments
    ---------
    order : sequence of int
        Utterance indices, sorted by size where padding matters.
    sizes : sequence of int
        Decoder positions of each utterance.
    batch_size : int
        Utterances per batch, if `batch_positions` is 0.
    batch_positions : int
        Padded positions (rows x longest) per batch; an utterance longer than this stands alone.

    Example
    -------
    >>> cut_batches([0, 1, 2], [4, 4, 9], batch_size=2)
    [[0, 1], [2]]
    >>> cut_batches([0, 1, 2], [4, 4, 9], batch_size=2, batch_positions=12)
    [[0, 1], [2]]
    """
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        grown = max(longest, sizes[index])
        full = (
            not batches
            or (batch_positions and grown * (len(batches[-1]) + 1) > batch_positions)
            or (not batch_positions and len(batches[-1]) == batch_size)
        )
        if full:
            batches.append([])
            grown = sizes[index]
        batches[-1].append(index)
        longest = grown
    return batches


class EndlessBatchSampler:
    """Endless training batches: sorted inside pools, equal in number and close in length on every rank.

    Each pass visits every utterance once. The utterances are shuffled, cut into pools, sorted by size within a pool and
    cut into batches; neighbouring batches, alike in length, go to the ranks of one step; the steps are shuffled.

    Arguments
    ---------
    sizes : sequence of int
        Decoder positions of each utterance.
    batch_size, batch_positions : int
        See `cut_batches`.
    pool_batches : int
        Batches per pool and rank, at least.
    seed : int
        Seed of all passes.
    rank, world_size : int
        This process among all.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        batch_positions: int = 0,
        pool_batches: int = 100,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(sizes) < world_size:
            raise UserError(f"{len(sizes)} training utterances cannot feed {world_size} processes")
        self.sizes = list(sizes)
        self.batch_size, self.batch_positions = batch_size, batch_positions
        self.pool_batches = pool_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.pass_number, self.position = 0, 0
        self._known = (-1, 0)  # a pass and its number of batches

    def batches_of_pass(self, pass_number: int) -> list[list[int]]:
        """All batches of one pass for this rank."""
        generator = random.Random(f"{self.seed}/{pass_number}")
        order = list(range(len(self.sizes)))
        generator.shuffle(order)
        mean = sum(self.sizes) / len(self.sizes)
        per_batch = (
            max(1, int(self.batch_positions / mean)) if self.batch_positions else self.batch_size
        )
        # Pools of whole steps, the remainder in the last one: alone it could not feed all ranks. A few of them even
        # where one would hold everything, or every pass would have the same batches.
        step_size = per_batch * self.world_size
        whole = len(order) // step_size
        pools = max(1, whole // self.pool_batches, min(4, whole // 4))
        bounds = [pool * whole // pools * step_size for pool in range(pools)] + [len(order)]
        steps: list[list[list[int]]] = []
        for first, end in itertools.pairwise(bounds):
            members = order[first:end]
            ordered = sorted(members, key=self.sizes.__getitem__)  # ties stay shuffled
            batches = cut_batches(ordered, self.sizes, self.batch_size, self.batch_positions)
            steps += self._steps(batches)
        generator.shuffle(steps)
        return [step[self.rank] for step in steps]

    def _steps(self, batches: list[list[int]]) -> list[list[list[int]]]:
        """Group batches by `world_size`; a remainder is split further, so that no utterance is dropped or repeated."""
        while len(batches) % self.world_size:
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            batch = batches[largest]
            if (
                len(batch) == 1
            ):  # all batches are single utterances: move one of them in front of another
                return self._uneven(batches)
            batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return [batches[i : i + self.world_size] for i in range(0, len(batches), self.world_size)]

    def _uneven(self, batches: list[list[int]]) -> list[list[list[int]]]:
        """More single utterances than full steps: the spare ones join the batches of the step before."""
        whole = len(batches) - len(batches) % self.world_size
        if whole == 0:
            raise UserError(
                f"a pool of {len(batches)} utterances cannot feed {self.world_size} processes"
            )
        for spare, batch in enumerate(batches[whole:]):
            batches[whole - 1 - spare].extend(batch)
        return [batches[i : i + self.world_size] for i in range(0, whole, self.world_size)]

    def __iter__(self) -> Iterator[list[int]]:
        """From the current (pass, position) on, for ever. `advance` moves the position: a loader reads ahead."""
        pass_number, position = self.pass_number, self.position
        while True:
            yield from self.batches_of_pass(pass_number)[position:]
            pass_number, position = pass_number + 1, 0

    def advance(self) -> None:
        """Count one batch as used."""
        self.position += 1
        if self.position == self._length(self.pass_number):
            self.pass_number, self.position = self.pass_number + 1, 0

    def _length(self, pass_number: int) -> int:
        if self._known[0] != pass_number:
            self._known = (pass_number, len(self.batches_of_pass(pass_number)))
        return self._known[1]

    def state_dict(self) -> dict[str, int]:
        """Where the run is."""
        return {"pass": self.pass_number, "position": self.position, "utterances": len(self.sizes)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        Raises
        ------
        UserError
            If the data has changed in size since.
        """
        if state["utterances"] != len(self.sizes):
            raise UserError(
                f"the checkpoint was made with {state['utterances']} training utterances, now there are "
                f"{len(self.sizes)}; restore the manifests or start again with --overwrite"
            )
        self.pass_number, self.position = state["pass"], state["position"]


def sorted_batches(
    sizes: Sequence[int],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    batch_positions: int = 0,
) -> list[list[int]]:
    """Batches for decoding and measuring: longest first, every utterance exactly once over all ranks.

    Example
    -------
    >>> sorted_batches([3, 9, 5], batch_size=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    return cut_batches(order, sizes, batch_size, batch_positions)[rank::world_size]


def device_batches(
    loader: torch.utils.data.DataLoader, device: torch.device | str
) -> Iterator[Batch]:
    """Batches of a loader, moved to a device."""
    for batch in loader:
        yield batch.to(device)
