"""Stage 1, and the loop that it shares with healing."""

from __future__ import annotations

import logging
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.checkpoint import MODEL_FILE, AtomicCheckpointer
from speechllm_prune.data.batching import Batch, EndlessBatchSampler, sorted_batches
from speechllm_prune.data.manifest import Row, read_summary
from speechllm_prune.data.pipeline import Utterances, filter_training_rows
from speechllm_prune.data.prompt import encode_target
from speechllm_prune.experiment import sha256_file, sha256_json, write_json, write_text
from speechllm_prune.hparams import hub_fingerprint, identity, resolve_hparams
from speechllm_prune.models.decoder import num_parameters, training_layers
from speechllm_prune.models.estimate import training_memory
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.distill import TeacherRows
from speechllm_prune.ranks import check_agreement
from speechllm_prune.redaction import RedactingFilter
from speechllm_prune.restore import (
    build_model,
    load_train_state,
    set_trainable,
    train_names,
)
from speechllm_prune.runtime import UserError, derive_seed
from speechllm_prune.tasks import TASKS
from speechllm_prune.workbench import Workbench


def train(bench: Workbench, for_export: bool = False) -> None:
    """Stage 1: train the projector (and the decoder's adapters, if there are any).

    Arguments
    ---------
    bench : Workbench
        Of an experiment whose corpus is prepared here, unless...
    for_export : bool
        ... training is done and only an export is wanted, which takes no corpus.
    """
    config_hash = bench.run.config_hash()
    if not (for_export and bench.experiment.is_done("train")):
        bench.prepare()
    with bench.working_on("train", config_hash) as todo:
        if not todo:
            return
        for key in (*bench.hparams["train_manifests"], bench.hparams["valid_manifest"]):
            read_summary(bench.manifest(key))  # complain before the models are loaded
        bench.on_main(_archive, bench)
        model = build_model(bench.hparams, bench.device)
        bench.adopt(model)
        names = train_names(model)
        if if_main_process():
            _announce(bench, model, names)
        fit(bench, "train", "train", names, bench.hparams["num_steps"], config_hash)
    load_train_state(model, bench.experiment)


def fit(
    bench: Workbench,
    stage: str,
    seed_name: str,
    names: list[str],
    num_steps: int,
    config_hash: str,
    teacher: Callable[[Batch], TeacherRows] | None = None,
    **facts: Any,
) -> None:
    """Train the named parameters of the bench's model and finish the stage.

    Arguments
    ---------
    bench : Workbench
        Holds the model as it is to be trained.
    stage : str
        Folder of the stage.
    seed_name : str
        What the random state is derived from, with seed and rank.
    names : list of str
        Parameters to train.
    num_steps : int
        Optimiser steps.
    config_hash : str
        Of the stage.
    teacher : callable, optional
        What the unpruned model says on a batch: distillation.
    **facts
        Further fields of DONE.json.
    """
    hparams, model, folder = bench.hparams, bench.model, bench.experiment.stage(stage)
    interval = min(hparams["valid_interval"], num_steps)
    if bench.run.flags.debug:
        interval, num_steps = 2, 4
    utterances = training_utterances(bench)
    sampler = training_sampler(bench, utterances)
    if if_main_process():
        _announce_memory(hparams, model, names, utterances)
    data_hash = sha256_json([[row.ID, row.duration, row.text] for row in utterances.rows])
    check_agreement(
        {
            "training data": data_hash,
            "batches in a pass": len(sampler.batches_of_pass(0)),
            "steps": num_steps,
        }
    )
    valid = validation_utterances(bench)
    valid_index = sorted_batches(
        valid.sizes,
        hparams["eval_batch_size"],
        bench.rank,
        bench.world_size,
        hparams["eval_batch_positions"],
    )
    bench.seed(seed_name)
    set_trainable(model, names)
    brain = SpeechLLMBrain(
        model,
        hparams,
        num_steps,
        interval,
        sampler,
        {key: value for key, value in bench.run_options.items() if key != "debug"},
        AtomicCheckpointer(folder / "save", _identity(bench, stage, config_hash, data_hash, facts)),
        _logger(hparams["train_logger"], folder / "train_log.txt"),
        teacher,
    )
    try:
        with (
            log_to(folder),
            training_layers(
                model.decoder, hparams["gradient_checkpointing"], hparams["compile_layers"]
            ),
        ):
            brain.fit(
                brain.epochs(),
                utterances.loader(sampler, hparams["num_workers"]),
                valid.loader(valid_index, hparams["num_workers"]),
                progressbar=bench.shows_progress,
            )
    finally:
        set_trainable(model, [])
        model.eval()
    if if_main_process():
        _finish(bench, brain, stage, names, config_hash, num_steps=num_steps, **facts)
    ddp_barrier()


