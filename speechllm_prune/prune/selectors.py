"""Which block to remove for each block size: the paper's choice and others to judge it by, behind one interface.

A selector takes an `Evidence` and gives a path {n: l} for n = 1..L-1 that never contains the last layer.

Shapes: B utterances, X positions, H width, M label rows, L layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from speechllm_prune.models.decoder import decoder_layers, lm_logits
from speechllm_prune.models.speechllm import DecoderInputs
from speechllm_prune.prune.path import pruning_path, tail_path
from speechllm_prune.prune.surgery import Removal, check_block
from speechllm_prune.runtime import UserError, derive_seed, raise_if_stopped

Block = tuple[int, int]
"""(start layer l, block size n)."""


@dataclass(frozen=True)
class Evidence:
    """What selectors decide by; each one reads its own part.

    Arguments
    ---------
    num_layers : int
        L.
    distance : array-like, optional
        [L, L] angular distances, row n-1, column l (`angular`).
    influence : array-like, optional
        [L, L] block influence, laid out alike (`influence`).
    loss : mapping, optional
        {(l, n): teacher-forced loss of the model without the block} (`rerank`).
    given : mapping, optional
        A path from elsewhere (`given`).
    seed : int
        Of the experiment (`random`).
    """

    num_layers: int
    distance: Any = None
    influence: Any = None
    loss: Mapping[Block, float] | None = None
    given: Mapping[Any, Any] | None = None
    seed: int = 0


def angular(evidence: Evidence) -> dict[int, int]:
    """The smallest angular distance (the paper's choice)."""
    return pruning_path(_needed(evidence, "distance"))


def influence(evidence: Evidence) -> dict[int, int]:
    """The smallest block influence, 1 - mean cosine of the states before and after the block (ShortGPT)."""
    return pruning_path(_needed(evidence, "influence"))


def random_path(evidence: Evidence) -> dict[int, int]:
    """A random start for every size, the same whenever the seed is.

    Example
    -------
    >>> path = random_path(Evidence(6, seed=1))
    >>> path == random_path(Evidence(6, seed=1)), all(l + n <= 5 for n, l in path.items())
    (True, True)
    """
    generator = random.Random(derive_seed(evidence.seed, "random path"))
    num_layers = evidence.num_layers
    return {n: generator.randrange(num_layers - n) for n in range(1, num_layers)}


def tail(evidence: Evidence) -> dict[int, int]:
    """The deepest block that leaves the last layer."""
    return tail_path(evidence.num_layers)


def given(evidence: Evidence) -> dict[int, int]:
    """A path from elsewhere, for as many sizes as it has; refused where a block does not lie in the decoder.

    Example
    -------
    >>> given(Evidence(6, given={"1": 2, "3": 2}))
    {1: 2, 3: 2}
    """
    path = {int(n): int(start) for n, start in _needed(evidence, "given").items()}
    for n, start in path.items():
        check_block(evidence.num_layers, start, n)
    return path


def rerank(evidence: Evidence) -> dict[int, int]:
    """The smallest loss among the blocks that were tried; ties go to the smallest l.

    Example
    -------
    >>> rerank(Evidence(4, loss={(0, 1): 2.0, (1, 1): 1.5, (0, 2): 3.0}))
    {1: 1, 2: 0}
    """
    best: dict[int, tuple[float, int]] = {}
    for (start, n), loss in _needed(evidence, "loss").items():
        best[n] = min(best.get(n, (loss, start)), (loss, start))
    return {n: best[n][1] for n in sorted(best)}


SELECTORS: dict[str, Callable[[Evidence], dict[int, int]]] = {
    "angular": angular,
    "influence": influence,
    "random": random_path,
    "tail": tail,
    "given": given,
    "rerank": rerank,
}


def select(name: str, evidence: Evidence) -> dict[int, int]:
    """The path of a selector.

    Raises
    ------
    UserError
        If there is no such selector, or what it decides by is not there.

    Example
    -------
    >>> select("tail", Evidence(4))
    {1: 2, 2: 1, 3: 0}
    """
    if name not in SELECTORS:
        raise UserError(f"selector {name!r} is not one of {', '.join(SELECTORS)}")
    return SELECTORS[name](evidence)


def _needed(evidence: Evidence, part: str) -> Any:
    value = getattr(evidence, part)
    if value is None:
        raise UserError(f"this selector needs {part!r}, which was not measured")
    return value


# ---------------------------------------------------------------- re-ranking by loss


def best_blocks(matrix: Any, count: int) -> list[Block]:
    """For every size, the `count` blocks of smallest distance that leave the last layer, best first.

    Example
    -------
    >>> nan = float("nan")
    >>> best_blocks([[0.3, 0.1, 0.2], [0.4, nan, nan], [nan, nan, nan]], 5)
    [(1, 1), (0, 1), (0, 2)]
    """
    num_layers = len(matrix)
    blocks: list[Block] = []
    for n in range(1, num_layers):
        row = [(float(matrix[n - 1][start]), start) for start in range(num_layers - n)]
        found = sorted((value, start) for value, start in row if not math.isnan(value))
        blocks += [(start, n) for _, start in found[:count]]
    return blocks


@dataclass
class BlockLosses:
    """Teacher-forced losses of a model without each of some blocks, summed over labels.

    Arguments
    ---------
    total : dict
        {(l, n): float64 sum of the cross-entropy over all labels}.
    full : float
        The same sum with all layers.
    num_labels : int
        Number of labels.
    layer_evaluations : int
        How many times a layer was run on a batch.
    """

    total: dict[Block, float]
    full: float = 0.0
    num_labels: int = 0
    layer_evaluations: int = field(default=0, compare=False)

    @property
    def mean(self) -> dict[Block, float]:
        """Loss per label of every block."""
        return {block: total / self.num_labels for block, total in self.total.items()}

    def all_reduce(self) -> BlockLosses:
        """Sum over all ranks."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        from speechbrain.utils.distributed import ddp_all_reduce

        counts = [self.full, float(self.num_labels), float(self.layer_evaluations)]
        packed = torch.tensor([*self.total.values(), *counts], dtype=torch.float64)
        if torch.distributed.get_backend() == "nccl":
            packed = packed.cuda()
        *totals, full, labels, evaluations = ddp_all_reduce(
            packed, torch.distributed.ReduceOp.SUM
        ).tolist()
        return BlockLosses(
            dict(zip(self.total, totals, strict=True)), full, round(labels), round(evaluations)
        )


@torch.no_grad()
def block_losses(
    decoder: Any, blocks: Sequence[Block], batches: Iterable[DecoderInputs]
) -> BlockLosses:
    """Loss of the decoder without each block, without training, sharing the layers below the cuts.

    The whole decoder runs once per batch and its states h[l] are kept where a block starts. Without block (l, n) the
    decoder is the same up to layer l, so the forward pass goes on from h[l] at layer l + n: L - l - n layers instead of
    L - n. The sums equal those of removing the block and running everything again, bit for bit.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM in eval mode, with its adapters as they are.
    blocks : sequence of (l, n)
        None may contain the last layer.
    batches : iterable of DecoderInputs
        With labels.

    Returns
    -------
    BlockLosses
        Summed over all ranks.

    Raises
    ------
    UserError
        If a block contains the last layer or does not lie in the decoder, or there are no labels.
    """
    num_layers = len(decoder_layers(decoder))
    for start, n in blocks:
        check_block(num_layers, start, n)
        if start + n >= num_layers:
            raise UserError(
                f"block (l={start}, n={n}) contains the last layer: nothing goes on after it"
            )
    losses = BlockLosses(dict.fromkeys(blocks, 0.0))
    for inputs in batches:
        raise_if_stopped()
        with _states_before(decoder, {start for start, _ in blocks}) as states:
            losses.full += _loss(decoder, inputs, inputs.inputs_embeds)
        losses.num_labels += len(inputs.labels)
        losses.layer_evaluations += num_layers
        for start, n in blocks:
            # With layers 0..l+n-1 gone and h[l] as its input, the decoder goes on where the cut ends.
            removal = Removal(decoder, 0, start + n)
            try:
                removal.apply()
                losses.total[start, n] += _loss(decoder, inputs, states[start])
            finally:
                removal.undo()
            losses.layer_evaluations += num_layers - start - n
    losses = losses.all_reduce()
    if losses.num_labels == 0:
        raise UserError("nothing to rank blocks by: there are no labels")
    return losses


def _loss(decoder: Any, inputs: DecoderInputs, embeds: Tensor) -> float:
    """Cross-entropy summed over the label rows, as in `SpeechLLM.forward`."""
    hidden = decoder.get_decoder()(
        inputs_embeds=embeds,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        use_cache=False,
    ).last_hidden_state
    logits = lm_logits(decoder, hidden[inputs.label_rows[0], inputs.label_rows[1]])
    return float(nn.functional.cross_entropy(logits, inputs.labels, reduction="sum"))


@contextmanager
def _states_before(decoder: Any, starts: set[int]) -> Iterator[dict[int, Tensor]]:
    """Context: a dict that the next forward pass fills with h[l] (B, X, H) for every wanted l."""
    states: dict[int, Tensor] = {}

    def keep(start: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[start] = args[0] if args else kwargs["hidden_states"]

        return hook

    layers = decoder_layers(decoder)
    handles = [
        layers[start].register_forward_pre_hook(keep(start), with_kwargs=True) for start in starts
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
