"""From points to judged results: intervals, relative degradation, verdicts, the chosen block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechllm_prune.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    corpus_score,
    largest_blocks,
    paired_bootstrap,
    relative_degradation,
    verdict,
)
from speechllm_prune.reporting.collect import (
    SHUFFLED,
    ExperimentData,
    Point,
    failure_reason,
)
from speechllm_prune.runtime import UserError
from speechllm_prune.tasks import TASKS

TOLERANCE = {name: task.tolerance for name, task in TASKS.items()}
"""Largest accepted relative degradation per task (paper, section 4.1)."""


@dataclass(frozen=True)
class Result:
    """A point with what is derived from it. None: cannot be said, for the reason in `remark`."""

    point: Point
    interval: Interval | None = None
    degradation: float | None = None
    degradation_interval: Interval | None = None
    verdict: str = "undecided"
    difference: float | None = None
    """Score minus that of the unpruned model, in points."""
    difference_interval: Interval | None = None
    healing: float | None = None
    """Score minus that of the same cut without healing, in points."""
    healing_interval: Interval | None = None
    remark: str = ""


@dataclass(frozen=True)
class Choice:
    """The block sizes that the acceptance rule picks for one experiment and heal mode."""

    heal_mode: str
    tag: str
    tolerance: float
    eval_sets: list[str]
    tested: dict[int, dict[str, Result]]
    """{block size: {evaluation set: result}} along the path, for sizes scored on an evaluation set."""
    largest: int | None
    safe: int | None
    on_dev: int | None
    """The largest block within tolerance on the dev set alone, of all that were scored there."""
    dev_tested: dict[int, dict[str, Result]]
    """As `tested`, for sizes scored on the dev set."""


def analyse(experiment: ExperimentData, tolerance: float | None = None) -> list[Result]:
    """Judge every point of an experiment against its unpruned model, utterance by utterance.

    Arguments
    ---------
    experiment : ExperimentData
        As read by `collect`.
    tolerance : float, optional
        Largest accepted relative degradation; by default the experiment's own.
    """
    tolerance = experiment.tolerance if tolerance is None else tolerance
    sets = experiment.set_order
    rows: dict[tuple[str, str], tuple[list[str], np.ndarray] | str] = {}
    for point in experiment.points:
        try:
            rows[point.variant, point.eval_set] = read_rows(point)
        except ValueError as error:
            rows[point.variant, point.eval_set] = str(error)
    order = sorted(
        experiment.points,
        key=lambda p: (
            sets.index(p.eval_set),
            not p.is_full,
            SHUFFLED in p.tag,
            p.control,
            p.block_size,
            p.start_layer or 0,
            p.heal_mode,
            p.tag,
        ),
    )
    return [_judge(point, experiment, rows, tolerance) for point in order]


def _judge(
    point: Point, experiment: ExperimentData, rows: Mapping[tuple[str, str], Any], tolerance: float
) -> Result:
    own = rows[point.variant, point.eval_set]
    if isinstance(own, str):
        remark, interval = f"no interval: {own}", None
    else:
        remark, interval = "", bootstrap_interval(own[1], point.metric)
    facts: dict[str, Any] = {"interval": interval}
    full = experiment.baseline(point.eval_set)
    if full is None:
        remark = remark or "the unpruned model was not evaluated on this set"
    elif point is not full:
        facts["degradation"] = relative_degradation(full.value, point.value, point.metric)
        facts["difference"] = point.value - full.value
        if facts["degradation"] is None:
            remark = remark or "the unpruned model scores 0: see the absolute change"
        paired, reason = _paired(full, point, rows)
        remark = remark or reason
        if paired is not None:
            facts["difference_interval"] = paired.difference
            facts["degradation_interval"] = paired.degradation
            facts["verdict"] = verdict(paired.degradation, tolerance)
    unhealed = _unhealed(point, experiment)
    if unhealed is not None:
        paired, _ = _paired(unhealed, point, rows)
        facts["healing"] = point.value - unhealed.value
        facts["healing_interval"] = paired.difference if paired else None
    return Result(point, remark=remark, **facts)


def _unhealed(point: Point, experiment: ExperimentData) -> Point | None:
    if not point.is_pruned or point.heal_mode == "none":
        return None
    name = f"l{point.start_layer:02d}n{point.block_size:02d}-none"
    return next(
        (p for p in experiment.points if (p.variant, p.eval_set) == (name, point.eval_set)), None
    )


def _paired(baseline: Point, system: Point, rows: Mapping[tuple[str, str], Any]) -> tuple[Any, str]:
    first, second = (rows[p.variant, p.eval_set] for p in (baseline, system))
    for found in (first, second):
        if isinstance(found, str):
            return None, f"no interval: {found}"
    try:
        return paired_bootstrap(first[0], first[1], second[0], second[1], system.metric), ""
    except ValueError as error:
        return None, f"no paired interval: {error}"


def choose_blocks(
    experiment: ExperimentData,
    results: Sequence[Result],
    tolerance: float,
    heal_mode: str = "joint",
    tag: str = "",
    source: str = "own",
) -> Choice:
    """Apply the paper's rule: the largest tested block within tolerance on all evaluation sets at once.

    Arguments
    ---------
    experiment, results
        As read by `collect` and judged by `analyse`.
    tolerance : float
        Largest accepted relative degradation.
    heal_mode, tag : str
        Which points to choose among.
    source : str
        Whose path chose the blocks: `own`, `text`, `tail`.
    """
    scored: dict[int, dict[str, Result]] = {}
    for result in results:
        point = result.point
        if (
            point.is_pruned
            and point.start_layer is not None
            and (point.heal_mode, point.tag) == (heal_mode, tag)
            and source in experiment.sources(point.start_layer, point.block_size)
        ):
            scored.setdefault(point.block_size, {})[point.eval_set] = result
    eval_sets, dev = experiment.eval_sets, [experiment.dev_set]
    tested, dev_tested = _scored_on(scored, eval_sets), _scored_on(scored, dev)
    largest, safe = largest_blocks(_degradations(tested), tolerance, eval_sets)
    on_dev, _ = largest_blocks(_degradations(dev_tested), tolerance, dev)
    return Choice(
        heal_mode,
        tag,
        tolerance,
        eval_sets,
        tested,
        largest,
        safe,
        on_dev,
        dev_tested,
    )


def _scored_on(
    scored: Mapping[int, dict[str, Result]], sets: Sequence[str]
) -> dict[int, dict[str, Result]]:
    """The block sizes with a score on one of the sets: another one says nothing of what a rule chooses there."""
    return {n: found for n, found in sorted(scored.items()) if not found.keys().isdisjoint(sets)}


def _degradations(
    tested: Mapping[int, Mapping[str, Result]],
) -> dict[int, dict[str, float | None]]:
    return {
        n: {name: result.degradation for name, result in found.items()}
        for n, found in tested.items()
    }


# -------------------------------------------------------------------------------------- utterance rows
def read_rows(point: Point) -> tuple[list[str], np.ndarray]:
    """Ids and counts of every utterance of a point, for the bootstrap.

    Raises
    ------
    ValueError
        If hyps.jsonl is missing, broken, or does not give the score of metrics.json.
    """
    path = point.folder / "hyps.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        ids = [str(line["id"]) for line in lines]
        rows = _wer_rows(lines) if point.metric == "wer" else _bleu_rows(lines, point.record)
    except FileNotFoundError:
        raise ValueError("there is no hyps.jsonl") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"hyps.jsonl is broken ({failure_reason(error)})") from None
    if len(rows) != point.num_utterances:
        raise ValueError(f"hyps.jsonl has {len(rows)} rows, metrics.json {point.num_utterances}")
    again = float(corpus_score(rows.sum(axis=0), point.metric)) if len(rows) else float("nan")
    if not abs(again - point.value) < 0.01:
        raise ValueError(f"hyps.jsonl gives {again:.3f}, metrics.json {point.value:.3f}")
    return ids, rows


def _wer_rows(lines: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array(
        [
            (r["substitutions"] + r["deletions"] + r["insertions"], r["reference_words"])
            for r in lines
        ],
        dtype=np.int64,
    ).reshape(-1, 2)


def _bleu_rows(lines: Sequence[dict[str, Any]], record: dict[str, Any]) -> np.ndarray:
    from sacrebleu.metrics import BLEU

    signature = str(record.get("signature") or "")
    if not all(part in signature for part in ("case:mixed", "tok:13a", "smooth:exp")):
        raise ValueError(f"no interval for a BLEU of signature {signature or 'unknown'!r}")
    bleu = BLEU(effective_order=True)  # silences its advice; the counts are the same
    scores = [bleu.sentence_score(row["hyp"], [row["ref"]]) for row in lines]
    return np.array(
        [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.int64
    ).reshape(-1, 10)


# ------------------------------------------------------------------------------------ what may be mixed
def check_comparable(experiments: Sequence[ExperimentData]) -> None:
    """Refuse numbers that must not stand in one table: other data, metric or normaliser under the same name.

    Seeds of one experiment may have corpora of their own (those of the demo do): they are listed side by side, and
    no utterance of one is ever paired with one of the other.

    Raises
    ------
    UserError
        Naming the two files that contradict each other, or the two folders of one seed.
    """
    seeds: dict[str, ExperimentData] = {}
    for experiment in experiments:
        first = seeds.setdefault(experiment.label, experiment)
        if first is not experiment:
            raise UserError(
                f"{first.folder} and {experiment.folder} are both {experiment.label}, and would count as two seeds; "
                "give one of them, or rename the folder of one: results/OTHER_NAME/<seed>"
            )
    known: dict[tuple[str, str], list[Point]] = {}
    for experiment in experiments:
        layers: Point | None = None
        for point in experiment.points:
            if SHUFFLED in point.tag:
                continue
            layers = layers or point
            if point.task != layers.task:
                raise UserError(
                    f"{layers.folder} is of task {layers.task}, {point.folder} of task {point.task}: one experiment "
                    "has one task; give the other task an experiment_name of its own"
                )
            if point.num_layers != layers.num_layers:
                raise UserError(
                    f"{layers.folder} is of a decoder with {layers.num_layers} layers, {point.folder} of one with "
                    f"{point.num_layers}: one experiment has one decoder; remove what is left of the other"
                )
            _refuse_other_data(known.setdefault((point.task, point.eval_set), []), point)


def _refuse_other_data(known: list[Point], point: Point) -> None:
    """Compare a point with those of the other corpora under the same name; a corpus of a new seed joins them."""
    own = [p for p in known if p.experiment == point.experiment and p.seed == point.seed]
    for first in own or known:
        differing = _scoring(first, point)
        another_seed = first.experiment == point.experiment and first.seed != point.seed
        if own or not (another_seed or any(same_data(p, point) for p in known)):
            differing += _data(first, point)
        for name, before, now in differing:
            if before != now:
                raise UserError(
                    f"{first.folder} and {point.folder} cannot stand in one table: {name} is {before!r} in the "
                    f"first and {now!r} in the second; report them separately, or, if one of them is out of date, "
                    "run evaluate.py --overwrite on it"
                )
    if not own:
        known.append(point)


def same_data(first: Point, second: Point) -> bool:
    """Whether two points of an evaluation set are known to be of the same utterances, as far as they say."""
    return all(before == now for _, before, now in _data(first, second))


def _scoring(first: Point, second: Point) -> list[tuple[str, Any, Any]]:
    pairs = [("metric", first.metric, second.metric)]
    return pairs + _recorded(first, second, "text_normaliser", "signature", "protocol")


def _data(first: Point, second: Point) -> list[tuple[str, Any, Any]]:
    pairs: list[tuple[str, Any, Any]]
    pairs = [("num_utterances", first.num_utterances, second.num_utterances)]
    pairs += _recorded(first, second, "reference_words")
    before, now = _manifest_hash(first), _manifest_hash(second)
    if before and now:
        pairs.append((f"the manifest of {first.eval_set}", before[:12], now[:12]))
    return pairs


def _recorded(first: Point, second: Point, *keys: str) -> list[tuple[str, Any, Any]]:
    pairs = [(key, first.record.get(key), second.record.get(key)) for key in keys]
    return [(key, before, now) for key, before, now in pairs if None not in (before, now)]


def _manifest_hash(point: Point) -> str | None:
    suffix = f"{point.corpus}/{point.split}.csv"
    inputs = point.record.get("inputs") or {}
    return next((digest for name, digest in inputs.items() if name.endswith(suffix)), None)
