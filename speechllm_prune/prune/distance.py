"""Angular distance between the residual stream at different depths (paper, section 3.1, after Gromov et al.).

h[0] is the decoder's input, h[l] the input of layer l, h[L] the output of the last layer before the final norm.
d(l, n) = arccos(cos(h[l], h[l+n])) / pi at the last real token, averaged over utterances.

Shapes: B sequences, T positions, H width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """Mean angular distances over a set of utterances.

    Arguments
    ---------
    total : Tensor
        (L, L) float64 sum over utterances; row n-1, column l.
    count : int
        Number of utterances.
    """

    total: Tensor
    count: int

    @property
    def matrix(self) -> Tensor:
        """(L, L) float64 means: row n-1, column l, NaN where l + n > L."""
        num_layers = len(self.total)
        n = torch.arange(1, num_layers + 1)[:, None]
        undefined = torch.arange(num_layers)[None] + n > num_layers
        return (self.total / self.count).masked_fill(undefined, math.nan)

    def all_reduce(self) -> Distances:
        """Sum over all ranks: the mean is per utterance, however they were spread."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from speechbrain.utils.distributed import ddp_all_reduce

            packed = torch.cat(
                [self.total.flatten(), torch.tensor([float(self.count)], dtype=torch.float64)]
            )
            if torch.distributed.get_backend() == "nccl":
                packed = packed.cuda()
            packed = ddp_all_reduce(packed, torch.distributed.ReduceOp.SUM).cpu()
            return Distances(packed[:-1].reshape(self.total.shape), round(packed[-1].item()))
        return self


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

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, hidden: Tensor) -> None:
        assert self.positions is not None
        self.states.append(hidden[torch.arange(len(hidden), device=hidden.device), self.positions])


@torch.no_grad()
def measure_distances(decoder: Any, batches: Iterable[Mapping[str, Tensor]]) -> Distances:
    """All d(l, n) from one forward pass per batch.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM; measured in eval mode with its adapters as they are. The output layer is not called.
    batches : iterable of mappings
        `inputs_embeds` (B, T, H) or `input_ids` (B, T), and `attention_mask` (B, T), padded on either side.

    Returns
    -------
    Distances

    Raises
    ------
    UserError
        If there is nothing to measure, or a row is all padding.
    """
    num_layers = len(decoder_layers(decoder))
    body = decoder.get_decoder()
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    total, count = torch.zeros(num_layers, num_layers, dtype=torch.float64), 0
    try:
        with ResidualStream(decoder) as stream:
            for batch in batches:
                raise_if_stopped()
                mask = batch["attention_mask"]
                stream.positions = last_positions(mask)
                inputs = {key: batch[key] for key in ("inputs_embeds", "input_ids") if key in batch}
                body(
                    **inputs,
                    attention_mask=mask,
                    position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
                total += pairwise_distances(stream.stack()).sum(dim=-1).cpu()
                count += len(mask)
    finally:
        for module, training in modes:
            module.training = training
    distances = Distances(total, count).all_reduce()
    if distances.count == 0:
        raise UserError("nothing to measure: there are no utterances")
    return distances


def pairwise_distances(states: Tensor) -> Tensor:
    """All distances within each utterance: (L + 1, B, H) -> (L, L, B), row n-1, column l, 0 where l + n > L."""
    num_layers = len(states) - 1
    result = states.new_zeros(num_layers, num_layers, states.shape[1])
    for start in range(
        num_layers
    ):  # one l at a time: all pairs at once would be L times the memory
        result[: num_layers - start, start] = angular_distance(states[start], states[start + 1 :])
    return result
