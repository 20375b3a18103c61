"""Models to ship: a plain Hugging Face causal LM with projector, encoder and speechllm.json beside it.

`export` writes one task with its adapters merged. `export_task` adds a task to a folder whose decoder is pruned and not
healed; there each task keeps an adapter of its own, so that one decoder serves them all.

An export is written under a temporary name, loaded again, compared, and renamed: it is there and right, or not there.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechllm_prune.experiment import provenance, read_json
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.models.decoder import load_decoder
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.card import task_entries
from speechllm_prune.prune.export_folder import (
    ExportFault,
    drop_unused_encoders,
    replacing,
    shared_encoder,
    sizes_of,
    write_cards,
    write_decoder,
    write_encoder,
    write_projector,
)
from speechllm_prune.prune.lora import merge_adapters
from speechllm_prune.prune.surgery import check_cached_decoding
from speechllm_prune.prune.task_adapters import (
    activate_adapter,
    attach_adapter,
    differing_tensors,
    lora_modules,
    merged_adapters,
    save_adapter,
    take_adapters,
)
from speechllm_prune.runtime import UserError

MERGE_TOLERANCE = 1e-4
"""Largest change of a logit by merging in fp32, as a share of the largest logit where that is above 1."""


@torch.no_grad()
def export(
    model: SpeechLLM, folder: Path, hparams: dict[str, Any], config_hash: str, **facts: Any
) -> Path:
    """Write an export of one task; `SpeechLLM.from_pretrained` and plain transformers load it.

    Adapters are merged into the decoder, which changes the model at hand: give it one that is not needed afterwards.

    Arguments
    ---------
    model : SpeechLLM
        A restored variant.
    folder : Path
        Replaced if it is an export already.
    hparams : dict
        The experiment's.
    config_hash : str
        Of the stage that made the model.
    **facts
        Further fields of speechllm.json: variant, num_layers, kept_layers, results.

    Raises
    ------
    UserError
        If the folder holds something else.
    ExportFault
        If merging changed the logits in fp32, or the export does not load as it was written. Nothing is left then.
    """
    merge = merge_and_compare(model.decoder)
    adapter = {"parameters": 0, "bytes": 0}
    with replacing(folder) as temporary:
        decoder = write_decoder(model, temporary, hparams, facts["kept_layers"])
        projector = write_projector(model.projector, temporary / "projector.safetensors")
        card = provenance(config_hash) | {
            "adapters": "merged",
            "tasks": [{"name": model.task, "prompt": model.prompt, "text_case": model.text_case}],
            "prompt": model.prompt,
            "encoder": write_encoder(model, temporary, hparams, "encoder"),
            "encoder_output_norm": hparams["encoder_output_norm"],
            "frame_stack": model.frame_stack,
            "max_tokens_per_second": model.max_tokens_per_second,
            "projector": projector,
            **decoder,
            "parts": sizes_of(model) | {"adapter": adapter},
            "merge": merge,
            "note": hparams["results_note"],
            **facts,
        }
        write_cards(temporary, card)
        _check_decoder(model, temporary, hparams)
    return folder


@torch.no_grad()
def export_task(
    model: SpeechLLM,
    folder: Path,
    name: str,
    hparams: dict[str, Any],
    config_hash: str,
    **facts: Any,
) -> dict[str, Any]:
    """Add a task to a folder of several tasks, making the folder if there is none.

    Arguments
    ---------
    model : SpeechLLM
        A restored variant; its adapters are taken off.
    folder : Path
        A task of the same name in it is replaced.
    name : str
        Of the task: `asr`, `ast`, or a name that tells apart two of a kind.
    hparams, config_hash, **facts
        As in `export`.

    Returns
    -------
    dict
        The folder's speechllm.json.

    Raises
    ------
    UserError
        If the folder's decoder is not the one below this model's adapters.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"task_name {name!r} names a folder: use letters, digits, '_' and '-'")
    healed = probe_logits(model.decoder)
    with merged_adapters(model.decoder):
        merged = probe_logits(model.decoder)
    adapter = take_adapters(model.decoder)
    before = _existing(folder, model, hparams, facts["kept_layers"])
    with replacing(folder, keep=before is not None) as temporary:
        decoder = write_decoder(model, temporary, hparams, facts["kept_layers"], before)
        place = temporary / "adapters" / name
        shutil.rmtree(place, ignore_errors=True)
        projector = write_projector(model.projector, place / "projector.safetensors")
        if adapter is not None:
            save_adapter(adapter, place, facts["kept_layers"], facts["num_layers"])
        others = [task for task in (before or {"tasks": []})["tasks"] if task["name"] != name]
        count = adapter.num_parameters if adapter else 0
        entry = {
            "name": name,
            "task": model.task,
            "prompt": model.prompt,
            "text_case": model.text_case,
            "folder": f"adapters/{name}",
            "adapter": adapter is not None,
            "encoder": shared_encoder(model, temporary, hparams, others),
            "encoder_output_norm": hparams["encoder_output_norm"],
            "frame_stack": model.frame_stack,
            "max_tokens_per_second": model.max_tokens_per_second,
            "projector": projector,
            "parts": sizes_of(model) | {"adapter": {"parameters": count, "bytes": 4 * count}},
            "merge": compare_logits(healed, merged, model.decoder.dtype) if adapter else None,
            "config_hash": config_hash,
            "note": hparams["results_note"],
            **{key: value for key, value in facts.items() if "layers" not in key},
        }
        layers = {key: facts[key] for key in ("num_layers", "kept_layers")}
        # a task keeps its place, so that the one which answers by default does not change
        names = [task["name"] for task in (before or {"tasks": []})["tasks"]]
        position = names.index(name) if name in names else len(others)
        tasks = [*others[:position], entry, *others[position:]]
        card = provenance(config_hash) | {"adapters": "separate", **decoder, **layers}
        card |= {"tasks": tasks}
        write_cards(temporary, card)
        drop_unused_encoders(temporary, card)
        _check_decoder(
            model, temporary, hparams, place if adapter else None, healed, before is not None
        )
    return card


