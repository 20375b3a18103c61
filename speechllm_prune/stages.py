"""The stages: each reads files of earlier stages, does one thing, and writes its own folder, DONE.json last."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor

from speechllm_prune.brain import gather
from speechllm_prune.data.manifest import prepare_command
from speechllm_prune.data.prompt import encode_text
from speechllm_prune.evaluation.efficiency import Meter
from speechllm_prune.experiment import (
    Variant,
    provenance,
    read_json,
    sha256_json,
    write_json,
    write_text,
)
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.inference import Hypothesis, decode
from speechllm_prune.models.decoder import load_decoder, num_parameters, resolve_token_ids
from speechllm_prune.prune.distance import Distances, measure_distances
from speechllm_prune.prune.path import path_margins, pruning_path, tail_path
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import cut, read_heal_state, read_plan
from speechllm_prune.runtime import UserError
from speechllm_prune.tasks import TASKS, score
from speechllm_prune.workbench import Workbench, text_batches

# ---------------------------------------------------------------- measure


def measure(bench: Workbench) -> Path:
    """Measure angular distances and write distances.safetensors, path.json and heatmap.png."""
    hparams = bench.hparams
    text_mode = hparams["measure_input"] == "text"
    needs_training = not text_mode or bool(hparams["decoder_lora_rank"])
    if needs_training:
        bench.experiment.require("train", bench.run.command("train", "--data_folder FOLDER"))
    sentences = _sentences(bench) if text_mode else []
    config_hash = _text_hash(bench) if text_mode else bench.run.config_hash("measure")
    if text_mode and hparams["last_token"] != "sequence":
        raise UserError(
            "last_token 'prompt' has no meaning with measure_input text: there is no prompt"
        )
    stage = f"measure/{hparams['measure_input']}"
    folder = bench.experiment.stage(stage)
    if not bench.begin(stage, config_hash):
        return folder
    bench.seed("measure")
    distances = _measure_text(bench, sentences) if text_mode else _measure_speech(bench)
    if if_main_process():
        inputs = [Path(hparams["text_file"])] if text_mode and hparams["text_file"] else []
        inputs += [bench.manifest(hparams["measure_manifest"])] if not inputs else []
        if needs_training:
            inputs.append(bench.experiment.stage("train") / "DONE.json")
        _write_measure(bench, folder, distances, config_hash, inputs)
        bench.experiment.finish(stage, config_hash, inputs)
    ddp_barrier()
    return folder


def _text_hash(bench: Workbench) -> str:
    """Text mode depends on the decoder alone, unless training adapted it."""
    values = bench.run.values
    if values["decoder_lora_rank"]:
        return bench.run.config_hash("measure")
    hub = hub_fingerprint(values["decoder_hub"], values["decoder_revision"])
    names = ("measure_manifest", "text_file", "last_token", "text_case", "precision")
    return sha256_json({"decoder": hub, **{name: values[name] for name in names}})


def _measure_speech(bench: Workbench) -> Distances:
    utterances = bench.utterances(bench.hparams["measure_manifest"])
    with_targets = bench.hparams["last_token"] == "sequence"

    def batches() -> Iterator[dict[str, Tensor]]:
        loader = bench.sorted_loader(utterances, bench.hparams["measure_batch_size"])
        for batch in bench.progress(loader, "measuring"):
            yield bench.model.inputs_for(batch, targets=with_targets)._asdict()

    with torch.no_grad():
        return measure_distances(bench.model.decoder, batches())


def _measure_text(bench: Workbench, sentences: list[str]) -> Distances:
    hparams = bench.hparams
    if hparams["decoder_lora_rank"]:
        decoder, tokenizer = bench.model.decoder, bench.model.tokenizer
    else:
        decoder, tokenizer = load_decoder(
            hparams["decoder_hub"], hparams["decoder_revision"], bench.dtype, hparams["attention"]
        )
        decoder.to(bench.device)
    ids = resolve_token_ids(decoder, tokenizer)
    sequences = [encode_text(tokenizer, text, hparams["text_case"], ids.stop) for text in sentences]
    mine = sequences[bench.rank :: bench.world_size]
    batches = text_batches(mine, hparams["measure_batch_size"], ids.pad, bench.device)
    return measure_distances(decoder, bench.progress(batches, "measuring"))


def _sentences(bench: Workbench) -> list[str]:
    name = bench.hparams["text_file"]
    if not name:
        rows = bench.rows(bench.hparams["measure_manifest"])
        return [row.source_text or row.text for row in rows]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text_file {name}: {error}") from None
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise UserError(f"text_file {name} holds no sentence")
    return sentences


def _write_measure(
    bench: Workbench, folder: Path, distances: Distances, config_hash: str, inputs: list[Path]
) -> None:
    from speechllm_prune.reporting.figures import HeatmapPanel, heatmap_figure

    matrix = distances.matrix
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"distance": matrix.contiguous(), "count": torch.tensor([distances.count])},
        folder / "distances.safetensors",
    )
    path = pruning_path(matrix)
    hparams = bench.hparams
    text_file = hparams["text_file"] if hparams["measure_input"] == "text" else ""
    facts = {
        "measure_input": hparams["measure_input"],
        "measure_manifest": None if text_file else hparams["measure_manifest"],
        "text_file": text_file or None,
        "last_token": hparams["last_token"],
        "num_layers": len(matrix),
        "count": distances.count,
        "decoder_hub": hparams["decoder_hub"],
        "path": {str(n): start for n, start in path.items()},
        "margin": {str(n): margin for n, margin in path_margins(matrix).items()},
        "note": hparams["results_note"],
    }
    write_json(folder / "path.json", provenance(config_hash, inputs, bench.experiment.root) | facts)
    title = f"{hparams['experiment_name']}, {hparams['measure_input']}"
    heatmap_figure([HeatmapPanel(title, matrix.numpy(), path)]).savefig(
        folder / "heatmap.png", dpi=150
    )


# ---------------------------------------------------------------- prune


def choose_start_layer(bench: Workbench, block_size: int, path: str, num_layers: int) -> int:
    """Start layer of a block of the given size on a path (`own`, `text`, `tail`, or a path.json)."""
    if not 1 <= block_size <= num_layers - 1:
        raise UserError(
            f"block_size {block_size} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers); "
            f"give --block_size N"
        )
    if path == "tail":
        return tail_path(num_layers)[block_size]
    if path in ("own", "text"):
        stage = f"measure/{'speech' if path == 'own' else 'text'}"
        options = ["--measure_input text"] if path == "text" else []
        file = bench.experiment.require(stage, bench.run.command("measure", *options)) / "path.json"
    else:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"path {path!r} is neither own, text, tail nor a file")
    found = read_json(file)
    if not isinstance(found.get("path"), dict) or "num_layers" not in found:
        raise UserError(f"{file} is not a path.json of measure.py")
    if found["num_layers"] != num_layers:
        raise UserError(
            f"{file} is for a decoder of {found['num_layers']} layers, this one has {num_layers}"
        )
    return int(found["path"][str(block_size)])


def plan_block(
    bench: Workbench, block_size: int, path: str, start_layer: int = -1, control: bool = False
) -> PrunePlan:
    """Choose a block and write its plan.json (or add the path to the ones that chose it)."""
    num_layers = decoder_depth(bench)
    start = (
        start_layer if start_layer >= 0 else choose_start_layer(bench, block_size, path, num_layers)
    )
    source = "given" if start_layer >= 0 else path
    plan = PrunePlan(num_layers, start, block_size, control=control)
    bench.on_main(_write_plan, bench, PrunePlan(num_layers, start, block_size), source)
    return plan


def _write_plan(bench: Workbench, plan: PrunePlan, source: str) -> None:
    file = bench.experiment.stage(f"prune/{plan.name}") / "plan.json"
    decoder = hub_fingerprint(bench.hparams["decoder_hub"], bench.hparams["decoder_revision"])
    sources = [source]
    if file.is_file():
        before = read_json(file)
        if before["decoder_fingerprint"] != decoder:
            raise UserError(
                f"{file} is a plan for another decoder ({before['decoder_hub']}); delete it first"
            )
        if source in before["path_sources"]:
            return
        sources = [*before["path_sources"], source]
    facts = asdict(plan) | {
        "kept_layers": plan.kept_layers,
        "receiving_layer": plan.receiving_layer,
        "decoder_hub": bench.hparams["decoder_hub"],
        "decoder_revision": bench.hparams["decoder_revision"],
        "decoder_fingerprint": decoder,
        "path_sources": sources,
    }
    facts.pop("control")
    write_json(file, provenance(bench.run.config_hash(), [], bench.experiment.root) | facts)


def decoder_depth(bench: Workbench) -> int:
    """L, from the decoder's config: no weights are needed to plan."""
    from transformers import AutoConfig

    from speechllm_prune.models.encoder import explain_hub_errors

    with explain_hub_errors(bench.hparams["decoder_hub"], "decoder_hub"):
        config = AutoConfig.from_pretrained(
            bench.hparams["decoder_hub"], revision=bench.hparams["decoder_revision"]
        )
    return config.get_text_config().num_hidden_layers


