#!/usr/bin/env python3
"""C1: a training step (forward, loss, backward) against that of SpeechBrain's SpeechLLM recipe.

    python benchmarks/train_step.py

The other side is our re-statement of the recipe's step, since a recipe is no part of the installed package: speech and
text are padded apart, so that the padding of speech stands in the middle of a row; the mask is built row by row; all
positions pass the output layer; the cross-entropy ignores all but the labels. Same decoder (frozen), projector
(trained) and batch; the encoder's features are given to both. Loss and gradients are compared with the position ids
that our rows have; the time is taken as the recipe does it, without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import (
    Result,
    best_of,
    check,
    feature_batch,
    flops,
    peak_of_side,
    qwen2,
    script,
    speech_llm,
)
from speechllm_prune.data.batching import Batch
from speechllm_prune.models.speechllm import SpeechLLM

IGNORE = -100


def speechbrain_step(model: SpeechLLM, batch: Batch, own_positions: bool = False) -> Tensor:
    """Mean loss per label as the recipe computes it, backwards; with `own_positions`, as ours numbers a row."""
    speech, lengths = model.speech_embeddings(batch)
    device = speech.device
    tokens = [torch.tensor(model.prompt_ids + ids, device=device) for ids in batch.target_ids]
    text = model.decoder.get_input_embeddings()(pad_sequence(tokens, batch_first=True))
    shape = (len(tokens), speech.shape[1] + text.shape[1])
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for i, row in enumerate(tokens):
        mask[i, : lengths[i]] = True
        mask[i, speech.shape[1] : speech.shape[1] + len(row)] = True
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if own_positions else {}
    logits = model.decoder(
        inputs_embeds=torch.cat([speech, text], dim=1), attention_mask=mask, **positions
    ).logits
    labels = torch.full(shape, IGNORE, device=device)
    first = speech.shape[1] + len(model.prompt_ids) - 1
    for i, ids in enumerate(batch.target_ids):
        said = torch.tensor([*ids, model.token_ids.eos], device=device)
        labels[i, first : first + len(said)] = said
    loss = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORE
    )
    loss.backward()
    return loss.detach()


def our_step(model: SpeechLLM, batch: Batch) -> Tensor:
    """Mean loss per label through our model, backwards."""
    sums = model(batch)
    loss = sums.loss / sums.num_labels
    loss.backward()
    return loss.detach()


def setting(tiny: bool) -> tuple[SpeechLLM, Batch]:
    """Model and batch: 12 layers of width 512 and the vocabulary of Qwen2.5-7B, four utterances of about 12 s."""
    layers, width, vocabulary = (2, 32, 500) if tiny else (12, 512, 152064)
    speech, targets = ([9, 8], [5, 4]) if tiny else ([123, 122, 120, 117], [42, 41, 42, 38])
    model = speech_llm(qwen2(layers, width, vocabulary), hidden=4 * width)
    model.projector.requires_grad_(True)
    return model, feature_batch(speech, targets, vocabulary)


def sides(tiny: bool) -> dict[str, Callable[[], Any]]:
    """Both steps on one model and batch."""
    model, batch = setting(tiny)

    def run(step: Callable[..., Tensor]) -> Callable[[], Any]:
        def once() -> None:
            model.zero_grad(set_to_none=True)
            step(model, batch)

        return once

    return {"ours": run(our_step), "theirs": run(speechbrain_step)}


def check_same(model: SpeechLLM, batch: Batch) -> float:
    """Both sides give the same loss and gradients; returns the loss."""
    found = []
    for step in (our_step, lambda m, b: speechbrain_step(m, b, own_positions=True)):
        model.zero_grad(set_to_none=True)
        loss = step(model, batch)
        norm = torch.cat([p.grad.flatten() for p in model.projector.parameters()]).norm()
        found.append((float(loss), float(norm)))
    (ours, our_norm), (theirs, their_norm) = found
    check(abs(ours - theirs) < 1e-5 * ours, f"losses {ours} and {theirs}")
    check(abs(our_norm - their_norm) < 1e-4 * our_norm, f"gradients {our_norm} and {their_norm}")
    return ours


def measure(tiny: bool) -> list[Result]:
    """Time and extra peak memory of a step."""
    check_same(*setting(tiny))
    steps = sides(tiny)
    seconds = best_of(steps, 1 if tiny else 3)
    limit = flops(steps["theirs"]) / flops(steps["ours"])
    peak = {side: peak_of_side(__file__, side, tiny) for side in steps}
    return [
        Result(
            "C1 train step, CPU s",
            seconds["theirs"] / seconds["ours"],
            ">= 1.7x",
            f"{seconds['ours']:.2f}",
            f"{seconds['theirs']:.2f}",
            f"{limit:.2f}x by operations",
            steps["ours"],
        ),
        Result(
            "C1 train step, extra peak MiB",
            peak["theirs"] / max(peak["ours"], 1e-9),
            ">= 3x",
            f"{peak['ours']:.0f}",
            f"{peak['theirs']:.0f}",
        ),
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv, sides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
