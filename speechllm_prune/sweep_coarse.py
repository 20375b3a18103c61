"""The coarse plan of a sweep: every third block size first, then those between the last accepted and the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from speechllm_prune.evaluation.statistics import largest_blocks, relative_degradation
from speechllm_prune.experiment import read_json
from speechllm_prune.runtime import UserError
from speechllm_prune.stages.plan import decoder_depth
from speechllm_prune.sweep import (
    Point,
    eval_keys,
    on_paths,
    plan_points,
    score_file,
    variant_of,
)
from speechllm_prune.workbench import Workbench

STRIDE = 3


def coarse_sizes(sizes: Sequence[int]) -> list[int]:
    """Every third size, beginning with the smallest.

    Example
    -------
    >>> coarse_sizes(range(1, 15))
    [1, 4, 7, 10, 13]
    """
    return list(sizes[::STRIDE])


def sizes_in_gap(sizes: Sequence[int], tested: Sequence[int], largest: int | None) -> list[int]:
    """The sizes between the largest accepted one and the next tested one, which was refused.

    All of them: WER need not grow with n, so that halving the gap could miss the largest.

    Example
    -------
    >>> sizes_in_gap(range(1, 15), [1, 4, 7, 10, 13], 7)
    [8, 9]
    >>> sizes_in_gap(range(1, 15), [1, 4, 7, 10, 13], 13)
    [14]
    >>> sizes_in_gap(range(1, 15), [1, 4, 7, 10, 13], None)
    []
    """
    low = largest or 0
    high = min((n for n in tested if n > low), default=max(sizes) + 1)
    return [n for n in sizes if low < n < high]


def require_judgement(bench: Workbench) -> None:
    """Refuse a coarse plan where nothing can be judged, or by processes that do not wait for each other's scores.

    Raises
    ------
    UserError
    """
    keys = eval_keys(bench)
    if not bench.hparams["shard"].endswith("/1"):
        raise UserError(
            f"plan coarse needs the scores of all coarse points, shard {bench.hparams['shard']} makes a part of "
            "them; leave --shard out (torchrun spreads a sweep over GPUs), or take --plan all"
        )
    if not keys:
        raise UserError(
            f"plan coarse judges by evaluation manifests, and of {bench.hparams['eval_manifests']} none is prepared"
        )
    for key in keys:
        if not score_file(bench, "full", key).is_file():
            raise UserError(
                f"plan coarse compares with the full model, which was not evaluated on {key}; run: "
                f"{bench.run.command('evaluate')}"
            )


def refine(
    bench: Workbench,
    points: Sequence[Point],
    sizes: Sequence[int],
    starts: Mapping[str, Mapping[int, int]],
) -> list[Point]:
    """The points to run after the coarse ones; none while a coarse score is missing, which is said.

    Arguments
    ---------
    bench : Workbench
        With the full model evaluated.
    points : sequence of Point
        The coarse points.
    sizes : sequence of int
        The whole grid, ascending.
    starts : mapping
        {path: {n: l}} for all of them.
    """
    added = bench.on_main(refined_sizes, bench, points, sizes)
    tolerance = bench.hparams["tolerance"]
    if added is None:
        if bench.rank == 0:
            print(
                f"sizes around the tolerance {tolerance:g} follow when all coarse points are scored"
            )
        return []
    if bench.rank == 0:
        for path, found in added.items():
            told = ", ".join(map(str, found)) or "no further size"
            print(f"around the tolerance {tolerance:g}{f' on {path}' if path else ''}: {told}")
    union = sorted(set().union(*added.values()))
    if not union:
        return []
    depth = decoder_depth(bench)
    more = plan_points(union, bench.hparams["heal_modes"], depth, control=False)
    return on_paths(more, {path: {n: starts[path][n] for n in added[path]} for path in added})


def refined_sizes(
    bench: Workbench, points: Sequence[Point], sizes: Sequence[int]
) -> dict[str, list[int]] | None:
    """The sizes to add on every path, or None while coarse points are missing.

    The healed modes decide, each by its own largest accepted size (`none` only if it is the only mode); every mode is
    then run on the sizes that any of them asks for, so that the curves stand on the same grid.

    Arguments
    ---------
    bench : Workbench
        With the full model evaluated.
    points : sequence of Point
        The coarse points.
    sizes : sequence of int
        The whole grid, ascending.
    """
    judged = [point for point in points if not point.control]
    healed = [point for point in judged if point.heal_mode != "none"]
    curves: dict[tuple[str, str, tuple[str, ...]], dict[int, dict[str, float | None]]] = {}
    for point in healed or judged:
        found = _degradations(bench, variant_of(bench.hparams, point).name)
        if found is None:
            return None
        for path in point.paths or ("",):
            curves.setdefault((path, point.heal_mode, point.extras), {})[point.block_size] = found
    added: dict[str, set[int]] = {}
    for (path, _, _), tested in curves.items():
        largest, _safe = largest_blocks(tested, bench.hparams["tolerance"], eval_keys(bench))
        added.setdefault(path, set()).update(sizes_in_gap(sizes, sorted(tested), largest))
    return {path: sorted(found) for path, found in added.items()}


def _degradations(bench: Workbench, variant: str) -> dict[str, float | None] | None:
    """{evaluation manifest: relative degradation} of a variant; None while one of them is missing."""
    found: dict[str, float | None] = {}
    for key in eval_keys(bench):
        file = score_file(bench, variant, key)
        if not file.is_file():
            return None
        now, full = read_json(file), read_json(score_file(bench, "full", key))
        found[key] = relative_degradation(full["value"], now["value"], now["metric"])
    return found
