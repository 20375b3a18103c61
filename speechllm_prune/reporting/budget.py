"""What every table and figure of the paper costs, computed from the leaves and the facts about their models.

    python -m speechllm_prune.reporting.budget

Estimates, not measurements: see `speechllm_prune.models.estimate`. Validation, evaluation, controls and the path from
text come on top. A healing without n of L layers is counted as (L - n) / L of as many training steps. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.estimate import (
    SECONDS,
    UTTERANCES,
    Estimate,
    estimate,
    setting,
)
from speechllm_prune.models.facts import decoder_facts, encoder_facts
from speechllm_prune.reporting.paper import TABLE1, TABLE2, TABLE2_LAYERS, removed_layers
from speechllm_prune.runtime import verb

HPARAMS = Path(__file__).resolve().parents[2] / "hparams"
ASR = "qwen7b qwen7b_lora qwen3b qwen1.5b llama8b llama3b llama1b".split()
AST = "fren ende".split()


@dataclass(frozen=True)
class Item:
    """A table or figure.

    Arguments
    ---------
    name, command : str
        What, and by which script.
    leaves : list of str
        The systems that are trained for it.
    sizes : callable
        (leaf's values, L) -> block sizes that are healed.
    modes : int
        Ways of healing per size.
    """

    name: str
    command: str
    leaves: list[str]
    sizes: Callable[[dict[str, Any], int], list[int]]
    modes: int


def paper_size(hparams: dict[str, Any], num_layers: int) -> list[int]:
    """The block size of a system's row in Table 1."""
    name = hparams["decoder_hub"].split("/")[1]
    name += " + LoRA" if hparams["decoder_lora_rank"] else ""
    (system,) = (system for system in TABLE1 if system.model == name)
    return [removed_layers(system.drop, num_layers)]


def all_sizes(hparams: dict[str, Any], num_layers: int) -> list[int]:
    """What a sweep takes by default."""
    return list(range(1, num_layers // 2 + 1))


def table2_sizes(hparams: dict[str, Any], num_layers: int) -> list[int]:
    """Rows of Table 2, the blocks of both paths counted as different ones."""
    return 2 * [removed_layers(row.drop, TABLE2_LAYERS) for row in TABLE2 if row.drop]


ITEMS = (
    Item(
        "Table 1 and figure 1, the paper's block sizes",
        "bash recipes/LibriSpeech/run.sh --paper_blocks FOLDER",
        [f"librispeech_{name}" for name in ASR],
        paper_size,
        1,
    ),
    Item(
        "Table 1, the block sizes found by a sweep",
        "bash recipes/LibriSpeech/run.sh FOLDER",
        [f"librispeech_{name}" for name in ASR],
        all_sizes,
        1,
    ),
    Item(
        "Figure 2, all sizes and ways of healing",
        "bash recipes/LibriSpeech/run.sh --figure2 FOLDER",
        [f"librispeech_{name}" for name in ASR],
        all_sizes,
        3,
    ),
    Item(
        "Table 2",
        "bash recipes/CoVoST2/run.sh FOLDER",
        [f"covost2_{name}_qwen7b" for name in AST],
        table2_sizes,
        1,
    ),
)


def system(leaf: str) -> tuple[dict[str, Any], Estimate, int]:
    """Values of a leaf, its estimate, and the GPUs that it is meant for."""
    hparams = load_hparams(HPARAMS / f"{leaf}.yaml", {"data_folder": "unused"})
    num_gpus, peak = setting(leaf)
    return hparams, estimate(hparams, num_gpus, peak), num_gpus


def table() -> str:
    """GPU hours (H100) and disk of every item, in Markdown."""
    head = "item | command | systems | training | healings | healing | together | weights"
    rows = [f"| {head} |", "|---" * 8 + "|"]
    systems = {leaf: system(leaf) for item in ITEMS for leaf in item.leaves}
    for item in ITEMS:
        training = healing = 0.0
        count = 0
        hubs: set[str] = set()
        for hparams, found, num_gpus in (systems[leaf] for leaf in item.leaves):
            steps = num_gpus * found.step_seconds / 3600
            training += steps * hparams["num_steps"]
            for n in item.sizes(hparams, found.num_layers):
                share = (found.num_layers - n) / found.num_layers
                healing += item.modes * steps * hparams["heal_steps"] * share
                count += item.modes
            hubs |= {hparams["decoder_hub"], hparams["encoder_hub"]}
        rows.append(
            f"| {item.name} | `{item.command}` | {len(item.leaves)} | {training:.0f} h | {count} | {healing:.0f} h "
            f"| {training + healing:.0f} h | {weights_gib(hubs):.0f} GiB |"
        )
    return "\n".join(rows)


def weights_gib(hubs: Iterable[str]) -> float:
    """Weights of some hub models at two bytes a parameter."""
    count = 0
    for hub in hubs:
        is_encoder = hub.startswith(("microsoft/", "openai/"))
        count += (encoder_facts if is_encoder else decoder_facts)(hub).num_parameters
    return 2 * count / 2**30


def features_gib(corpus: str, encoder_hub: str) -> float:
    """Encoder features of a training corpus that `cache_features` would keep, in bf16 at 50 frames a second."""
    config = encoder_facts(encoder_hub).config
    width = config.get("hidden_size") or config["d_model"]
    return UTTERANCES[corpus] * SECONDS[corpus] * 50 * width * 2 / 2**30


@verb
def main(argv: list[str]) -> int | None:
    """Print the table."""
    print(table())
    size = features_gib("librispeech", "microsoft/wavlm-large")
    print(f"cache_features on LibriSpeech 960 h with WavLM Large: {size:.0f} GiB")
    return None


if __name__ == "__main__":
    sys.exit(main())
