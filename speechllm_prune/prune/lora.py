"""LoRA adapters by peft: on the attention of every layer (the paper's LoRA system), or on one layer's MLP (healing).

Adapters are injected into the decoder in place, so its class and its `get_decoder()` stay those of Hugging Face.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from speechllm_prune.models.decoder import decoder_layers
from speechllm_prune.runtime import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# peft keeps adapters in a ModuleDict, where no name may be that of a method, such as "train".
TRAIN_ADAPTER, HEAL_ADAPTER = "stage1", "heal"


@dataclass(frozen=True)
class LoraSettings:
    """Rank, alpha (the update is scaled by alpha / rank) and dropout."""

    rank: int
    alpha: int
    dropout: float = 0.0


def add_decoder_lora(decoder: Any, settings: LoraSettings) -> list[str]:
    """Adapters on q, k, v and o of every layer (paper, section 4). Returns the names of their parameters."""
    layers = decoder_layers(decoder)
    _inject(layers, settings, ATTENTION, TRAIN_ADAPTER)
    count = sum(isinstance(module, LoraLayer) for module in layers.modules())
    assert count == 4 * len(layers), f"{count} attention modules wrapped in {len(layers)} layers"
    return adapter_names(decoder, TRAIN_ADAPTER)


def add_healing_lora(decoder: Any, layer: int | None, settings: LoraSettings) -> list[str]:
    """Adapters on gate, up and down of an MLP (paper, section 3.3). Returns the names of their parameters.

    Arguments
    ---------
    decoder : PreTrainedModel
        The decoder after the cut.
    layer : int or None
        The receiving layer, in the decoder's numbering now: l after a cut, l + n in the control. None: every layer,
        which is not the paper's.
    settings : LoraSettings
    """
    every = decoder_layers(decoder)
    for index in range(len(every)) if layer is None else [layer]:
        # Into the MLP alone: a pattern over the whole decoder could match layer 13 for layer 3.
        mlp = every[index].mlp
        _inject(mlp, settings, MLP, HEAL_ADAPTER)
        assert sum(isinstance(module, LoraLayer) for module in mlp.modules()) == len(MLP)
    return adapter_names(decoder, HEAL_ADAPTER)


def remove_healing_lora(decoder: Any) -> None:
    """Take every healing adapter off again; the wrapped modules come back as they were."""
    for layer in decoder_layers(decoder):
        for name, module in list(layer.mlp.named_children()):
            if isinstance(module, LoraLayer) and HEAL_ADAPTER in module.lora_A:
                setattr(layer.mlp, name, module.get_base_layer())
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            layer.mlp.__dict__.pop(leftover, None)


def adapter_names(decoder: Any, adapter: str) -> list[str]:
    """Names of an adapter's parameters within the decoder."""
    return [
        name
        for name, _ in decoder.named_parameters()
        if f".{adapter}." in name and ".lora_" in name
    ]


def merge_adapters(decoder: Any) -> None:
    """Fold all adapters into the weights, in place: summed in fp32 and rounded once to the type of the weights."""
    for parent in list(decoder.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLayer):
                base = module.get_base_layer()
                updates = [module.get_delta_weight(adapter) for adapter in module.lora_A]
                merged = sum((update.float() for update in updates), base.weight.float())
                assert torch.isfinite(merged).all()
                base.weight.data = merged.to(base.weight.dtype)
                setattr(parent, name, base)
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            parent.__dict__.pop(leftover, None)


def _inject(
    module: nn.Module, settings: LoraSettings, targets: tuple[str, ...], adapter: str
) -> None:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        bias="none",
    )
    inject_adapter_in_model(config, module, adapter_name=adapter)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = (
                parameter.data.float()
            )  # trained in fp32 whatever the frozen weights are


# ---------------------------------------------------------------- adapters and removed layers


_LAYER = re.compile(r"(?P<before>(?:^|.*?\.)layers\.)(?P<number>\d+)(?P<after>\..*)")
_NOT_DECODER = re.compile(r"(^|\.)(projector|encoder|vision_\w+|audio_\w+)\.")


def _layer_of(name: str) -> re.Match[str] | None:
    """The decoder layer in a tensor's name; None for tensors outside the decoder's layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None or _NOT_DECODER.search(match["before"]) else match


def remap_adapter(
    state_dict: Mapping[str, Tensor], kept_layers: Sequence[int]
) -> dict[str, Tensor]:
    """Rename an adapter's tensors for a decoder that has lost layers.

    Arguments
    ---------
    state_dict : mapping
        Tensors by name, of peft or of this package, made on the decoder before the cut.
    kept_layers : sequence of int
        Numbers, before the cut, of the layers that stay, in order.

    Returns
    -------
    dict
        Tensors of removed layers are left out; names without a decoder layer stay as they are.

    Example
    -------
    >>> names = ["model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.5.mlp.up_proj.lora_A.weight"]
    >>> list(remap_adapter(dict.fromkeys(names), [0, 1, 5]))[1]
    'model.layers.2.mlp.up_proj.lora_A.weight'
    """
    new_number = {old: new for new, old in enumerate(kept_layers)}
    if list(new_number) != sorted(new_number) or len(new_number) != len(kept_layers):
        raise UserError(f"kept_layers {list(kept_layers)} is not a list of rising layer numbers")
    remapped = {}
    for name, tensor in state_dict.items():
        match = _layer_of(name)
        if match is None:
            remapped[name] = tensor
        elif int(match["number"]) in new_number:
            remapped[f"{match['before']}{new_number[int(match['number'])]}{match['after']}"] = (
                tensor
            )
    return remapped


def check_adapter(
    names: Mapping[str, Any] | Sequence[str],
    adapter_layers: Sequence[int] | None,
    decoder_layers: Sequence[int],
    what: str = "the adapter",
) -> None:
    """Refuse an adapter that was made on other layers than the decoder has: no library would notice.

    Arguments
    ---------
    names : mapping or sequence of str
        Names of the adapter's tensors.
    adapter_layers : sequence of int, optional
        Original layers of the decoder that it was made on, as stored beside it; None if nothing is stored.
    decoder_layers : sequence of int
        Original layers that the decoder has.
    what : str
        How messages call it.

    Raises
    ------
    UserError

    Example
    -------
    >>> check_adapter(["model.layers.1.mlp.up_proj.lora_A.weight"], [0, 1, 5], [0, 1, 5])
    """
    if adapter_layers is None:
        raise UserError(
            f"{what} does not say which layers it was made on (kept_layers); the decoder has {_ranges(decoder_layers)}"
        )
    if list(adapter_layers) != list(decoder_layers):
        raise UserError(
            f"{what} was made on layers {_ranges(adapter_layers)}, the decoder has {_ranges(decoder_layers)}: its "
            "tensors would land on other layers; remap_adapter(state_dict, kept_layers) renumbers them"
        )
    numbers = [int(match["number"]) for match in map(_layer_of, names) if match]
    if numbers and max(numbers) >= len(decoder_layers):
        raise UserError(
            f"{what} has tensors of layer {max(numbers)}, the decoder has {len(decoder_layers)} layers"
        )


def _ranges(layers: Sequence[int]) -> str:
    """`0..17, 26..27` for a list of layer numbers.

    Example
    -------
    >>> _ranges([0, 1, 2, 6, 8, 9])
    '0..2, 6, 8..9'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}..{b}" if b > a else f"{a}" for a, b in runs)