# ------------------------------------------------------------------------------------------ logits


def probe_logits(decoder: Any) -> Tensor:
    """(2, 32, V) logits on token ids that depend on nothing but the size of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    rows = decoder.get_input_embeddings().num_embeddings
    ids = torch.randint(0, rows, (2, 32), generator=generator).to(decoder.device)
    return decoder(input_ids=ids, use_cache=False).logits.float().cpu()


def compare_logits(a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """How far two sets of logits are apart, for the card."""
    return {
        "max_logit_difference": float((a - b).abs().max()),
        "max_logit": float(a.abs().max()),
        "same_best_token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "positions": a[..., 0].numel(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def merge_and_compare(decoder: Any) -> dict[str, Any] | None:
    """Merge all adapters; returns what that did to the logits, None if there was nothing to merge.

    In fp32 a change beyond rounding is refused. In bf16 the weights are rounded, so the change is put on the card, and
    evaluation decodes with merged weights (`merged_adapters`): its scores are those of the weights that are shipped.
    """
    if not lora_modules(decoder):
        return None
    before = probe_logits(decoder)
    merge_adapters(decoder)
    found = compare_logits(before, probe_logits(decoder), decoder.dtype)
    limit = MERGE_TOLERANCE * max(1.0, found["max_logit"])
    if decoder.dtype == torch.float32 and not found["max_logit_difference"] <= limit:
        raise ExportFault(
            f"merging the adapters in fp32 changed a logit by {found['max_logit_difference']:.3g}, above {limit:.3g}"
        )
    return found


# ------------------------------------------------------------------------------------------ checks


def _existing(
    folder: Path, model: SpeechLLM, hparams: dict[str, Any], kept_layers: list[int]
) -> dict[str, Any] | None:
    """speechllm.json of a folder that a task can be added to; None if there is no folder yet."""
    if not (folder / "speechllm.json").is_file():
        return None
    card = read_json(folder / "speechllm.json")
    if card.get("adapters") != "separate":
        names = ", ".join(task["name"] for task in task_entries(card))
        raise UserError(
            f"{folder} is an export of one task ({names}) whose decoder is its own; name another folder with --into "
            f"and add each task to it"
        )
    here = hub_fingerprint(hparams["decoder_hub"], hparams["decoder_revision"])
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    for what, there, ours in (
        ("source of the decoder", card["decoder_fingerprint"], here),
        ("kept layers", card["kept_layers"], list(kept_layers)),
        ("type of the weights (--precision)", card["decoder"]["dtype"], dtype),
    ):
        if there != ours:
            raise UserError(
                f"{folder} holds another decoder: its {what}: {there}; of this task: {ours}. Tasks share a folder only "
                f"if they share the pruned decoder: cut both by the same --start_layer, or name another folder"
            )
    return card


def _check_decoder(
    model: SpeechLLM,
    temporary: Path,
    hparams: dict[str, Any],
    adapter: Path | None = None,
    healed: Tensor | None = None,
    is_shared: bool = False,
) -> None:
    """Load the decoder from disk as any other program would, and compare; with an adapter also the healed logits."""
    expected, ids = probe_logits(model.decoder), model.tokenizer("seven green boxes").input_ids
    device = model.device
    if device.type == "cuda":
        model.cpu()  # there may be no room for two
    reloaded, tokenizer = load_decoder(
        str(temporary), None, model.decoder.dtype, hparams["attention"]
    )
    strange = differing_tensors(reloaded, model.decoder)
    if strange:
        message = f"the decoder in the export is another than the model's: {', '.join(strange[:3])}"
        if is_shared:  # such as two decoders with a compensation of their own
            raise UserError(f"{message}. Tasks share a folder only if they share the decoder")
        raise ExportFault(message)
    reloaded.to(device)
    check_cached_decoding(reloaded)
    if not torch.equal(probe_logits(reloaded), expected):
        raise ExportFault("the decoder gives other logits after it was loaded again")
    if tokenizer("seven green boxes").input_ids != ids:
        raise ExportFault("the tokenizer splits otherwise after it was loaded again")
    if adapter is not None and healed is not None:
        kept = read_json(temporary / "speechllm.json")["kept_layers"]
        attach_adapter(reloaded, adapter, "check", kept)
        activate_adapter(reloaded, "check")
        found = compare_logits(healed, probe_logits(reloaded.to(device)), model.decoder.dtype)
        if not found["max_logit_difference"] <= 1e-6 * max(1.0, found["max_logit"]):
            raise ExportFault("the decoder gives other logits with the adapter that was written")
