"""Part `mem`: decoding Llama-3.1-8B before and after the cut, against SpeechBrain's searcher and `generate`.

The paper gives a speed-up of 35 % and 15.72 -> 10.37 GiB without saying how both were taken. 32 layers less 40 % are 19
layers. Three protocols that the numbers allow are measured and held against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_models import caps_of, evaluation_lengths, random_batch, random_model
from speechllm_prune.models.decoder import num_parameters
from speechllm_prune.models.speechllm import DecoderInputs, SpeechLLM
from speechllm_prune.prune.surgery import remove_layers
from speechllm_prune.search import greedy_search

if TYPE_CHECKING:
    from benchmarks.gpu import Part, Row

LEAF = "librispeech_llama8b"
NEVER = frozenset({-1})
PAPER = "15.72 -> 10.37"
Search = Callable[[Any, DecoderInputs, list[int]], list[list[int]]]


def ours(graphs: str) -> Search:
    """Our search; `never`: the growing cache, `always`: CUDA graphs."""

    def search(decoder: Any, inputs: DecoderInputs, caps: list[int]) -> list[list[int]]:
        found = greedy_search(
            decoder, inputs.inputs_embeds, inputs.attention_mask, caps, NEVER, graphs
        )
        return [tokens for tokens, _ in found]

    return search


def generate(decoder: Any, inputs: DecoderInputs, caps: list[int]) -> list[list[int]]:
    """`generate` of transformers, as long as the longest row needs."""
    rows = decoder.generate(
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max(caps),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).tolist()
    return [row[:cap] for row, cap in zip(rows, caps, strict=True)]


def speechbrain(decoder: Any, inputs: DecoderInputs, caps: list[int]) -> list[list[int]]:
    """The searcher of the installed speechbrain package; the last token of the prompt is its bos."""
    from benchmarks.decoding import ForcedSearcher

    ends = torch.tensor(caps, device=inputs.inputs_embeds.device) - 1
    searcher = ForcedSearcher(decoder, ends)
    searcher.bos_index = PROMPT_END
    mask = inputs.attention_mask[:, :-1].bool()
    share = torch.ones(len(caps), device=mask.device)
    return searcher(inputs.inputs_embeds[:, :-1], share, mask)[0]


PROMPT_END = 14
"""Last token of the prompt that `benchmarks.common.Tokenizer` gives."""
SEARCHES: dict[str, Search] = {
    "SpeechBrain": speechbrain,
    "generate": generate,
    "ours": ours("never"),
    "ours, graphs": ours("always"),
}


def run(part: Part) -> None:
    """All rows of the part."""
    ceilings = _ceilings(part)
    model = random_model(LEAF, part.device, part.tiny)
    model.projector.to(model.decoder.dtype)
    lengths = (
        [seconds / 10 for seconds in evaluation_lengths(8)] if part.tiny else evaluation_lengths()
    )
    middle = len(lengths) // 2
    whole = 2.0 if part.tiny else 35.0
    hundred = [1.0] * 3 if part.tiny else [12.5] * 8
    work = {
        "35 s": ([whole], list(SEARCHES)),
        "100 s": (hundred, ["SpeechBrain", "ours", "ours, graphs"]),
        "12.3 s x 16": ([1.2] * 3 if part.tiny else [12.3] * 16, list(SEARCHES)),
        "test, 16": (lengths[middle - 8 : middle + 8], ["generate", "ours", "ours, graphs"]),
        "test, 64": (lengths, ["ours", "ours, graphs"]),
    }
    num_layers = len(model.decoder.get_decoder().layers)
    removed = round(0.4 * num_layers)
    times: dict[tuple[int, str], float] = {}
    peaks: dict[str, list[Row]] = {}
    for depth in (num_layers, num_layers - removed):
        if depth < num_layers:
            remove_layers(model.decoder, num_layers - removed - 1, removed)
        _protocols(part, model, depth, [whole], hundred, peaks)
        for name, (durations, modes) in work.items():
            for mode in modes:
                row = part.row(
                    "decoding",
                    {"layers": depth, "mode": mode, "batch": name},
                    lambda durations=durations, mode=mode: _decoding(  # type: ignore[misc]
                        part, model, durations, mode, ceilings
                    ),
                )
                if row and name == "35 s":
                    times[depth, mode] = row["seconds"]
    _compare(part, num_layers, num_layers - removed, times, peaks)


@torch.no_grad()
def _decoding(
    part: Part, model: SpeechLLM, durations: list[float], mode: str, ceilings: Row
) -> Row:
    """One way to search on one batch. `differ`: rows whose tokens are not those of our search without graphs."""
    decoder, batch, caps = model.decoder, random_batch(model, durations), caps_of(durations)
    search = SEARCHES[mode]
    inputs = model.inputs_for(batch, targets=False, padding_side="left")
    found: list[list[int]] = []
    memory = part.memory(lambda: found.extend(search(decoder, inputs, caps)))
    encode = part.seconds(lambda: model.speech_embeddings(batch))
    whole = part.seconds(lambda: search(decoder, inputs, caps))
    prefill = part.seconds(lambda: search(decoder, inputs, [1] * len(caps)))
    steps = max(1, max(caps) - 1)
    step = (whole - prefill) / steps
    expected = found if mode == "ours" else SEARCHES["ours"](decoder, inputs, caps)
    ends = [cap - 1 for cap in caps]  # SpeechBrain's searcher spends the last one on eos
    differ = sum(a[:end] != b[:end] for a, b, end in zip(found, expected, ends, strict=True))
    tokens = sum(caps)
    floor = _step_bytes(decoder, inputs.attention_mask, tokens) / ceilings["bytes_per_second"]
    return {
        "seconds": encode + whole,
        "step_ms": 1e3 * step,
        "times_floor": step / floor,
        "tokens_s": tokens / whole,
        "rtfx": sum(durations) / (encode + whole),
        "encoder_ms": 1e3 * encode,
        "prefill_ms": 1e3 * prefill,
        "differ": f"{differ} of {len(caps)}",
        **memory,
    }


def _step_bytes(decoder: Any, mask: Tensor, tokens: int) -> float:
    """Bytes that one step has to read: all weights but the embedding's, and the cache half way through."""
    config, size = decoder.config, decoder.dtype.itemsize
    weights = num_parameters(decoder.get_decoder().layers) + config.vocab_size * config.hidden_size
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * (weights + per_position * (float(mask.sum()) + tokens / 2))


