"""The learning rate over the steps of a run."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmdown(LambdaLR):
    """Linear warm-up, a plateau, then a linear fall: `warmdown_share` = 1 falls over all steps, as in the paper.

    Arguments
    ---------
    optimizer : Optimizer
        Its learning rates are the peaks.
    num_steps : int
        Optimiser steps of the whole run.
    warmup_steps : int
        Steps of linear rise.
    final_lr_share : float
        Share of the peak at the end.
    warmdown_share : float
        Share of the run over which the rate falls.

    Example
    -------
    >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = LinearWarmdown(optimizer, num_steps=4)
    >>> [scheduler.share(step) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        warmup_steps: int = 0,
        final_lr_share: float = 0.0,
        warmdown_share: float = 1.0,
    ) -> None:
        self.num_steps, self.warmup_steps = num_steps, warmup_steps
        self.final_lr_share, self.warmdown_share = final_lr_share, warmdown_share
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Share of the peak for the update after `step` updates."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall_steps = max(1.0, self.warmdown_share * self.num_steps)
        left = min(1.0, max(0.0, (self.num_steps - step) / fall_steps))
        return min(warmup, self.final_lr_share + (1 - self.final_lr_share) * left)