def _identity(
    bench: Workbench, stage: str, config_hash: str, data_hash: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint of this stage must agree in with the run that goes on from it."""
    hparams, trained = bench.hparams, bench.experiment.stage("train") / "DONE.json"
    return {
        "encoder": hub_fingerprint(hparams["encoder_hub"], hparams["encoder_revision"]),
        "decoder": hub_fingerprint(hparams["decoder_hub"], hparams["decoder_revision"]),
        "kept layers": facts.get("kept_layers", "all"),
        "training data": data_hash,
        "stage-1 model": sha256_file(trained) if stage != "train" else None,
        "number of processes": bench.world_size,  # each has a share of the batches and a random state
        "configuration": config_hash,
    }


def _finish(
    bench: Workbench,
    brain: SpeechLLMBrain,
    stage: str,
    names: list[str],
    config_hash: str,
    **facts: Any,
) -> None:
    hparams = bench.hparams
    inputs = [
        bench.manifest(key) for key in (*hparams["train_manifests"], hparams["valid_manifest"])
    ]
    if stage != "train":
        inputs.append(bench.experiment.stage("train") / "DONE.json")
    task = TASKS[hparams["task"]]
    key = f"valid_{task.metric}"
    best = brain.checkpointer.best(**{"max_key" if task.higher_is_better else "min_key": key})
    parameters = dict(brain.model.named_parameters())
    bench.experiment.finish(
        stage,
        config_hash,
        inputs,
        checkpoint=f"save/{best.path.name}",
        checkpoint_sha256=sha256_file(best.path / MODEL_FILE),
        **{key: best.meta[key]},
        timing=brain.timing(),
        skipped_steps=brain.counters.skipped_steps,
        optimizer_step=best.meta["optimizer_step"],
        num_trainable=sum(parameters[name].numel() for name in names),
        trainable=names,
        **facts,
    )


def training_sampler(bench: Workbench, utterances: Utterances) -> EndlessBatchSampler:
    """The order of the training data on this rank, the same for training and every healing."""
    hparams = bench.hparams
    return EndlessBatchSampler(
        utterances.sizes,
        hparams["batch_size"],
        hparams["batch_positions"],
        hparams["pool_batches"],
        derive_seed(hparams["seed"], "batches"),
        bench.rank,
        bench.world_size,
    )


def training_utterances(bench: Workbench) -> Utterances:
    """The training rows that pass the length filters, the dropped ones counted by reason."""
    hparams, model = bench.hparams, bench.model
    parts: list[Utterances] = []
    for key in hparams["train_manifests"]:
        name = f"{key}, filtered"  # the same split may be measured or evaluated, whole
        if (name, False) not in bench._utterances:
            kept = _filtered(bench, key, model)
            bench._utterances[name, False] = bench.make_utterances(key, kept)
        parts.append(bench._utterances[name, False])
    return parts[0] if len(parts) == 1 else _joined(parts)


def _filtered(bench: Workbench, key: str, model: SpeechLLM) -> list[Row]:
    hparams, rows = bench.hparams, bench.rows(key)
    tokens = [len(encode_target(model.tokenizer, row.text, model.text_case)) for row in rows]
    kept, dropped = filter_training_rows(
        rows,
        tokens,
        hparams["min_seconds"],
        hparams["max_seconds"],
        hparams["max_target_tokens"],
        model,
    )
    if if_main_process():
        hours = sum(row.duration for row in kept) / 3600
        reasons = "".join(f"; dropped {count} {reason}" for reason, count in dropped.items())
        print(f"{key}: {len(kept)} utterances, {hours:.2f} h{reasons}")
    return kept


def _joined(parts: list[Utterances]) -> Utterances:
    rows = [row for part in parts for row in part.rows]
    if len({row.ID for row in rows}) != len(rows):
        raise UserError("two training manifests share an utterance id")
    dataset: Any = torch.utils.data.ConcatDataset([part.dataset for part in parts])
    return Utterances(rows, dataset, [size for part in parts for size in part.sizes])


def validation_utterances(bench: Workbench) -> Utterances:
    """A fixed random subset of the validation manifest: the same in every run, on every rank."""
    key = bench.hparams["valid_manifest"]
    rows, count = bench.rows(key), bench.hparams["valid_utterances"]
    if not count or count >= len(rows):
        return bench.utterances(key)
    chosen = sorted(random.Random("validation").sample(range(len(rows)), count))
    return bench.make_utterances(key, [rows[index] for index in chosen])


def _archive(bench: Workbench) -> None:
    """hyperparams.yaml, the authority on this experiment, and what the leaf alone said (to notice later changes)."""
    run, folder = bench.run, bench.experiment.stage("train")
    if (folder / "hyperparams.yaml").is_file() and bench.experiment.holds_training():
        return  # a resumed run keeps its archive
    leaf = identity(resolve_hparams(run.leaf, None, run.flags.allow_module))
    write_json(folder / "leaf.json", {"leaf": run.leaf, "values": leaf})
    write_text(folder / "hyperparams.yaml", run.text)


def _announce(bench: Workbench, model: SpeechLLM, names: list[str]) -> None:
    """One line for every choice."""
    hparams, config = bench.hparams, model.decoder.config.get_text_config()
    trained = sum(p.numel() for name, p in model.named_parameters() if name in set(names))
    total, decoder = num_parameters(model), num_parameters(model.decoder)
    print(
        f"encoder:  {hparams['encoder_hub']} ({num_parameters(model.encoder):,} parameters, frozen)"
    )
    print(
        f"decoder:  {hparams['decoder_hub']} ({decoder:,} parameters, {100 * decoder / total:.1f} % of all, "
        f"{config.num_hidden_layers} layers)"
    )
    print(f"trained:  {trained:,} parameters on {bench.device}, frozen weights in {bench.dtype}")
    print(f"tokens:   {model.token_ids}, prompt {model.prompt!r} = {model.prompt_ids}")
    batch = (
        f"{hparams['batch_positions']} positions"
        if hparams["batch_positions"]
        else f"{hparams['batch_size']} utterances"
    )
    micro = f"{bench.world_size} x {hparams['grad_accumulation_factor']} x {batch}"
    print(f"schedule: {hparams['num_steps']} steps of {micro}, lr {hparams['lr']:g}")
    if hparams["results_note"]:
        print(f"note:     {hparams['results_note']}")


def _announce_memory(
    hparams: dict[str, Any], model: SpeechLLM, names: list[str], utterances: Utterances
) -> None:
    positions = hparams["batch_positions"] or hparams["batch_size"] * max(utterances.sizes)
    memory = training_memory(
        model, names, positions, checkpointing=hparams["gradient_checkpointing"]
    )
    print(
        f"memory:   about {memory / 2**30:.1f} GiB per process at most, for a micro-batch of {positions} positions "
        f"(an estimate)"
    )


def _logger(factory: Callable[..., Any], file: Path) -> Any:
    """SpeechBrain's text logger takes a file, its TensorBoard logger a folder."""
    import inspect

    names = inspect.signature(factory).parameters
    try:
        return (
            factory(save_file=str(file))
            if "save_file" in names
            else factory(save_dir=str(file.parent / "tensorboard"))
        )
    except ImportError as error:
        raise UserError(
            f"train_logger: {error}; TensorBoard is an optional extra: pip install -e '.[tensorboard]'"
        ) from None


class log_to:
    """Context: Python's log also goes to `log.txt`, the environment to `env.log`.

    Arguments
    ---------
    folder : Path
        Of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.handler: logging.Handler | None = None
        if not if_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        import peft
        import speechbrain
        import transformers

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {
            module.__name__: module.__version__ for module in (transformers, peft, speechbrain)
        }
        lines = [f"{name} {version}" for name, version in versions.items()]
        write_text(self.folder / "env.log", "\n".join([f"platform {sys.platform}", *lines]) + "\n")
        self.handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        self.handler.setFormatter(
            logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
        )
        self.handler.addFilter(RedactingFilter())
        logging.getLogger().addHandler(self.handler)

    def __exit__(self, *exc_info: object) -> None:
        if self.handler is not None:
            logging.getLogger().removeHandler(self.handler)
            self.handler.close()
