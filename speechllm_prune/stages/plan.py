"""The prune stage: choosing a block, writing its plan, exporting a variant."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from speechllm_prune.experiment import (
    Variant,
    provenance,
    read_json,
    write_json,
)
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.prune.path import tail_path
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import read_plan
from speechllm_prune.runtime import UserError
from speechllm_prune.workbench import Workbench


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
