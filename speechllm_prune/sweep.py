"""Many points of one experiment in one process: block sizes x heal modes x paths, the model loaded once."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechllm_prune.experiment import HEAL_MODES, Variant
from speechllm_prune.restore import EXTRAS
from speechllm_prune.runtime import Stopped, UserError, spoken
from speechllm_prune.stages.evaluate import evaluate
from speechllm_prune.stages.heal import extras_of, heal, heal_tag
from speechllm_prune.stages.plan import choose_start_layer, decoder_depth, plan_block
from speechllm_prune.sweep_estimate import Costs, audio_seconds
from speechllm_prune.workbench import Workbench


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
    start_layer : int
        l; -1 until the point is put on a path.
    paths : tuple of str
        All that choose this block; empty where `start_layer` was given.
    """

    block_size: int
    heal_mode: str
    control: bool = False
    extras: tuple[str, ...] = ()
    start_layer: int = -1
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        mode = "+".join([self.heal_mode, *self.extras])
        return f"n={self.block_size} {mode}{' control' if self.control else ''}"


# ---------------------------------------------------------------- which points


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
    sizes = all_sizes(block_sizes, num_layers)
    points = [Point(size, mode, extras=extras) for size in sizes for mode, extras in modes]
    if control:
        points += [
            Point(sizes[-1], mode, control=True)
            for mode, extras in modes
            if mode != "none" and not extras
        ]
    return points


