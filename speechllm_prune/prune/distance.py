"""Angular distance between the residual stream at different depths (paper, section 3.1, after Gromov et al.).

h[0] is the decoder's input, h[l] the input of layer l, h[L] the output of the last layer before the final norm.
d(l, n) = arccos(cos(h[l], h[l+n])) / pi at the last real token, averaged over utterances.

Shapes: B sequences, T positions, H width, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from speechllm_prune.models.decoder import decoder_layers
from speechllm_prune.runtime import UserError, raise_if_stopped


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between vectors in units of pi.

    Computed in float64 from the half-angle, 2 atan2(|a'-b'|, |a'+b'|) of the unit vectors: exact for small angles,
    where arccos of a rounded cosine has no digits left, and never NaN from a cosine above 1.

    Arguments
    ---------
    a, b : Tensor
        (..., H), broadcast against each other.

    Returns
    -------
    Tensor
        (...), in [0, 1]; float64 for float64 inputs, else float32.

    Example
    -------
    >>> angular_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).item()
    0.5
    """
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a = nn.functional.normalize(a.double(), dim=-1)
    b = nn.functional.normalize(b.double(), dim=-1)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return (angle / math.pi).to(dtype)


@dataclass
class Distances:
    """Angular distances of a set of utterances, all from the same states.

    Arguments
    ---------
    total : Tensor
        (L, L) float64 sum over utterances; row n-1, column l, 0 where l + n > L.
    count : int
        Number of utterances.
    influence_total : Tensor
        (L, L) float64 sum of 1 - cos(h[l], h[l+n]), laid out alike.
    post_norm_total : Tensor
        (L,) float64 sum of the distance of h[l] to h[L] after the final norm.
    samples : Tensor
        (count, L, L) float32 distances of the single utterances, for the bootstrap: 8 MB for LibriSpeech's dev-clean
        and 28 layers.
    index : Tensor, optional
        (count,) the utterances' numbers in the whole set, where the batches had them.
    """

    total: Tensor
    count: int
    influence_total: Tensor
    post_norm_total: Tensor
    samples: Tensor
    index: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """(L, L) float64 mean distances: row n-1, column l, NaN where l + n > L."""
        return self._mean(self.total)

    @property
    def influence(self) -> Tensor:
        """(L, L) float64 block influence, 1 - mean cos(h[l], h[l+n]) (ShortGPT), laid out like `matrix`."""
        return self._mean(self.influence_total)

    @property
    def post_norm(self) -> Tensor:
        """(L,) float64: entry l is the mean distance of the block [l, L) if h[L] is taken after the final norm.

        What `hidden_states` of transformers would give; all other blocks are the same. To look at, never for a path.
        """
        return self.post_norm_total / self.count

    def all_reduce(self) -> Distances:
        """Sum over all ranks: the mean is per utterance, however they were spread. `samples` come in order of `index`.

        Raises
        ------
        ValueError
            If a number occurs twice in `index`, as where a sampler fills up its shards with utterances seen before.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return self._over_ranks()._in_order()
        return self._in_order()

    def _mean(self, total: Tensor) -> Tensor:
        num_layers = len(total)
        n = torch.arange(1, num_layers + 1)[:, None]
        undefined = torch.arange(num_layers)[None] + n > num_layers
        return (total / self.count).masked_fill(undefined, math.nan)

    def _over_ranks(self) -> Distances:
        from speechbrain.utils.distributed import ddp_all_reduce

        sums = (self.total, self.influence_total, self.post_norm_total)
        packed = torch.cat(
            [*(s.flatten() for s in sums), torch.tensor([float(self.count)]).double()]
        )
        if torch.distributed.get_backend() == "nccl":
            packed = packed.cuda()
        packed = ddp_all_reduce(packed, torch.distributed.ReduceOp.SUM).cpu()
        total, influence, post_norm, count = packed.split([*(s.numel() for s in sums), 1])
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.samples.numpy(), self.index))
        index = [part[1] for part in parts]
        return Distances(
            total.reshape(self.total.shape),
            round(count.item()),
            influence.reshape(self.total.shape),
            post_norm,
            torch.cat([torch.from_numpy(part[0]) for part in parts]),
            None if any(i is None for i in index) else torch.cat(index),
        )

    def _in_order(self) -> Distances:
        if self.index is None:
            return self
        numbers, order = self.index.sort()
        twice = numbers[1:][numbers.diff() == 0]
        if len(twice):
            raise ValueError(f"utterance {twice[0]} was measured twice: the shards overlap")
        return replace(self, samples=self.samples[order], index=numbers)


def last_positions(attention_mask: Tensor) -> Tensor:
    """Index of each row's last real position, whichever side is padded: (B, T) -> (B,).

    Example
    -------
    >>> last_positions(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    if not attention_mask.any(dim=1).all():
        raise UserError("a sequence without any real position cannot be measured")
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(dim=1)


class ResidualStream:
    """Context: hooks that keep h[0..L] at chosen positions of the next forward passes, and nothing else.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM.
    """

    def __init__(self, decoder: Any) -> None:
        self.layers = decoder_layers(decoder)
        self.positions: Tensor | None = None
        self.states: list[Tensor] = []

    def __enter__(self) -> ResidualStream:
        self.handles = [
            layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in self.layers
        ]
        # The end state is taken here and not from `hidden_states`, whose last entry has passed the final norm.
        self.handles.append(self.layers[-1].register_forward_hook(self._after))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self.handles:
            handle.remove()

    def stack(self) -> Tensor:
        """(L + 1, B, H) float64 states of the last forward pass; empties the store."""
        states, self.states = self.states, []
        assert len(states) == len(self.layers) + 1, "one forward pass per stack"
        return torch.stack(states).double()

    def pick(self, hidden: Tensor) -> Tensor:
        """The chosen position of every row: (B, T, H) -> (B, H), a copy."""
        assert self.positions is not None
        return hidden[torch.arange(len(hidden), device=hidden.device), self.positions]

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, hidden: Tensor) -> None:
        self.states.append(self.pick(hidden))


