"""The heal stage: what a cut model gets back, by training (adapters, projector) or by a least-squares map."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor

from speechllm_prune.data.batching import Batch, sorted_batches
from speechllm_prune.data.pipeline import Utterances
from speechllm_prune.experiment import SCHEMA, Variant, sha256_file, sha256_json, write_text
from speechllm_prune.prune.compensate import (
    COMPENSATION_FILE,
    check_compensable,
    fit_compensation,
)
from speechllm_prune.prune.distill import TeacherRows, TeacherStore, ask_teacher
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.ranks import agreed_maximum
from speechllm_prune.restore import EXTRAS, HealState, cut
from speechllm_prune.runtime import UserError
from speechllm_prune.training import fit, training_sampler, training_utterances
from speechllm_prune.workbench import Workbench


def extras_of(hparams: dict[str, Any], mode: str) -> list[str]:
    """Tags of the extras that the keys ask for, as far as they concern a heal mode."""
    asked = {
        "all": hparams["heal_lora_layers"] == "all" and mode in ("decoder", "joint"),
        "comp": hparams["compensate"],
        "kl": hparams["heal_kl_beta"] > 0 and mode != "none",
    }
    return [tag for tag in EXTRAS if asked[tag]]


def heal_tag(hparams: dict[str, Any], mode: str, tag: str) -> str:
    """Tag of a variant: its extras, then the user's own word.

    Raises
    ------
    UserError
        If the user's word is the name of an extra that the keys do not ask for.

    Example
    -------
    >>> keys = {"heal_lora_layers": "receiver", "compensate": True, "heal_kl_beta": 1.0}
    >>> heal_tag(keys, "joint", ""), heal_tag(keys, "joint", "try2"), heal_tag(keys, "joint", "kl")
    ('comp-kl', 'comp-kl-try2', 'comp-kl')
    """
    extras = extras_of(hparams, mode)
    if tag in EXTRAS and tag not in extras:
        key, value = next(iter(EXTRAS[tag].items()))
        raise UserError(f"the tag {tag!r} is for {key}; give --{key} {value} (and no tag)")
    own = [] if tag in EXTRAS or not tag else [tag]
    return "-".join([*extras, *own])


def heal(bench: Workbench, plan: PrunePlan, mode: str, tag: str = "") -> str:
    """Heal a cut model: adapters on the receiving layer's MLP and/or the projector. Returns the variant's name.

    Starts from the best stage-1 state with a fresh optimiser and the full peak learning rate.
    """
    hparams = bench.hparams
    tag = heal_tag(hparams, mode, tag)
    variant = Variant(plan.start_layer, plan.block_size, mode, tag, plan.control)
    stage, config_hash = f"heal/{variant.name}", bench.run.config_hash("heal")
    _check(bench, plan, mode)
    with bench.working_on(stage, config_hash) as todo:
        if todo:
            _heal(bench, plan, variant, stage, config_hash)
    return variant.name


def _heal(
    bench: Workbench, plan: PrunePlan, variant: Variant, stage: str, config_hash: str
) -> None:
    hparams, mode = bench.hparams, variant.heal_mode
    state = HealState(
        mode,
        LoraSettings(
            hparams["heal_lora_rank"], hparams["heal_lora_alpha"], hparams["heal_lora_dropout"]
        ),
        lora_layers=hparams["heal_lora_layers"],
        compensation=compensation(bench, plan, stage) if hparams["compensate"] else None,
    )
    if if_main_process():
        write_text(bench.experiment.stage(stage) / "hyperparams.yaml", bench.run.text)
    facts = state.facts() | {"variant": variant.name, "kept_layers": plan.kept_layers}
    if mode == "none":
        if if_main_process():
            inputs = [bench.experiment.stage("train") / "DONE.json"]
            bench.experiment.finish(stage, config_hash, inputs, **facts)
        ddp_barrier()
        return
    teacher = make_teacher(bench) if hparams["heal_kl_beta"] > 0 else None
    model = bench.model  # loading it draws random numbers: before the seed, as in a sweep
    # One seed for all modes and the control: same adapters at the start, same data in the same order.
    bench.seed("heal")
    with cut(model, plan, state) as names:
        fit(bench, stage, "heal", names, hparams["heal_steps"], config_hash, teacher, **facts)


def check_request(mode: str, compensate: bool, control: bool) -> None:
    """Refuse keys that contradict each other.

    Raises
    ------
    UserError
    """
    if mode == "none" and not compensate:
        raise UserError(
            "heal_mode none trains nothing: give one of decoder, projector, joint, or --compensate True with it; "
            "`evaluate.py --variant l18n08-none` evaluates a plain cut"
        )
    if compensate and control:
        raise UserError(
            "compensate makes up for a cut, and a control has none; leave one of them out"
        )


def _check(bench: Workbench, plan: PrunePlan, mode: str) -> None:
    """Refuse what cannot be healed before anything is trained."""
    compensate = bench.hparams["compensate"]
    check_request(mode, compensate, plan.control)
    if mode in ("decoder", "joint") and plan.receiving_layer is None:
        raise UserError(
            f"block {plan.name} reaches the last layer: there is no receiving layer to heal"
        )
    if compensate:
        check_compensable(bench.model.decoder, plan.start_layer)


# ---------------------------------------------------------------- compensation


def compensation(bench: Workbench, plan: PrunePlan, stage: str) -> Tensor:
    """Fit the map on training utterances, and keep it in the stage's folder."""
    hparams = bench.hparams
    utterances = training_utterances(bench)
    count = min(hparams["compensate_utterances"], len(utterances.rows))
    chosen = sorted(random.Random("compensation").sample(range(len(utterances.rows)), count))

    def batches() -> Iterator[dict[str, Tensor]]:
        mine = _batches_of(bench, utterances, chosen[bench.rank :: bench.world_size])
        for batch in bench.progress(mine, "compensation"):
            yield bench.model.inputs_for(batch)._asdict()

    weight = fit_compensation(
        bench.model.decoder,
        plan.start_layer,
        plan.block_size,
        batches(),
        hparams["compensate_ridge"],
    )
    folder = bench.experiment.stage(stage)
    if if_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": weight.contiguous().cpu()}, folder / COMPENSATION_FILE)
    ddp_barrier()
    return weight