def all_sizes(block_sizes: list[int], num_layers: int) -> list[int]:
    """The block sizes asked for, ascending; by default every n from 1 to L/2.

    Raises
    ------
    UserError
    """
    sizes = sorted(set(block_sizes)) or list(range(1, num_layers // 2 + 1))
    if sizes[-1] > num_layers - 1:
        raise UserError(
            f"block_sizes: {sizes[-1]} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers)"
        )
    return sizes


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


def parse_paths(text: str) -> list[str]:
    """The paths of `--path own,text`; a file may have a comma in its name.

    Example
    -------
    >>> parse_paths("own, text,own")
    ['own', 'text']
    """
    parts = [text] if Path(text).is_file() else [part.strip() for part in text.split(",")]
    return list(dict.fromkeys(parts))


def start_layers(bench: Workbench, sizes: list[int]) -> dict[str, dict[int, int]]:
    """{path: {n: l}} of every path asked for; with `start_layer` there is one, named ''.

    Raises
    ------
    UserError
        A path that does not exist is no fault of single points.
    """
    if bench.hparams["start_layer"] >= 0:
        return {"": dict.fromkeys(sizes, bench.hparams["start_layer"])}
    depth = decoder_depth(bench)
    return {
        path: {size: choose_start_layer(bench, size, path, depth) for size in sizes}
        for path in parse_paths(bench.hparams["path"])
    }


def on_paths(points: list[Point], starts: Mapping[str, Mapping[int, int]]) -> list[Point]:
    """Every point on every path that has a block of its size; paths that choose the same block share the point.

    Example
    -------
    >>> points = on_paths([Point(1, "none"), Point(2, "none")], {"own": {1: 3, 2: 3}, "text": {1: 4, 2: 3}})
    >>> [(point.block_size, point.start_layer, point.paths) for point in points]
    [(1, 3, ('own',)), (1, 4, ('text',)), (2, 3, ('own', 'text'))]
    """
    found: dict[Point, tuple[str, ...]] = {}
    for point in points:
        for path, start in starts.items():
            if point.block_size in start:
                placed = replace(point, start_layer=start[point.block_size])
                found[placed] = (*found.get(placed, ()), *([path] if path else []))
    return [replace(point, paths=paths) for point, paths in found.items()]


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


# ---------------------------------------------------------------- where a point stands


def keys_of(hparams: dict[str, Any], point: Point) -> dict[str, Any]:
    """The keys that a point's extras set; what is on already may have another value."""
    on_already = extras_of(hparams, point.heal_mode)
    extras = [extra for extra in point.extras if extra not in on_already]
    return {key: value for extra in extras for key, value in EXTRAS[extra].items()}


def variant_of(hparams: dict[str, Any], point: Point) -> Variant:
    """The variant that a point makes. Its name knows no path."""
    block = point.start_layer, point.block_size
    if point.heal_mode == "none" and not point.extras:
        return Variant(*block)
    tag = heal_tag(hparams | keys_of(hparams, point), point.heal_mode, hparams["tag"])
    return Variant(*block, point.heal_mode, tag, point.control)


def eval_keys(bench: Workbench) -> list[str]:
    """The evaluation manifests that are prepared: what a sweep evaluates on."""
    return [key for key in bench.hparams["eval_manifests"] if bench.is_prepared(key)]


def score_file(bench: Workbench, variant: str, key: str) -> Path:
    """Where the score of a variant on an evaluation manifest stands."""
    return bench.experiment.stage(f"eval/{variant}/{key.replace('/', '-')}") / "metrics.json"


def missing_parts(bench: Workbench, point: Point) -> tuple[bool, list[str]]:
    """Whether healing is still to be done, and the evaluation manifests without a score."""
    variant = variant_of(bench.hparams, point)
    if bench.run.flags.overwrite:
        return variant.is_healed, eval_keys(bench)
    to_heal = variant.is_healed and not bench.experiment.is_done(f"heal/{variant.name}")
    keys = [key for key in eval_keys(bench) if not score_file(bench, variant.name, key).is_file()]
    return to_heal, keys


def seconds_left(bench: Workbench, points: list[Point]) -> tuple[dict[Point, float | None], Costs]:
    """How long every point that is not finished will take (None: not known), and what that was computed from."""
    costs, found = Costs.of(bench), {}
    for point in points:
        to_heal, keys = missing_parts(bench, point)
        if to_heal or keys:
            variant = variant_of(bench.hparams, point)
            found[point] = costs.seconds(variant, to_heal, audio_seconds(bench, keys))
    return found, costs


def listing(bench: Workbench, points: list[Point]) -> list[str]:
    """For `--dry_run`: how long it will take, and where every point stands."""
    todo, costs = seconds_left(bench, points)
    told = costs.describe(list(todo.values()))
    lines = [f"{len(points)} points, {len(points) - len(todo)} done; {told}"]
    for point in points:
        paths = f" ({', '.join(point.paths)})" if point.paths else ""
        state = "would run" if point in todo else "done     "
        lines.append(f"{state} {point}: {variant_of(bench.hparams, point).name}{paths}")
    return lines


def remarks(bench: Workbench, points: list[Point]) -> list[str]:
    """What a user should know before the first point."""
    lines = []
    shared = {
        f"l{point.start_layer:02d}n{point.block_size:02d}": " and ".join(point.paths)
        for point in points
        if len(point.paths) > 1
    }
    if shared:
        told = ", ".join(f"{block} by {paths}" for block, paths in shared.items())
        lines.append(f"chosen by several paths and run once: {told}")
    if not bench.hparams["cache_features"]:
        lines.append("cache_features is False: the encoder runs again for every point")
    return lines


# ---------------------------------------------------------------- running them


def run_sweep(bench: Workbench, points: list[Point]) -> list[tuple[str, Exception]]:
    """Plan, heal and evaluate every point; finished ones are skipped, failed ones reported at the end.

    Returns
    -------
    list of (str, Exception)
        Every failed point and what went wrong.
    """
    failed: list[tuple[str, Exception]] = []
    progress = Progress(bench, points)
    for point in points:
        told = ""
        try:
            run_point(bench, point)
        except (Stopped, KeyboardInterrupt):
            progress.close()
            raise
        except Exception as error:  # the other points must not be lost with this one
            if bench.world_size > 1 and not isinstance(error, UserError):
                raise  # the other ranks wait for this one: only ending the job frees them
            # Its frames hold the tensors of the point, which on a GPU the next points need.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            failed.append((str(point), error))
            print(f"failed: {point}: {type(error).__name__}: {error}", file=sys.stderr)
            told = "failed after "
        progress.finished(point, told)
    progress.close()
    return failed


def run_point(bench: Workbench, point: Point) -> str:
    """Plan, heal and evaluate one point; returns the variant's name."""
    start = bench.hparams["start_layer"]
    for path in point.paths or ("",):  # every path that chose the block is noted in its plan
        plan = plan_block(bench, point.block_size, path, start, point.control)
    name = variant_of(bench.hparams, point).name
    if point.heal_mode != "none" or point.extras:
        with bench.overridden(keys_of(bench.hparams, point)):
            heal(bench, plan, point.heal_mode, bench.hparams["tag"])
    evaluate(bench, name, must_exist=False)
    return name


class Progress:
    """How far a sweep is: a bar on a terminal, elsewhere a line for every point.

    The time left is that of the work that this process has done so far, scaled by the cost of what is left; points that
    were finished before enter neither.

    Arguments
    ---------
    bench : Workbench
        Rank 0 speaks.
    points : list of Point
        All points of this process.
    """

    def __init__(self, bench: Workbench, points: list[Point]) -> None:
        self.bench, self.total, self.count = bench, len(points), 0
        seconds, _ = seconds_left(bench, points)
        known = [value for value in seconds.values() if value]
        # what is not known counts as much as the mean of those that are
        mean = sum(known) / len(known) if known else 1.0
        self.costs = {point: value or mean for point, value in seconds.items()}
        self.spent = self.done = 0.0
        self.left = sum(self.costs.values())
        self.began = time.monotonic()
        self.bar = tqdm(
            total=self.total,
            desc="sweep",
            disable=not bench.shows_progress,
            dynamic_ncols=True,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {postfix}",
        )

    def finished(self, point: Point, told: str = "") -> None:
        """One more point is done; `told` goes in front of the time it took."""
        self.count += 1
        seconds, cost = time.monotonic() - self.began, self.costs.get(point)
        if cost is None:
            told = told and "failed" or "was already done"
        else:
            self.spent += seconds
            self.done += cost
            self.left -= cost
            told += spoken(seconds)
        if cost is not None and self.left > 0:
            left = spoken(self.spent * self.left / self.done)
            told += f", about {left} left"
            self.bar.set_postfix_str(f"about {left} left")
        self.bar.update()
        if self.bench.rank == 0 and self.bar.disable:
            print(f"[{self.count}/{self.total}] {point}: {told}", flush=True)
        self.began = time.monotonic()

    def close(self) -> None:
        """Leave the terminal's last line as it is."""
        self.bar.close()
