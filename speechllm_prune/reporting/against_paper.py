"""`paper | ours | difference` for every number of the paper that our results can be held against, and the share of
layers that each tier keeps. A system is ours if its decoder is the paper's; seeds of one system are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechllm_prune.reporting.analysis import Choice, Result, choose_blocks
from speechllm_prune.reporting.collect import ExperimentData
from speechllm_prune.reporting.efficiency import Saving, savings
from speechllm_prune.reporting.paper import (
    AST_DROP,
    DECODER_ONLY_WER,
    DIRECTIONS,
    EFFICIENCY_DROP,
    EVAL_SETS,
    KEPT_SHARES,
    PEAK_MEMORY_GIB,
    TABLE1,
    TABLE2,
    TABLE2_LAYERS,
    WALL_CLOCK_SPEEDUP,
    System,
    removed_layers,
)
from speechllm_prune.reporting.relative import system_of_experiment
from speechllm_prune.reporting.tables import MISSING, Table, fixed
from speechllm_prune.reporting.translation import asr_path_for, direction_of, protocol_of

OUR_SETS = dict(
    zip(
        EVAL_SETS,
        ("librispeech-test-clean", "librispeech-test-other", "loquacious-dev"),
        strict=True,
    )
)
PROTOCOL = "standard"
"""The protocol of CoVoST2 whose BLEU stands beside the paper's."""


@dataclass(frozen=True)
class Ours:
    """One of our experiments, and the system of the paper that it repeats (None: it is not in the paper)."""

    experiment: ExperimentData
    results: Sequence[Result]
    choice: Choice
    system: System | None

    def score(self, eval_set: str, n: int, heal_mode: str = "joint") -> float | None:
        """Score of the unpruned model (n = 0), or of the block that the own path removes."""
        for result in self.results:
            point = result.point
            if point.eval_set != eval_set or point.control or point.tag:
                continue
            if n == 0 and point.is_full:
                return point.value
            if point.is_pruned and (point.block_size, point.heal_mode) == (n, heal_mode):
                assert point.start_layer is not None
                if "own" in self.experiment.sources(point.start_layer, n):
                    return point.value
        return None

    @property
    def directions(self) -> set[str]:
        """Directions of translation whose set of the paper the rule was applied to."""
        points = [r.point for r in self.results if r.point.is_full]
        points = [p for p in points if p.eval_set in self.choice.eval_sets and p.split == "test"]
        return {direction_of(p) for p in points if protocol_of(p) == PROTOCOL}

    @property
    def paper_drop(self) -> float | None:
        """`drop` as the paper means it: None unless the rule was applied to all sets of the paper."""
        sets = set(OUR_SETS.values()) if self.experiment.task == "asr" else set()
        complete = sets <= set(self.choice.eval_sets) if sets else bool(self.directions)
        return self.drop if complete else None

    @property
    def drop(self) -> float | None:
        """Largest removable share in percent: 0 if no tested block is within tolerance, None if none was judged."""
        if not self.choice.tested or not any(result.point.is_full for result in self.results):
            return None
        return 100.0 * (self.choice.largest or 0) / self.experiment.points[0].num_layers


def our_systems(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    tolerance: float | None = None,
) -> list[Ours]:
    """Every experiment with the paper's system that has its decoder."""
    found = []
    for experiment in experiments:
        judged = results[str(experiment.folder)]
        allowed = experiment.tolerance if tolerance is None else tolerance
        choice = choose_blocks(experiment, judged, allowed)
        found.append(Ours(experiment, judged, choice, system_of_experiment(experiment)))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------------------------- kept share per tier
def kept_of_tier(ours: Sequence[Ours], tier: str) -> float | None:
    """Mean kept share (%) of a tier's families, each the mean of its seeds; without LoRA baselines, as in the paper."""
    families: dict[str, list[float | None]] = {}
    for one in ours:
        system = one.system
        if system and system.tier == tier and not system.lora and one.experiment.task == "asr":
            kept = None if one.paper_drop is None else 100.0 - one.paper_drop
            families.setdefault(system.family, []).append(kept)
    return _mean([_mean(kept) for kept in families.values()])


