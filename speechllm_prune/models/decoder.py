"""The LLM decoder: the only file that knows how Hugging Face model families differ.

Shapes: B sequences, T positions, H decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechllm_prune.models.encoder import explain_hub_errors
from speechllm_prune.runtime import UserError


@dataclass(frozen=True)
class TokenIds:
    """Token ids by role.

    Arguments
    ---------
    bos : int or None
        Begins a text, where the model has one (Llama 3 has, Qwen2.5 has not).
    eos : int
        The label that ends a target.
    stop : frozenset of int
        Ids that end a hypothesis: eos and whatever the checkpoint's generation config adds.
    pad : int
        Fills padded rows; masked everywhere and never looked at, so it may equal eos (Qwen2.5 base) or stand in for a
        missing one (Llama 3).
    """

    bos: int | None
    eos: int
    stop: frozenset[int]
    pad: int


def load_decoder(
    hub: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[Any, Any]:
    """Load a pretrained causal LM, frozen and in eval mode, and its tokenizer.

    Arguments
    ---------
    hub : str
        Hub id or local folder.
    revision : str, optional
        Hub revision.
    dtype : torch.dtype
        Type of the frozen weights.
    attention : str
        `sdpa` or `eager`.

    Returns
    -------
    PreTrainedModel, PreTrainedTokenizer
    """
    from transformers import AutoModelForCausalLM

    with explain_hub_errors(hub, "decoder_hub"):
        try:
            decoder, report = AutoModelForCausalLM.from_pretrained(
                hub,
                revision=revision,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                weights_only=True,
                trust_remote_code=False,
            )
        except ValueError as error:
            if "attention implementation" not in str(error) or attention == "eager":
                raise
            raise _needs_eager(hub, attention) from None
    # Gemma 2 caps the scores inside its attention, which sdpa cannot do: 5.23 refuses it, 5.17 goes on without the cap.
    cap = getattr(decoder.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and attention != "eager":
        raise _needs_eager(hub, attention)
    strange = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if strange:
        # transformers would go on with random weights (missing) or fewer layers than stored (unexpected).
        raise UserError(
            f"decoder_hub: {hub!r}: weights and config.json do not fit: {', '.join(map(str, strange[:5]))}"
        )
    check_supported(decoder)
    decoder.requires_grad_(False)
    return decoder.eval(), load_tokenizer(hub, revision)


def _needs_eager(hub: str, attention: str) -> UserError:
    return UserError(
        f"decoder_hub: {hub!r} does not support --attention {attention}; give --attention eager"
    )


def load_tokenizer(hub: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a decoder."""
    from transformers import AutoTokenizer

    with explain_hub_errors(hub, "decoder_hub"):
        return AutoTokenizer.from_pretrained(hub, revision=revision, trust_remote_code=False)


def check_supported(decoder: Any) -> None:
    """Refuse decoders whose logits pass a step that `lm_logits` does not know.

    Raises
    ------
    UserError
    """
    text_config = decoder.config.get_text_config()
    scaling = [
        name
        for name in ("logits_scaling", "logit_scale")
        if getattr(text_config, name, 1.0) not in (None, 1.0)
    ]
    if scaling:
        raise UserError(
            f"decoder {decoder.config.model_type!r} scales its logits ({scaling[0]}), which is not supported"
        )
    if not hasattr(decoder.get_decoder(), "layers"):
        raise UserError(
            f"decoder {decoder.config.model_type!r} is not of the Llama/Qwen2 kind (it has no list of layers)"
        )


