"""The learning rate: as the optimiser sees it, step by step."""

from __future__ import annotations

import pytest
import torch

from speechllm_prune.brain import LinearWarmdown


def rates(num_steps: int, peak: float = 2.0, **options: float) -> list[float]:
    """The rate of every update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = LinearWarmdown(optimizer, num_steps=num_steps, **options)
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_falls_from_the_peak_over_all_steps() -> None:
    assert rates(5) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_warm_up_comes_first() -> None:
    seen = rates(8, warmup_steps=3)
    assert seen[:3] == pytest.approx([0.5, 1.0, 1.5])
    assert seen[3:] == pytest.approx([2 * left / 8 for left in (5, 4, 3, 2, 1)])


def test_plateau_before_the_fall() -> None:
    assert rates(8, warmdown_share=0.5) == pytest.approx([2, 2, 2, 2, 2, 1.5, 1.0, 0.5])


def test_final_share_is_where_the_fall_would_end() -> None:
    seen = rates(4, final_lr_share=0.5)
    assert seen == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert min(rates(50, final_lr_share=0.1)) > 0.2


def test_never_negative_and_never_above_the_peak() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LinearWarmdown(optimizer, num_steps=3, warmup_steps=5)
    shares = [scheduler.share(step) for step in range(10)]
    assert all(0 <= share <= 1 for share in shares) and shares[3:] == [0.0] * 7


def test_every_group_and_resuming() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 4.0}, {"params": [parameters[1]]}], lr=2.0
    )
    scheduler = LinearWarmdown(optimizer, num_steps=4)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3.0, 1.5])
    fresh = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 4.0}, {"params": [parameters[1]]}], lr=2.0
    )
    resumed = LinearWarmdown(fresh, num_steps=4)
    fresh.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    fresh.step()
    resumed.step()
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx([2.0, 1.0])
