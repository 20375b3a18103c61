#!/usr/bin/env python3
"""C3 and C4: batched greedy search against SpeechBrain's searcher for LLMs and against `generate` of transformers.

    python benchmarks/decoding.py

`S2SHuggingFaceLLMGreedySearcher` of the installed speechbrain package has no cache: every token runs the whole row
again, and all positions pass the output layer. `generate` is called on the same batch with a cache. Random weights
never end a hypothesis, so every row ends at a length given beforehand, each side being told in its own way: ours by
the cap of a row, `generate` by a stopping criterion per row, SpeechBrain by raising the logit of eos. All three run
the same number of steps and must give the same tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from speechbrain.decoders.seq2seq import S2SHuggingFaceLLMGreedySearcher
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.common import Result, best_of, check, cpu_seconds, qwen2, script
from speechllm_prune.inference import greedy_search

EOS = 2
NEVER = frozenset({-1})


class ForcedSearcher(S2SHuggingFaceLLMGreedySearcher):
    """SpeechBrain's searcher; a row says eos after its number of tokens."""

    def __init__(self, decoder: Any, num_tokens: Tensor) -> None:
        super().__init__(
            decoder,
            temperature=0.0,
            bos_index=1,
            eos_index=EOS,
            min_decode_ratio=0.0,
            max_decode_ratio=1.0,
        )
        self.num_tokens, self.done = num_tokens, 0

    def reset_mem(self, batch_size: int, device: Any) -> None:
        self.done = 0

    def forward_step(self, *args: Any) -> Any:
        logits, memory, attention = super().forward_step(*args)
        logits[self.num_tokens == self.done, EOS] = torch.inf
        self.done += 1
        return logits, memory, attention


class EachAtItsEnd(StoppingCriteria):
    """A row of `generate` ends after its number of tokens."""

    def __init__(self, num_tokens: Tensor) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.num_tokens


def searches(tiny: bool) -> tuple[dict[str, Callable[[], list[list[int]]]], int, Tensor]:
    """The three searches on one model and batch, the prefix' length, and the length of every row's hypothesis."""
    layers, width, vocabulary = (2, 32, 300) if tiny else (6, 384, 32000)
    prefix, num_tokens = (24, [2, 4, 7]) if tiny else (87, [10, 15, 20, 25, 30, 35, 39, 44])
    ends = torch.tensor(num_tokens)
    decoder = qwen2(layers, width, vocabulary, spread=0.05)
    decoder.get_output_embeddings().weight[EOS] = 0  # never said of its own accord
    embeds = torch.randn(len(ends), prefix - 1, width)
    bos = decoder.get_input_embeddings()(torch.ones(len(ends), 1, dtype=torch.long))
    whole, mask = torch.cat([embeds, bos], dim=1), torch.ones(len(ends), prefix, dtype=torch.long)

    def cut_off(rows: list[Any]) -> list[list[int]]:
        return [list(map(int, row[:n])) for row, n in zip(rows, num_tokens, strict=True)]

    def ours() -> list[list[int]]:
        caps = [n + 1 for n in num_tokens]  # as with a label that ends the text
        return cut_off([row for row, _ in greedy_search(decoder, whole, mask, caps, NEVER)])

    def generate() -> list[list[int]]:
        rows = decoder.generate(
            inputs_embeds=whole,
            attention_mask=mask,
            max_new_tokens=max(num_tokens) + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS,
            stopping_criteria=StoppingCriteriaList([EachAtItsEnd(ends + 1)]),
        )
        return cut_off(rows.tolist())

    searcher = ForcedSearcher(decoder, ends)

    def speechbrain() -> list[list[int]]:
        rows = searcher(embeds, torch.ones(len(ends)), mask[:, 1:].bool())[0]
        return cut_off(rows)

    return {"ours": ours, "generate": generate, "speechbrain": speechbrain}, prefix, ends


@torch.no_grad()
def measure(tiny: bool) -> list[Result]:
    """Seconds of the three; the gate between the two that are close is judged by more rounds."""
    sides, prefix, ends = searches(tiny)
    expected = sides["ours"]()
    check([len(row) for row in expected] == ends.tolist(), "lengths of the hypotheses")
    check(sides["generate"]() == expected, "tokens of generate")
    seconds = best_of({name: sides[name] for name in ("ours", "generate")}, 1 if tiny else 7)
    slow: list[float] = []
    for _ in range(1 if tiny else 3):
        rows: list[Any] = []
        slow.append(cpu_seconds(lambda rows=rows: rows.extend(sides["speechbrain"]())))
        check(rows == expected, "tokens of SpeechBrain's searcher")
    steps = max(ends.tolist()) + 1
    limit = sum(prefix + step for step in range(steps)) / (prefix + steps - 1)
    ours = f"{seconds['ours']:.2f}"
    return [
        Result(
            f"C3 greedy, {len(ends)} rows, CPU s: SpeechBrain's searcher",
            min(slow) / seconds["ours"],
            ">= 20x",
            ours,
            f"{min(slow):.2f}",
            f"{limit:.0f}x by positions",
            sides["ours"],
        ),
        Result(
            f"C4 greedy, {len(ends)} rows, CPU s: HF generate",
            seconds["generate"] / seconds["ours"],
            ">= 1.0x",
            ours,
            f"{seconds['generate']:.2f}",
            "1x and what dropped rows save",
            sides["ours"],
        ),
    ]


def main(argv: list[str]) -> int:
    """Command line."""
    return script(__doc__ or "", measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
