"""What a cut saves: decoding time, peak memory and parameters, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechllm_prune.reporting.analysis import Result, choose_blocks
from speechllm_prune.reporting.collect import ExperimentData, Point
from speechllm_prune.reporting.paper import (
    EFFICIENCY_DROP,
    PEAK_MEMORY_GIB,
    WALL_CLOCK_SPEEDUP,
    speedup_readings,
)
from speechllm_prune.reporting.tables import MISSING, Table, fixed

CONDITIONS = (
    "device",
    "device_name",
    "precision",
    "features_cached",
    "eval_batch_size",
    "eval_batch_positions",
    "num_processes",
    "decode_graphs",
)
"""Fields of metrics.json that must be equal before two times are compared, or be missing on both sides."""
UNKNOWN = "not stated"


@dataclass(frozen=True)
class Saving:
    """One cut against the unpruned model on the sets that both decoded. None: not measured, or not comparable."""

    seconds: tuple[float, float] | None
    memory_gib: tuple[float, float] | None
    parameters: tuple[int, int] | None
    decoder_parameters: tuple[int, int] | None
    conditions: str

    @property
    def time_saved(self) -> float | None:
        """Percent of the time that is gone: the first reading of a '35 % speedup'."""
        return 100.0 * (1 - self.seconds[1] / self.seconds[0]) if self.seconds else None

    @property
    def speed_gained(self) -> float | None:
        """Percent by which it is faster: the second reading."""
        return 100.0 * (self.seconds[0] / self.seconds[1] - 1) if self.seconds else None


def saving_of(before: Mapping[str, Point], after: Mapping[str, Point]) -> Saving:
    """Compare two variants, each given as {evaluation set: point}."""
    pairs = [(before[name].record, after[name].record) for name in before if name in after]

    def both(key: str) -> list[tuple[float, float]]:
        found = [(one.get(key), two.get(key)) for one, two in pairs]
        return [(one, two) for one, two in found if one and two]

    def first(key: str) -> tuple[int, int] | None:
        return next(((int(one), int(two)) for one, two in both(key)), None)

    conditions = {
        key: {record.get(key, UNKNOWN) for pair in pairs for record in pair} for key in CONDITIONS
    }
    unlike = [key for key, values in conditions.items() if len(values) > 1]
    alike = bool(pairs) and not unlike
    memory = both("peak_memory_bytes")
    device, name, precision = (
        str(next(iter(conditions[key]), None) or UNKNOWN)
        for key in ("device", "device_name", "precision")
    )
    device += f" ({name})" if name not in (UNKNOWN, device) else ""
    return Saving(
        _timed_seconds(before, after) if alike else None,
        # On a CPU it is the high-water mark of a process that may have held other models too.
        (max(m for m, _ in memory) / 2**30, max(m for _, m in memory) / 2**30)
        if alike and memory and device.startswith("cuda")
        else None,
        first("num_parameters"),
        first("decoder_parameters"),
        f"{device}, {precision}{', encoder features cached' * (conditions['features_cached'] == {True})}"
        if alike
        else f"not alike: {', '.join(unlike)}",
    )


def _timed_seconds(
    before: Mapping[str, Point], after: Mapping[str, Point]
) -> tuple[float, float] | None:
    """Sums over the sets, in which short sets do not count as much as long ones; None if one was not timed alike."""
    totals = [0.0, 0.0]
    for name in before:
        if name in after:
            timed = [_timed(point) for point in (before[name], after[name])]
            if None in timed or not math.isclose(timed[0][0], timed[1][0]):  # type: ignore[index]
                return None
            totals = [total + one[1] for total, one in zip(totals, timed, strict=True)]  # type: ignore[index]
    return (totals[0], totals[1]) if all(totals) else None


def _timed(point: Point) -> tuple[float, float] | None:
    """Seconds of audio and of decoding it, without the warm-up, as in rtfx; older files time it for the whole set."""
    record = point.record
    if record.get("timed_seconds") and record.get("timed_audio_seconds"):
        return record["timed_audio_seconds"], record["timed_seconds"]
    try:
        lines = (point.folder / "hyps.jsonl").read_text(encoding="utf-8").splitlines()
        audio = math.fsum(json.loads(line)["duration"] for line in lines if line)
        return audio, audio / record["rtfx"]
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def savings(
    experiment: ExperimentData, results: Sequence[Result], heal_mode: str = "joint"
) -> dict[int, Saving]:
    """{n: saving} of every tested block on the own path; every n of the sweep is decoded by the same code."""
    full = {r.point.eval_set: r.point for r in results if r.point.is_full}
    before = {name: full[name] for name in experiment.eval_sets if name in full}
    tested = choose_blocks(experiment, results, experiment.tolerance, heal_mode).tested
    return {
        n: saving_of(before, {name: result.point for name, result in found.items()})
        for n, found in tested.items()
    }


def efficiency_table(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    tolerance: float | None = None,
    heal_mode: str = "joint",
) -> Table:
    """The paper's efficiency line for every tested n, the one chosen by the paper's rule marked.

    Arguments
    ---------
    experiments, results
        Those with points, judged by `analyse`.
    tolerance : float, optional
        Decides which n is marked; by default that of each experiment's YAML.
    heal_mode : str
        Whose points are compared.
    """
    columns = ["model", "n", "% drop", "decoding time (s)", "time", "speed", "peak memory (GiB)"]
    table = Table(f"Efficiency, before and after pruning ({heal_mode} healing)", columns)
    table.columns += ["parameters", "decoder parameters", "measured on"]
    table.notes = list(dict.fromkeys(note for e in experiments for note in e.notes))
    for experiment in experiments:
        judged = results[str(experiment.folder)]
        allowed = experiment.tolerance if tolerance is None else tolerance
        chosen = choose_blocks(experiment, judged, allowed, heal_mode).largest
        for n, saving in savings(experiment, judged, heal_mode).items():
            _add_row(table, experiment, n, saving, n == chosen)
    ways = ", ".join(f"{name} ({factor:.2f}x)" for name, factor in speedup_readings().items())
    before, after = PEAK_MEMORY_GIB
    table.remarks = [
        "*: the largest n within tolerance. Decoding time: sum over the evaluation sets, one run each, without every "
        "process's first batch, its warm-up (`timed_seconds` of metrics.json; older files have none: the audio of the "
        "set divided by its `rtfx`); time and speed: how they change. Peak memory: on a GPU only. Times are "
        "wall-clock: other work on the same cores, such as the demo's second process, is in them.",
        f"The paper, Llama-3.1-8B without {EFFICIENCY_DROP:g} % of its layers on one H100: '{WALL_CLOCK_SPEEDUP:g} % "
        f"wall-clock speedup', which reads as {ways}; {before} -> {after} GiB ({100 * (after / before - 1):+.1f} %).",
    ]
    return table


def _arrow(pair: tuple[float, float] | None, digits: int) -> str:
    return MISSING if pair is None else " -> ".join(fixed(value, digits) for value in pair)


def _counts(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return MISSING
    return f"{pair[0]:,} -> {pair[1]:,} ({100.0 * (pair[1] / pair[0] - 1):+.1f} %)"


def _add_row(
    table: Table, experiment: ExperimentData, n: int, saving: Saving, chosen: bool
) -> None:
    share = 100.0 * n / experiment.points[0].num_layers
    saved, gained = saving.time_saved, saving.speed_gained
    table.rows.append(
        [
            experiment.label,
            f"{n}{' *' if chosen else ''}",
            fixed(share, 1),
            _arrow(saving.seconds, 2),
            MISSING if saved is None else f"{0.0 - saved:+.1f} %",
            MISSING if gained is None else f"{gained:+.1f} %",
            _arrow(saving.memory_gib, 2),
            _counts(saving.parameters),
            _counts(saving.decoder_parameters),
            saving.conditions,
        ]
    )

    def sides(name: str, pair: tuple[float, float] | None) -> dict[str, float | None]:
        return {
            f"{name}_before": pair[0] if pair else None,
            f"{name}_after": pair[1] if pair else None,
        }

    table.records.append(
        {
            "experiment": experiment.name,
            "seed": experiment.seed,
            "block_size": n,
            "drop_percent": share,
            "chosen": chosen,
            **sides("num_parameters", saving.parameters),
            **sides("decoder_parameters", saving.decoder_parameters),
            **sides("peak_memory_gib", saving.memory_gib),
            **sides("seconds", saving.seconds),
            "time_saved_percent": saved,
            "speed_gained_percent": gained,
            "measured_on": saving.conditions,
            "note": "; ".join(experiment.notes),
        }
    )
