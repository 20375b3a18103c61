"""Batched greedy search: a cache that grows and drops ended rows, or one of fixed size whose step is a CUDA graph.

Shapes: B utterances, X prefix positions, H decoder width, V vocabulary, K positions of a cache of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from speechllm_prune.models.decoder import lm_logits

EAGER_STEPS = 2
"""Steps before a CUDA graph is captured: they load every kernel, and decode two tokens all the same."""


@torch.no_grad()
def greedy_search(
    decoder: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    max_tokens: Sequence[int],
    stop: frozenset[int],
    graphs: str = "never",
) -> list[tuple[list[int], bool]]:
    """Greedy decoding of a left-padded batch with a KV cache.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM.
    inputs_embeds : Tensor
        (B, X, H), padded on the left.
    attention_mask : Tensor
        (B, X).
    max_tokens : sequence of int
        Cap for each row.
    stop : frozenset of int
        Ids that end a hypothesis.
    graphs : str
        never | auto (on a GPU) | always: a cache of fixed size, and on a GPU one CUDA graph for a whole step. Decoders
        with sliding windows always take the other way.

    Returns
    -------
    list of (token ids without the stop token, whether the cap was hit)
    """
    device = inputs_embeds.device
    stops = torch.tensor(sorted(stop), device=device)
    caps = torch.tensor(list(max_tokens), device=device)
    cache = None
    if graphs == "always" or (graphs == "auto" and device.type == "cuda"):
        cache = _fixed_cache(decoder, attention_mask.shape[1] + int(max(max_tokens)))
    if cache is None:
        rows = _search_growing(decoder, inputs_embeds, attention_mask, caps, stops)
    else:
        rows = _search_fixed(decoder, inputs_embeds, attention_mask, caps, stops, cache)
    return [_trim(row[:cap], stop) for row, cap in zip(rows, max_tokens, strict=True)]


def _trim(tokens: list[int], stop: frozenset[int]) -> tuple[list[int], bool]:
    end = next((index for index, token in enumerate(tokens) if token in stop), None)
    return (tokens, True) if end is None else (tokens[:end], False)


def has_loop(
    tokens: Sequence[int], repeats: int = 4, min_tokens: int = 8, max_period: int = 16
) -> bool:
    """Whether a hypothesis got stuck: somewhere in it one phrase stands at least `repeats` times in a row.

    Arguments
    ---------
    tokens : sequence of int
        Of one hypothesis.
    repeats : int
        Copies one after the other; an unfinished one at the end is not counted.
    min_tokens : int
        Tokens that the copies have together, so that a word said four times is none.
    max_period : int
        Longest phrase that is looked for.

    Example
    -------
    >>> has_loop([5, 1, 2, 1, 2, 1, 2, 1, 2, 6]), has_loop([7] * 8)
    (True, True)
    >>> has_loop([7] * 7), has_loop([1, 2, 1, 2, 1, 2, 1, 3])
    (False, False)
    """
    for period in range(1, max_period + 1):
        same = 0
        for before, token in zip(tokens, tokens[period:], strict=False):
            same = same + 1 if token == before else 0
            if same + period >= max(repeats * period, min_tokens):
                return True
    return False


def _search_growing(
    decoder: Any, inputs_embeds: Tensor, attention_mask: Tensor, caps: Tensor, stops: Tensor
) -> list[list[int]]:
    """Tokens of every row, perhaps beyond its end. Rows leave the batch when a quarter of it has ended."""
    from transformers import DynamicCache

    body, embed = decoder.get_decoder(), decoder.get_input_embeddings()
    cache = DynamicCache(config=decoder.config)
    position = attention_mask.sum(1, keepdim=True)  # (B, 1), position of the next token in each row
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros_like(caps, dtype=torch.bool)
    # asking the GPU for a flag stalls it
    check_every = 1 if inputs_embeds.device.type == "cpu" else 8
    found: list[list[int]] = [[] for _ in caps]
    alive = list(range(len(found)))  # the row of the batch that each row of the tensors is
    steps: list[Tensor] = []
    for step in range(int(caps.max())):
        hidden = body(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        token = lm_logits(decoder, hidden).argmax(-1)  # (B,)
        steps.append(token)
        ended = ended | torch.isin(token, stops) | (caps <= step + 1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
        positions, position = position, position + 1
        if step % check_every == check_every - 1:
            live = [row for row, has_ended in enumerate(ended.tolist()) if not has_ended]
            if not live:
                break
            if 4 * (len(alive) - len(live)) >= len(alive):
                _collect(found, alive, steps)
                index, steps = torch.tensor(live, device=token.device), []
                alive = [alive[row] for row in live]
                cache.batch_select_indices(index)
                token, ended, caps = token[index], ended[index], caps[index]
                attention_mask, positions, position = (
                    tensor[index] for tensor in (attention_mask, positions, position)
                )
        inputs_embeds = embed(token)[:, None]
    _collect(found, alive, steps)
    return found


def _collect(found: list[list[int]], alive: list[int], steps: list[Tensor]) -> None:
    """Append the tokens of some steps to the rows that were in the batch."""
    if steps:
        for row, tokens in zip(alive, torch.stack(steps, dim=1).tolist(), strict=True):
            found[row] += tokens


def _fixed_cache(decoder: Any, length: int) -> Any:
    """A cache that holds `length` positions, or None where some layer sees only a window of them."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=decoder.config, max_cache_len=-(-length // 64) * 64)
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


def _search_fixed(
    decoder: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    caps: Tensor,
    stops: Tensor,
    cache: Any,
) -> list[list[int]]:
    """Tokens of every row, perhaps beyond its end. A step only works on tensors that stay where they are."""
    body, embed = decoder.get_decoder(), decoder.get_input_embeddings()
    (batch, prefix), device = attention_mask.shape, inputs_embeds.device
    num_steps = int(caps.max())
    hidden = body(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    token = lm_logits(decoder, hidden).argmax(-1)  # (B,)
    found = token[:, None].repeat(1, num_steps)
    ended = torch.isin(token, stops) | (caps <= 1)
    position = attention_mask.sum(1, keepdim=True)  # (B, 1)
    slot, count = (torch.full((1,), value, device=device) for value in (prefix, 0))
    lowest = torch.finfo(inputs_embeds.dtype).min
    mask = inputs_embeds.new_full((batch, 1, 1, cache.layers[0].max_cache_len), lowest)
    mask[..., :prefix].masked_fill_(attention_mask[:, None, None].bool(), 0.0)

    def advance() -> None:
        mask.index_fill_(3, slot, 0.0)
        hidden = body(
            inputs_embeds=embed(token)[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        token.copy_(lm_logits(decoder, hidden).argmax(-1))
        for counter in (slot, count, position):
            counter.add_(1)
        found.index_copy_(1, count, token[:, None])
        ended.logical_or_((token[:, None] == stops).any(1) | (caps <= count + 1))

    replay = None
    for step in range(1, num_steps):
        if step % 8 == 1 and bool(ended.all()):  # asking the GPU for a flag stalls it
            break
        if step > EAGER_STEPS and device.type == "cuda":
            replay = replay or _captured(advance, device)
            replay()
        else:
            advance()
    return found.tolist()


def _captured(advance: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of a step. Capturing runs nothing, and takes about as long as launching the step once.

    One graph for every batch: kept for later batches it would have to be thrown away at every cut, undo and merge.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: the loader's pins memory, which a capture in the global mode does not survive.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        advance()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
