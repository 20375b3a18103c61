"""Facts about the public checkpoints of the leaves: config values, token roles, parameter counts. Nothing to download.

Training never reads this table: sizes and token ids come from the models themselves. It lets every leaf be built on the
meta device where no weights are, so that dimensions, adapter targets and parameter counts are checked before anybody
downloads 15 GB, and it feeds the estimates of `estimate.py`. No torch until something is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from speechllm_prune.runtime import UserError


@dataclass(frozen=True)
class DecoderFacts:
    """A causal LM of the hub.

    Arguments
    ---------
    model_type : str
        As in its config.json: qwen2 | llama.
    num_parameters : int
        Of the whole checkpoint, tied embeddings counted once.
    num_tokens : int
        Length of the tokenizer; the embedding may have more rows.
    bos, eos, pad : int or None
        What the *tokenizer* names. A missing pad is no fault: padded positions are masked and never looked at.
    special_tokens : dict
        Text and id of the tokens that matter here.
    config : dict
        The values of config.json that decide shapes and tokens.
    gated : bool
        Whether its licence must be accepted before the download.
    """

    model_type: str
    num_parameters: int
    num_tokens: int
    bos: int | None
    eos: int
    pad: int | None
    special_tokens: dict[str, int] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    gated: bool = False


@dataclass(frozen=True)
class EncoderFacts:
    """A speech encoder of the hub.

    Arguments
    ---------
    model_type : str
        wavlm | whisper.
    num_parameters : int
        Of the encoder; a Whisper checkpoint's text decoder is not counted and not kept.
    do_normalize : bool
        Whether its preprocessor brings waveforms to zero mean and unit variance.
    config : dict
        The values of config.json that decide shapes and tokens.
    """

    model_type: str
    num_parameters: int
    do_normalize: bool
    config: dict[str, Any] = field(repr=False)


def _qwen(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, rows: int, count: int
) -> DecoderFacts:
    """Qwen2.5 base. Trap: pad is the eos token, and the config names a bos that the tokenizer does not have."""
    end = 151643
    return DecoderFacts(
        model_type="qwen2",
        num_parameters=count,
        num_tokens=151665,
        bos=None,
        eos=end,
        pad=end,
        special_tokens={"<|endoftext|>": end, "<|im_start|>": end + 1, "<|im_end|>": end + 2},
        config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": rows,
            "tie_word_embeddings": rows == 151936,  # all but the 7B and larger
            "bos_token_id": end,
            "eos_token_id": end,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    )


def _llama(
    hidden: int, inner: int, layers: int, heads: int, head_dim: int, factor: float, count: int
) -> DecoderFacts:
    """Llama 3.1 and 3.2 base. Trap: no pad token; bos is put in front of every text by the tokenizer."""
    return DecoderFacts(
        model_type="llama",
        num_parameters=count,
        num_tokens=128256,
        bos=128000,
        eos=128001,
        pad=None,
        special_tokens={
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|finetune_right_pad_id|>": 128004,
            "<|eot_id|>": 128009,
        },
        config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "vocab_size": 128256,
            "tie_word_embeddings": factor == 32.0,  # the 3.2 models
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        gated=True,
    )


def _wavlm(hidden: int, layers: int, heads: int, large: bool, count: int) -> EncoderFacts:
    return EncoderFacts(
        model_type="wavlm",
        num_parameters=count,
        do_normalize=large,
        config={
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "feat_extract_norm": "layer" if large else "group",
            "do_stable_layer_norm": large,
            "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
            "conv_stride": (5, 2, 2, 2, 2, 2, 2),
        },
    )


DECODERS: dict[str, DecoderFacts] = {
    "Qwen/Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, 152064, 7_615_616_512),
    "Qwen/Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, 151936, 3_085_938_688),
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, 1_543_714_304),
    "Qwen/Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936, 494_032_768),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 128, 8.0, 8_030_261_248),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, 128, 32.0, 3_212_749_824),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, 64, 32.0, 1_235_814_400),
}
"""The paper's six decoders, and the small one of `hparams/minilibrispeech_qwen0.5b.yaml`."""

ENCODERS: dict[str, EncoderFacts] = {
    "microsoft/wavlm-large": _wavlm(1024, 24, 16, True, 315_453_120),
    "microsoft/wavlm-base-plus": _wavlm(768, 12, 12, False, 94_381_936),
    "openai/whisper-large-v3": EncoderFacts(
        model_type="whisper",
        num_parameters=636_968_960,
        do_normalize=False,
        config={
            "vocab_size": 51866,
            "num_mel_bins": 128,
            "d_model": 1280,
            "encoder_layers": 32,
            "decoder_layers": 32,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
        },
    ),
}
"""The paper's two encoders, and the small one of `hparams/minilibrispeech_qwen0.5b.yaml`."""


def decoder_facts(hub: str) -> DecoderFacts:
    """Facts of a decoder.

    Raises
    ------
    UserError
        If the table does not hold it.

    Example
    -------
    >>> decoder_facts("Qwen/Qwen2.5-7B").config["num_hidden_layers"]
    28
    """
    if hub not in DECODERS:
        raise UserError(f"no facts about {hub!r}; known decoders are {', '.join(DECODERS)}")
    return DECODERS[hub]


def encoder_facts(hub: str) -> EncoderFacts:
    """Facts of an encoder.

    Raises
    ------
    UserError
        If the table does not hold it.
    """
    if hub not in ENCODERS:
        raise UserError(f"no facts about {hub!r}; known encoders are {', '.join(ENCODERS)}")
    return ENCODERS[hub]


def meta_decoder(hub: str, **changes: Any) -> Any:
    """A decoder on the meta device: shapes and names without a single weight; of full size but for `changes`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = decoder_facts(hub)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(facts.model_type, **facts.config | changes)
        )
    return decoder.requires_grad_(False).eval()


def meta_encoder(hub: str, output_norm: str = "none", **changes: Any) -> Any:
    """A wrapped encoder on the meta device, of full size but for `changes`."""
    import torch
    from transformers import AutoConfig, AutoModel, WhisperFeatureExtractor

    from speechllm_prune.models.encoder import WaveEncoder, WhisperFeatures

    facts = encoder_facts(hub)
    with torch.device("meta"):
        model = AutoModel.from_config(
            AutoConfig.for_model(facts.model_type, **facts.config | changes)
        )
    if facts.model_type == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=facts.config["num_mel_bins"])
        return WhisperFeatures(model.encoder, extractor, output_norm)
    return WaveEncoder(model, facts.do_normalize, output_norm)