@contextlib.contextmanager
def without_adapters(decoder: Any) -> Iterator[None]:
    """Context: all adapters of peft in a decoder are off; leaves them, and what is trainable, as they were.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        With injected or wrapped-around adapters, or with none, which changes nothing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
    were_off = [module.disable_adapters for module in tuners]
    trainable = [(parameter, parameter.requires_grad) for parameter in decoder.parameters()]
    try:
        for module in tuners:
            module.enable_adapters(False)
        yield
    finally:
        for module, was_off in zip(tuners, were_off, strict=True):
            module.enable_adapters(
                not was_off
            )  # makes the adapter trainable, which is not our business
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _eval_mode(decoder: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def measure_distances(
    decoder: Any, batches: Iterable[Mapping[str, Tensor]], adapters: bool = True
) -> Distances:
    """All d(l, n) from one forward pass per batch.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM; measured in eval mode. The output layer is not called.
    batches : iterable of mappings
        `inputs_embeds` (B, T, H) or `input_ids` (B, T), and `attention_mask` (B, T), padded on either side. Optional:
        `index` (B,), the utterances' numbers in the whole set; then the order of `Distances.samples` depends neither
        on batches nor on ranks, and an utterance that comes twice is an error.
    adapters : bool
        True: adapters of peft are as they are. False: off, which measures the decoder as it was before adaptation.

    Returns
    -------
    Distances
        Over the utterances of all ranks.

    Raises
    ------
    UserError
        If there is nothing to measure, a row is all padding, or the decoder computes NaN or infinity.
    """
    num_layers = len(decoder_layers(decoder))
    body = decoder.get_decoder()
    # Sums stay on the device until the end: a copy per batch would make the device wait for the host.
    sums: list[Any] = [0.0, 0.0, 0.0]
    samples: list[Tensor] = [torch.zeros(0, num_layers, num_layers)]
    index: list[Tensor] = []
    switched = contextlib.nullcontext() if adapters else without_adapters(decoder)
    with switched, _eval_mode(decoder), ResidualStream(decoder) as stream:
        for batch in batches:
            raise_if_stopped()
            mask = batch["attention_mask"]
            stream.positions = last_positions(mask)
            inputs = {key: batch[key] for key in ("inputs_embeds", "input_ids") if key in batch}
            output = body(
                **inputs,
                attention_mask=mask,
                position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            )
            normed = stream.pick(output[0])
            distance, influence, post_norm = pairwise_distances(stream.stack(), normed)
            found = (distance.sum(0), influence.sum(0), post_norm.sum(0))
            sums = [total + part for total, part in zip(sums, found, strict=True)]
            samples.append(distance.float())
            if "index" in batch:
                index.append(batch["index"].cpu())
    per_utterance = torch.cat([sample.cpu() for sample in samples])
    zeros = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    totals = [zeros + part for part in (torch.as_tensor(s).cpu() for s in sums[:2])]
    numbers = torch.cat([torch.zeros(0, dtype=torch.long), *index])
    distances = Distances(
        totals[0],
        len(per_utterance),
        totals[1],
        zeros[0] + torch.as_tensor(sums[2]).cpu(),
        per_utterance,
        numbers if len(numbers) == len(per_utterance) else None,
    ).all_reduce()
    if distances.count == 0:
        raise UserError("nothing to measure: there are no utterances")
    if not distances.total.isfinite().all():
        # Such as float64 with eager attention, where a row of padding on the left becomes NaN and spreads.
        raise UserError(
            "the decoder's states are not finite; try --precision fp32 or --attention sdpa"
        )
    return distances


def pairwise_distances(states: Tensor, normed_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All distances within each utterance, by the half-angle of `angular_distance`.

    Arguments
    ---------
    states : Tensor
        (L + 1, B, H) h[0..L], float64.
    normed_end : Tensor
        (B, H) h[L] after the final norm.

    Returns
    -------
    Tensor, Tensor, Tensor
        (B, L, L) distances and (B, L, L) values of 1 - cosine, row n-1, column l, 0 where l + n > L; (B, L) distances
        of h[l] to `normed_end`.
    """
    num_layers, device = len(states) - 1, states.device
    ends = torch.cat([states, normed_end.double()[None]]).transpose(0, 1)
    unit = nn.functional.normalize(ends, dim=-1)
    # Two launches whatever L is, and no (L, L, H) in memory. Never by matrix products, which lose small differences.
    exact = "donot_use_mm_for_euclid_dist"
    difference = torch.cdist(unit[:, :-2], unit, compute_mode=exact)
    total = torch.cdist(unit[:, :-2], -unit, compute_mode=exact)
    angle = 2 * torch.atan2(difference, total) / math.pi
    start = torch.arange(num_layers, device=device)[None]
    end = start + torch.arange(1, num_layers + 1, device=device)[:, None]
    defined = end <= num_layers
    end = end.clamp(max=num_layers)
    # |a - b|^2 = 2 - 2 cos for unit vectors: no digits are lost where the two are close.
    return (
        angle[:, start, end] * defined,
        0.5 * difference[:, start, end] ** 2 * defined,
        angle[:, :, -1],
    )
