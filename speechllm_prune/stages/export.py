"""Exporting a variant of an experiment, alone or as a task beside others, with the results that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speechllm_prune.evaluation.statistics import relative_degradation
from speechllm_prune.experiment import Experiment, Variant, provenance, read_json
from speechllm_prune.prune.card import memory_line
from speechllm_prune.prune.export import export, export_task
from speechllm_prune.prune.surgery import num_layers
from speechllm_prune.restore import read_plan, restore
from speechllm_prune.runtime import UserError
from speechllm_prune.workbench import Workbench


def export_if_asked(bench: Workbench, variant: Variant, folder: Path) -> None:
    """What `--export` and `--into` ask of a verb that has just made a variant. Rank 0 only.

    Arguments
    ---------
    bench : Workbench
        With a finished train stage.
    variant : Variant
        What to export.
    folder : Path
        Where `--export` writes; `--into` names a folder of several tasks instead.
    """
    into = bench.hparams["into"]
    if bench.rank or not (bench.run.flags.export or into):
        return
    if into:
        folder = Path(into)
        name = bench.hparams["task_name"] or bench.hparams["task"]
        card = export_variant_as_task(bench, variant, folder, name)
        print(f"exported to {folder}: {', '.join(task['name'] for task in card['tasks'])}")
        print(memory_line(card))
    else:
        print(f"exported to {export_variant(bench, variant, folder)}")


def export_variant(bench: Workbench, variant: Variant, folder: Path) -> Path:
    """Write a variant as an export folder, from a model of its own: merging adapters changes it for good."""
    model = restore(bench.experiment, variant.name, bench.hparams, bench.device)
    facts = _facts(bench, variant, num_layers(model.decoder))
    return export(model, folder, bench.hparams, bench.run.config_hash("heal"), **facts)


def export_variant_as_task(
    bench: Workbench, variant: Variant, folder: Path, name: str
) -> dict[str, Any]:
    """Add a variant to a folder of several tasks that share the pruned decoder; returns its speechllm.json."""
    model = restore(bench.experiment, variant.name, bench.hparams, bench.device)
    facts = _facts(bench, variant, num_layers(model.decoder))
    facts |= {"experiment_name": bench.experiment.name, "seed": bench.experiment.seed}
    return export_task(model, folder, name, bench.hparams, bench.run.config_hash("heal"), **facts)


def _facts(bench: Workbench, variant: Variant, depth: int) -> dict[str, Any]:
    kept = list(range(depth))
    if variant.start_layer is not None:
        plan = read_plan(bench.experiment, variant)
        depth, kept = plan.num_layers, plan.kept_layers
    sets = [key.replace("/", "-") for key in bench.hparams["eval_manifests"]]
    made_from = [bench.experiment.stage("train") / "DONE.json"]
    if variant.start_layer is not None:
        made_from.append(bench.experiment.stage(f"prune/{variant.block}") / "plan.json")
    if variant.is_healed:
        made_from.append(bench.experiment.stage(f"heal/{variant.name}") / "DONE.json")
    return {
        "inputs": provenance("", made_from, bench.experiment.root)["inputs"],
        "variant": variant.name,
        "num_layers": depth,
        "kept_layers": kept,
        "results": results_of(bench.experiment, variant, sets),
    }


def results_of(
    experiment: Experiment, variant: Variant, eval_sets: list[str]
) -> list[dict[str, Any]]:
    """Scores of a variant and of the full model, None where something was not measured.

    A score of another model (trained or healed again since) counts as not measured.

    Arguments
    ---------
    experiment : Experiment
        Holds `eval/<variant>/<set>/metrics.json`.
    variant : Variant
        Exported.
    eval_sets : list of str
        Listed even if nothing was measured on them; others that were measured follow.
    """
    folder = experiment.stage(f"eval/{variant.name}")
    measured = sorted(file.parent.name for file in folder.glob("*/metrics.json"))
    results = []
    for name in dict.fromkeys([*eval_sets, *measured]):
        mine = _metrics(experiment, variant.name, name)
        full = _metrics(experiment, "full", name)
        change = None
        if mine and full and variant.name != "full":
            change = relative_degradation(full["value"], mine["value"], mine["metric"])
        any_record = mine or full or {}
        results.append(
            {
                "eval_set": name,
                "metric": any_record.get("metric"),
                "value": mine.get("value"),
                "full_value": full.get("value"),
                "relative_degradation": change,
                "num_utterances": any_record.get("num_utterances"),
                "precision": mine.get("precision"),
            }
        )
    return results


def _metrics(experiment: Experiment, variant: str, eval_set: str) -> dict[str, Any]:
    file = experiment.stage(f"eval/{variant}/{eval_set}") / "metrics.json"
    if not file.is_file():
        return {}
    record = read_json(file)
    try:
        experiment.check_inputs(file, record)
    except UserError:
        return {}
    return record
