"""Removing a block of decoder layers in memory, and putting it back.

A block is half open: `start_layer` l and `block_size` n remove layers l .. l+n-1 (0-based), and the receiving layer l+n
becomes layer l (paper, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from speechllm_prune.models.decoder import check_prunable, decoder_layers, lm_logits
from speechllm_prune.prune.peft_configs import PeftConfigs
from speechllm_prune.runtime import UserError

PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of a config with one entry per layer, in families of the Llama/Qwen2 kind."""


@dataclass(frozen=True)
class PrunePlan:
    """Which block of which decoder is removed: a few integers instead of a second checkpoint.

    Arguments
    ---------
    num_layers : int
        L, depth of the unpruned decoder.
    start_layer : int
        l, first layer of the block.
    block_size : int
        n, number of layers in the block.
    control : bool
        Nothing is removed; healing adapters sit where they would after the cut.

    Raises
    ------
    UserError
        If the block does not lie in the decoder.

    Example
    -------
    >>> plan = PrunePlan(num_layers=28, start_layer=18, block_size=8)
    >>> plan.receiving_layer, plan.name, len(plan.kept_layers)
    (26, 'l18n08', 20)
    """

    num_layers: int
    start_layer: int
    block_size: int
    control: bool = field(default=False)

    def __post_init__(self) -> None:
        check_block(self.num_layers, self.start_layer, self.block_size)

    @property
    def name(self) -> str:
        """Two digits each: `l18n08`."""
        return f"l{self.start_layer:02d}n{self.block_size:02d}"

    @property
    def receiving_layer(self) -> int | None:
        """l + n in the original numbering; None when the block reaches the end."""
        layer = self.start_layer + self.block_size
        return layer if layer < self.num_layers else None

    @property
    def kept_layers(self) -> list[int]:
        """Original indices of the layers that stay."""
        removed = range(self.start_layer, self.start_layer + self.block_size)
        return [index for index in range(self.num_layers) if self.control or index not in removed]


