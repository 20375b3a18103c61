#!/usr/bin/env python3
"""C9: a step of decoder-only healing against one of joint healing.

    python benchmarks/healing.py

Both are `cut()` on the same model and batch: LoRA on the receiving layer's MLP, and in joint mode the projector, to
which gradients flow through every layer. Without a trainable projector autograd stops at the receiving layer. One third
of the layers is removed, the deepest block that leaves the last layer. Cached states at the cut are not built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import (
    Result,
    best_of,
    check,
    feature_batch,
    flops,
    qwen2,
    script,
    speech_llm,
)
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import HealState, cut, set_trainable


def measure(tiny: bool) -> list[Result]:
    """Seconds of a step in both modes."""
    layers, width, vocabulary = (6, 32, 200) if tiny else (12, 512, 8000)
    speech, targets = ([9, 8], [5, 4]) if tiny else ([123, 122, 120, 117], [42, 41, 42, 38])
    model = speech_llm(qwen2(layers, width, vocabulary), hidden=4 * width)
    batch = feature_batch(speech, targets, vocabulary)
    size = layers // 3
    plan = PrunePlan(layers, layers - 1 - size, size)
    losses: dict[str, float] = {}

    def step(mode: str) -> Callable[[], Any]:
        def once() -> None:
            # The same cut and adapters every time, so that one call is complete in itself; cutting costs milliseconds.
            torch.manual_seed(0)
            with cut(model, plan, HealState(mode, LoraSettings(16, 32))) as names:
                set_trainable(model, names)
                model.train()
                loss = model(batch).loss
                loss.backward()
                losses[mode] = float(loss.detach())

        return once

    sides = {"decoder": step("decoder"), "joint": step("joint")}
    seconds = best_of(sides, 1 if tiny else 3)
    check(losses["decoder"] == losses["joint"], f"losses {losses}")
    limit = flops(sides["joint"]) / flops(sides["decoder"])
    return [
        Result(
            f"C9 healing, {layers} layers cut to {layers - size}, CPU s: decoder-only, joint",
            seconds["joint"] / seconds["decoder"],
            ">= 1.6x",
            f"{seconds['decoder']:.2f}",
            f"{seconds['joint']:.2f}",
            f"{limit:.2f}x by operations",
            sides["decoder"],
        )
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
