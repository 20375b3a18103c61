"""Part `train`: training steps of Qwen2.5-7B and 1.5B, ours with each key and a re-statement of SpeechBrain's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_models import HPARAMS, random_batch, random_model
from speechllm_prune.data.batching import Batch
from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.decoder import num_parameters, training_layers
from speechllm_prune.models.estimate import H100, step_operations, training_memory
from speechllm_prune.models.facts import decoder_facts, encoder_facts
from speechllm_prune.models.speechllm import SpeechLLM

if TYPE_CHECKING:
    from benchmarks.gpu import Part, Row

LEAVES = ("librispeech_qwen7b", "librispeech_qwen1.5b")
CHUNK = 512


def run(part: Part) -> None:
    """All rows of the part; the compiled ones last, since compiling takes longest."""
    for leaf in LEAVES:
        _leaf(part, leaf)


def _leaf(part: Part, leaf: str) -> None:
    model = random_model(leaf, part.device, part.tiny)
    model.projector.requires_grad_(True)
    batches = {"33 x 12.3 s": [12.3] * 33, "13 x 30 s": [30.0] * 13}
    if part.tiny:
        batches = {"3 x 1 s": [1.0] * 3}
    for name, durations in batches.items():
        batch = random_batch(model, durations)
        for variant, measure in _variants(part, model, batch, leaf).items():
            part.row("training", {"leaf": leaf, "batch": name, "variant": variant}, measure)
        part.row(
            "encoder",
            {"leaf": leaf, "batch": name},
            lambda durations=durations: _encoder(part, model, durations),  # type: ignore[misc]
        )


def _variants(
    part: Part, model: SpeechLLM, batch: Batch, leaf: str
) -> dict[str, Callable[[], Row]]:
    def ours(chunk: int = 0, **how: Any) -> Callable[[], Row]:
        def measure() -> Row:
            model.loss_chunk_rows = chunk
            layers = training_layers(model.decoder, **how) if how else nullcontext()
            try:
                with layers:
                    return _step(part, model, batch, leaf, bool(how.get("checkpointing")), _ours)
            finally:
                model.loss_chunk_rows = 0

        return measure

    backend = "aot_eager" if part.tiny else "inductor"
    return {
        "ours": ours(),
        "SpeechBrain's, re-stated": lambda: _step(part, model, batch, leaf, False, _speechbrain),
        f"ours, loss_chunk_rows {4 if part.tiny else CHUNK}": ours(4 if part.tiny else CHUNK),
        "ours, gradient_checkpointing": ours(checkpointing=True, compiled=False),
        "ours, compile_layers": ours(checkpointing=False, compiled=True, backend=backend),
    }


def _ours(model: SpeechLLM, batch: Batch) -> torch.Tensor:
    sums = model(batch)
    (sums.loss / sums.num_labels).backward()
    return sums.loss.detach() / sums.num_labels


def _speechbrain(model: SpeechLLM, batch: Batch) -> torch.Tensor:
    from benchmarks.train_step import speechbrain_step

    return speechbrain_step(model, batch)


def _step(
    part: Part,
    model: SpeechLLM,
    batch: Batch,
    leaf: str,
    checkpointing: bool,
    step: Callable[[SpeechLLM, Batch], torch.Tensor],
) -> Row:
    """Forward and backward pass; the optimiser's part is small. Estimates stand beside what they estimate."""
    rows: list[int] = []
    handle = model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(args[0].numel() // args[0].shape[-1])
    )

    def once() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with part.training():
            return step(model, batch)

    try:
        loss = float(once())  # compiles, where there is something to compile
        head_rows = sum(rows)
        memory = part.memory(once)
        seconds = part.seconds(once)
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    hparams = load_hparams(HPARAMS / f"{leaf}.yaml", {"data_folder": "unused"})
    operations = step_operations(
        decoder_facts(hparams["decoder_hub"]),
        encoder_facts(hparams["encoder_hub"]),
        num_parameters(model.projector),
        len(batch),
        sum(batch.durations) / len(batch),
    )
    sizes = [
        model.num_positions(n, len(ids))
        for n, ids in zip(batch.audio_lengths, batch.target_ids, strict=True)
    ]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    estimate = training_memory(model, names, sum(sizes), checkpointing=checkpointing)
    return {
        "ms": 1e3 * seconds,
        "audio_s_per_s": sum(batch.durations) / seconds,
        "mfu_4n_percent": 100 * operations / seconds / H100,
        "loss": loss,
        "lm_head_rows": head_rows,
        "waits": _waits(part, once),
        "estimate_gib": estimate / 2**30,
        **memory,
    }


def _waits(part: Part, function: Callable[[], Any]) -> int | None:
    """How often a step makes the host wait for the device; None on a CPU."""
    if not part.cuda:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@torch.no_grad()
def _encoder(part: Part, model: SpeechLLM, durations: list[float]) -> Row:
    """Our attention against transformers' own in the encoder."""
    batch = random_batch(model, durations)
    theirs = copy.deepcopy(model.encoder)
    for layer in theirs.model.encoder.layers:
        del layer.attention.torch_multi_head_self_attention  # the class's own comes back
    found: Row = {}
    for name, encoder in (("ours", model.encoder), ("theirs", theirs)):
        found[f"{name}_ms"] = 1e3 * part.seconds(
            lambda encoder=encoder: encoder(batch.audio, batch.audio_lengths)  # type: ignore[misc]
        )
        memory = part.memory(
            lambda encoder=encoder: encoder(batch.audio, batch.audio_lengths)  # type: ignore[misc]
        )
        found[f"{name}_alloc_gib"] = memory["alloc_gib"]
    return found
