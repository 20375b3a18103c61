"""The evaluate stage: decode and score a variant on every evaluation split."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechllm_prune.brain import gather
from speechllm_prune.data.manifest import prepare_command, read_summary
from speechllm_prune.evaluation.efficiency import Meter, device_name
from speechllm_prune.evaluation.scoring import manifest_facts
from speechllm_prune.experiment import (
    Variant,
    provenance,
    read_json,
    write_json,
    write_text,
)
from speechllm_prune.inference import Hypothesis, decode
from speechllm_prune.models.decoder import num_parameters
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.prune.task_adapters import merged_adapters
from speechllm_prune.restore import cut, read_heal_state, read_plan
from speechllm_prune.runtime import UserError
from speechllm_prune.tasks import TASKS, score
from speechllm_prune.workbench import Workbench


def evaluate(bench: Workbench, variant_name: str, must_exist: bool = True) -> None:
    """Decode and score a variant on every evaluation manifest that has not been scored yet.

    Arguments
    ---------
    bench : Workbench
        With a finished train stage.
    variant_name : str
        `full`, `l18n08-joint`, ...
    must_exist : bool
        Whether a manifest that is not prepared is an error (evaluate.py) or a warning (train.py, sweep.py).
    """
    variant = Variant.parse(variant_name)
    keys = [key for key in bench.hparams["eval_manifests"] if _is_evaluable(bench, key, must_exist)]
    shuffled = bench.hparams["shuffle_audio"]
    if variant.start_layer is None and variant.tag:
        raise UserError(f"{variant_name!r} is no variant to decode; give --shuffle_audio or full")
    if shuffled and variant_name != "full":
        raise UserError("shuffle_audio checks the full model; leave --variant out")
    name = "full+shuffled_audio" if shuffled else variant.name
    todo = [key for key in keys if bench.on_main(_needs_scoring, bench, name, key)]
    if not todo:
        return
    if variant.start_layer is None:
        for key in todo:
            _evaluate_alone(bench, name, variant, None, key)
        return
    plan = read_plan(bench.experiment, variant)
    heal_state = read_heal_state(bench.experiment, variant)
    with cut(bench.model, plan, heal_state):
        for key in todo:
            _evaluate_alone(bench, name, variant, plan, key)


def _evaluate_alone(
    bench: Workbench, name: str, variant: Variant, plan: PrunePlan | None, key: str
) -> None:
    folder = _eval_folder(bench, name, key)
    stage = folder.relative_to(bench.experiment.root).as_posix()
    with bench.writing(stage, bench.run.config_hash("evaluate")):
        _evaluate_split(bench, name, variant, plan, key)


def _is_evaluable(bench: Workbench, key: str, must_exist: bool) -> bool:
    if bench.is_prepared(key):
        return True
    command = prepare_command(bench.manifest(key), bench.hparams["prepare"])
    message = f"the evaluation manifest {key} is not prepared; prepare it with: {command}"
    if must_exist:
        raise UserError(message)
    if if_main_process():
        print(f"warning: {message}", file=sys.stderr)
    return False


def _eval_folder(bench: Workbench, name: str, key: str) -> Path:
    return bench.experiment.stage(f"eval/{name}/{key.replace('/', '-')}")


def _needs_scoring(bench: Workbench, name: str, key: str) -> bool:
    file = _eval_folder(bench, name, key) / "metrics.json"
    if not file.is_file() or bench.run.flags.overwrite:
        return True
    record = read_json(file)
    if record["config_hash"] != bench.run.config_hash("evaluate"):
        raise UserError(
            f"{file} was made with another configuration; use --overwrite to make it again"
        )
    bench.experiment.check_inputs(file, record)
    print(f"{file.parent} is already done; --overwrite makes it again")
    return False


def _evaluate_split(
    bench: Workbench, name: str, variant: Variant, plan: PrunePlan | None, key: str
) -> None:
    utterances = bench.utterances(key, bench.hparams["shuffle_audio"])
    batches = bench.sorted_loader(
        utterances, bench.hparams["eval_batch_size"], bench.hparams["eval_batch_positions"]
    )
    # with the weights that an export ships; the adapters come back afterwards
    with merged_adapters(bench.model.decoder), Meter(bench.device) as meter:
        parts = [
            decode(bench.model, [batch])
            for batch in meter.warmed(bench.progress(batches, f"{name} on {key}"))
        ]
    ranks = gather([(parts, meter)])
    by_id = {h.id: h for parts, _ in ranks for part in parts for h in part}
    hypotheses = [by_id[row.ID] for row in utterances.rows]
    if if_main_process():
        _write_scores(bench, name, variant, plan, key, hypotheses, _speed(ranks))
    ddp_barrier()


def _speed(ranks: list[tuple[list[list[Hypothesis]], Meter]]) -> dict[str, Any]:
    """Of all ranks together, each one's first batch left out where it has another."""
    timed = [h for parts, _ in ranks for part in parts[len(parts) > 1 :] for h in part]
    seconds = max(meter.seconds - meter.warmup_seconds for _, meter in ranks)
    audio_seconds = sum(h.duration for h in timed)
    num_tokens = sum(h.num_tokens + (not h.capped) for h in timed)
    return {
        "rtfx": audio_seconds / seconds,
        "tokens_per_second": num_tokens / seconds,
        "timed_utterances": len(timed),
        "timed_audio_seconds": audio_seconds,
        "timed_seconds": seconds,
        "seconds": max(meter.seconds for _, meter in ranks),
        "peak_memory_bytes": max(meter.peak_memory_bytes for _, meter in ranks),
    }


