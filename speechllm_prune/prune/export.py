"""A model to ship: a plain Hugging Face causal LM with projector, encoder and speechllm.json beside it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from speechllm_prune.experiment import provenance, write_json
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.lora import merge_adapters


@torch.no_grad()
def export(
    model: SpeechLLM, folder: Path, hparams: dict[str, Any], config_hash: str, **facts: Any
) -> Path:
    """Write an export folder; `SpeechLLM.from_pretrained` and plain transformers load it.

    Adapters are merged into the decoder, which changes the model at hand: give it one that is not needed afterwards.

    Arguments
    ---------
    model : SpeechLLM
        A restored variant.
    folder : Path
        Replaced if it exists.
    hparams : dict
        The experiment's.
    config_hash : str
        Of the stage that made the model.
    **facts
        Further fields of speechllm.json (variant, kept layers, ...).
    """
    merge_adapters(model.decoder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    temporary.chmod(0o755)
    try:
        model.decoder.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        projector = {
            name: tensor.float().contiguous().cpu()
            for name, tensor in model.projector.state_dict().items()
        }
        save_file(projector, temporary / "projector.safetensors")
        encoder: dict[str, Any] = {
            "hub": hparams["encoder_hub"],
            "revision": hparams["encoder_revision"],
        }
        encoder["fingerprint"] = hub_fingerprint(
            hparams["encoder_hub"], hparams["encoder_revision"]
        )
        if Path(
            hparams["encoder_hub"]
        ).is_dir():  # a folder of this machine means nothing elsewhere
            names = ("*.json", "*.safetensors")
            (temporary / "encoder").mkdir()
            for file in [
                file for pattern in names for file in Path(hparams["encoder_hub"]).glob(pattern)
            ]:
                shutil.copy(file, temporary / "encoder" / file.name)
            encoder = {
                "hub": None,
                "revision": None,
                "folder": "encoder",
                "fingerprint": encoder["fingerprint"],
            }
        first, activation, last = (
            module for module in model.projector.modules() if not list(module.children())
        )
        card = provenance(config_hash) | {
            "tasks": [{"name": model.task, "prompt": model.prompt, "text_case": model.text_case}],
            "encoder": encoder,
            "encoder_output_norm": hparams["encoder_output_norm"],
            "frame_stack": model.frame_stack,
            "max_tokens_per_second": model.max_tokens_per_second,
            "projector": {
                "class": f"{type(model.projector).__module__}.{type(model.projector).__qualname__}",
                "activation": f"torch.nn.{type(activation).__name__}",
                "input_size": first.in_features,
                "hidden_size": first.out_features,
                "output_size": last.out_features,
            },
            "decoder_hub": hparams["decoder_hub"],
            "note": hparams["results_note"],
            **facts,
        }
        write_json(temporary / "speechllm.json", card)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
