"""Adapters made by peft, on a decoder that loses layers: their configs, and saving and loading them safely.

peft itself loads an adapter of the whole decoder on a pruned one without a word: the tensors of layer k land on
whatever layer has number k now.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from speechllm_prune.experiment import read_json, write_json
from speechllm_prune.prune.lora import check_adapter, remap_adapter
from speechllm_prune.runtime import UserError

KEPT_LAYERS_FILE = "kept_layers.json"
"""Beside a saved peft adapter: the original layers of the decoder that it was made on."""


class PeftConfigs:
    """What peft remembers by layer number about the adapters of a decoder, changed and restored with its layers.

    The adapters themselves move with their layers. Their configs do not: `layers_to_transform` and numbered target
    modules would send a saved adapter to other layers, or to none, when it is loaded again.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        A causal LM before the cut.
    kept_layers : list of int
        The layers that will stay.

    Raises
    ------
    UserError
        If an adapter would be left without a layer, or is of a kind that has no layer of its own.
    """

    def __init__(self, decoder: Any, kept_layers: Sequence[int]) -> None:
        self.kept = list(kept_layers)
        self.base = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
        self.layers = decoder.get_decoder().layers
        # A PeftModel of the prompt-learning kind has no tuner and keeps them itself.
        holders = [m for m in decoder.modules() if vars(m).keys() & {"peft_config", "_peft_config"}]
        # The tuner and the model that it wraps share one mapping; our own adapters are injected into other modules.
        found = {id(c): (name, c) for m in holders for name, c in _configs(m).items()}
        self.configs = [
            (name, config) for name, config in found.values() if not self._is_free(config)
        ]
        self.saved = [(config, dict(vars(config))) for _, config in self.configs]
        self.tuners = [module for module in decoder.modules() if isinstance(module, BaseTuner)]
        self.names = [list(tuner.targeted_module_names) for tuner in self.tuners]
        for name, config in self.configs:
            self._check(name, config)

    def _is_free(self, config: Any) -> bool:
        """Whether a config says nothing about layer numbers."""
        return not config.is_prompt_learning and not any(
            (
                getattr(config, "layers_to_transform", None) is not None,
                getattr(config, "layer_replication", None),
                _numbered(config),
            )
        )

    def _check(self, name: str, config: Any) -> None:
        if config.is_prompt_learning or getattr(config, "layer_replication", None):
            raise UserError(
                f"adapter {name!r} ({config.peft_type}) depends on the number of layers; merge or delete it first"
            )
        kept = nn.ModuleList([self.layers[index] for index in self.kept])
        if not _wrapped(kept, name):
            raise UserError(
                f"adapter {name!r} sits only on layers that would be removed; delete it first"
            )
        inside = {id(module) for module in self.layers.modules()}
        outside = [n for n, m in _wrapped(self.base, name).items() if id(m) not in inside]
        if outside and getattr(config, "layers_to_transform", None) is not None:
            raise UserError(
                f"adapter {name!r} also sits outside the decoder's layers ({outside[0]}): its layers_to_transform "
                "cannot say both; merge it first"
            )

    def apply(self) -> None:
        """Renumber, after the layers have been removed."""
        for name, config in self.configs:
            if _numbered(config):
                self._spell_out(name, config)
            else:
                chosen = config.layers_to_transform
                chosen = {chosen} if isinstance(chosen, int) else set(chosen)
                config.layers_to_transform = [
                    new for new, old in enumerate(self.kept) if old in chosen
                ]
        for tuner in self.tuners:
            tuner.targeted_module_names = [
                name
                for name, module in tuner.model.named_modules()
                if isinstance(module, BaseTunerLayer)
            ]

    def _spell_out(self, name: str, config: Any) -> None:
        """Replace numbered names and patterns by the full names that the adapted modules have now."""
        modules = _wrapped(self.base, name)
        config.target_modules = set(modules)
        config.layers_to_transform = config.layers_pattern = None
        if hasattr(config, "exclude_modules"):
            config.exclude_modules = None
        for field, attribute, default in (
            ("rank_pattern", "r", "r"),
            ("alpha_pattern", "lora_alpha", "lora_alpha"),
        ):
            if getattr(config, field, None):
                values = {n: getattr(m, attribute)[name] for n, m in modules.items()}
                usual = getattr(config, default)
                setattr(config, field, {re.escape(n): v for n, v in values.items() if v != usual})

    def undo(self) -> None:
        """Put every config back as it was."""
        for config, values in self.saved:
            vars(config).clear()
            vars(config).update(values)
        for tuner, names in zip(self.tuners, self.names, strict=True):
            tuner.targeted_module_names = names


def _configs(module: nn.Module) -> dict[str, Any]:
    configs = vars(module).get("peft_config") or vars(module).get("_peft_config") or {}
    return configs if isinstance(configs, dict) else {"default": configs}


def _numbered(config: Any) -> bool:
    """Whether a config names modules or patterns by a number, such as `layers.3.mlp`."""
    names: list[str] = []
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, field, None) or []
        names += [value] if isinstance(value, str) else list(value)
    # A regular expression may hide a number behind any digit: `[3-5]`, `1\\d`.
    return any(re.search(r"(^|[^A-Za-z_])\d|\\d", name) for name in names)


def _wrapped(module: nn.Module, adapter: str) -> dict[str, Any]:
    """Modules that carry an adapter, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, BaseTunerLayer) and adapter in part._get_available_adapters()
    }


