"""The measure stage: angular distances on speech or text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor

from speechllm_prune.data.prompt import encode_text
from speechllm_prune.experiment import (
    provenance,
    sha256_json,
    write_json,
)
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.models.decoder import load_decoder, resolve_token_ids
from speechllm_prune.prune.distance import Distances, measure_distances
from speechllm_prune.prune.path import bootstrap_share, path_margins, pruning_path
from speechllm_prune.ranks import InStep
from speechllm_prune.runtime import UserError
from speechllm_prune.workbench import Workbench, text_batches


def measure(bench: Workbench) -> Path:
    """Measure angular distances and write distances.safetensors, path.json and heatmap.png."""
    hparams = bench.hparams
    stage = measure_stage(hparams)
    text_mode = hparams["measure_input"] == "text"
    needs_training = not text_mode or _is_adapted(hparams)
    if needs_training:
        bench.require_training()
    sentences = _sentences(bench) if text_mode else []
    config_hash = _text_hash(bench) if text_mode else bench.run.config_hash("measure")
    if text_mode and hparams["last_token"] != "sequence":
        raise UserError(
            "last_token 'prompt' has no meaning with measure_input text: there is no prompt"
        )
    folder = bench.experiment.stage(stage)
    with bench.working_on(stage, config_hash) as todo:
        if not todo:
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


def measure_stage(hparams: Mapping[str, Any]) -> str:
    """`measure/<measure_input>` or `measure/<measure_input>-no_lora`: comparable, and neither replaces the other.

    Raises
    ------
    UserError
        If adapters are to be off where there are none.
    """
    stage = f"measure/{hparams['measure_input']}"
    if hparams["measure_lora"]:
        return stage
    if not hparams["decoder_lora_rank"]:
        raise UserError(
            "measure_lora False turns off the decoder's adapters, and this system has none (decoder_lora_rank is 0); "
            "leave the option out"
        )
    return f"{stage}-no_lora"


def _is_adapted(hparams: Mapping[str, Any]) -> bool:
    """Whether the decoder that is measured differs from the one on the hub."""
    return bool(hparams["decoder_lora_rank"] and hparams["measure_lora"])


def _text_hash(bench: Workbench) -> str:
    """Text mode depends on the decoder alone, unless training adapted it."""
    values = bench.run.values
    if _is_adapted(values):
        return bench.run.config_hash("measure")
    hub = hub_fingerprint(values["decoder_hub"], values["decoder_revision"])
    names = ("measure_manifest", "text_file", "last_token", "text_case", "precision")
    return sha256_json({"decoder": hub, **{name: values[name] for name in names}})


def _measure_speech(bench: Workbench) -> Distances:
    utterances = bench.utterances(bench.hparams["measure_manifest"])
    with_targets = bench.hparams["last_token"] == "sequence"
    number = {row.ID: position for position, row in enumerate(utterances.rows)}

    def batches() -> Iterator[dict[str, Tensor]]:
        loader = bench.sorted_loader(utterances, bench.hparams["measure_batch_size"])
        for batch in bench.progress(loader, "measuring"):
            inputs = bench.model.inputs_for(batch, targets=with_targets)._asdict()
            yield inputs | {"index": torch.tensor([number[name] for name in batch.ids])}

    with torch.no_grad():
        return measure_distances(bench.model.decoder, batches(), bench.hparams["measure_lora"])


def _measure_text(bench: Workbench, sentences: list[str]) -> Distances:
    hparams = bench.hparams
    if _is_adapted(hparams):
        decoder, tokenizer = bench.model.decoder, bench.model.tokenizer
    else:
        decoder, tokenizer = load_decoder(
            hparams["decoder_hub"], hparams["decoder_revision"], bench.dtype, hparams["attention"]
        )
        decoder.to(bench.device)
    ids = resolve_token_ids(decoder, tokenizer)
    sequences = [encode_text(tokenizer, text, hparams["text_case"], ids.stop) for text in sentences]
    mine = sequences[bench.rank :: bench.world_size]
    batches = list(text_batches(mine, hparams["measure_batch_size"], ids.pad, bench.device))
    numbered = (
        batch | {"index": bench.rank + bench.world_size * batch["index"]}
        for batch in InStep(batches)
    )
    return measure_distances(decoder, bench.progress(numbered, "measuring"))


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
        {
            "distance": matrix.contiguous(),
            "influence": distances.influence.contiguous(),
            "distance_post_norm": distances.post_norm.contiguous(),
            "count": torch.tensor([distances.count]),
        },
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
        "measure_lora": hparams["measure_lora"],
        "decoder_lora_rank": hparams["decoder_lora_rank"],
        "num_layers": len(matrix),
        "count": distances.count,
        "decoder_hub": hparams["decoder_hub"],
        "decoder_fingerprint": bench.models()["decoder"]["fingerprint"],
        "path": {str(n): start for n, start in path.items()},
        "margin": {str(n): margin for n, margin in path_margins(matrix).items()},
        "bootstrap_share": {
            str(n): share for n, share in bootstrap_share(distances.samples, path).items()
        },
        "note": hparams["results_note"],
    }
    write_json(folder / "path.json", provenance(config_hash, inputs, bench.experiment.root) | facts)
    title = f"{hparams['experiment_name']}, {folder.name}"
    heatmap_figure([HeatmapPanel(title, matrix.numpy(), path)]).savefig(
        folder / "heatmap.png", dpi=150
    )