def kept_share_table(ours: Sequence[Ours], notes: list[str]) -> Table:
    """Share of decoder layers that ASR needs, per tier: the paper's section 5.2, and systems that it has not."""
    columns = ["tier", "paper: kept %", "ours: kept %", "difference", "systems of ours: kept %"]
    table = Table("Kept share of decoder layers (ASR, largest n within tolerance)", columns)
    table.notes = notes
    asr = [one for one in ours if one.experiment.task == "asr" and one.drop is not None]
    for tier, printed in KEPT_SHARES.items():
        here = [s for s in asr if s.system and s.system.tier == tier and not s.system.lora]
        _add_tier(table, tier, printed, kept_of_tier(ours, tier), here)
    for one in asr:
        if one.system is None or one.system.lora:
            name = one.system.model if one.system else "not in the paper"
            assert one.drop is not None
            _add_tier(table, name, None, 100.0 - one.drop, [one])
    table.remarks = [
        "A tier of ours is the mean over its families, a family the mean over its seeds; systems with LoRA baselines "
        "are left out of it, as in the paper. Its 86.5 is not the mean of its own Table 1, which is 84.35: "
        "python report.py --paper."
    ]
    return table


def _add_tier(
    table: Table, tier: str, printed: float | None, kept: float | None, systems: Sequence[Ours]
) -> None:
    difference = None if None in (printed, kept) else kept - printed  # type: ignore[operator]
    named = "; ".join(
        f"{s.experiment.label} {fixed(100.0 - (s.drop or 0.0), 1)}"
        + " (not on all sets of the paper)" * (s.system is not None and s.paper_drop is None)
        for s in systems
    )
    table.rows.append(
        [
            tier,
            "–" if printed is None else f"{printed:g}",
            fixed(kept),
            "–" if difference is None else f"{difference:+.2f}",
            named or MISSING,
        ]
    )
    table.records.append(
        {
            "tier": tier,
            "paper": printed,
            "ours": kept,
            "difference": difference,
            "systems": named,
            "note": "; ".join(table.notes),
        }
    )


# ------------------------------------------------------------------------------ paper | ours | difference
def paper_table(ours: Sequence[Ours], notes: list[str]) -> Table:
    """Every number of Tables 1 and 2 and of the text, with its place, ours and the difference."""
    table = Table("The paper and ours", ["place", "what", "paper", "ours", "difference"])
    table.notes = notes
    _add_table1(table, ours)
    _add_table2(table, ours)
    for tier, printed in KEPT_SHARES.items():
        what = f"kept share of layers, {tier}, %"
        _add(table, "Section 5.2", what, printed, kept_of_tier(ours, tier))
    _add_efficiency(table, ours)
    measured = sum(record["ours"] is not None for record in table.records)
    table.remarks = [
        f"{measured} of {len(table.records)} numbers measured. Ours: the experiments of this report with the paper's "
        "decoder, mean over their seeds; WER and BLEU at the paper's own block size on our path, joint healing, "
        f"whatever our tolerance rule chose; BLEU by the {PROTOCOL} protocol of CoVoST2. % drop and kept share: only "
        "of experiments whose unpruned model was evaluated on all sets of the paper.",
    ]
    return table


def _add(table: Table, place: str, what: str, printed: float, value: float | None) -> None:
    difference = None if value is None else value - printed
    table.rows.append(
        [
            place,
            what,
            f"{printed:g}" if what.endswith(("drop", ", %", "directions")) else fixed(printed),
            fixed(value),
            MISSING if difference is None else f"{difference:+.2f}",
        ]
    )
    table.records.append(
        {
            "place": place,
            "what": what,
            "paper": printed,
            "ours": value,
            "difference": difference,
            "note": "; ".join(table.notes),
        }
    )


