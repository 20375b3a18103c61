"""The parts of an export folder: each written once, none in place, and all of them or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from speechllm_prune.experiment import write_json, write_text
from speechllm_prune.hparams import hub_fingerprint
from speechllm_prune.models.decoder import num_parameters
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.models.projector import Projector
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.card import mergekit_yaml, model_card, public_name
from speechllm_prune.prune.task_adapters import differing_tensors
from speechllm_prune.runtime import UserError

ENCODER_FILES = ("*.json", "*.safetensors", "*.bin")
"""The last only where there is nothing in safetensors."""


class ExportFault(RuntimeError):
    """What was written does not load as what was in memory."""


@contextmanager
def replacing(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end; after an error nothing has changed.

    Arguments
    ---------
    folder : Path
        An export, an empty folder, or nothing yet.
    keep : bool
        Begin with what the folder holds (as links: no file of it may be written in place).

    Raises
    ------
    UserError
        If the folder holds something that is no export.
    """
    if folder.exists() and not (folder / "speechllm.json").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder} exists and is no export; it is left alone: name another one")
    temporary = folder.parent / f".{folder.name}.writing"
    previous = folder.parent / f".{folder.name}.previous"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        if keep:
            shutil.copytree(folder, temporary, copy_function=_link)
        else:
            temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):  # safetensors writes for the owner alone
            file.chmod(0o755 if file.is_dir() else 0o644)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        try:
            temporary.rename(folder)
        except OSError:
            if previous.exists():
                previous.rename(folder)
            raise
    finally:
        for leftover in (temporary, previous):
            shutil.rmtree(leftover, ignore_errors=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
    return target


def write_decoder(
    model: SpeechLLM,
    temporary: Path,
    hparams: dict[str, Any],
    kept_layers: list[int],
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Decoder, tokenizer and mergekit.yml, unless they are there; returns the fields that describe them."""
    hub, revision = hparams["decoder_hub"], hparams["decoder_revision"]
    fingerprint = hub_fingerprint(hub, revision)
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    if before is None:
        model.decoder.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        text = mergekit_yaml(hub, revision, fingerprint, kept_layers, dtype)
        write_text(temporary / "mergekit.yml", text)
    return {
        "decoder_hub": public_name(hub),
        "decoder_revision": revision,
        "decoder_fingerprint": fingerprint,
        "decoder": size_of(model.decoder) | {"dtype": dtype},
    }


def write_projector(projector: nn.Module, path: Path) -> dict[str, Any]:
    """Weights in fp32; returns what `inference.build_projector` needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.float().contiguous().cpu() for name, tensor in projector.state_dict().items()
    }
    save_file(tensors, path)
    written = load_file(path)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise ExportFault(f"{path.name} does not load as it was written")
    shape: dict[str, Any] = {
        "class": f"{type(projector).__module__}.{type(projector).__qualname__}"
    }
    if isinstance(projector, Projector):
        first, activation, last = projector.layers
        plain = repr(type(activation)()) == repr(activation)
        shape |= {
            "activation": f"torch.nn.{type(activation).__name__}" if plain else repr(activation),
            "input_size": first.in_features,
            "hidden_size": first.out_features,
            "output_size": last.out_features,
        }
    return shape


def write_encoder(
    model: SpeechLLM, temporary: Path, hparams: dict[str, Any], name: str
) -> dict[str, Any]:
    """Name a hub encoder; copy a local one: a folder of this machine means nothing elsewhere."""
    hub, revision = hparams["encoder_hub"], hparams["encoder_revision"]
    found = {"hub": hub, "revision": revision, "fingerprint": hub_fingerprint(hub, revision)}
    source = Path(hub)
    if not source.is_dir():
        return found
    (temporary / name).mkdir()
    weights = any(source.glob("*.safetensors"))
    for pattern in ENCODER_FILES[:2] if weights else ENCODER_FILES:
        for file in source.glob(pattern):
            if file.name != "bootstrap.json":
                shutil.copy(file, temporary / name / file.name)
    copied = load_encoder(
        str(temporary / name), None, model.encoder.dtype, hparams["encoder_output_norm"]
    )
    strange = differing_tensors(copied, model.encoder)
    if strange:
        raise ExportFault(f"the copied encoder differs: {', '.join(strange[:3])}")
    return found | {"hub": None, "revision": None, "folder": name}


def shared_encoder(
    model: SpeechLLM, temporary: Path, hparams: dict[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """The encoder of another task if it is the same one, else one of its own."""
    fingerprint = hub_fingerprint(hparams["encoder_hub"], hparams["encoder_revision"])
    for task in others:
        if task["encoder"]["fingerprint"] == fingerprint:
            return task["encoder"]
    taken = {task["encoder"].get("folder") for task in others}
    name = f"encoder-{fingerprint[-8:]}" if "encoder" in taken else "encoder"
    shutil.rmtree(temporary / name, ignore_errors=True)  # of the task that is being replaced
    return write_encoder(model, temporary, hparams, name)


def drop_unused_encoders(temporary: Path, card: dict[str, Any]) -> None:
    used = {task["encoder"].get("folder") for task in card["tasks"]}
    for folder in temporary.glob("encoder*"):
        if folder.name not in used:
            shutil.rmtree(folder)


def write_cards(temporary: Path, card: dict[str, Any]) -> None:
    write_json(temporary / "speechllm.json", card)
    write_text(temporary / "README.md", model_card(card))


def sizes_of(model: SpeechLLM) -> dict[str, dict[str, int]]:
    return {"encoder": size_of(model.encoder), "projector": size_of(model.projector)}


def size_of(module: nn.Module) -> dict[str, int]:
    """Parameters and bytes of the weights, tied ones counted once."""
    count = sum(p.numel() * p.element_size() for p in module.parameters())
    return {"parameters": num_parameters(module), "bytes": count}
