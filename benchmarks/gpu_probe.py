"""Part `probe`: what measuring, a sweep, a cut and healing cost, and how many rows depend on their batch in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_mem import NEVER
from benchmarks.gpu_models import caps_of, evaluation_lengths, random_batch, random_model
from speechllm_prune.models.decoder import num_parameters
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.distance import measure_distances
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.path import pruning_path
from speechllm_prune.prune.selectors import block_losses
from speechllm_prune.prune.surgery import PrunePlan, Removal
from speechllm_prune.restore import HealState, cut, set_trainable
from speechllm_prune.search import greedy_search

if TYPE_CHECKING:
    from benchmarks.gpu import Part, Row

LEAVES = ("librispeech_qwen7b", "librispeech_llama8b")


def run(part: Part) -> None:
    """All rows of the part."""
    for leaf in LEAVES:
        model = random_model(leaf, part.device, part.tiny)
        durations = [1.0, 0.7, 0.5] if part.tiny else [12.3] * 16
        _passes(part, leaf, model, durations)
        _sweep(part, leaf, model, durations)
        _healing(part, leaf, model, durations)
        lengths = (
            [seconds / 10 for seconds in evaluation_lengths(6)]
            if part.tiny
            else evaluation_lengths(32)
        )
        part.row(
            "tokens",
            {"leaf": leaf, "dtype": str(model.decoder.dtype).removeprefix("torch.")},
            lambda model=model, lengths=lengths: _tokens(part, model, lengths),  # type: ignore[misc]
        )
        del model


@torch.no_grad()
def _passes(part: Part, leaf: str, model: SpeechLLM, durations: list[float]) -> None:
    """The distance pass against a plain one, and against what most tools call."""
    inputs, decoder = model.inputs_for(random_batch(model, durations)), model.decoder
    asked: dict[str, Any] = {
        "inputs_embeds": inputs.inputs_embeds,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.position_ids,
        "use_cache": False,
    }
    batch = {"inputs_embeds": inputs.inputs_embeds, "attention_mask": inputs.attention_mask}
    passes: dict[str, Callable[[], Any]] = {
        "plain": lambda: decoder.get_decoder()(**asked),
        "ours, all distances": lambda: measure_distances(decoder, [batch]),
        "body, output_hidden_states": lambda: decoder.get_decoder()(
            **asked, output_hidden_states=True
        ),
        "causal LM, output_hidden_states": lambda: decoder(**asked, output_hidden_states=True),
    }
    plain = 0.0
    for name, function in passes.items():

        def measure(function: Callable[[], Any] = function) -> Row:
            seconds = part.seconds(function)
            return {"ms": 1e3 * seconds, "audio_s_per_s": sum(durations) / seconds} | part.memory(
                function
            )

        row = part.row("distance pass", {"leaf": leaf, "pass": name}, measure)
        if row:
            plain = plain or row["ms"]
            row["over_plain_percent"] = 100 * (row["ms"] / plain - 1)


@torch.no_grad()
def _sweep(part: Part, leaf: str, model: SpeechLLM, durations: list[float]) -> None:
    """The losses of one block of every size: layers below the cuts shared, or every variant run whole."""
    from benchmarks.rerank import naive_losses

    decoder = model.decoder
    inputs = model.inputs_for(random_batch(model, durations))
    num_layers = len(decoder.get_decoder().layers)
    batch = {"inputs_embeds": inputs.inputs_embeds, "attention_mask": inputs.attention_mask}
    path = pruning_path(measure_distances(decoder, [batch]).matrix)
    blocks = [(path[n], n) for n in range(1, num_layers // 2 + 1)]
    sides = {
        "shared": lambda: block_losses(decoder, blocks, [inputs]),
        "naive": lambda: naive_losses(decoder, blocks, [inputs]),
    }
    for name, function in sides.items():

        def measure(function: Callable[[], Any] = function) -> Row:
            seconds = part.seconds(function, 3)
            return {"depths": len(blocks), "s_per_100_s": 100 * seconds / sum(durations)}

        part.row("sweep of losses", {"leaf": leaf, "how": name}, measure)

    def surgery() -> Row:
        removal = Removal(decoder, *blocks[-1])
        seconds = part.seconds(lambda: (removal.apply(), removal.undo()))
        trained = num_parameters(model.projector)
        return {"cut_and_undo_ms": 1e3 * seconds, "checkpoint_mb": 12 * trained / 1e6}

    part.row("cut in memory", {"leaf": leaf, "layers_removed": blocks[-1][1]}, surgery)


def _healing(part: Part, leaf: str, model: SpeechLLM, durations: list[float]) -> None:
    """A step of healing, by what is trained. Decoder-only healing needs no gradient below the cut."""
    batch = random_batch(model, durations)
    num_layers = len(model.decoder.get_decoder().layers)
    removed = round(0.4 * num_layers)
    plan = PrunePlan(num_layers, num_layers - removed - 1, removed)
    for mode, forced in (("joint", False), ("decoder", False), ("decoder", True)):

        def measure(mode: str = mode, forced: bool = forced) -> Row:
            with cut(model, plan, HealState(mode, LoraSettings(16, 32, 0.0))) as names:
                set_trainable(model, names)

                def step() -> None:
                    model.zero_grad(set_to_none=True)
                    with part.training():
                        model(batch).loss.backward()

                embed = model.decoder.get_input_embeddings()
                handle = embed.register_forward_hook(_needs_gradient) if forced else None
                try:
                    memory = part.memory(step)
                    return {"ms": 1e3 * part.seconds(step)} | memory
                finally:
                    if handle is not None:
                        handle.remove()

        what = {
            "leaf": leaf,
            "mode": mode,
            "gradient_of_inputs": "forced" if forced else "as needed",
        }
        part.row("healing", what, measure)


def _needs_gradient(module: Any, args: Any, output: Tensor) -> Tensor:
    """What `enable_input_require_grads` of transformers does."""
    return output.requires_grad_(True)


@torch.no_grad()
def _tokens(part: Part, model: SpeechLLM, durations: list[float]) -> Row:
    """Rows whose tokens differ by how they are decoded: none in fp32, some in bf16."""

    def tokens(batch_size: int, graphs: str) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(durations), batch_size):
            some = durations[first : first + batch_size]
            prefix = [embeds[first + i] for i in range(len(some))]
            length = max(len(row) for row in prefix)
            shape = (len(some), length, prefix[0].shape[-1])
            inputs, mask = prefix[0].new_zeros(shape), torch.zeros(shape[:2], dtype=torch.long)
            for i, row in enumerate(prefix):
                inputs[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
            rows = greedy_search(
                model.decoder, inputs, mask.to(inputs.device), caps_of(some), NEVER, graphs
            )
            found += [row for row, _ in rows]
        return found

    # The speech of every row is encoded once: only the decoder's batch differs.
    embeds = [
        model.inputs_for(random_batch(model, [seconds]), targets=False).inputs_embeds[0]
        for seconds in durations
    ]
    alone = tokens(1, "never")

    def differ(other: list[list[int]]) -> int:
        return sum(a != b for a, b in zip(alone, other, strict=True))

    return {
        "rows": len(alone),
        "batch_16_differs": differ(tokens(16, "never")),
        "graphs_differ": differ(tokens(1, "always")),
        "batch_16_graphs_differ": differ(tokens(16, "always")),
    }
