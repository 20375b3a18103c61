"""Table 2 of the paper: BLEU of translation on the path measured on translation and on the path measured on ASR.

Two paths that choose the same block share one result. The table says `same block` there: one run is not
an agreement of two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechllm_prune.reporting.analysis import Result
from speechllm_prune.reporting.collect import ExperimentData, Measurement, Point, collect
from speechllm_prune.reporting.tables import MISSING, Table, block_label, fixed, percent

SAME_BLOCK = "same block"
NOT_STATED = "not stated"
_CORPUS = re.compile(r".+_(?P<source>[a-z]{2,3})_(?P<target>[a-z]{2,3})_(?P<protocol>[a-z]+)")


def direction_of(point: Point) -> str:
    """Direction of translation as the paper writes it, from the name of the corpus.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> direction_of(SimpleNamespace(corpus="covost2_en_de_standard"))
    'En-De'
    """
    named = _CORPUS.fullmatch(point.corpus)
    return f"{named['source'].title()}-{named['target'].title()}" if named else point.corpus


def protocol_of(point: Point) -> str:
    """How the references were made: `protocol` of metrics.json, else the end of the corpus's name.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> protocol_of(SimpleNamespace(corpus="covost2_en_de_standard", record={}))
    'standard'
    """
    named = _CORPUS.fullmatch(point.corpus)
    return str(point.record.get("protocol") or (named["protocol"] if named else NOT_STATED))


def asr_path_for(
    experiment: ExperimentData, experiments: Sequence[ExperimentData]
) -> tuple[ExperimentData, Measurement] | None:
    """The ASR experiment whose path a translation experiment is compared with, and its measurement.

    It is one of the report, or one whose path.json chose blocks of this experiment (`--path FILE`). It has the same
    decoder and was measured on speech by the same rule; one of the same seed comes first.
    """
    own = experiment.measurements.get("speech")
    num_layers = experiment.points[0].num_layers
    found: list[tuple[bool, int, ExperimentData, Measurement]] = []
    for other in [*experiments, *_path_owners(experiment)]:
        theirs = other.measurements.get("speech")
        if theirs is None or not other.points or other.points[0].task != "asr":
            continue
        alike = own is None or theirs.last_token == own.last_token
        if theirs.num_layers == num_layers and alike and _same_decoder(experiment, other):
            found.append((other.seed != experiment.seed, len(found), other, theirs))
    return min(found, key=lambda item: item[:2])[2:] if found else None


def _same_decoder(first: ExperimentData, second: ExperimentData) -> bool:
    """By the fingerprints of their files where both have one, else by name; what says neither is another one."""
    for one, two in zip(_decoder_of(first), _decoder_of(second), strict=True):
        if one and two:
            return bool(one == two)
    return False


def _decoder_of(experiment: ExperimentData) -> tuple[Any, Any]:
    """Fingerprint and `decoder_hub`, of the measured path first: it is what is borrowed."""
    measured = experiment.measurements.get("speech")
    record = measured.record if measured else {}
    models = [p.record["models"]["decoder"] for p in experiment.points if p.record.get("models")]
    model = models[0] if models else {}
    return (
        record.get("decoder_fingerprint") or model.get("fingerprint"),
        record.get("decoder_hub") or experiment.settings.get("decoder_hub") or model.get("hub"),
    )


def _path_owners(experiment: ExperimentData) -> list[ExperimentData]:
    """Experiments outside the report whose measure/speech/path.json chose blocks of this one."""
    files = {Path(source) for sources in experiment.plans.values() for source in sources}
    named = [
        file for file in sorted(files) if file.parts[-3:] == ("measure", "speech", "path.json")
    ]
    return [collect(file.parents[2]) for file in named if file.is_file()]


def table2(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    heal_mode: str = "joint",
) -> Table | None:
    """The paper's Table 2; None if no experiment is one of translation.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Those of translation make the rows; one of ASR with the same decoder gives the other path.
    results : mapping
        {str(experiment folder): judged results}.
    heal_mode : str
        Whose points are shown.
    """
    translating = [e for e in experiments if e.points and e.points[0].task == "ast"]
    if not translating:
        return None
    columns = ["direction", "protocol", "n", "% drop", "own path", "BLEU, own path", "ASR path"]
    columns += ["BLEU, ASR path", "utterances", "signature"]
    table = Table(
        f"Table 2: BLEU on the AST path and on the ASR path ({heal_mode} healing)", columns
    )
    table.notes = list(dict.fromkeys(note for e in translating for note in e.notes))
    for experiment in translating:
        donor = asr_path_for(experiment, experiments)
        judged = results[str(experiment.folder)]
        for eval_set in experiment.eval_sets:
            here = [r for r in judged if r.point.eval_set == eval_set]
            _add_direction(table, experiment, here, donor, heal_mode)
        table.remarks.append(_donor_remark(experiment, donor))
    table.remarks.append(
        "n: removed layers; n = 0 is the unpruned model. In brackets: change relative to it, positive is worse. "
        f"'{SAME_BLOCK}': both paths choose the same layers, so that there is one run and nothing to agree."
    )
    return table


def _add_direction(
    table: Table,
    experiment: ExperimentData,
    results: Sequence[Result],
    donor: tuple[ExperimentData, Measurement] | None,
    heal_mode: str,
) -> None:
    """The rows of one evaluation set: the unpruned model, then every tested block size."""
    full = next((r for r in results if r.point.is_full), None)
    pruned = {
        (r.point.block_size, r.point.start_layer): r
        for r in results
        if r.point.is_pruned and (r.point.heal_mode, r.point.tag) == (heal_mode, "")
    }
    example = full or next(iter(pruned.values()), None)
    if example is None:
        return
    if full is not None:
        _add_row(table, full.point, 0, ("–", fixed(full.point.value)), ("–", "–"))
        table.records.append(_record(experiment, full.point, 0, full, None, None, None))
    own = experiment.measurements.get("speech")
    for n in sorted({size for size, _ in pruned}):
        own_start = own.path.get(n) if own else None
        asr_start = donor[1].path.get(n) if donor else None
        if own_start is None and asr_start is None:
            continue
        own_result = pruned.get((n, own_start))
        asr_result = pruned.get((n, asr_start))
        if own_result is None and asr_result is None:
            continue  # a block that was given, or taken from another path
        same = own_start is not None and own_start == asr_start
        asr_cell = SAME_BLOCK if same else _score(asr_result)
        if asr_start is None:
            asr_cell = "no ASR path"
        cells = (
            (block_label(own_start, n), _score(own_result)),
            (block_label(asr_start, n), asr_cell),
        )
        _add_row(table, example.point, n, *cells)
        shown = None if same else asr_result
        row = _record(experiment, example.point, n, own_result, own_start, shown, asr_start)
        source = {"same_block": same, "asr_path_of": donor[0].name if donor else None}
        table.records.append(row | source)


def _score(result: Result | None) -> str:
    if result is None:
        return MISSING
    return f"{fixed(result.point.value)} ({percent(result.degradation)})"


def _add_row(
    table: Table, point: Point, n: int, own: tuple[str, str], asr: tuple[str, str]
) -> None:
    table.rows.append(
        [
            direction_of(point),
            protocol_of(point),
            str(n),
            fixed(100.0 * n / point.num_layers, 1) if n else "–",
            *own,
            *asr,
            str(point.num_utterances),
            str(point.record.get("signature") or NOT_STATED),
        ]
    )


def _record(
    experiment: ExperimentData,
    point: Point,
    n: int,
    own: Result | None,
    own_start: int | None,
    asr: Result | None,
    asr_start: int | None,
) -> dict[str, object]:
    return {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "direction": direction_of(point),
        "protocol": protocol_of(point),
        "eval_set": point.eval_set,
        "block_size": n,
        "drop_percent": 100.0 * n / point.num_layers,
        "own_start_layer": own_start,
        "own_bleu": own.point.value if own else None,
        "own_relative_degradation": own.degradation if own else None,
        "asr_start_layer": asr_start,
        "asr_bleu": asr.point.value if asr else None,
        "asr_relative_degradation": asr.degradation if asr else None,
        "num_utterances": point.num_utterances,
        "signature": point.record.get("signature"),
        "note": point.note,
    }


def _donor_remark(
    experiment: ExperimentData, donor: tuple[ExperimentData, Measurement] | None
) -> str:
    if donor is None:
        return (
            f"{experiment.label}: no ASR path, since no ASR experiment with the same decoder and a measure/speech was "
            "given, nor a block chosen by one; run: python report.py AST_FOLDER... ASR_FOLDER"
        )
    own = experiment.measurements.get("speech")
    other = f"{experiment.label}: the ASR path is that of {donor[0].label}"
    if own is None:
        return f"{other}; its own path was not measured (python measure.py LEAF.yaml)."
    sizes = sorted(set(own.path) & set(donor[1].path))
    equal = sum(own.path[n] == donor[1].path[n] for n in sizes)
    return f"{other}; of all {len(sizes)} block sizes, both paths choose the same block at {equal}."
