"""Removing a block of decoder layers in memory, and putting it back.

A block is half open: `start_layer` l and `block_size` n remove layers l .. l+n-1 (0-based), and the receiving layer l+n
becomes layer l (paper, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from speechllm_prune.models.decoder import decoder_layers
from speechllm_prune.runtime import UserError


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
    """Raise UserError unless 1 <= n <= L-1 and 0 <= l <= L-n."""
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
    """Layers taken out of a decoder, with what is needed to put them back exactly as they were."""

    def __init__(self, decoder: Any, start_layer: int, block_size: int) -> None:
        body = decoder.get_decoder()
        config = body.config
        self.decoder = decoder
        self.layers: nn.ModuleList = body.layers
        check_block(len(self.layers), start_layer, block_size)
        removed = range(start_layer, start_layer + block_size)
        self.kept = [index for index in range(len(self.layers)) if index not in removed]
        names = ("num_hidden_layers", "layer_types", "max_window_layers")
        self.config = {name: getattr(config, name) for name in names if hasattr(config, name)}

    def apply(self) -> list[int]:
        """Remove the block; returns the kept original indices."""
        body = self.decoder.get_decoder()
        config = body.config
        body.layers = nn.ModuleList([self.layers[index] for index in self.kept])
        _renumber(body.layers)
        layer_types = self.config.get("layer_types")
        if layer_types is not None:
            config.layer_types = [layer_types[index] for index in self.kept]
        config.num_hidden_layers = len(self.kept)
        if self.config.get("max_window_layers") is not None and getattr(
            config, "use_sliding_window", False
        ):
            config.max_window_layers = sum(kind == "full_attention" for kind in config.layer_types)
        return self.kept

    def undo(self) -> None:
        """Put the decoder back as it was before `apply`."""
        body = self.decoder.get_decoder()
        body.layers = self.layers
        _renumber(self.layers)
        for name, value in self.config.items():
            setattr(body.config, name, value)


def remove_layers(decoder: Any, start_layer: int, block_size: int) -> list[int]:
    """Remove layers l .. l+n-1 of a causal LM in place.

    The layer list, each layer's cache index and the per-layer fields of the config change together, so that cached
    generation and `save_pretrained` stay right.

    Arguments
    ---------
    decoder : PreTrainedModel
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
        If the block is empty, is the whole decoder, or does not lie in it.
    """
    return Removal(decoder, start_layer, block_size).apply()


def _renumber(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        # Gemma 3 and others keep an index on the layer as well as on its attention.
        owners: list[Any] = [layer, getattr(layer, "self_attn", None)]
        for owner in owners:
            if hasattr(owner, "layer_idx"):
                owner.layer_idx = index


def num_layers(decoder: Any) -> int:
    """L, the number of layers that the decoder has now."""
    return len(decoder_layers(decoder))