def check_prunable(decoder: Any, per_layer_fields: tuple[str, ...]) -> None:
    """Refuse decoders that would not be the same model with fewer layers.

    Arguments
    ---------
    decoder : PreTrainedModel or PeftModel
        A causal LM.
    per_layer_fields : tuple of str
        Fields of its config that the caller shortens with the layers.

    Raises
    ------
    UserError
        If the weights are quantised, layers share weights, layers and config disagree, or the config has per-layer
        settings that nobody here knows.
    """
    body = decoder.get_decoder()
    config, layers, name = body.config, body.layers, f"decoder {decoder.config.model_type!r}"
    if is_quantised(decoder):
        raise UserError(
            f"{name} is quantised: load it unquantised, remove layers and heal, then quantise the export"
        )
    if config.num_hidden_layers != len(layers):
        raise UserError(
            f"{name} has {len(layers)} layers and a config of {config.num_hidden_layers}: load it anew"
        )
    owners = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if len(set(owners)) != len(owners):
        raise UserError(f"{name} shares weights between layers, which is not supported")
    unknown = [
        field
        for field, value in vars(config).items()
        if isinstance(value, (list, tuple))
        and len(value) == len(layers)
        and ("layer" in field or "pattern" in field)
        and field not in per_layer_fields
    ]
    unknown += [f for f in ("num_kv_shared_layers",) if getattr(config, f, 0)]
    if unknown:
        raise UserError(f"{name} has per-layer settings that are not supported ({unknown[0]})")


def is_quantised(decoder: Any) -> bool:
    """Whether the layers' weights are stored in fewer bits than they are computed in."""
    marks = ("hf_quantizer", "quantization_method")
    if any(getattr(decoder, mark, None) is not None for mark in marks):
        return True
    if getattr(decoder.config, "quantization_config", None) is not None:
        return True
    weights = decoder_layers(decoder).parameters()
    return any(not weight.is_floating_point() or weight.element_size() == 1 for weight in weights)


def resolve_token_ids(decoder: Any, tokenizer: Any) -> TokenIds:
    """Token ids by role, from the tokenizer first and the model's configs second.

    Raises
    ------
    UserError
        If there is no end-of-sequence token.
    """
    generation = decoder.generation_config.eos_token_id
    config_eos = decoder.config.get_text_config().eos_token_id
    candidates = [tokenizer.eos_token_id, *_as_list(config_eos), *_as_list(generation)]
    known = [int(token) for token in candidates if token is not None]
    if not known:
        raise UserError("the decoder's tokenizer and config name no end-of-sequence token")
    rows = decoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the decoder {rows} embeddings: they do not belong "
            "together; decoder_hub must hold both of one model"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else known[0]
    # The config's eos of a base checkpoint and the tokenizer's may differ in instruct models: any of them ends a text.
    return TokenIds(bos=tokenizer.bos_token_id, eos=known[0], stop=frozenset(known), pad=int(pad))


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def decoder_layers(decoder: Any) -> Any:
    """The `ModuleList` of decoder layers of a causal LM."""
    return decoder.get_decoder().layers


@contextmanager
def training_layers(
    decoder: Any, checkpointing: bool, compiled: bool, backend: str = "inductor"
) -> Iterator[None]:
    """Context: how the layers run while gradients are computed. Decoding and measuring run them as they are.

    Arguments
    ---------
    decoder : PreTrainedModel
        A causal LM. It may stay in eval mode, as a frozen decoder does: transformers' own switches would not act then.
    checkpointing : bool
        Keep only a layer's input for the backward pass, which computes the rest again.
    compiled : bool
        Through torch.compile, whatever the length of the batch.
    backend : str
        Of torch.compile.
    """
    layers = list(decoder_layers(decoder)) if checkpointing or compiled else []
    for layer in layers:
        layer.forward = _while_training(layer.forward, checkpointing, compiled, backend)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def _while_training(
    forward: Callable[..., Any], checkpointing: bool, compiled: bool, backend: str
) -> Callable[..., Any]:
    trained = torch.compile(forward, dynamic=True, backend=backend) if compiled else forward
    if checkpointing:
        trained = partial(checkpoint, trained, use_reentrant=False)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (trained if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either


def lm_logits(decoder: Any, hidden: Tensor) -> Tensor:
    """Logits of chosen rows: (..., H) after the final norm -> (..., V) in fp32, with the soft cap of Gemma 2."""
    logits = decoder.get_output_embeddings()(hidden).float()
    cap = getattr(decoder.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def num_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)
