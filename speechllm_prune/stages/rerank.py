"""The re-ranking part of the measure stage: which of the best blocks of each size costs the least loss, untrained."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechllm_prune.experiment import provenance, read_json, write_json
from speechllm_prune.models.speechllm import DecoderInputs
from speechllm_prune.prune.selectors import (
    BlockLosses,
    Evidence,
    best_blocks,
    block_losses,
    select,
)
from speechllm_prune.runtime import UserError
from speechllm_prune.workbench import Workbench

STAGE = "measure/speech"


def check_rerank(bench: Workbench) -> None:
    """Refuse `--rerank` where there are no losses to rank by, before anything is measured.

    Raises
    ------
    UserError
    """
    if not bench.hparams["rerank"]:
        return
    if bench.hparams["measure_input"] != "speech" or not bench.hparams["measure_lora"]:
        raise UserError(
            "rerank compares losses of the trained system on speech: leave out --measure_input text and "
            "--measure_lora False, or --rerank"
        )


def rerank_blocks(bench: Workbench) -> Path | None:
    """Write measure/speech/rerank.json if the key `rerank` asks for it; None if it does not.

    The `rerank` blocks of smallest distance of every size are compared by the teacher-forced loss on
    `rerank_utterances` of the measure manifest.
    """
    count = bench.hparams["rerank"]
    if not count:
        return None
    check_rerank(bench)
    folder = bench.experiment.require(STAGE, bench.run.command("measure"))
    file, config_hash = folder / "rerank.json", bench.run.config_hash("measure", "rerank")
    if not bench.on_main(_begin, bench, file, config_hash):
        return file
    with bench.writing(STAGE, config_hash):
        matrix = load_file(folder / "distances.safetensors")["distance"].tolist()
        losses = block_losses(bench.model.decoder, best_blocks(matrix, count), _batches(bench))
        if if_main_process():
            _write(bench, file, config_hash, losses)
            (folder / "STOPPED.json").unlink(missing_ok=True)
        ddp_barrier()
    return file


def _begin(bench: Workbench, file: Path, config_hash: str) -> bool:
    if not file.is_file():
        return True
    found = read_json(file)
    if found["config_hash"] != config_hash:
        raise UserError(
            f"{file} was made with another configuration (rerank {found['rerank']}, rerank_utterances "
            f"{found['rerank_utterances']}); delete it, or use --overwrite, which measures again as well"
        )
    bench.experiment.check_inputs(file, found)
    print(f"{file} is already done")
    return False


def _batches(bench: Workbench) -> Iterator[DecoderInputs]:
    """This rank's share of a fixed random subset: the same in every run, whatever the number of ranks."""
    key, count = bench.hparams["measure_manifest"], bench.hparams["rerank_utterances"]
    rows = bench.rows(key)
    if count < len(rows):
        chosen = sorted(random.Random("rerank").sample(range(len(rows)), count))
        rows = [rows[index] for index in chosen]
    utterances = bench.make_utterances(key, rows)
    loader = bench.sorted_loader(utterances, bench.hparams["measure_batch_size"])
    for batch in bench.progress(loader, "re-ranking"):
        yield bench.model.inputs_for(batch)


def _write(bench: Workbench, file: Path, config_hash: str, losses: BlockLosses) -> None:
    hparams, measured = bench.hparams, read_json(file.parent / "path.json")
    mean = losses.mean
    path = select("rerank", Evidence(measured["num_layers"], loss=mean))
    table: dict[str, dict[str, float]] = {str(n): {} for n in path}
    for (start, n), loss in mean.items():
        table[str(n)][str(start)] = loss
    inputs = [
        file.parent / "distances.safetensors",
        bench.manifest(hparams["measure_manifest"]),
        bench.experiment.stage("train") / "DONE.json",
    ]
    facts = {
        "measure_input": "speech",
        "measure_manifest": hparams["measure_manifest"],
        "last_token": measured["last_token"],
        "num_layers": measured["num_layers"],
        "rerank": hparams["rerank"],
        "rerank_utterances": hparams["rerank_utterances"],
        "num_labels": losses.num_labels,
        "layer_evaluations": losses.layer_evaluations,
        "decoder_hub": hparams["decoder_hub"],
        "decoder_fingerprint": bench.models()["decoder"]["fingerprint"],
        "path": {str(n): start for n, start in path.items()},
        "loss": table,
        "full_loss": losses.full / losses.num_labels,
        "note": hparams["results_note"],
    }
    write_json(file, provenance(config_hash, inputs, bench.experiment.root) | facts)
