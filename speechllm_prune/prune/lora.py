"""LoRA adapters by peft: on the attention of every layer (the paper's LoRA system), or on one layer's MLP (healing).

Adapters are injected into the decoder in place, so its class and its `get_decoder()` stay those of Hugging Face.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from speechllm_prune.models.decoder import decoder_layers

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


def add_healing_lora(decoder: Any, layer: int, settings: LoraSettings) -> list[str]:
    """Adapters on gate, up and down of one layer's MLP (paper, section 3.3). Returns the names of their parameters.

    Arguments
    ---------
    decoder : PreTrainedModel
        The decoder after the cut.
    layer : int
        The receiving layer in the decoder's numbering now: l after a cut, l + n in the control.
    settings : LoraSettings
    """
    # Into the MLP alone: a pattern over the whole decoder could match layer 13 for layer 3.
    mlp = decoder_layers(decoder)[layer].mlp
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
