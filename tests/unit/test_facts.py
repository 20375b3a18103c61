"""The table of hub models: published parameter counts, depths and token roles, built on the meta device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from speechllm_prune.models.decoder import decoder_layers, num_parameters, resolve_token_ids
from speechllm_prune.models.facts import (
    DECODERS,
    ENCODERS,
    decoder_facts,
    encoder_facts,
    meta_decoder,
    meta_encoder,
)
from speechllm_prune.reporting.paper import TABLE1
from speechllm_prune.runtime import UserError


@pytest.mark.parametrize("hub", DECODERS)
def test_decoders_on_meta(hub: str) -> None:
    """The published count follows from the config values to the last parameter, so no size can be wrong."""
    facts, decoder = DECODERS[hub], meta_decoder(hub)
    assert {p.device.type for p in decoder.parameters()} == {"meta"}
    assert num_parameters(decoder) == facts.num_parameters
    assert len(decoder_layers(decoder)) == facts.config["num_hidden_layers"]
    tied = decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
    assert tied == facts.config["tie_word_embeddings"]
    assert decoder.get_input_embeddings().weight.shape[0] >= facts.num_tokens
    has_bias = decoder_layers(decoder)[0].self_attn.q_proj.bias is not None
    assert has_bias == (facts.model_type == "qwen2")


@pytest.mark.parametrize("hub", ENCODERS)
def test_encoders_on_meta(hub: str) -> None:
    facts, encoder = ENCODERS[hub], meta_encoder(hub)
    assert num_parameters(encoder) == facts.num_parameters
    assert encoder.output_length(160_000) in (499, 500), "50 Hz"
    assert encoder.max_samples == (480_000 if facts.model_type == "whisper" else None)


def test_depths_are_those_of_the_paper() -> None:
    by_name = {hub.split("/")[1]: facts for hub, facts in DECODERS.items()}
    for system in TABLE1:
        name = system.model.removesuffix(" + LoRA")
        assert by_name[name].config["num_hidden_layers"] == system.num_layers


class Tokenizer(SimpleNamespace):
    """The part of a tokenizer that names token roles."""

    def __len__(self) -> int:
        return self.num_tokens


@pytest.mark.parametrize("hub", DECODERS)
def test_token_roles(hub: str) -> None:
    """Qwen2.5: pad is eos, no bos whatever the config names. Llama 3: no pad, so eos stands in; masked all the same."""
    facts = DECODERS[hub]
    tokenizer = Tokenizer(
        bos_token_id=facts.bos,
        eos_token_id=facts.eos,
        pad_token_id=facts.pad,
        num_tokens=facts.num_tokens,
    )
    decoder = meta_decoder(hub)
    ids = resolve_token_ids(decoder, tokenizer)
    assert (ids.bos, ids.eos, ids.pad) == (facts.bos, facts.eos, facts.eos)
    assert ids.stop == {facts.eos}
    if facts.model_type == "qwen2":
        assert facts.bos is None and decoder.config.bos_token_id == facts.eos == facts.pad
        assert facts.special_tokens["<|endoftext|>"] == facts.eos
    else:
        assert facts.pad is None and facts.gated
        assert decoder.config.bos_token_id == facts.bos == facts.special_tokens["<|begin_of_text|>"]
    assert all(number < facts.config["vocab_size"] for number in facts.special_tokens.values())


def test_unknown_models_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="Qwen/Qwen2.5-7B"):
        decoder_facts("gpt2")
    with pytest.raises(UserError, match="microsoft/wavlm-large"):
        encoder_facts("gpt2")


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, speechllm_prune.models.facts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