def _add_table1(table: Table, ours: Sequence[Ours]) -> None:
    for system in TABLE1:
        here = [s for s in ours if s.system == system and s.experiment.task == "asr"]
        n = removed_layers(system.drop, system.num_layers)
        for title, size, printed in (("", 0, system.unpruned), (" + Pruning", n, system.pruned)):
            if size:
                value = _mean([s.paper_drop for s in here])
                _add(table, "Table 1", f"{system.model}: % drop", system.drop, value)
            for name, wer in zip(EVAL_SETS, printed, strict=True):
                value = _mean([s.score(OUR_SETS[name], size) for s in here])
                depth = f" (n={size})" if size else ""
                _add(table, "Table 1", f"{system.model}{title}{depth}: {name} WER %", wer, value)
    qwen = [s for s in ours if s.system == TABLE1[0] and s.experiment.task == "asr"]
    n = removed_layers(TABLE1[0].drop, TABLE1[0].num_layers)
    value = _mean([s.score(OUR_SETS[EVAL_SETS[0]], n, "decoder") for s in qwen])
    what = f"{TABLE1[0].model}, decoder-only healing (n={n}): {EVAL_SETS[0]} WER %"
    _add(table, "Section 5.2", what, DECODER_ONLY_WER, value)


def _add_table2(table: Table, ours: Sequence[Ours]) -> None:
    translating = [s for s in ours if s.experiment.task == "ast" and s.system == TABLE1[0]]
    for row in TABLE2:
        n = removed_layers(row.drop, TABLE2_LAYERS)
        for path, printed in (("AST path", row.ast_path), ("ASR path", row.asr_path)):
            for direction, bleu in zip(DIRECTIONS, printed, strict=True):
                values = [_bleu(s, direction, n, path, ours) for s in translating]
                what = f"{direction}, {path}, n={n}: BLEU" if n else f"{direction}, unpruned: BLEU"
                if n or path == "AST path":
                    _add(table, "Table 2", what, bleu, _mean(values))
    drops = [_mean([s.paper_drop for s in translating if d in s.directions]) for d in DIRECTIONS]
    known = [drop for drop in drops if drop is not None]
    value = min(known) if len(known) == len(DIRECTIONS) else None
    _add(table, "Section 5.3", "% drop within 10 % in both directions", AST_DROP, value)


def _bleu(one: Ours, direction: str, n: int, path: str, ours: Sequence[Ours]) -> float | None:
    """BLEU on the own path, or on that of the ASR experiment in the report."""
    points = [
        result.point
        for result in one.results
        if direction_of(result.point) == direction and protocol_of(result.point) == PROTOCOL
        if result.point.split == "test" and not result.point.tag and not result.point.control
    ]
    if n == 0:
        return next((point.value for point in points if point.is_full), None)
    donor = asr_path_for(one.experiment, [s.experiment for s in ours])
    own = one.experiment.measurements.get("speech")
    measurement = own if path == "AST path" else donor[1] if donor else None
    start = measurement.path.get(n) if measurement else None
    block = (n, start, "joint")
    return next(
        (p.value for p in points if (p.block_size, p.start_layer, p.heal_mode) == block), None
    )


def _add_efficiency(table: Table, ours: Sequence[Ours]) -> None:
    llama = next(system for system in TABLE1 if system.model == "Llama-3.1-8B")
    n = removed_layers(EFFICIENCY_DROP, llama.num_layers)
    found: list[Saving] = []
    for one in ours:
        if one.system == llama and one.experiment.task == "asr":
            found += [s for size, s in savings(one.experiment, one.results).items() if size == n]
    start = f"{llama.model} without {EFFICIENCY_DROP:g} % (n={n}): "
    saved, gained = _mean([s.time_saved for s in found]), _mean([s.speed_gained for s in found])
    before, after = (
        _mean([s.memory_gib[side] if s.memory_gib else None for s in found]) for side in (0, 1)
    )
    for what, printed, value in (
        ("wall-clock, read as time saved, %", WALL_CLOCK_SPEEDUP, saved),
        ("wall-clock, read as speed gained, %", WALL_CLOCK_SPEEDUP, gained),
        ("peak GPU memory before, GiB", PEAK_MEMORY_GIB[0], before),
        ("peak GPU memory after, GiB", PEAK_MEMORY_GIB[1], after),
    ):
        _add(table, "Section 5.2", start + what, printed, value)
