"""A Llama or Qwen2 decoder in float64, as loops over layers, heads and positions: nothing of transformers runs here.

What the library measures, prunes and decodes is compared with this. It takes one row without padding, so it knows of no
padding, masks, caches or batches that could be wrong in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """What the weights do not say."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    norm_eps: float


def sizes_of(config: Any) -> Sizes:
    """Sizes from a Llama or Qwen2 config."""
    return Sizes(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.rope_parameters["rope_theta"],
        config.rms_norm_eps,
    )


def weights_of(decoder: Any, adapters: bool = True) -> dict[str, np.ndarray]:
    """Every weight in float64 under its name in the plain model; LoRA's products added, or left out.

    Arguments
    ---------
    decoder : PreTrainedModel
        Only its tensors are read. Adapters of any name, injected by peft; all of them count.
    adapters : bool
        Whether the adapters are on.
    """
    found = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.double().numpy()
        for name, value in decoder.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in decoder.named_modules():
        if adapters and hasattr(module, "lora_A"):
            plain = name.replace("base_model.model.", "") + ".weight"
            for adapter in module.lora_A:
                first = module.lora_A[adapter].weight.detach().double().numpy()
                second = module.lora_B[adapter].weight.detach().double().numpy()
                found[plain] = found[plain] + module.scaling[adapter] * second @ first
    return found


def residual_stream(
    weights: Weights, sizes: Sizes, inputs: np.ndarray, kept: Sequence[int] | None = None
) -> list[np.ndarray]:
    """h[0], ..., h[L] before the final norm, (T, H) each, of one row.

    Arguments
    ---------
    weights, sizes
        From `weights_of` and `sizes_of`.
    inputs : numpy.ndarray
        (T, H) embeddings.
    kept : sequence of int, optional
        The layers to run, in order; by default all.
    """
    states = [np.asarray(inputs, dtype=np.float64)]
    for layer in range(sizes.num_layers) if kept is None else kept:
        name = f"model.layers.{layer}."
        x = states[-1]
        x = x + _attention(
            weights, name + "self_attn.", sizes, _norm(weights, name + "input_layernorm", x, sizes)
        )
        x = x + _mlp(
            weights, name + "mlp.", _norm(weights, name + "post_attention_layernorm", x, sizes)
        )
        states.append(x)
    return states


def final_norm(weights: Weights, sizes: Sizes, state: np.ndarray) -> np.ndarray:
    """h[L] after the final norm."""
    return _norm(weights, "model.norm", state, sizes)


def logits(
    weights: Weights, sizes: Sizes, inputs: np.ndarray, kept: Sequence[int] | None = None
) -> np.ndarray:
    """(T, V) logits of one row."""
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    end = residual_stream(weights, sizes, inputs, kept)[-1]
    return final_norm(weights, sizes, end) @ head.T


def greedy(
    weights: Weights,
    sizes: Sizes,
    ids: Sequence[int],
    num_tokens: int,
    kept: Sequence[int] | None = None,
) -> list[int]:
    """The most probable next token, again and again; everything is computed anew for every token."""
    table, row = weights["model.embed_tokens.weight"], list(ids)
    for _ in range(num_tokens):
        row.append(int(logits(weights, sizes, table[row], kept)[-1].argmax()))
    return row[len(ids) :]


def _norm(weights: Weights, name: str, x: np.ndarray, sizes: Sizes) -> np.ndarray:
    rows = []
    for row in x:
        mean_square = sum(float(value) ** 2 for value in row) / len(row)
        rows.append(row / math.sqrt(mean_square + sizes.norm_eps) * weights[name + ".weight"])
    return np.stack(rows)


def _linear(weights: Weights, name: str, row: np.ndarray) -> np.ndarray:
    return weights[name + ".weight"] @ row + weights.get(name + ".bias", 0.0)


def _attention(weights: Weights, name: str, sizes: Sizes, x: np.ndarray) -> np.ndarray:
    width = weights[name + "q_proj.weight"].shape[0] // sizes.num_heads
    queries, keys, values = (
        [_linear(weights, name + part, row).reshape(-1, width) for row in x]
        for part in ("q_proj", "k_proj", "v_proj")
    )
    queries, keys = (
        [
            np.stack([_rotate(head, position, sizes) for head in heads])
            for position, heads in enumerate(rows)
        ]
        for rows in (queries, keys)
    )
    result = []
    for position, heads in enumerate(queries):
        joined = []
        for index, query in enumerate(heads):
            shared = index * sizes.num_kv_heads // sizes.num_heads
            scores = [
                float(query @ keys[past][shared]) / math.sqrt(width) for past in range(position + 1)
            ]
            shares = [math.exp(score - max(scores)) for score in scores]
            joined.append(
                sum(share / sum(shares) * values[past][shared] for past, share in enumerate(shares))
            )
        result.append(_linear(weights, name + "o_proj", np.concatenate(joined)))
    return np.stack(result)


def _rotate(head: np.ndarray, position: int, sizes: Sizes) -> np.ndarray:
    half = len(head) // 2
    result = np.empty_like(head)
    for pair in range(half):
        angle = position * sizes.rope_theta ** (-pair / half)
        a, b = head[pair], head[pair + half]
        result[pair] = a * math.cos(angle) - b * math.sin(angle)
        result[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def _mlp(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    rows = []
    for row in x:
        gate = _linear(weights, name + "gate_proj", row)
        gate = gate / (1.0 + np.exp(-gate))
        rows.append(
            _linear(weights, name + "down_proj", gate * _linear(weights, name + "up_proj", row))
        )
    return np.stack(rows)