def _batches_of(bench: Workbench, utterances: Utterances, chosen: list[int]) -> Iterator[Batch]:
    """Chosen utterances in batches, longest first, on the device."""
    sizes = [utterances.sizes[index] for index in chosen]
    index = sorted_batches(sizes, bench.hparams["measure_batch_size"])
    batches = [[chosen[i] for i in batch] for batch in index]
    return bench.on_device(utterances.loader(batches, bench.hparams["num_workers"]))


# ---------------------------------------------------------------- distillation


def make_teacher(bench: Workbench) -> Callable[[Batch], TeacherRows]:
    """What the unpruned model says on every utterance that healing will see, computed once for all blocks and modes.

    Must be called on the uncut model. The answers are kept beside the encoder features, one file per rank.
    """
    hparams = bench.hparams
    utterances = training_utterances(bench)
    steps = hparams["heal_steps"] * hparams["grad_accumulation_factor"]
    order = itertools.islice(training_sampler(bench, utterances), steps)
    needed = sorted({index for batch in order for index in batch})
    file = _teacher_file(bench, len(utterances.rows))
    store = TeacherStore.load(file) if file.is_file() else None
    missing = store is None or any(utterances.rows[index].ID not in store for index in needed)
    if agreed_maximum(missing)[0]:  # all ranks go through their batches, or none does
        batches = _batches_of(bench, utterances, needed)
        store = ask_teacher(
            bench.model, bench.progress(batches, "asking the teacher"), hparams["heal_kl_top"]
        )
        store.save(file)
    assert store is not None
    kept, beta = store, float(hparams["heal_kl_beta"])
    return lambda batch: kept.rows_of(batch.ids, beta).to(bench.model.device)


def _teacher_file(bench: Workbench, num_utterances: int) -> Path:
    """Named by all that decides the answers: the trained model, the data and its order, and how many are kept."""
    hparams = bench.hparams
    identity = [
        SCHEMA,
        bench.run.config_hash(),
        sha256_file(bench.experiment.stage("train") / "DONE.json"),
        num_utterances,
        hparams["heal_steps"],
        hparams["heal_kl_top"],
        str(bench.dtype),
    ]
    folder = Path(hparams["results_folder"]) / "features" / f"teacher_{sha256_json(identity)[:16]}"
    return folder / f"rank{bench.rank}of{bench.world_size}.safetensors"