def _protocols(
    part: Part,
    model: SpeechLLM,
    depth: int,
    whole: list[float],
    hundred: list[float],
    peaks: dict[str, list[Row]],
) -> None:
    """Peak memory by the three protocols."""

    @torch.no_grad()
    def end_to_end(durations: list[float]) -> Row:
        batch = random_batch(model, durations)

        def work() -> None:
            inputs = model.inputs_for(batch, targets=False, padding_side="left")
            SEARCHES["ours"](model.decoder, inputs, caps_of(durations))

        return part.memory(work)

    @torch.no_grad()
    def without_encoder() -> Row:
        batch = random_batch(model, hundred)
        features, batch.audio_lengths = model.encoder(batch.audio, batch.audio_lengths)
        batch.audio = features
        model.encoder.to("cpu")
        model.projector.float()

        def work() -> None:
            inputs = model.inputs_for(batch, targets=False, padding_side="left")
            SEARCHES["SpeechBrain"](model.decoder, inputs, caps_of(hundred))

        try:
            return part.memory(work)
        finally:
            model.encoder.to(part.device)
            model.projector.to(model.decoder.dtype)

    protocols: dict[str, Callable[[], Row]] = {
        "bf16 with encoder, cache, 35 s": lambda: end_to_end(whole),
        "bf16 with encoder, cache, 100 s batch": lambda: end_to_end(hundred),
        "cached features, fp32 projector, SpeechBrain's searcher, 100 s batch": without_encoder,
    }
    for name, measure in protocols.items():
        row = part.row("memory", {"protocol": name, "layers": depth}, measure)
        if row:
            peaks.setdefault(name, []).append(row)


def _compare(
    part: Part,
    full: int,
    cut: int,
    times: dict[tuple[int, str], float],
    peaks: dict[str, list[Row]],
) -> None:
    """Hold what was measured against the paper."""
    for mode in SEARCHES:
        if (full, mode) in times and (cut, mode) in times:
            before, after = times[full, mode], times[cut, mode]
            part.note(
                f"{full} -> {cut} layers, batch 1, 35 s, {mode}: time {100 * (after / before - 1):+.1f} %, "
                f"{before / after:.2f}x as fast (paper: 35 %)"
            )
    for name, rows in peaks.items():
        if len(rows) == 2 and part.cuda:
            allocated = " -> ".join(f"{row['alloc_gib']:.2f}" for row in rows)
            reserved = " -> ".join(f"{row['reserved_gib']:.2f}" for row in rows)
            part.note(
                f"{name}: {allocated} GiB allocated, {reserved} GiB reserved (paper: {PAPER})"
            )


def _ceilings(part: Part) -> Row:
    """What the device reaches: a large matrix product, and a copy (read and written)."""
    size, count = (128, 2**20) if part.tiny else (8192, 4 * 2**30)
    dtype = torch.bfloat16 if part.cuda else torch.float32

    def measure() -> Row:
        matrix = torch.randn(size, size, device=part.device).to(dtype)
        product = part.seconds(lambda: matrix @ matrix)
        source = torch.zeros(count // dtype.itemsize, dtype=dtype, device=part.device)
        target = torch.empty_like(source)
        copy = part.seconds(lambda: target.copy_(source))
        return {"tflops": 2e-12 * size**3 / product, "bytes_per_second": 2 * count / copy}

    return part.row("ceilings", {"device": part.device}, measure) or {"bytes_per_second": 1.0}
