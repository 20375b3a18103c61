"""From encoder frames to decoder input embeddings: frame stacking and the projector (paper, section 2.1, equation 1).

Shapes: B utterances, T encoder frames, D encoder width, k frames in a stack, S = ceil(T / k), H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def stacked_length(length: int, frame_stack: int) -> int:
    """Number of stacks that cover `length` frames: the last one may be partly filled.

    Example
    -------
    >>> [stacked_length(n, 5) for n in (1, 5, 6)]
    [1, 1, 2]
    """
    return -(-length // frame_stack)


def stack_frames(
    features: Tensor, lengths: list[int], frame_stack: int
) -> tuple[Tensor, list[int]]:
    """Concatenate every `frame_stack` consecutive frames; the last stack is filled up with zeros.

    Arguments
    ---------
    features : Tensor
        (B, T, D); frames at and beyond an utterance's length are ignored.
    lengths : list of int
        True number of frames of each utterance.
    frame_stack : int
        k, at least 1.

    Returns
    -------
    Tensor, list of int
        (B, S, k * D) and the number of stacks of each utterance.

    Example
    -------
    >>> stacks, lengths = stack_frames(torch.ones(1, 3, 2), [3], 2)
    >>> stacks[0].tolist(), lengths
    ([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], [2])
    """
    batch, frames, width = features.shape
    stacks = stacked_length(frames, frame_stack)
    true = torch.tensor(lengths).to(features.device, non_blocking=True)  # waits for nothing
    inside = torch.arange(frames, device=features.device) < true[:, None]  # (B, T)
    # where, not a product: whatever stands in the padding (even NaN) must not get through.
    features = torch.where(inside[..., None], features, features.new_zeros(()))
    features = nn.functional.pad(features, (0, 0, 0, stacks * frame_stack - frames))
    return features.reshape(batch, stacks, frame_stack * width), [
        stacked_length(n, frame_stack) for n in lengths
    ]


class Projector(nn.Module):
    """Linear - activation - Linear, with biases and no activation at the end.

    Arguments
    ---------
    input_size : int
        Width of a stack, k * D.
    hidden_size : int
        Width of the hidden layer.
    output_size : int
        Width of the decoder, H.
    activation : callable
        Makes the activation module.

    Example
    -------
    >>> Projector(10, 16, 4)(torch.rand(2, 3, 10)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_size, hidden_size), activation(), nn.Linear(hidden_size, output_size)
        )

    def forward(self, stacks: Tensor) -> Tensor:
        """(B, S, k * D) -> (B, S, H)."""
        return self.layers(stacks)