def export_variant(bench: Workbench, variant: Variant, folder: Path) -> Path:
    """Write a variant as an export folder, from a model of its own: merging adapters changes it for good."""
    from speechllm_prune.prune.export import export
    from speechllm_prune.restore import restore

    plan = read_plan(bench.experiment, variant)
    model = restore(bench.experiment, variant.name, bench.hparams, bench.device)
    facts = {
        "variant": variant.name,
        "num_layers": plan.num_layers,
        "kept_layers": plan.kept_layers,
    }
    return export(model, folder, bench.hparams, bench.run.config_hash("heal"), **facts)


# ---------------------------------------------------------------- evaluate


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
            _evaluate_split(bench, name, variant, None, key)
        return
    plan = read_plan(bench.experiment, variant)
    heal_state = read_heal_state(bench.experiment, variant)
    with cut(bench.model, plan, heal_state):
        for key in todo:
            _evaluate_split(bench, name, variant, plan, key)


def _is_evaluable(bench: Workbench, key: str, must_exist: bool) -> bool:
    if bench.is_prepared(key):
        return True
    message = f"the evaluation manifest {key} is not prepared; prepare it with: {prepare_command(bench.manifest(key))}"
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
    batches = bench.sorted_loader(utterances, bench.hparams["eval_batch_size"])
    with Meter(bench.device) as meter:
        mine = decode(bench.model, bench.progress(batches, f"{name} on {key}"))
    by_id = {hypothesis.id: hypothesis for hypothesis in gather(mine)}
    hypotheses = [by_id[row.ID] for row in utterances.rows]
    if if_main_process():
        _write_scores(bench, name, variant, plan, key, hypotheses, meter)
    ddp_barrier()


