"""Many points of one experiment in one process: block sizes x heal modes on a path, the model loaded once."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from speechllm_prune.experiment import Variant
from speechllm_prune.restore import EXTRAS
from speechllm_prune.runtime import Stopped, UserError
from speechllm_prune.stages.evaluate import evaluate
from speechllm_prune.stages.heal import extras_of, heal
from speechllm_prune.stages.plan import plan_block
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
    extras : tuple of str
        Beyond the paper: of `all`, `comp`, `kl`.
    """

    block_size: int
    heal_mode: str
    control: bool = False
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        mode = "+".join([self.heal_mode, *self.extras])
        return f"n={self.block_size} {mode}{' control' if self.control else ''}"


def plan_points(
    block_sizes: list[int], heal_modes: list[str], num_layers: int, control: bool
) -> list[Point]:
    """The points of a sweep, cheap ones first within a block size.

    Arguments
    ---------
    block_sizes : list of int
        Empty: every n from 1 to L/2.
    heal_modes : list of str
        Of `none`, `decoder`, `projector`, `joint`, each perhaps with extras: `joint+kl`, `none+comp`.
    num_layers : int
        L.
    control : bool
        Whether to add, for the largest block size, the control of every healing mode without extras.

    Example
    -------
    >>> [str(point) for point in plan_points([2], ["joint+kl", "none", "joint"], 6, control=True)]
    ['n=2 none', 'n=2 joint', 'n=2 joint+kl', 'n=2 joint control']
    """
    modes = sorted({parse_mode(mode) for mode in heal_modes}, key=_order)
    sizes = sorted(set(block_sizes)) or list(range(1, num_layers // 2 + 1))
    if sizes[-1] > num_layers - 1:
        raise UserError(
            f"block_sizes: {sizes[-1]} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers)"
        )
    points = [Point(size, mode, extras=extras) for size in sizes for mode, extras in modes]
    if control:
        points += [
            Point(sizes[-1], mode, control=True)
            for mode, extras in modes
            if mode != "none" and not extras
        ]
    return points


def parse_mode(text: str) -> tuple[str, tuple[str, ...]]:
    """Heal mode and extras of an entry of `heal_modes`.

    Raises
    ------
    UserError

    Example
    -------
    >>> parse_mode("joint+kl+comp")
    ('joint', ('comp', 'kl'))
    """
    mode, *extras = text.split("+")
    if mode not in HEAL_MODES:
        raise UserError(f"heal_modes: {text!r} is not one of {', '.join(HEAL_MODES)}")
    allowed = {"none": ["comp"], "projector": ["comp", "kl"]}.get(mode, list(EXTRAS))
    for extra in extras:
        if extra not in allowed:
            raise UserError(
                f"heal_modes: {text!r}: {mode} takes {', '.join(f'+{name}' for name in allowed)}"
            )
    return mode, tuple(sorted(set(extras)))


def _order(entry: tuple[str, tuple[str, ...]]) -> tuple[int, int, tuple[str, ...]]:
    mode, extras = entry
    return HEAL_MODES.index(mode), len(extras), extras


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
            failed.append(f"{point}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", file=sys.stderr)
    return failed


def run_point(bench: Workbench, point: Point) -> str:
    """Plan, heal and evaluate one point; returns the variant's name."""
    path = bench.hparams["path"]
    plan = plan_block(bench, point.block_size, path, bench.hparams["start_layer"], point.control)
    on_already = extras_of(bench.hparams, point.heal_mode)  # by a key, perhaps with another value
    extras = [extra for extra in point.extras if extra not in on_already]
    keys = {key: value for extra in extras for key, value in EXTRAS[extra].items()}
    if point.heal_mode == "none" and not point.extras:
        name = Variant(plan.start_layer, plan.block_size).name
    else:
        with bench.overridden(keys):
            name = heal(bench, plan, point.heal_mode, bench.hparams["tag"])
    evaluate(bench, name, must_exist=False)
    return name
