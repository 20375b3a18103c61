"""The prune stage: choosing a block and writing its plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from speechllm_prune.experiment import (
    provenance,
    read_json,
    write_json,
)
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.keys import NAMED_PATHS
from speechllm_prune.prune.selectors import Evidence, select
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.runtime import UserError
from speechllm_prune.workbench import Workbench


def choose_start_layer(bench: Workbench, block_size: int, path: str, num_layers: int) -> int:
    """Start layer of a block of the given size on a path (one of `NAMED_PATHS`, or a path.json)."""
    if not 1 <= block_size <= num_layers - 1:
        raise UserError(
            f"block_size {block_size} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers); "
            f"give --block_size N"
        )
    found = path_of(bench, path, num_layers)
    if block_size not in found:
        sizes = ", ".join(map(str, sorted(found)))
        raise UserError(f"path {path!r} has no block of size {block_size}; it has {sizes}")
    return found[block_size]


def path_of(bench: Workbench, path: str, num_layers: int) -> dict[int, int]:
    """The whole path {n: l} that `--path` names.

    Raises
    ------
    UserError
        If it was not measured yet (naming the command), is no path, or is of another decoder.
    """
    if path in ("tail", "random"):
        return select(path, Evidence(num_layers, seed=bench.hparams["seed"]))
    if path == "influence":
        return select(path, Evidence(num_layers, influence=_influence(bench, num_layers)))
    file = _path_file(bench, path)
    found = read_json(file)
    if not isinstance(found.get("path"), dict) or "num_layers" not in found:
        raise UserError(f"{file} is not a path.json of measure.py")
    _same_depth(file, found["num_layers"], num_layers)
    decoder = bench.models()["decoder"]["fingerprint"]
    if found.get("decoder_fingerprint", decoder) != decoder:
        raise UserError(
            f"{file} was measured on another decoder ({found['decoder_hub']}); measure this one, or give --start_layer"
        )
    try:
        return select("given", Evidence(num_layers, given=found["path"]))
    except (ValueError, TypeError):
        raise UserError(f"{file} is not a path.json of measure.py: {found['path']}") from None


def _path_file(bench: Workbench, path: str) -> Path:
    if path not in NAMED_PATHS:
        if not Path(path).is_file():
            raise UserError(f"path {path!r} is neither {', '.join(NAMED_PATHS)} nor a file")
        return Path(path)
    stage = "measure/text" if path == "text" else "measure/speech"
    options = {"text": ["--measure_input text"], "rerank": ["--rerank 4"]}.get(path, [])
    command = bench.run.command("measure", *options)
    folder = bench.experiment.require(stage, command)
    if path != "rerank":
        return folder / "path.json"
    file = folder / "rerank.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; run: {command}")
    bench.experiment.check_inputs(file, read_json(file))
    return file


def _influence(bench: Workbench, num_layers: int) -> Any:
    """The matrix of block influence that measure.py wrote, for speech."""
    from safetensors.torch import load_file

    command = bench.run.command("measure")
    file = bench.experiment.require("measure/speech", command) / "distances.safetensors"
    tensors = load_file(file)
    if "influence" not in tensors:
        raise UserError(f"{file} holds no block influence; run: {command} --overwrite")
    _same_depth(file, len(tensors["influence"]), num_layers)
    return tensors["influence"].tolist()


def _same_depth(file: Path, measured: int, num_layers: int) -> None:
    if measured != num_layers:
        raise UserError(f"{file} is for a decoder of {measured} layers, this one has {num_layers}")


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
            bench.hparams["decoder_hub"],
            revision=bench.hparams["decoder_revision"],
            trust_remote_code=False,
        )
    return config.get_text_config().num_hidden_layers
