"""What goes further than the paper's healing, held against it: each extra beside the same cut without it, by seed.

Seeds are listed side by side and averaged; each keeps its own paired interval, and utterances are never pooled over
seeds, whose corpora may differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from speechllm_prune.evaluation.statistics import (
    Interval,
    Paired,
    aligned,
    mean_difference,
    paired_bootstrap,
)
from speechllm_prune.reporting.analysis import Result, read_rows
from speechllm_prune.reporting.collect import SHUFFLED, ExperimentData, Point
from speechllm_prune.reporting.find import unequal_healing
from speechllm_prune.reporting.tables import MISSING, Table, block_label, fixed, span

PAPER_MODE = "joint"


@dataclass
class _Seed:
    """The cuts of one experiment folder that were healed with extras, and what they are compared with."""

    label: str
    results: dict[tuple[str, int, str], Result] = field(default_factory=dict)
    """{(evaluation set, block size, healing): judged result}."""
    rows: dict[tuple[str, int, str], tuple[list[str], np.ndarray]] = field(default_factory=dict)


def healing_name(point: Point) -> str:
    """How a cut was healed, such as `joint` or `joint+kl`."""
    return point.heal_mode + (f"+{point.tag}" if point.tag else "")


def extras_tables(
    experiments: Sequence[ExperimentData], results: Mapping[str, Sequence[Result]]
) -> list[Table]:
    """The extras of every experiment, all of its seeds together: a summary, then every cut. Empty without extras.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Those of one name are seeds of each other.
    results : mapping
        {str(experiment folder): judged results}.
    """
    tables = []
    for name in dict.fromkeys(experiment.name for experiment in experiments):
        of_name = [e for e in experiments if e.name == name]
        seeds = [_cuts_of(e, results[str(e.folder)]) for e in of_name]
        seeds = [seed for seed in seeds if any("+" in key[2] for key in seed.results)]
        if seeds:
            notes = list(dict.fromkeys(note for e in of_name for note in e.notes))
            sets = list(dict.fromkeys(s for e in of_name for s in e.set_order))
            metric = of_name[0].points[0].metric
            tables += [_summary(name, seeds, metric, notes), _details(name, seeds, sets, notes)]
    return tables


def _cuts_of(experiment: ExperimentData, judged: Sequence[Result]) -> _Seed:
    """Only blocks that some extra was tried on; where a block size has several, the one on the own path."""
    seed = _Seed(f"seed {experiment.seed}")
    pruned = [r for r in judged if r.point.is_pruned and SHUFFLED not in r.point.tag]
    tried: dict[int, int] = {}
    for result in pruned:
        size, start = result.point.block_size, result.point.start_layer
        if result.point.tag and start is not None:
            own = "own" in experiment.sources(start, size)
            if own or size not in tried:
                tried[size] = start
    for result in pruned:
        point = result.point
        if tried.get(point.block_size) == point.start_layer:
            key = (point.eval_set, point.block_size, healing_name(point))
            seed.results[key] = result
            with contextlib.suppress(
                ValueError
            ):  # no interval then, which the table of points says
                seed.rows[key] = read_rows(point)
    return seed


def _compared(seeds: Sequence[_Seed]) -> list[tuple[str, str]]:
    """(healing, what it is held against): everything against joint; what has an extra also against going without."""
    names = list(dict.fromkeys(key[2] for seed in seeds for key in sorted(seed.results)))
    names.sort(key=lambda name: (not name.startswith(PAPER_MODE), name))
    pairs = [(name, PAPER_MODE) for name in names if name != PAPER_MODE]
    return pairs + [
        (name, name.partition("+")[0])
        for name in names
        if "+" in name and name.partition("+")[0] != PAPER_MODE
    ]


def _paired(seed: _Seed, cut: tuple[str, int], healing: str, other: str) -> Paired | None:
    first, second = seed.rows.get((*cut, other)), seed.rows.get((*cut, healing))
    if first is None or second is None:
        return None
    metric = seed.results[(*cut, healing)].point.metric
    try:
        return paired_bootstrap(*first, *second, metric)
    except ValueError:  # other utterances
        return None


def _side(interval: Interval | None, metric: str) -> str:
    """better | worse | undecided: where the interval of a difference lies."""
    if interval is None or interval.low <= 0 <= interval.high:
        return "undecided"
    return "better" if (interval.high < 0) == (metric == "wer") else "worse"


# --------------------------------------------------------------------------------------------- summary
def _summary(name: str, seeds: Sequence[_Seed], metric: str, notes: list[str]) -> Table:
    columns = ["healing", "held against", *(f"{seed.label}: mean difference" for seed in seeds)]
    columns += ["mean over seeds", "cuts better / worse / undecided", "verdict"]
    table = Table(f"Extras of {name}: what they change, over all cuts and sets", columns)
    table.notes = notes
    for healing, other in _compared(seeds):
        _add_summary(table, name, seeds, metric, healing, other)
    table.remarks = [
        f"Difference: {metric.upper()} minus that of the healing it is held against, in points, at the same cut; mean "
        f"over the cuts and evaluation sets that have both; {'below' if metric == 'wer' else 'above'} 0 is better. "
        "In brackets: 95 % paired bootstrap interval within the seed. Cuts: evaluation set x block size x seed, by "
        "where the paired interval of each lies.",
        "Verdict: helps or hurts if the interval of the mean difference lies on one side of 0 in every one of at least "
        "two seeds; no difference shown otherwise.",
        *_healing_remarks(seeds),
    ]
    return table


def _healing_remarks(seeds: Sequence[_Seed]) -> list[str]:
    """Whether what is held against each other was healed for the same steps with the same LoRA."""
    unequal, unknown = [], set()
    pairs = [(seed, *names) for seed in seeds for names in _compared(seeds)]
    for seed, healing, other in pairs:
        for cut in [key[:2] for key in seed.results if key[2] == healing]:
            if (*cut, other) in seed.results:
                one, two = (seed.results[(*cut, name)].point for name in (healing, other))
                root, names = one.folder.parents[2], (one.variant, two.variant)
                found = unequal_healing(root, *names, whole=False)
                unknown |= {f"{seed.label}: {' and '.join(names)}"} if found is None else set()
                unequal += [f"{seed.label}: {' and '.join(names)}: {text}" for text in found or ()]
    remarks = [f"Not healed alike: {'; '.join(dict.fromkeys(unequal))}."] if unequal else []
    if unknown:
        text = f"{len(unknown)} pairs of a cut's healings do not both state their steps and LoRA"
        remarks.append(f"{text} (heal/*/DONE.json), such as {min(unknown)}.")
    return remarks


def _add_summary(
    table: Table, name: str, seeds: Sequence[_Seed], metric: str, healing: str, other: str
) -> None:
    cells, means, sides, cuts = [], [], [], []
    for seed in seeds:
        both = [key[:2] for key in seed.results if key[2] == healing]
        pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for cut in both:
            paired = _paired(seed, cut, healing, other)
            if paired is not None:
                cuts.append(_side(paired.difference, metric))
                rows = (*seed.rows[(*cut, other)], *seed.rows[(*cut, healing)])
                pairs.setdefault(cut[0], []).append(aligned(*rows))
        if not pairs:
            cells.append(MISSING)
            continue
        mean, interval = mean_difference(pairs, metric)
        means.append(mean)
        sides.append(_side(interval, metric))
        cells.append(f"{mean:+.2f}{span(interval)}")
        table.records.append(
            {
                "experiment": name,
                "seed": seed.label.removeprefix("seed "),
                "healing": healing,
                "held_against": other,
                "eval_set": "all",
                "num_cuts": sum(map(len, pairs.values())),
                "difference": mean,
                "difference_low": interval.low,
                "difference_high": interval.high,
                "side": sides[-1],
                "note": "; ".join(table.notes),
            }
        )
    counts = " / ".join(str(cuts.count(side)) for side in ("better", "worse", "undecided"))
    mean_cell = f"{np.mean(means):+.2f}" if len(means) > 1 else "–"
    table.rows.append([healing, other, *cells, mean_cell, counts, _verdict(sides)])


def _verdict(sides: Sequence[str]) -> str:
    if len(sides) < 2:
        return "one seed only" if sides else MISSING
    if set(sides) == {"better"}:
        return "helps"
    return "hurts" if set(sides) == {"worse"} else "no difference shown"


# --------------------------------------------------------------------------------------------- details
def _details(name: str, seeds: Sequence[_Seed], sets: Sequence[str], notes: list[str]) -> Table:
    columns = ["evaluation set", "n", "healing"]
    columns += [f"{seed.label}: {what}" for seed in seeds for what in ("score", "minus joint")]
    table = Table(f"Extras of {name}: every cut", [*columns, "minus joint, mean over seeds"])
    table.notes = notes
    cuts = {key[:2] for seed in seeds for key in seed.results}
    names = [PAPER_MODE, *dict.fromkeys(healing for healing, _ in _compared(seeds))]
    for cut in sorted(cuts, key=lambda cut: (sets.index(cut[0]), cut[1])):
        for healing in names:
            if any((*cut, healing) in seed.results for seed in seeds):
                _add_cut(table, name, seeds, cut, healing)
    blocks = [f"{seed.label}: {', '.join(_blocks(seed))}" for seed in seeds]
    table.remarks = [
        "Score: WER (lower is better) or BLEU (higher is better) with its 95 % bootstrap interval over utterances; "
        "minus joint: difference to the paper's joint healing of the same cut, in points, with its paired interval.",
        f"Blocks: {'; '.join(blocks)}.",
    ]
    return table


def _blocks(seed: _Seed) -> list[str]:
    found = {(r.point.block_size, r.point.start_layer) for r in seed.results.values()}
    return [block_label(start, size) for size, start in sorted(found, key=lambda block: block[0])]


def _add_cut(
    table: Table, name: str, seeds: Sequence[_Seed], cut: tuple[str, int], healing: str
) -> None:
    cells, differences = [], []
    for seed in seeds:
        result = seed.results.get((*cut, healing))
        if result is None:
            cells += [MISSING, MISSING]
            continue
        joint = seed.results.get((*cut, PAPER_MODE))
        paired = _paired(seed, cut, healing, PAPER_MODE)
        interval = paired.difference if paired else None
        difference = result.point.value - joint.point.value if joint else None
        cells.append(fixed(result.point.value) + span(result.interval))
        if healing == PAPER_MODE:
            cells.append("–")
        else:
            cells.append(MISSING if difference is None else f"{difference:+.2f}{span(interval)}")
        if difference is not None:
            differences.append(difference)
        table.records.append(
            {
                "experiment": name,
                "seed": seed.label.removeprefix("seed "),
                "healing": healing,
                "held_against": PAPER_MODE,
                "eval_set": cut[0],
                "block_size": cut[1],
                "start_layer": result.point.start_layer,
                "variant": result.point.variant,
                "value": result.point.value,
                "value_low": result.interval.low if result.interval else None,
                "value_high": result.interval.high if result.interval else None,
                "difference": difference,
                "difference_low": interval.low if interval else None,
                "difference_high": interval.high if interval else None,
                "side": _side(interval, result.point.metric),
                "note": result.point.note,
            }
        )
    mean = f"{np.mean(differences):+.2f}" if len(differences) == len(seeds) else MISSING
    table.rows.append(
        [cut[0], str(cut[1]), healing, *cells, "–" if healing == PAPER_MODE else mean]
    )
