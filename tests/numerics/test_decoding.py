"""Greedy search with a cache, against a loop without one and against Hugging Face's generate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm_prune.data.batching import collate
from speechllm_prune.inference import EXTRA_TOKENS, decode, transcribe
from speechllm_prune.models.decoder import lm_logits
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import HealState, cut
from speechllm_prune.search import _fixed_cache, greedy_search
from tests import tiny
from tests.numerics.common import build, stir_adapters, utterances

NEVER = frozenset({-1})
STATES = ["full", "cut", "healed"]
both_caches = pytest.mark.parametrize("graphs", ["never", "always"])


@contextmanager
def in_state(model: SpeechLLM, state: str) -> Iterator[None]:
    """The model as it is, cut, or cut and healed with adapters that do something."""
    if state == "full":
        yield
        return
    heal = HealState("joint", LoraSettings(4, 8, 0.5)) if state == "healed" else None
    with cut(model, PrunePlan(tiny.DECODER_LAYERS, 1, 3), heal):
        stir_adapters(model, "heal")
        yield


def without_cache(model: SpeechLLM, embeds: Tensor, num_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy by the definition: the whole row again for every token. (X, H) -> token ids and (num_tokens, V) logits."""
    tokens: list[int] = []
    logits = []
    embed = model.decoder.get_input_embeddings()
    for _ in range(num_tokens):
        row = torch.cat([embeds, embed(torch.tensor(tokens, dtype=torch.long))])
        logits.append(model.decoder(inputs_embeds=row[None], use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


@both_caches
@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_greedy_with_cache_equals_the_loop_without(
    wavlm_layer: Path, decoder_folder: Path, state: str, graphs: str
) -> None:
    model = build(wavlm_layer, decoder_folder)
    items = utterances(model, [1, 4, 2])
    with in_state(model, state):
        inputs = model.inputs_for(collate(items), targets=False, padding_side="left")
        caps = [8, 8, 8]
        logits: list[Tensor] = []
        handle = model.decoder.get_output_embeddings().register_forward_hook(
            lambda module, args, output: logits.append(output)
        )
        found = greedy_search(
            model.decoder, inputs.inputs_embeds, inputs.attention_mask, caps, NEVER, graphs
        )
        handle.remove()
        steps = torch.stack(logits, dim=1)  # (B, steps, V)
        for row, (tokens, capped) in enumerate(found):
            alone = model.inputs_for(collate([items[row]]), targets=False).inputs_embeds[0]
            expected, expected_logits = without_cache(model, alone, caps[row])
            assert tokens == expected and capped
            # Random weights soon repeat a token: equal ids alone would say little.
            torch.testing.assert_close(
                steps[row, : caps[row]], expected_logits, atol=1e-4, rtol=1e-4
            )
    assert len({tuple(tokens[:5]) for tokens, _ in found}) > 1


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_greedy_equals_hugging_face_generate(
    wavlm_layer: Path, decoder_folder: Path, state: str
) -> None:
    model = build(wavlm_layer, decoder_folder)
    items = utterances(model, [2, 4])
    with in_state(model, state):
        inputs = model.inputs_for(collate(items), targets=False, padding_side="left")
        ours = greedy_search(
            model.decoder, inputs.inputs_embeds, inputs.attention_mask, [10, 10], NEVER
        )
        for row, (tokens, _) in enumerate(ours):
            alone = model.inputs_for(collate([items[row]]), targets=False)
            theirs = model.decoder.generate(
                inputs_embeds=alone.inputs_embeds,
                attention_mask=alone.attention_mask,
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=None,
            )
            assert tokens == theirs[0].tolist()


@torch.no_grad()
def test_surgery_and_healing_change_what_is_decoded(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    inputs = model.inputs_for(collate(utterances(model, [3])), targets=False)
    found = []
    for state in [*STATES, "full"]:
        with in_state(model, state):
            found += greedy_search(
                model.decoder, inputs.inputs_embeds, inputs.attention_mask, [10], NEVER
            )
    assert found[0] == found[3]
    assert len({tuple(tokens) for tokens, _ in found}) == 3


@both_caches
@torch.no_grad()
def test_stop_tokens_end_a_row_and_caps_cut_it(wavlm_layer: Path, llama: Path, graphs: str) -> None:
    model = build(wavlm_layer, llama)
    items = utterances(model, [1, 5, 2, 4])
    inputs = model.inputs_for(collate(items), targets=False, padding_side="left")
    arguments = model.decoder, inputs.inputs_embeds, inputs.attention_mask
    endless = [tokens for tokens, _ in greedy_search(*arguments, [20] * 4, NEVER)]
    stop = frozenset({endless[0][3], endless[1][6]})
    caps = [20, 20, 1, 20]
    expected = []
    for tokens, cap in zip(endless, caps, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stop]
        ended = bool(ends) and ends[0] < cap
        expected.append((tokens[: ends[0]], False) if ended else (tokens[:cap], True))
    assert greedy_search(*arguments, caps, stop, graphs) == expected
    assert {capped for _, capped in expected} == {True, False}
    # A row whose very first token stops it is an empty hypothesis, not a capped one.
    first = frozenset({endless[0][0]})
    assert greedy_search(*arguments, caps, first, graphs)[0] == ([], False)


@both_caches
@torch.no_grad()
def test_search_ends_when_all_rows_have_ended(wavlm_layer: Path, llama: Path, graphs: str) -> None:
    model = build(wavlm_layer, llama)
    inputs = model.inputs_for(
        collate(utterances(model, [1, 3])), targets=False, padding_side="left"
    )
    arguments = model.decoder, inputs.inputs_embeds, inputs.attention_mask
    endless = [tokens for tokens, _ in greedy_search(*arguments, [6, 6], NEVER)]
    calls: list[int] = []
    handle = model.decoder.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    greedy_search(*arguments, [500, 500], frozenset({endless[0][2], endless[1][4]}), graphs)
    handle.remove()
    assert len(calls) <= (5 if graphs == "never" else 9)  # there it looks at every eighth step


@torch.no_grad()
def test_ended_rows_leave_the_batch(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    items = utterances(model, [1, 5, 2, 4, 3])
    inputs = model.inputs_for(collate(items), targets=False, padding_side="left")
    caps, rows = [3, 9, 3, 20, 6], []
    handle = model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    found = greedy_search(model.decoder, inputs.inputs_embeds, inputs.attention_mask, caps, NEVER)
    handle.remove()
    # Two of five end at 3, one of three at 6, one of two at 9.
    assert rows == [5] * 3 + [3] * 3 + [2] * 3 + [1] * 11
    for item, cap, tokens in zip(items, caps, found, strict=True):
        alone = model.inputs_for(collate([item]), targets=False)
        alone_found = greedy_search(
            model.decoder, alone.inputs_embeds, alone.attention_mask, [cap], NEVER
        )
        assert [tokens] == alone_found and len(tokens[0]) == cap


@torch.no_grad()
def test_fewer_than_a_quarter_stay_until_more_have_ended(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    inputs = model.inputs_for(
        collate(utterances(model, [2] * 5)), targets=False, padding_side="left"
    )
    rows: list[int] = []
    handle = model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    caps = [2, 4, 7, 7, 7]
    found = greedy_search(model.decoder, inputs.inputs_embeds, inputs.attention_mask, caps, NEVER)
    handle.remove()
    assert rows == [5] * 4 + [3] * 3  # one of five is not a quarter
    assert [len(tokens) for tokens, _ in found] == caps


@torch.no_grad()
def test_sliding_windows_keep_the_growing_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    arguments = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.long), [12, 12], NEVER
    for window, fixed in ((4, False), (None, True)):
        decoder = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window)).eval()
        assert (_fixed_cache(decoder, 30) is not None) == fixed
        found = greedy_search(decoder, *arguments, "always")
        assert found == greedy_search(decoder, *arguments, "never")
        assert len(set(found[0][0])) > 2


def check_batching(model: SpeechLLM) -> None:
    wavs = [item["audio"] for item in utterances(model, [1, 5, 2, 4, 3])]
    alone = [transcribe(model, [wav])[0] for wav in wavs]
    assert len(set(alone)) > 2
    for size in (2, 5):
        assert transcribe(model, wavs, batch_size=size) == alone
    order = [3, 0, 4, 1, 2]
    assert transcribe(model, [wavs[i] for i in order], batch_size=3) == [alone[i] for i in order]


def test_transcripts_do_not_depend_on_batch_size_or_order(
    encoder_folder: Path, llama: Path
) -> None:
    check_batching(build(encoder_folder, llama, max_tokens_per_second=2.0))


@pytest.mark.parametrize("state", STATES[1:])
def test_nor_after_surgery_and_healing(wavlm_layer: Path, qwen2: Path, state: str) -> None:
    model = build(wavlm_layer, qwen2, max_tokens_per_second=2.0)
    with in_state(model, state):
        check_batching(model)


def test_hypotheses_carry_reference_length_and_cap(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2, max_tokens_per_second=5.0)
    items = utterances(model, [1, 5, 2])
    model.train()
    hypotheses = decode(model, [collate(items[:2]), collate(items[2:])])
    assert not model.training
    for item, hypothesis in zip(items, hypotheses, strict=True):
        assert (hypothesis.id, hypothesis.ref) == (item["id"], item["text"])
        assert hypothesis.duration == item["duration"]
        assert hypothesis.capped  # random weights never end by themselves
        assert hypothesis.num_tokens == math.ceil(5.0 * item["duration"]) + EXTRA_TOKENS


@torch.no_grad()
def test_lm_logits_equal_those_of_the_whole_model(decoder_folder: Path, wavlm_layer: Path) -> None:
    decoder = build(wavlm_layer, decoder_folder).decoder
    ids = torch.randint(0, 200, (2, 7))
    hidden = decoder.get_decoder()(input_ids=ids).last_hidden_state
    assert torch.equal(lm_logits(decoder, hidden), decoder(input_ids=ids).logits)


@torch.no_grad()
def test_lm_logits_apply_the_soft_cap_of_gemma() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5, initializer_range=0.5)
    decoder = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, 40, (1, 6))
    hidden = decoder.get_decoder()(input_ids=ids).last_hidden_state
    expected = decoder(input_ids=ids).logits
    assert expected.abs().max() <= 0.5
    torch.testing.assert_close(lm_logits(decoder, hidden), expected)