def check_block(num_layers: int, start_layer: int, block_size: int) -> None:
    """Raise UserError unless both are whole numbers with 1 <= n <= L-1 and 0 <= l <= L-n."""
    for name, value in (("block_size", block_size), ("start_layer", start_layer)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(
                f"{name} {value!r} is no whole number (the decoder has {num_layers} layers: "
                f"block_size 1..{num_layers - 1}, start_layer 0..{num_layers} - block_size)"
            )
    if not 1 <= block_size <= num_layers - 1:
        raise UserError(
            f"block_size {block_size} is outside 1..{num_layers - 1} (the decoder has {num_layers} layers)"
        )
    if not 0 <= start_layer <= num_layers - block_size:
        raise UserError(
            f"start_layer {start_layer} is outside 0..{num_layers - block_size} "
            f"for block_size {block_size} of {num_layers} layers"
        )


class Removal:
    """Layers taken out of a decoder, with what is needed to put them back exactly as they were.

    Everything that can be refused is refused here; nothing is changed before `apply`.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        A causal LM of the Llama/Qwen2 kind, perhaps with adapters.
    start_layer : int
        l, 0-based.
    block_size : int
        n.

    Raises
    ------
    UserError
        If the block does not lie in the decoder, or the decoder is one whose layers cannot be taken out.
    """

    def __init__(self, decoder: Any, start_layer: int, block_size: int) -> None:
        body = decoder.get_decoder()
        self.decoder = decoder
        self.layers: nn.ModuleList = body.layers
        check_block(len(self.layers), start_layer, block_size)
        check_prunable(decoder, PER_LAYER_FIELDS)
        removed = range(start_layer, start_layer + block_size)
        self.kept = [index for index in range(len(self.layers)) if index not in removed]
        self.removed = [self.layers[index] for index in removed]
        self.device = next(self.layers.parameters()).device
        names = ("num_hidden_layers", *PER_LAYER_FIELDS, "max_window_layers")
        self.config = {
            name: getattr(body.config, name) for name in names if hasattr(body.config, name)
        }
        # Qwen2 remembers when it is built whether any layer has a window.
        self.body = {
            name: getattr(body, name) for name in ("has_sliding_layers",) if hasattr(body, name)
        }
        self.adapters = PeftConfigs(decoder, self.kept)

    def apply(self) -> list[int]:
        """Remove the block; returns the kept original indices."""
        body = self.decoder.get_decoder()
        config = body.config
        body.layers = nn.ModuleList([self.layers[index] for index in self.kept])
        _renumber(body.layers)
        for name in PER_LAYER_FIELDS:
            values = self.config.get(name)
            if values is not None:
                setattr(config, name, [values[index] for index in self.kept])
        config.num_hidden_layers = len(self.kept)
        layer_types = getattr(config, "layer_types", None) or []
        if self.body:
            body.has_sliding_layers = "sliding_attention" in layer_types
        if self.config.get("max_window_layers") is not None and getattr(
            config, "use_sliding_window", False
        ):
            config.max_window_layers = sum(kind == "full_attention" for kind in layer_types)
        self.adapters.apply()
        for layer in self.removed:
            layer.to("cpu")  # on a GPU they would count in the memory of the model without them
        return self.kept

    def undo(self) -> None:
        """Put the decoder back as it was before `apply`."""
        body = self.decoder.get_decoder()
        for layer in self.removed:
            layer.to(self.device)
        body.layers = self.layers
        _renumber(self.layers)
        for name, value in self.config.items():
            setattr(body.config, name, value)
        for name, value in self.body.items():
            setattr(body, name, value)
        self.adapters.undo()


def remove_layers(decoder: Any, start_layer: int, block_size: int) -> list[int]:
    """Remove layers l .. l+n-1 of a causal LM in place.

    The layer list, each layer's cache index, the per-layer fields of the config and, where peft has wrapped the model,
    the layer numbers in its adapters' configs change together, so that cached generation and `save_pretrained` stay
    right.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        A causal LM of the Llama/Qwen2 kind.
    start_layer : int
        l, 0-based.
    block_size : int
        n.

    Returns
    -------
    list of int
        Original indices of the layers kept.

    Raises
    ------
    UserError
        If the block is empty, is the whole decoder, or does not lie in it; or if the decoder is quantised, shares
        weights between layers, or has per-layer settings that are not known here.
    """
    return Removal(decoder, start_layer, block_size).apply()


@torch.no_grad()
def check_cached_decoding(decoder: Any, num_tokens: int = 8) -> float:
    """Self-check after surgery: decoding one token at a time with a cache gives the logits of one whole forward.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        A causal LM; put into eval mode for the check.
    num_tokens : int
        At least this many; more than a short attention window, so that the window matters.

    Returns
    -------
    float
        The largest difference of a logit.

    Raises
    ------
    RuntimeError
        If the layers' numbers, the config and the cache do not fit together.

    Example
    -------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=3))
    >>> remove_layers(decoder, 0, 1), check_cached_decoding(decoder) < 1e-4
    ([1, 2], True)
    """
    _check_numbering(decoder)
    body, config = decoder.get_decoder(), decoder.get_decoder().config
    window = getattr(config, "sliding_window", None) or 0
    length = max(num_tokens, window + 4 if window <= 64 else 0)
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        ids = ids.to(body.embed_tokens.weight.device)
        whole = lm_logits(decoder, body(input_ids=ids, use_cache=False).last_hidden_state)
        cached = _cached_logits(decoder, body, ids)
    finally:
        for module, training in modes:
            module.training = training
    difference = float((whole - cached).abs().max())
    # Rounding, in the type of the weights; a wrong cache is off by a large part of the logits' own size.
    share = 1e-3 if body.embed_tokens.weight.dtype in (torch.float32, torch.float64) else 0.1
    if not difference <= share * max(1.0, float(whole.abs().max())):  # also if it is NaN
        raise RuntimeError(
            f"cached decoding differs from a whole forward by {difference:.3g} after the surgery on this decoder"
        )
    return difference


def _cached_logits(decoder: Any, body: Any, ids: Tensor) -> Tensor:
    """Logits of half of the tokens at once, then of one after the other."""
    cache, rows, start = None, [], 0
    for end in range(max(1, ids.shape[1] // 2), ids.shape[1] + 1):
        output = body(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        rows.append(lm_logits(decoder, output.last_hidden_state))
    return torch.cat(rows, dim=1)


def _check_numbering(decoder: Any) -> None:
    layers, config = decoder_layers(decoder), decoder.get_decoder().config
    counts = {"num_hidden_layers": config.num_hidden_layers}
    for name in PER_LAYER_FIELDS:
        if getattr(config, name, None) is not None:
            counts[name] = len(getattr(config, name))
    wrong = [f"{name} says {count}" for name, count in counts.items() if count != len(layers)]
    for index, owner in _index_owners(layers):
        if owner.layer_idx != index:
            wrong.append(f"layer {index} caches in slot {owner.layer_idx}")
        kind = getattr(owner, "layer_type", None)
        if kind is not None and not wrong and kind != config.layer_types[index]:
            wrong.append(
                f"layer {index} is {kind} and layer_types says {config.layer_types[index]}"
            )
    if wrong:
        raise RuntimeError(f"the decoder has {len(layers)} layers, but {'; '.join(wrong[:3])}")


def _index_owners(layers: nn.ModuleList) -> list[tuple[int, Any]]:
    """Everything that keeps a layer's number, with the number it should have."""
    # Gemma 3 and others keep an index on the layer as well as on its attention.
    owners = [
        (index, owner)
        for index, layer in enumerate(layers)
        for owner in (layer, getattr(layer, "self_attn", None))
    ]
    return [(index, owner) for index, owner in owners if hasattr(owner, "layer_idx")]


def _renumber(layers: nn.ModuleList) -> None:
    for index, owner in _index_owners(layers):
        owner.layer_idx = index


def num_layers(decoder: Any) -> int:
    """L, the number of layers that the decoder has now."""
    return len(decoder_layers(decoder))
