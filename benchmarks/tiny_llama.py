#!/usr/bin/env python3
"""Distances, path and the loss after every cut of a small real decoder on text, as a page and a figure.

    python benchmarks/tiny_llama.py ../shared/data/tiny_llama ../shared/data/librispeech_mini docs

DECODER is a folder of a causal LM; TEXT a folder in LibriSpeech layout, whose transcripts are read in lower case.
Writes tiny_llama.md and tiny_llama.svg into OUT. Every block that can be cut is cut, so that what the path chooses can
be held against the best choice. Seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from speechllm_prune.data.prompt import encode_text
from speechllm_prune.experiment import sha256_file, write_text
from speechllm_prune.models.decoder import (
    load_decoder,
    num_parameters,
    resolve_token_ids,
)
from speechllm_prune.prune.distance import Distances, measure_distances
from speechllm_prune.prune.path import (
    bootstrap_share,
    path_margins,
    pruning_path,
    tail_path,
)
from speechllm_prune.prune.surgery import remove_layers
from speechllm_prune.reporting.figures import RC
from speechllm_prune.runtime import UserError, verb
from speechllm_prune.workbench import text_batches

Losses = dict[tuple[int, int], float]
"""{(start layer, block size): mean loss per token in nats}; (0, 0) is the whole decoder."""


def read_sentences(folder: Path, limit: int) -> list[str]:
    """Transcripts of a corpus in LibriSpeech layout, in the order of their file names."""
    lines = [
        line.split(" ", 1)[1]
        for file in sorted(folder.rglob("*.trans.txt"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if " " in line
    ]
    if not lines:
        raise UserError(f"{folder} holds no *.trans.txt; give a folder in LibriSpeech layout")
    return lines[:limit] if limit else lines


@torch.no_grad()
def mean_loss(decoder: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Cross-entropy of every token but a sentence's first, in nats: summed over all sentences, divided once."""
    total, count = 0.0, 0
    for batch in batches:
        mask = batch["attention_mask"]
        logits = decoder(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        labels = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].double().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        total, count = total + loss.item(), count + int((labels != -100).sum())
    return total / count


def all_losses(decoder: Any, batches: list[dict[str, torch.Tensor]], num_layers: int) -> Losses:
    """The loss of the whole decoder and after every cut that leaves a layer."""
    losses = {(0, 0): mean_loss(decoder, batches)}
    for n in range(1, num_layers):
        for start in range(num_layers - n + 1):
            pruned = copy.deepcopy(decoder)
            remove_layers(pruned, start, n)
            losses[start, n] = mean_loss(pruned, batches)
    return losses


def choices(losses: Losses, num_layers: int, path: dict[int, int]) -> list[dict[str, Any]]:
    """What path, tail rule and hindsight choose at every block size, among blocks that leave the last layer."""
    lines, tail = [], tail_path(num_layers)
    for n in range(1, num_layers):
        candidates = {start: losses[start, n] for start in range(num_layers - n)}
        ranked = sorted(candidates, key=lambda start: candidates[start])
        lines.append(
            {
                "n": n,
                "path": path[n],
                "path_loss": candidates[path[n]],
                "rank": ranked.index(path[n]) + 1,
                "candidates": len(ranked),
                "tail": tail[n],
                "tail_loss": candidates[tail[n]],
                "best": ranked[0],
                "best_loss": candidates[ranked[0]],
                "worst_loss": candidates[ranked[-1]],
                "last_loss": losses[num_layers - n, n],
            }
        )
    return lines


