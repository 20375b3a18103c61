"""Adapters on the move: taken off a decoder as one peft adapter, put on again by name, switched, merged for a while.

`lora.py` puts adapters where training wants them. Here they travel: one pruned decoder serves several tasks, each with
an adapter of its own, of which at most one is active.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm_prune.experiment import read_json, write_json
from speechllm_prune.prune.lora import check_adapter, merge_adapters
from speechllm_prune.prune.peft_configs import KEPT_LAYERS_FILE
from speechllm_prune.runtime import UserError

PEFT_PREFIX = "base_model.model."
"""What peft puts before the names of a saved adapter's tensors."""
LEFTOVERS = ("peft_config", "_hf_peft_config_loaded")


@dataclass
class Adapter:
    """All low-rank updates of a decoder as one peft adapter.

    Arguments
    ---------
    config : LoraConfig
        Its target modules are whole names: a short one could match in another layer.
    tensors : dict
        As peft saves them.
    """

    config: LoraConfig
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Of the adapter alone."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def lora_modules(decoder: Any) -> dict[str, Any]:
    """The wrapped modules of a decoder by name."""
    return {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLayer)}


def take_adapters(decoder: Any) -> Adapter | None:
    """Take every adapter off, in place, so that the decoder is the plain one below them.

    Arguments
    ---------
    decoder : PreTrainedModel
        With adapters by `lora.py`: no module has two.

    Returns
    -------
    Adapter or None
        None if there was none.
    """
    wrapped = lora_modules(decoder)
    if not wrapped:
        return None
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in wrapped.items():
        (adapter,) = module.lora_A
        ranks[name], alphas[name] = module.r[adapter], module.lora_alpha[adapter]
        assert module.scaling[adapter] == alphas[name] / ranks[name], name
        for side in ("lora_A", "lora_B"):
            weight = getattr(module, side)[adapter].weight
            tensors[f"{PEFT_PREFIX}{name}.{side}.weight"] = weight.detach().cpu().contiguous()
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=sorted(wrapped),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        bias="none",
        inference_mode=True,
    )
    for name, module in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, module.get_base_layer())
    for module in decoder.modules():
        for leftover in LEFTOVERS:
            module.__dict__.pop(leftover, None)
    return Adapter(config, tensors)


def save_adapter(adapter: Adapter, folder: Path, kept_layers: list[int], num_layers: int) -> None:
    """Write an adapter so that plain peft loads it, with the layers it belongs to beside it.

    Layer numbers in an adapter are those after the cut. peft would load it onto any other cut without a word, hence
    `kept_layers.json`, which our own loader checks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter.tensors, folder / "adapter_model.safetensors")
    adapter.config.save_pretrained(str(folder))
    write_json(
        folder / KEPT_LAYERS_FILE, {"num_layers": num_layers, "kept_layers": list(kept_layers)}
    )


def attach_adapter(decoder: Any, folder: Path, name: str, kept_layers: list[int]) -> None:
    """Add a saved adapter under a name and make it the active one; `activate_adapter` switches.

    Arguments
    ---------
    decoder : PreTrainedModel
        The pruned base that the adapter was made for; others of its adapters stay on it.
    folder : Path
        From `save_adapter`.
    name : str
        No method of a dictionary and without a dot: peft keeps adapters in a ModuleDict.
    kept_layers : list of int
        Of the decoder, in the numbering of its source.

    Raises
    ------
    UserError
        If the adapter was made for other layers, or does not fit.
    """
    saved = {
        key.removeprefix(PEFT_PREFIX): tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    made_for = read_json(folder / KEPT_LAYERS_FILE)["kept_layers"]
    check_adapter(saved, made_for, kept_layers, f"the adapter in {folder}")
    config = LoraConfig.from_pretrained(str(folder))
    with warnings.catch_warnings():  # several adapters on one decoder are what this is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, decoder, adapter_name=name)
    own = {key: p for key, p in decoder.named_parameters() if key.endswith(f".{name}.weight")}
    shapes = {key.replace(f".{name}.weight", ".weight"): p.shape for key, p in own.items()}
    if shapes != {key: tensor.shape for key, tensor in saved.items()}:  # peft is silent about some
        strange = sorted(set(shapes) ^ set(saved)) or ["shapes"]
        raise UserError(
            f"{folder}: adapter_config.json and its tensors do not fit: {', '.join(strange[:3])}"
        )
    for parameter in own.values():
        parameter.data = parameter.data.float()  # as in training, whatever the frozen weights are
    set_peft_model_state_dict(decoder, saved, adapter_name=name)
    decoder.requires_grad_(False)
    decoder.eval()


def activate_adapter(decoder: Any, name: str | None) -> None:
    """Make one adapter active and all others idle; None: the bare decoder."""
    for module in lora_modules(decoder).values():
        here = [name] if name is not None and name in module.lora_A else []
        module.set_adapter(here, inference_mode=True)


@contextmanager
def merged_adapters(decoder: Any) -> Iterator[None]:
    """Decode with the weights that an export ships: adapters folded in for the time of the context, then as before.

    In bf16 merging rounds, so a score of unmerged adapters would be that of a model which nobody can download.
    """
    wrapped = lora_modules(decoder)
    # On the host: beside their successors on a GPU they would count in the memory of the model.
    before = {name: module.get_base_layer().weight.data.cpu() for name, module in wrapped.items()}
    facts = [
        (module, {key: module.__dict__[key] for key in LEFTOVERS if key in module.__dict__})
        for module in decoder.modules()
    ]
    with torch.no_grad():
        merge_adapters(decoder)  # gives a wrapped module's base a new tensor; the old ones are kept
    try:
        yield
    finally:
        for name, module in wrapped.items():
            module.get_base_layer().weight.data = before[name].to(module.get_base_layer().weight)
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, module)
        for owner, entries in facts:
            owner.__dict__.update(entries)


def differing_tensors(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of tensors that are not bit-equal in two models, or that only one of them has."""
    left, right = a.state_dict(), b.state_dict()
    return sorted(set(left) ^ set(right)) + [
        name
        for name, tensor in left.items()
        if name in right
        and (tensor.dtype != right[name].dtype or not torch.equal(tensor.cpu(), right[name].cpu()))
    ]
