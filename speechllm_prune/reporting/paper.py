"""The paper's own numbers as data with their place, and its claims recomputed by the functions that judge our results.

Sun and Woodland, "Measuring the Redundancy of Decoder Layers in SpeechLLMs". A claim agrees if the recomputed value,
rounded as printed, is the printed one; a bound agrees if it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechllm_prune.evaluation.statistics import is_within, largest_blocks, relative_degradation
from speechllm_prune.reporting.analysis import TOLERANCE

EVAL_SETS = ("LibriSpeech test-clean", "LibriSpeech test-other", "Loquacious dev")
TIERS = ("7-8B", "3-4B", "1-1.5B")
"""From the largest to the smallest: the next smaller tier is the next entry."""


@dataclass(frozen=True)
class System:
    """One model of Table 1: WER (%) per evaluation set, unpruned and pruned, and the printed share removed (%)."""

    model: str
    family: str
    tier: str
    num_layers: int
    drop: float
    unpruned: tuple[float, float, float]
    pruned: tuple[float, float, float]
    lora: bool = False


TABLE1 = (
    System("Qwen2.5-7B", "Qwen2.5", "7-8B", 28, 28.6, (2.01, 4.77, 12.21), (2.36, 4.83, 14.91)),
    System(
        "Qwen2.5-7B + LoRA",
        "Qwen2.5",
        "7-8B",
        28,
        17.9,
        (1.70, 3.56, 10.99),
        (2.02, 4.26, 13.01),
        True,
    ),
    System("Qwen2.5-3B", "Qwen2.5", "3-4B", 36, 30.6, (2.22, 4.83, 17.24), (2.53, 5.12, 16.69)),
    System("Qwen2.5-1.5B", "Qwen2.5", "1-1.5B", 28, 25.0, (2.59, 5.05, 16.94), (2.83, 5.97, 19.79)),
    System("Llama-3.1-8B", "Llama", "7-8B", 32, 43.8, (2.65, 5.03, 20.50), (3.28, 6.28, 18.92)),
    System("Llama-3.2-3B", "Llama", "3-4B", 28, 39.3, (2.25, 5.30, 25.47), (2.71, 6.32, 25.72)),
    System("Llama-3.2-1B", "Llama", "1-1.5B", 16, 6.3, (2.61, 5.52, 28.05), (2.73, 6.28, 32.05)),
)
"""Table 1. The numbers of layers are those of the public checkpoints; the paper prints percentages only."""


@dataclass(frozen=True)
class TranslationRow:
    """One row of Table 2: BLEU of Fr-En and En-De along the AST path and along the ASR path."""

    drop: float
    ast_path: tuple[float, float]
    asr_path: tuple[float, float]


DIRECTIONS = ("Fr-En", "En-De")
TABLE2_LAYERS = 28
"""The printed percentages of Table 2 are multiples of 1/28."""
TABLE2 = (
    TranslationRow(0.0, (39.03, 27.66), (39.03, 27.66)),
    TranslationRow(10.7, (37.23, 27.46), (37.23, 27.40)),
    TranslationRow(21.4, (36.09, 25.57), (36.09, 25.55)),
    TranslationRow(32.1, (36.12, 25.40), (36.12, 25.40)),
    TranslationRow(42.9, (32.87, 17.08), (32.93, 17.07)),
)

JOINT_WER, DECODER_ONLY_WER = 2.36, 5.93
"""Section 5.2: Qwen2.5-7B without 28.6 % of its layers on LibriSpeech test-clean, by healing."""
UNHEALED_DEGRADATION = 50.0
"""Section 5.2: without healing 'often exceeding 50 % relative degradation'."""
KEPT_SHARES = {"7-8B": 63.8, "3-4B": 65.05, "1-1.5B": 86.5}
"""Section 5.2: share of decoder layers kept per tier, in percent."""
LORA_VERSUS_FROZEN = (17.9, 28.6)
"""Section 5.2: prunable share of Qwen2.5-7B with and without LoRA, in percent."""
LARGEST_DROP = 43.8
"""Section 1: 'up to 43.8 % of decoder layers removable'."""
TIER_GAP = 25.0
"""Section 4.1: 'approximately 25 %' average cumulative relative WER gap between adjacent tiers (the number itself is
lost from the text at hand and taken from the threshold that it justifies)."""
AST_DROP = 32.1
"""Section 5.3: share of layers removable for both directions, in percent."""
EFFICIENCY_DROP = 40.0
"""Section 5.2: share of Llama-3.1-8B removed where time and memory are given (one H100 80 GiB), in percent."""
WALL_CLOCK_SPEEDUP = 35.0
"""Section 5.2: '35 % wall-clock speedup'; see `speedup_readings`."""
PEAK_MEMORY_GIB = (15.72, 10.37)
"""Section 5.2: peak GPU memory before and after."""


def speedup_readings(percent: float = WALL_CLOCK_SPEEDUP) -> dict[str, float]:
    """'35 % speedup' as speed-up factors: of time saved, or of speed gained.

    Example
    -------
    >>> {name: round(factor, 2) for name, factor in speedup_readings().items()}
    {'time -35 %': 1.54, 'speed +35 %': 1.35}
    """
    return {
        f"time -{percent:g} %": 100.0 / (100.0 - percent),
        f"speed +{percent:g} %": (100.0 + percent) / 100.0,
    }


def removed_layers(drop: float, num_layers: int) -> int:
    """The whole number of layers nearest to a printed percentage.

    Example
    -------
    >>> removed_layers(28.6, 28)
    8
    """
    return round(drop * num_layers / 100.0)


def system_of(decoder_hub: str, lora: bool = False) -> System | None:
    """The system of Table 1 with this decoder: a hub id, or a local folder of the model's name.

    Example
    -------
    >>> system_of("Qwen/Qwen2.5-7B", lora=True).drop
    17.9
    """
    name = decoder_hub.rstrip("/").rpartition("/")[2] + (" + LoRA" if lora else "")
    return next((system for system in TABLE1 if system.model == name), None)


# ----------------------------------------------------------------------------------------------- claims
def paper_claims(
    table1: Sequence[System] = TABLE1, table2: Sequence[TranslationRow] = TABLE2
) -> list[dict[str, Any]]:
    """Recompute the paper's claims from its tables.

    Arguments
    ---------
    table1, table2 : sequences
        The tables, by default as printed.

    Returns
    -------
    list of dict
        `{claim, printed, computed, verdict}`, the verdict `agrees` or `disagrees`.
    """
    return [
        *_drop_claims(table1, table2),
        *_kept_share_claims(table1),
        *_acceptance_claims(table1),
        *_translation_claims(table2),
        *_tier_gap_claims(table1),
        *_next_tier_claims(table1),
        *_text_claims(table1),
    ]


def _claim(text: str, printed: Any, computed: float, holds: bool) -> dict[str, Any]:
    return {
        "claim": text,
        "printed": printed,
        "computed": round(float(computed), 4),
        "verdict": "agrees" if holds else "disagrees",
    }


def _printed(text: str, printed: float, computed: float, unit: float) -> dict[str, Any]:
    """A claim that holds if `computed` rounds to `printed` in steps of `unit`, either way at a half."""
    return _claim(text, printed, computed, abs(printed - computed) <= unit / 2 + 1e-9)


def _bound(text: str, largest: float, computed: float) -> dict[str, Any]:
    """A claim that holds if `computed` is at most `largest`; equal values hold."""
    return _claim(text, largest, computed, computed <= largest + 1e-9)


def _drop_claims(
    table1: Sequence[System], table2: Sequence[TranslationRow]
) -> list[dict[str, Any]]:
    rows = [("Table 1", system.model, system.drop, system.num_layers) for system in table1]
    rows += [("Table 2", "AST", row.drop, TABLE2_LAYERS) for row in table2 if row.drop]
    claims = []
    for place, name, drop, num_layers in rows:
        n = removed_layers(drop, num_layers)
        text = f"{place}, {name}: % drop is n/L = {n}/{num_layers}"
        claims.append(_printed(text, drop, 100.0 * n / num_layers, 0.1))
    return claims


def _kept_share_claims(table1: Sequence[System]) -> list[dict[str, Any]]:
    claims = []
    for tier, printed in KEPT_SHARES.items():
        systems = [s for s in table1 if s.tier == tier and not s.lora]
        kept = float(np.mean([100.0 - s.drop for s in systems]))
        exact = np.mean(
            [100.0 * (1 - removed_layers(s.drop, s.num_layers) / s.num_layers) for s in systems]
        )
        text = (
            f"Section 5.2: kept share of layers of {tier} decoders, %, mean of 100 - printed drop "
            f"({exact:.2f} from n/L)"
        )
        unit = 0.01 if round(printed, 1) != printed else 0.1
        claims.append(_printed(text, printed, kept, unit))
    large = [100.0 - s.drop for s in table1 if s.tier == TIERS[0] and not s.lora]
    text = (
        "Abstract and section 6: 7-8B decoders need only 60 % of their layers (to the nearest ten)"
    )
    claims.append(_printed(text, 60.0, float(np.mean(large)), 10.0))
    return claims


def _acceptance_claims(table1: Sequence[System]) -> list[dict[str, Any]]:
    tolerance = TOLERANCE["asr"]
    claims = []
    for system in table1:
        for name, before, after in zip(EVAL_SETS, system.unpruned, system.pruned, strict=True):
            degradation = relative_degradation(before, after, "wer")
            assert degradation is not None
            text = f"Table 1, {system.model} + Pruning, {name}: relative degradation at most, %"
            holds = is_within(degradation, tolerance)
            claims.append(_claim(text, 100.0 * tolerance, 100.0 * degradation, holds))
    return claims


def _translation_claims(table2: Sequence[TranslationRow]) -> list[dict[str, Any]]:
    tolerance = TOLERANCE["ast"]
    full, *pruned = table2
    claims = []
    tested: dict[int, dict[str, float | None]] = {}
    for row in pruned:
        found = tested.setdefault(removed_layers(row.drop, TABLE2_LAYERS), {})
        for name, before, after in zip(DIRECTIONS, full.ast_path, row.ast_path, strict=True):
            degradation = relative_degradation(before, after, "bleu")
            assert degradation is not None
            found[name] = degradation
            if row.drop == AST_DROP:
                text = f"Section 5.3, {name} at {row.drop} %: relative decrease of BLEU at most, %"
                holds = is_within(degradation, tolerance)
                claims.append(_claim(text, 100.0 * tolerance, 100.0 * degradation, holds))
    largest, _ = largest_blocks(tested, tolerance, DIRECTIONS)
    text = "Section 5.3: largest tested share of layers within 10 % in both directions, %"
    claims.append(_printed(text, AST_DROP, 100.0 * (largest or 0) / TABLE2_LAYERS, 0.1))
    apart = max(
        abs(one - two)
        for row in table2
        for one, two in zip(row.ast_path, row.asr_path, strict=True)
    )
    text = "Table 2: 'virtually identical' along both paths: largest difference at most 0.1 BLEU"
    claims.append(_bound(text, 0.1, apart))
    return claims


def _adjacent_tiers(table1: Sequence[System]) -> list[tuple[System, System]]:
    """(larger, next smaller) frozen-decoder models of each family."""
    by_place = {(s.family, s.tier): s for s in table1 if not s.lora}
    families = dict.fromkeys(s.family for s in table1)
    return [
        (by_place[family, large], by_place[family, small])
        for family in families
        for large, small in zip(TIERS, TIERS[1:], strict=False)
    ]


def tier_gaps(table1: Sequence[System] = TABLE1) -> dict[str, float]:
    """Relative WER gap to the next smaller unpruned model, summed over the evaluation sets, in percent."""
    gaps = {}
    for large, small in _adjacent_tiers(table1):
        parts = [
            relative_degradation(before, after, "wer") or 0.0
            for before, after in zip(large.unpruned, small.unpruned, strict=True)
        ]
        gaps[f"{large.model} to {small.model}"] = 100.0 * sum(parts)
    return gaps


def _tier_gap_claims(table1: Sequence[System]) -> list[dict[str, Any]]:
    gaps = tier_gaps(table1)
    of_sums = [
        100.0 * (sum(small.unpruned) - sum(large.unpruned)) / sum(large.unpruned)
        for large, small in _adjacent_tiers(table1)
    ]
    listed = ", ".join(f"{name}: {gap:.1f}" for name, gap in gaps.items())
    start = "Section 4.1: average cumulative relative WER gap between adjacent tiers, %, about (to the nearest 5), "
    readings = (
        (
            f"read as the mean of the gaps summed over the sets ({listed})",
            np.mean([*gaps.values()]),
        ),
        ("read as the median of the gaps summed over the sets", np.median([*gaps.values()])),
        ("read as the mean gap of the summed WER", np.mean(of_sums)),
    )
    return [_printed(start + text, TIER_GAP, float(computed), 5.0) for text, computed in readings]


def _next_tier_claims(table1: Sequence[System]) -> list[dict[str, Any]]:
    claims = []
    for large, small in _adjacent_tiers(table1):
        start = "Section 4.1: WER not degraded beyond the unpruned next smaller tier, "
        pair = f"{large.model} + Pruning and {small.model}"
        for name, bound, pruned in zip(EVAL_SETS, small.unpruned, large.pruned, strict=True):
            claims.append(_bound(f"{start}{name}: {pair}", bound, pruned))
        bound, pruned = round(sum(small.unpruned), 2), sum(large.pruned)
        claims.append(_bound(f"{start}summed over the sets: {pair}", bound, pruned))
    return claims


def _text_claims(table1: Sequence[System]) -> list[dict[str, Any]]:
    by_name = {system.model: system for system in table1}
    qwen, lora, llama = (by_name[n] for n in ("Qwen2.5-7B", "Qwen2.5-7B + LoRA", "Llama-3.1-8B"))
    n = removed_layers(EFFICIENCY_DROP, llama.num_layers)
    share = 100.0 * n / llama.num_layers
    largest = max(system.drop for system in table1)
    return [
        _printed(
            "Section 5.2 against Table 1: Qwen2.5-7B, joint healing, test-clean WER, %",
            JOINT_WER,
            qwen.pruned[0],
            0.01,
        ),
        _bound(
            "Section 5.2: joint healing is better than decoder-only, Qwen2.5-7B test-clean WER, %",
            DECODER_ONLY_WER,
            qwen.pruned[0],
        ),
        _printed(
            "Section 5.2 against Table 1: prunable share with LoRA, %",
            LORA_VERSUS_FROZEN[0],
            lora.drop,
            0.1,
        ),
        _printed(
            "Section 5.2 against Table 1: prunable share without LoRA, %",
            LORA_VERSUS_FROZEN[1],
            qwen.drop,
            0.1,
        ),
        _printed("Section 1: largest removable share, %", LARGEST_DROP, largest, 0.1),
        _printed(
            f"Section 5.2: 40 % of Llama-3.1-8B is n/L = {n}/{llama.num_layers} (to the nearest ten)",
            EFFICIENCY_DROP,
            share,
            10.0,
        ),
    ]


def render_claims(claims: Sequence[dict[str, Any]], as_json: bool = False) -> str:
    """The claims as JSON, or as lines to read with a count at the end."""
    if as_json:
        return json.dumps(list(claims), indent=2, ensure_ascii=False)
    lines = [f"{'verdict':<10}{'printed':>9}{'computed':>10}  claim"]
    lines += [
        f"{claim['verdict']:<10}{claim['printed']:>9}{claim['computed']:>10.2f}  {claim['claim']}"
        for claim in claims
    ]
    agree = sum(claim["verdict"] == "agrees" for claim in claims)
    return "\n".join([*lines, f"{agree} of {len(claims)} claims agree"])
