#!/usr/bin/env python3
"""What measuring all angular distances costs over a plain forward pass of the decoder body.

    python benchmarks/distance_pass.py [--layers 28] [--width 896] [--batch 8] [--positions 160] [--repeats 5]

Both sides run in this process, taking turns on the same batch; CPU seconds, best of the repeats (seconds on a GPU). The
decoder is a Qwen2 with random weights, on which the cost does not depend. Gate: at most 3 %, and no call of lm_head.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from speechllm_prune.prune.distance import measure_distances

GATE_PERCENT = 3.0


def build(layers: int, width: int, device: str):
    """A Qwen2 of that shape (a small vocabulary: the output layer is not used)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config).eval().to(device)


def seconds(function, device: str) -> float:
    """CPU seconds of a call, or seconds where a GPU works."""
    if device == "cpu":
        started = time.process_time()
        function()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main(argv: list[str]) -> int:
    """Command line; 1 if the gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--positions", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    decoder = build(arguments.layers, arguments.width, arguments.device)
    shape = (arguments.batch, arguments.positions)
    mask = torch.ones(shape, dtype=torch.long, device=arguments.device)
    embeds = torch.randn(*shape, arguments.width, device=arguments.device)
    batch = {"inputs_embeds": embeds, "attention_mask": mask}
    calls: list[int] = []
    decoder.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    positions = mask.cumsum(1) - 1

    def plain() -> None:
        decoder.get_decoder()(**batch, position_ids=positions, use_cache=False)

    def measured() -> None:
        measure_distances(decoder, [batch])

    times: dict[str, list[float]] = {"plain": [], "measured": []}
    plain(), measured()
    for _ in range(arguments.repeats):
        times["plain"].append(seconds(plain, arguments.device))
        times["measured"].append(seconds(measured, arguments.device))
    best = {name: min(values) for name, values in times.items()}
    percent = 100 * (best["measured"] / best["plain"] - 1)
    shown = f"{arguments.layers} layers, width {arguments.width}, {shape[0]} x {shape[1]} positions"
    print(f"{shown}: plain {best['plain']:.3f} s, measured {best['measured']:.3f} s")
    print(
        f"all distances cost {percent:+.2f} % (gate {GATE_PERCENT:g} %); lm_head called {len(calls)} times"
    )
    return int(percent > GATE_PERCENT or bool(calls))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
