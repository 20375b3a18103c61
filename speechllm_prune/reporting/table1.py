"""Table 1 of the paper: the unpruned model and the largest block within tolerance, by the paper's rule and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from speechllm_prune.reporting.analysis import Choice, Result, choose_blocks
from speechllm_prune.reporting.collect import ExperimentData
from speechllm_prune.reporting.find import unequal_healing
from speechllm_prune.reporting.tables import MISSING, Table, block_label, fixed, percent

NOTHING_SCORED = "no evaluation set scored"


def table1(
    experiments: Sequence[ExperimentData],
    results: Mapping[str, Sequence[Result]],
    task: str,
    tolerance: float | None = None,
    heal_mode: str = "joint",
) -> Table:
    """The paper's Table 1: the unpruned model and the largest tested block within tolerance on all sets at once.

    Arguments
    ---------
    experiments : sequence of ExperimentData
        Those with points; the ones of another task are skipped.
    results : mapping
        {str(experiment folder): judged results}.
    task : str
        `asr` or `ast`.
    tolerance : float, optional
        By default that of each experiment's YAML.
    heal_mode : str
        Whose points may be chosen.
    """
    metric = "WER" if task == "asr" else "BLEU"
    chosen = [e for e in experiments if e.task == task]
    eval_sets = list(dict.fromkeys(name for e in chosen for name in e.eval_sets))
    columns = ["model", "% drop", "block", *(f"{name} {metric} %" for name in eval_sets), "verdict"]
    columns += ["largest n", "safe n", "n by dev only", "tested n"]
    table = Table(f"Table 1: {metric}, unpruned and pruned ({heal_mode} healing)", columns)
    table.notes = list(dict.fromkeys(note for e in chosen for note in e.notes))
    tolerances = {}
    for experiment in chosen:
        judged = results[str(experiment.folder)]
        allowed = experiment.tolerance if tolerance is None else tolerance
        tolerances[experiment.label] = f"{allowed:g}"
        choice = choose_blocks(experiment, judged, allowed, heal_mode)
        _add_experiment(table, experiment, judged, choice, eval_sets)
        table.remarks.append(_choice_remark(experiment, choice))
        table.remarks += _sets_remark(experiment)
    limits = set(tolerances.values())
    limit = limits.pop() if len(limits) == 1 else f"the tolerance ({_listed(tolerances)})"
    table.remarks.append(
        f"Rule: the largest tested n whose relative degradation, unrounded, is at most {limit} on all "
        "evaluation sets at once; safe n: every smaller tested n passes too; n by dev only: the largest that passes "
        "on the set of `valid_manifest`, so that no evaluation set had a say. In brackets: change relative to the "
        "unpruned model, positive is worse. Verdict: whether the 95 % paired bootstrap interval of that change lies "
        "within the tolerance on all sets, exceeds it on one, or leaves it undecided."
    )
    for experiment in chosen:
        table.remarks += _control_remarks(experiment, results[str(experiment.folder)], heal_mode)
    return table


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def chosen_sizes(choice: Choice) -> list[str]:
    """What the rules choose, as text: largest n, safe n, n by dev only, tested n."""
    on_dev = str(choice.on_dev or "none") if choice.dev_tested else MISSING
    if not choice.tested:
        return [MISSING, MISSING, on_dev, "–"]
    sizes = [str(choice.largest or "none"), str(choice.safe or "none"), on_dev]
    return [*sizes, " ".join(map(str, choice.tested))]


def _add_experiment(
    table: Table,
    experiment: ExperimentData,
    judged: Sequence[Result],
    choice: Choice,
    eval_sets: Sequence[str],
) -> None:
    """The unpruned model, what each rule chooses where it differs, and the controls."""
    full = {result.point.eval_set: result for result in judged if result.point.is_full}
    _add_row(table, experiment.label, "full", full, eval_sets, choice)
    blank = ["", *("" for _ in eval_sets), ""]
    if not choice.tested:
        why = "not tested" if choice.eval_sets else NOTHING_SCORED
        table.rows.append(["+ Pruning", why, *blank, *chosen_sizes(choice)])
    elif choice.largest is None:
        cells = ["none within tolerance", *blank, *chosen_sizes(choice)]
        table.rows.append(["+ Pruning", *cells])
    rows = (
        ("+ Pruning", "largest", choice.largest),
        ("+ Pruning, safe", "safe", choice.safe),
        ("+ Pruning, n by dev", "dev", choice.on_dev),
    )
    shown: set[int] = set()
    for label, kind, n in rows:
        if n is not None and n not in shown:
            found = choice.tested.get(n) or choice.dev_tested[n]
            _add_row(table, label, kind, found, eval_sets, choice)
            shown.add(n)
    for name, found in _controls(judged, choice.heal_mode).items():
        _add_row(table, f"control ({name})", "control", found, eval_sets, choice)


def _controls(results: Sequence[Result], heal_mode: str) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.point.control and result.point.heal_mode == heal_mode:
            found.setdefault(result.point.variant, {})[result.point.eval_set] = result
    return found


def _control_remarks(
    experiment: ExperimentData, judged: Sequence[Result], heal_mode: str
) -> list[str]:
    """Whether each control was healed as the cut that it controls for."""
    remarks = []
    for control in _controls(judged, heal_mode):
        cut = control.removeprefix("control-")
        unequal = unequal_healing(experiment.folder, control, cut)
        text = f"{experiment.label}, {control}: nothing removed, "
        if unequal is None:
            text += f"healed; whether as {cut} was, cannot be said (heal/*/DONE.json of both)."
        elif unequal:
            text += f"but not healed as {cut} was: {'; '.join(unequal)}."
        else:
            text += (
                f"the same healing for the same steps as {cut}: what healing gives without a cut."
            )
        remarks.append(text)
    return remarks


def joint_verdict(results: Sequence[Result | None]) -> str:
    """`exceeds` if it does on any set, `within` if on all, else `undecided`; None: not evaluated on a set."""
    verdicts = {result.verdict if result else "undecided" for result in results}
    if "exceeds" in verdicts:
        return "exceeds"
    return "within" if verdicts == {"within"} else "undecided"


def _add_row(
    table: Table,
    label: str,
    row_kind: str,
    found: Mapping[str, Result],
    eval_sets: Sequence[str],
    choice: Choice,
) -> None:
    """One line of Table 1 and its CSV records, one per evaluation set."""
    cells = []
    for name in eval_sets:
        result = found.get(name)
        if result is None:
            cells.append(MISSING)
            continue
        point = result.point
        change = "" if point.is_full else f" ({percent(result.degradation)})"
        cells.append(fixed(point.value) + change)
        table.records.append(_record(row_kind, result, choice))
    any_point = next((result.point for result in found.values()), None)
    pruned = any_point is not None and any_point.is_pruned
    judged = [found.get(name) for name in choice.eval_sets]
    table.rows.append(
        [
            label,
            fixed(any_point.drop_percent, 1) if pruned and any_point else "–",
            block_label(any_point.start_layer, any_point.block_size)
            if pruned and any_point
            else "–",
            *cells,
            joint_verdict(judged) if row_kind != "full" and found else "–",
            *(chosen_sizes(choice) if row_kind == "largest" else ["–"] * 4),
        ]
    )


def _record(row_kind: str, result: Result, choice: Choice) -> dict[str, object]:
    point = result.point
    return {
        "experiment": point.experiment,
        "seed": point.seed,
        "row": row_kind,
        "variant": point.variant,
        "eval_set": point.eval_set,
        "metric": point.metric,
        "value": point.value,
        "relative_degradation": result.degradation,
        "verdict": "" if point.is_full else result.verdict,
        "drop_percent": point.drop_percent,
        "start_layer": point.start_layer,
        "block_size": point.block_size,
        "tolerance": choice.tolerance,
        "largest_n": choice.largest,
        "safe_n": choice.safe,
        "dev_n": choice.on_dev if choice.dev_tested else MISSING,
        "tested_n": " ".join(map(str, choice.tested)),
        "num_utterances": point.num_utterances,
        "note": point.note,
    }


def _choice_remark(experiment: ExperimentData, choice: Choice) -> str:
    name = f"{experiment.label}, {choice.heal_mode} healing on its own path: "
    if not choice.eval_sets:
        return name + f"{NOTHING_SCORED} (python evaluate.py LEAF.yaml, python sweep.py LEAF.yaml)"
    if not choice.tested:
        return name + (
            "not tested (needs measure/speech and points on its path: python measure.py LEAF.yaml, "
            "python sweep.py LEAF.yaml)"
        )
    layers = experiment.points[0].num_layers
    text = name + (
        f"tested n = {', '.join(map(str, choice.tested))} of {layers} layers; largest n within tolerance: "
        f"{choice.largest or 'none'}; safe n: {choice.safe or 'none'}"
    )
    dev = str(experiment.settings.get("valid_manifest") or "")
    if choice.dev_tested:
        return f"{text}; by {experiment.dev_set} only: {choice.on_dev or 'none'}."
    if experiment.dev_set:
        text += f"; n by dev only needs evaluate.py (full) and sweep.py with --eval_manifests {dev}"
    return text + "."


def _sets_remark(experiment: ExperimentData) -> list[str]:
    full = {point.eval_set: point for point in experiment.points if point.is_full}
    if not full:
        command = "python evaluate.py LEAF.yaml --variant full"
        return [f"{experiment.label}: the unpruned model was not evaluated; run: {command}"]
    counts = [f"{n} {full[n].num_utterances}" for n in experiment.set_order if n in full]
    text = f"{experiment.label}, utterances: {', '.join(counts)}."
    if experiment.unjudged_sets:
        text += f" The rule was not applied to {', '.join(experiment.unjudged_sets)} of its eval_manifests."
    return [text]