def _write_scores(
    bench: Workbench,
    name: str,
    variant: Variant,
    plan: PrunePlan | None,
    key: str,
    hypotheses: list[Hypothesis],
    meter: Meter,
) -> None:
    hparams, folder = bench.hparams, _eval_folder(bench, name, key)
    task = TASKS[hparams["task"]]
    ids, refs, hyps = ([getattr(h, part) for h in hypotheses] for part in ("id", "ref", "hyp"))
    result = score(task, ids, refs, hyps, hparams["target_language"])
    rows = [asdict(h) | counts for h, counts in zip(hypotheses, result.rows, strict=True)]
    (folder / "metrics.json").unlink(missing_ok=True)
    write_text(folder / "hyps.jsonl", "".join(json_line(row) for row in rows))
    write_text(folder / f"{task.metric}.txt", result.report)
    corpus, split = key.split("/")
    inputs = [bench.experiment.stage("train") / "DONE.json", bench.manifest(key)]
    if variant.start_layer is not None:
        inputs.append(bench.experiment.stage(f"prune/{variant.block}") / "plan.json")
    if variant.heal_mode != "none":
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
        **result.facts,
        "rtfx": sum(h.duration for h in hypotheses) / meter.seconds,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "num_parameters": num_parameters(bench.model),
        "decoder_parameters": num_parameters(bench.model.decoder),
        "num_capped": sum(h.capped for h in hypotheses),
        "precision": str(bench.dtype).removeprefix("torch."),
        "device": bench.device,
        "features_cached": hparams["cache_features"],
        "note": hparams["results_note"],
    }
    record = provenance(bench.run.config_hash("evaluate"), inputs, bench.experiment.root) | facts
    write_json(folder / "metrics.json", record)
    print(
        f"{name} on {key}: {task.metric.upper()} {result.value:.2f} %  ({len(hypotheses)} utterances)"
    )


def json_line(row: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    import json

    return json.dumps(row, ensure_ascii=False) + "\n"