def save_peft_adapter(model: Any, folder: Path, kept_layers: Sequence[int]) -> None:
    """Save the adapters of a PeftModel with the list of layers that they were made on.

    Arguments
    ---------
    model : PeftModel
        Perhaps after `remove_layers`.
    folder : Path
        Written by peft, plus kept_layers.json.
    kept_layers : sequence of int
        Original layers that the decoder has.
    """
    model.save_pretrained(folder)
    write_json(folder / KEPT_LAYERS_FILE, {"kept_layers": list(kept_layers)})


def load_peft_adapter(decoder: Any, folder: Path, kept_layers: Sequence[int]) -> Any:
    """Put a saved peft adapter on a decoder, renumbered where the decoder has lost layers since it was made.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM.
    folder : Path
        From `save_peft_adapter`.
    kept_layers : sequence of int
        Original layers that the decoder has.

    Returns
    -------
    PeftModel

    Raises
    ------
    UserError
        If the adapter says nothing about its layers, or lacks layers that the decoder has.
    """
    file = folder / KEPT_LAYERS_FILE
    made_on = read_json(file)["kept_layers"] if file.is_file() else None
    tensors = load_peft_weights(str(folder), device="cpu")
    config = PeftConfig.from_pretrained(str(folder))
    if made_on is not None and set(kept_layers) < set(made_on):
        tensors = remap_adapter(tensors, [made_on.index(layer) for layer in kept_layers])
        # The tensors' own names say where the adapter sits: whatever numbers the config has are those before the cut.
        places = {name for name in tensors if ".lora_" in name}
        if not places or config.rank_pattern or config.alpha_pattern:
            why = (
                "ranks by pattern" if places else "no tensor of a layer that the decoder still has"
            )
            raise UserError(f"the adapter in {folder} cannot be renumbered: it has {why}")
        config.target_modules = {
            re.sub(r"^base_model\.model\.|\.lora_.*$", "", name) for name in places
        }
        config.layers_to_transform = config.layers_pattern = None
    else:
        check_adapter(tensors, made_on, kept_layers, f"the adapter in {folder}")
    model = get_peft_model(decoder, config)
    report = set_peft_model_state_dict(model, tensors)
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        strange = [*missing, *report.unexpected_keys]
        raise UserError(f"the adapter in {folder} does not fit the decoder: {strange[0]}")
    return model.eval()