def _write_scores(
    bench: Workbench,
    name: str,
    variant: Variant,
    plan: PrunePlan | None,
    key: str,
    hypotheses: list[Hypothesis],
    speed: dict[str, Any],
) -> None:
    hparams, folder = bench.hparams, _eval_folder(bench, name, key)
    task = TASKS[hparams["task"]]
    ids, refs, hyps = ([getattr(h, part) for h in hypotheses] for part in ("id", "ref", "hyp"))
    result = score(task, ids, refs, hyps, hparams["target_language"])
    rows = [asdict(h) | counts for h, counts in zip(hypotheses, result.rows, strict=True)]
    for old in ("metrics.json", "STOPPED.json"):
        (folder / old).unlink(missing_ok=True)
    write_text(folder / "hyps.jsonl", "".join(json_line(row) for row in rows))
    write_text(folder / f"{task.metric}.txt", result.report)
    corpus, split = key.split("/")
    inputs = [bench.experiment.stage("train") / "DONE.json", bench.manifest(key)]
    if variant.start_layer is not None:
        inputs.append(bench.experiment.stage(f"prune/{variant.block}") / "plan.json")
    if variant.is_healed:
        inputs.append(bench.experiment.stage(f"heal/{variant.name}") / "DONE.json")
    facts = {
        "task": task.name,
        "variant": name,
        "corpus": corpus,
        "split": split,
        "metric": task.metric,
        "value": result.value,
        "num_utterances": len(hypotheses),
        "num_layers": plan.num_layers if plan else len(bench.model.decoder.get_decoder().layers),
        **{field: value for field, value in asdict(variant).items() if field != "tag"},
        "tag": Variant.parse(name).tag,
        "experiment_name": hparams["experiment_name"],
        "seed": hparams["seed"],
        "models": bench.models(),
        **result.facts,
        **manifest_facts(read_summary(bench.manifest(key)), ids, result.rows),
        **speed,
        "eval_batch_size": hparams["eval_batch_size"],
        "eval_batch_positions": hparams["eval_batch_positions"],
        "decode_graphs": hparams["decode_graphs"],
        "num_processes": bench.world_size,
        "num_parameters": num_parameters(bench.model),
        "decoder_parameters": num_parameters(bench.model.decoder),
        "num_capped": sum(h.capped for h in hypotheses),
        "num_repetitions": sum(h.looped for h in hypotheses),
        "precision": str(bench.dtype).removeprefix("torch."),
        "device": bench.device,
        "device_name": device_name(bench.device),
        "features_cached": hparams["cache_features"],
        "note": hparams["results_note"],
    }
    record = provenance(bench.run.config_hash("evaluate"), inputs, bench.experiment.root) | facts
    write_json(folder / "metrics.json", record)
    print(
        f"{name} on {key}: {task.metric.upper()} {result.value:.2f} %  ({len(hypotheses)} utterances, "
        f"{facts['num_capped']} cut off at the cap, {facts['num_repetitions']} with a loop; "
        f"{facts['rtfx']:.1f} x real time)"
    )


def json_line(row: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    import json

    return json.dumps(row, ensure_ascii=False) + "\n"
