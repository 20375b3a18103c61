"""Many points of one experiment in one process: block sizes x heal modes on a path, the model loaded once."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from speechllm_prune.experiment import Variant
from speechllm_prune.runtime import Stopped, UserError
from speechllm_prune.stages.evaluate import evaluate
from speechllm_prune.stages.plan import plan_block
from speechllm_prune.training import heal
from speechllm_prune.workbench import Workbench

HEAL_MODES = ("none", "decoder", "projector", "joint")


@dataclass(frozen=True)
class Point:
    """One system of a sweep.

    Arguments
    ---------
    block_size : int
        n.
    heal_mode : str
        none | decoder | projector | joint.
    control : bool
        Nothing removed.
    """

    block_size: int
    heal_mode: str
    control: bool = False


def plan_points(
    block_sizes: list[int], heal_modes: list[str], num_layers: int, control: bool
) -> list[Point]:
    """The points of a sweep, cheap ones first within a block size.

    Arguments
    ---------
    block_sizes : list of int
        Empty: every n from 1 to L/2.
    heal_modes : list of str
        Of `none`, `decoder`, `projector`, `joint`.
    num_layers : int
        L.
    control : bool
        Whether to add, for the largest block size, the control of every healing mode.

    Example
    -------
    >>> [(p.block_size, p.heal_mode, p.control) for p in plan_points([2], ["none", "joint"], 6, True)]
    [(2, 'none', False), (2, 'joint', False), (2, 'joint', True)]
    """
    unknown = [mode for mode in heal_modes if mode not in HEAL_MODES]
    if unknown:
        raise UserError(f"heal_modes: {unknown[0]!r} is not one of {', '.join(HEAL_MODES)}")
    sizes = sorted(set(block_sizes)) or list(range(1, num_layers // 2 + 1))
    if sizes[-1] > num_layers - 1:
        raise UserError(
            f"block_sizes: {sizes[-1]} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers)"
        )
    modes = [mode for mode in HEAL_MODES if mode in heal_modes]
    points = [Point(size, mode) for size in sizes for mode in modes]
    if control:
        points += [Point(sizes[-1], mode, control=True) for mode in modes if mode != "none"]
    return points


def shard_of(points: list[Point], shard: str) -> list[Point]:
    """Every N-th point, for `i/N`; i may count from 0 or from 1 (N/N is 0/N), as array jobs do either.

    Example
    -------
    >>> shard_of(["a", "b", "c"], "1/2"), shard_of(["a", "b", "c"], "2/2") == shard_of(["a", "b", "c"], "0/2")
    (['b'], True)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or int(match[2]) < 1 or int(match[1]) > int(match[2]):
        raise UserError(f"shard {shard!r} is not i/N, such as 1/4 ... 4/4")
    index, count = int(match[1]) % int(match[2]), int(match[2])
    return points[index::count]


def run_sweep(bench: Workbench, points: list[Point]) -> list[str]:
    """Plan, heal and evaluate every point; finished ones are skipped, failed ones reported at the end.

    Returns
    -------
    list of str
        One line for every failed point.
    """
    failed = []
    for point in bench.progress(points, "sweep"):
        try:
            run_point(bench, point)
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:  # the other points must not be lost with this one
            name = f"n={point.block_size} {point.heal_mode}{' control' if point.control else ''}"
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", file=sys.stderr)
    return failed


def run_point(bench: Workbench, point: Point) -> str:
    """Plan, heal and evaluate one point; returns the variant's name."""
    path = bench.hparams["path"]
    plan = plan_block(bench, point.block_size, path, bench.hparams["start_layer"], point.control)
    if point.heal_mode == "none":
        name = Variant(plan.start_layer, plan.block_size).name
    else:
        name = heal(bench, plan, point.heal_mode, bench.hparams["tag"])
    evaluate(bench, name, must_exist=False)
    return name