def draw(distances: Distances, losses: Losses, path: dict[int, int]) -> Figure:
    """The matrix with its path, and the loss of every cut over its block size."""
    matrix = distances.matrix.numpy()
    num_layers = len(matrix)
    with rc_context(RC):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        extent = (-0.5, num_layers - 0.5, 0.5, num_layers + 0.5)
        left.imshow(matrix, origin="lower", extent=extent, cmap="viridis", interpolation="nearest")
        middle = (matrix[matrix == matrix].max() + matrix[matrix == matrix].min()) / 2
        for n in range(1, num_layers + 1):
            for start in range(num_layers - n + 1):
                value, chosen = matrix[n - 1, start], path.get(n) == start
                left.text(
                    start,
                    n,
                    f"[{value:.3f}]" if chosen else f"{value:.3f}",
                    color="white" if value < middle else "black",
                    ha="center",
                    va="center",
                    fontsize=9,
                    fontweight="bold" if chosen else "normal",
                )
        left.set_xlabel("start layer l (first removed layer)")
        left.set_ylabel("block size n (layers removed)")
        left.set_title("angular distance; in brackets: the path", fontsize=10)
        for n in range(1, num_layers):
            for start in range(num_layers - n + 1):
                last = start + n == num_layers
                right.plot(
                    n + 0.06 * (start - (num_layers - n) / 2),
                    losses[start, n],
                    marker="x" if last else "o",
                    color="#D55E00" if last else "#808080",
                    linestyle="none",
                    label={True: "blocks with the last layer", False: "other blocks"}[last]
                    if n == 1 and (last or start == 0)
                    else None,
                )
        sizes = [0, *range(1, num_layers)]
        along = [losses[0, 0], *(losses[path[n], n] for n in sizes[1:])]
        right.plot(sizes, along, color="#0072B2", marker="s", markersize=4, label="the path")
        right.set_xlabel("block size n (layers removed)")
        right.set_ylabel("loss per token (nats, lower is better)")
        right.set_title("loss after each cut, without healing", fontsize=10)
        right.legend(fontsize=9)
        for axis in (left.xaxis, left.yaxis, right.xaxis):
            axis.get_major_locator().set_params(integer=True)
    return figure


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(facts: dict[str, Any], distances: Distances, losses: Losses, path: dict[int, int]) -> str:
    """The page: what was measured, the matrix, the path, the losses."""
    matrix, num_layers = distances.matrix, len(distances.matrix)
    margins, shares = path_margins(matrix), bootstrap_share(distances.samples, path)
    rows = [
        [f"n={n}", *("" if v != v else f"{v:.4f}" for v in matrix[n - 1].tolist())]
        for n in range(1, num_layers + 1)
    ]
    after = ["[l, L), after the final norm", *(f"{v:.4f}" for v in distances.post_norm.tolist())]
    lines = choices(losses, num_layers, path)
    chosen = [
        [
            str(line["n"]),
            str(line["path"]),
            "no choice" if margins[line["n"]] is None else f"{margins[line['n']]:.4f}",
            f"{shares[line['n']]:.0%}",
            f"{line['path_loss']:.3f}",
            f"{line['rank']} of {line['candidates']}",
            f"{line['tail_loss']:.3f} (l={line['tail']})",
            f"{line['best_loss']:.3f} (l={line['best']})",
            f"{line['worst_loss']:.3f}",
            f"{line['last_loss']:.3f}",
        ]
        for line in lines
    ]
    columns = ["n", "path: l", "margin", "bootstraps", "loss on the path", "its rank"]
    columns += ["tail rule", "best block", "worst block", "block with the last layer"]
    hits = sum(line["rank"] == 1 for line in lines if line["candidates"] > 1)
    sizes = sum(line["candidates"] > 1 for line in lines)
    predicted = f"{facts['tokens']} predicted tokens{facts['left_out']}"
    uniform, is_tail = math.log(facts["vocabulary"]), ""
    if path == tail_path(num_layers):
        is_tail = "\nThe path is the tail rule at every size: "
        is_tail += "these distances choose nothing that depth alone would not."
    return f"""# A real decoder: distances, path and the loss after each cut

Decoder: {facts["source"]}.
{num_layers} layers, {facts["parameters"]:,} parameters, weights sha256 {facts["sha256"][:12]}.
Text: {distances.count} transcripts of `{facts["text"]}` in lower case, {predicted}.
fp32 on a CPU, no healing. This page and its figure are written by

```
{facts["command"]}
```

![Angular distances with the path, and the loss after each cut](tiny_llama.svg)

## Angular distance d[n, l] at the last token
{table(["", *(f"l={start}" for start in range(num_layers))], [*rows, after])}

The last line takes the end state after the final norm, as `hidden_states` of transformers gives it. It replaces the
last number of each row above, and is never used for a path.

## What a cut costs
Loss per token of the whole decoder: {losses[0, 0]:.3f} nats; guessing all {facts["vocabulary"]} tokens alike would cost
{uniform:.3f}. Among the blocks that leave the last layer, the path takes the block with the smallest loss at
{hits} of the {sizes} block sizes that leave a choice.{is_tail}

{table(columns, chosen)}

Margin: distance of the runner-up minus that of the path's block. Bootstraps: share of 200 resampled sets of sentences
whose path takes the same block. Tail rule: the deepest block that leaves the last layer.
"""


@verb
def main(argv: list[str]) -> int | None:
    """Measure, cut, write."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/tiny_llama.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("decoder", type=Path, metavar="DECODER")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--limit", type=int, default=0, help="use this many sentences (0: all)")
    parser.add_argument(
        "--source",
        default="stories260K by A. Karpathy (karpathy/tinyllamas, MIT), trained on TinyStories",
        help="what the decoder is, for the page",
    )
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    decoder, tokenizer = load_decoder(str(arguments.decoder))
    ids = resolve_token_ids(decoder, tokenizer)
    sentences = read_sentences(arguments.text, arguments.limit)
    encoded = [encode_text(tokenizer, text, "lower", ids.stop) for text in sentences]
    longest = decoder.config.get_text_config().max_position_embeddings
    fitting = [sequence for sequence in encoded if 1 < len(sequence) <= longest]
    left_out = len(encoded) - len(fitting)
    batches = list(text_batches(fitting, 8, ids.pad, "cpu"))
    distances = measure_distances(decoder, batches)
    path = pruning_path(distances.matrix)
    losses = all_losses(decoder, batches, len(distances.matrix))
    facts = {
        "source": arguments.source,
        "vocabulary": decoder.config.get_text_config().vocab_size,
        "parameters": num_parameters(decoder),
        "sha256": sha256_file(arguments.decoder / "model.safetensors"),
        "text": arguments.text.name,
        "tokens": sum(len(sequence) - 1 for sequence in fitting),
        "left_out": f" ({left_out} longer than {longest} tokens left out)" if left_out else "",
        "command": " ".join(["python benchmarks/tiny_llama.py", *map(str, argv)]),
    }
    figure = draw(distances, losses, path)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with rc_context(RC):
        figure.savefig(arguments.out / "tiny_llama.svg", metadata={"Date": None})
    print(write_text(arguments.out / "tiny_llama.md", page(facts, distances, losses, path)))
    return None


if __name__ == "__main__":
    sys.exit(main())
