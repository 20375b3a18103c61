#!/usr/bin/env python3
"""C11: WavLM's transformer layers with our attention against transformers' own.

    python benchmarks/wavlm_attention.py

Four layers of the width of WavLM-Large with random weights, four utterances of 12.3 s and less. transformers always
asks torch for the attention weights; ours goes through `scaled_dot_product_attention`. Both give the same frames.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import Result, best_of, check, flops, peak_of_side, script
from speechllm_prune.models.encoder import WaveEncoder


def setting(tiny: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Both sides' transformer layers, (B, T, D) hidden states and the (B, T) mask."""
    from transformers import WavLMConfig, WavLMModel

    width, heads, lengths = (32, 4, [21, 20, 18, 15]) if tiny else (1024, 16, [614, 612, 600, 585])
    config = WavLMConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=heads,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    theirs = WavLMModel(config).eval()
    ours = WaveEncoder(copy.deepcopy(theirs), do_normalize=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    hidden = torch.randn(len(lengths), max(lengths), width)
    return {"ours": ours.model.encoder, "theirs": theirs.encoder}, hidden, mask


@torch.no_grad()
def encode(layers: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D) frames. transformers writes zeros into the padding of what it is given, hence the copy."""
    return layers(hidden.clone(), attention_mask=mask).last_hidden_state


def sides(tiny: bool) -> dict[str, Callable[[], Any]]:
    """Both sides on the same batch."""
    layers, hidden, mask = setting(tiny)
    return {
        name: lambda module=module: encode(module, hidden, mask)  # type: ignore[misc]
        for name, module in layers.items()
    }


def check_same(layers: dict[str, Any], hidden: Tensor, mask: Tensor) -> None:
    """Both sides give the same frames."""
    found = {name: encode(module, hidden, mask)[mask] for name, module in layers.items()}
    difference = float((found["ours"] - found["theirs"]).abs().max())
    check(difference < 1e-5 * float(found["theirs"].abs().max()), f"frames, by {difference}")


def measure(tiny: bool) -> list[Result]:
    """Time and extra peak memory of the layers."""
    check_same(*setting(tiny))
    calls = sides(tiny)
    seconds = best_of(calls, 1 if tiny else 3)
    peak = {side: peak_of_side(__file__, side, tiny) for side in calls}
    return [
        Result(
            "C11 WavLM attention, CPU s",
            seconds["theirs"] / seconds["ours"],
            ">= 1.1x",
            f"{seconds['ours']:.2f}",
            f"{seconds['theirs']:.2f}",
            f"{flops(calls['ours']) / 1e9:.0f} billion operations",
            calls["ours"],
        ),
        Result(
            "C11 WavLM attention, extra peak of ours over theirs",
            100 * peak["ours"] / max(peak["theirs"], 1e-9),
            "<= 70 %",
            f"{peak['ours']:.0f} MiB",
            f"{peak['theirs']:.0f} MiB",
        ),
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv, sides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
