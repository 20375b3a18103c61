"""Removing layers, against models built with fewer layers; and undoing it, proven by hashes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from speechllm_prune.inference import greedy_search
from speechllm_prune.models.decoder import decoder_layers, lm_logits
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import (
    PrunePlan,
    Removal,
    check_cached_decoding,
    remove_layers,
)
from speechllm_prune.restore import HealState, cut, set_trainable, train_names
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics.common import batch_of, build, digest

L = tiny.DECODER_LAYERS
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral_sliding": lambda: MistralConfig(**SIZES, sliding_window=5),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"] * (L // 2)
    ),
    "gemma3_nested": lambda: Gemma3Config(
        text_config={
            **SIZES,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * (L // 2),
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_index=49,
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=5, final_logit_softcapping=2.0),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2_sliding": lambda: Qwen2Config(
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
    ),
}
BLOCKS = [(0, 1), (0, 3), (1, 2), (2, 3), (3, 2), (L - 1, 1), (1, L - 1)]


def decoder_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rebuilt_with_fewer_layers(decoder: Any, kept: list[int]) -> Any:
    """An independent way to the same model: a new one from a new config, the kept layers' weights copied in by name."""
    config = copy.deepcopy(decoder.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[index] for index in kept]
    small = AutoModelForCausalLM.from_config(config).eval()
    weights = {}
    for name, tensor in decoder.state_dict().items():
        parts = name.split(".")
        if "layers" in parts and "vision_tower" not in parts:
            at = parts.index("layers") + 1
            if int(parts[at]) not in kept:
                continue
            parts[at] = str(kept.index(int(parts[at])))
        weights[".".join(parts)] = tensor
    small.load_state_dict(weights)
    return small


@torch.no_grad()
def hand_written_forward(decoder: Any, layers: list[torch.nn.Module], ids: Tensor) -> Tensor:
    """Embeddings, the given layers one after the other, final norm, output layer."""
    body = decoder.model
    hidden = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
    for layer in layers:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=body.rotary_emb(hidden, positions),
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return decoder.lm_head(body.norm(hidden))


@torch.no_grad()
def check_pruned(decoder: Any, reference: Any, tmp_path: Path) -> None:
    """Whole forward, cached greedy search, and save_pretrained followed by a reload, all against the reference."""
    ids = torch.randint(3, 49, (2, 17))
    expected = reference(input_ids=ids, use_cache=False).logits
    assert torch.equal(decoder(input_ids=ids, use_cache=False).logits, expected)
    embeds = decoder.get_input_embeddings()(ids)
    found = greedy_search(decoder, embeds, torch.ones_like(ids), [9, 9], frozenset({-1}))
    for row, (tokens, _) in enumerate(found):
        growing = ids[row].tolist()
        for token in tokens:
            logits = reference(input_ids=torch.tensor([growing]), use_cache=False).logits
            assert token == int(logits[0, -1].argmax())
            growing.append(token)
    generated = decoder.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert generated[:, 17:].tolist() == [tokens for tokens, _ in found]
    decoder.save_pretrained(tmp_path / "pruned")
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(reloaded.eval()(input_ids=ids).logits, expected)
    depth = reloaded.config.get_text_config().num_hidden_layers
    assert depth == len(decoder_layers(reloaded)) == len(decoder_layers(decoder))
    assert check_cached_decoding(decoder) < 1e-4 and check_cached_decoding(reloaded) < 1e-4
    assert reloaded.generation_config.eos_token_id == decoder.generation_config.eos_token_id


@pytest.mark.parametrize(("start", "size"), BLOCKS)
def test_remove_layers_equals_a_forward_through_the_kept_layers(
    decoder_folder: Path, start: int, size: int
) -> None:
    whole, decoder = decoder_of(decoder_folder), decoder_of(decoder_folder)
    expected_kept = [*range(start), *range(start + size, L)]
    kept = remove_layers(decoder, start, size)
    assert kept == expected_kept
    ids = torch.randint(3, 300, (2, 11))
    expected = hand_written_forward(whole, [whole.model.layers[i] for i in kept], ids)
    with torch.no_grad():
        got = decoder(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert (got - whole(input_ids=ids).logits).abs().max() > 0.05
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("start", "size"), [(0, 2), (2, 3), (4, 2)])
def test_pruned_decoder_generates_saves_and_reloads(
    decoder_folder: Path, tmp_path: Path, start: int, size: int
) -> None:
    decoder = decoder_of(decoder_folder)
    reference = rebuilt_with_fewer_layers(decoder, [*range(start), *range(start + size, L)])
    remove_layers(decoder, start, size)
    check_pruned(decoder, reference, tmp_path)
    tied = decoder.lm_head.weight.data_ptr() == decoder.model.embed_tokens.weight.data_ptr()
    assert tied == (decoder_folder.name == "qwen2_tied")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "size"), [(0, 3), (1, 2), (3, 2)])
def test_other_families(family: str, tmp_path: Path, start: int, size: int) -> None:
    decoder = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    tiny._spread_out(decoder)
    reference = rebuilt_with_fewer_layers(decoder, [*range(start), *range(start + size, L)])
    remove_layers(decoder, start, size)
    check_pruned(decoder, reference, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_the_config_of_other_families(family: str) -> None:
    decoder = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    ids = torch.randint(3, 49, (1, 17))
    with torch.no_grad():
        expected = decoder(input_ids=ids).logits
        config = copy.deepcopy(decoder.config.to_dict())
        removal = Removal(decoder, 1, 2)
        removal.apply()
        assert decoder.config.to_dict() != config
        removal.undo()
        assert decoder.config.to_dict() == config
        assert torch.equal(decoder(input_ids=ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_lm_logits_pass_the_soft_cap(family: str) -> None:
    """Gemma 2 caps its logits: label rows that skip the cap would have another loss."""
    decoder = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    decoder.get_output_embeddings().weight.data *= 4
    ids = torch.randint(3, 49, (1, 7))
    hidden = decoder.get_decoder()(input_ids=ids).last_hidden_state
    expected = decoder(input_ids=ids).logits
    torch.testing.assert_close(lm_logits(decoder, hidden), expected, atol=1e-5, rtol=1e-5)
    uncapped = decoder.get_output_embeddings()(hidden)  # the wrong way
    assert torch.allclose(uncapped, expected, atol=1e-5) == (family == "qwen3")


def test_removing_twice_equals_removing_both(qwen2: Path) -> None:
    whole, decoder = decoder_of(qwen2), decoder_of(qwen2)
    assert remove_layers(decoder, 1, 1) == [0, 2, 3, 4, 5]
    assert remove_layers(decoder, 2, 2) == [0, 1, 4]  # in the numbering that the decoder has by now
    ids = torch.randint(3, 300, (1, 9))
    expected = hand_written_forward(whole, [whole.model.layers[i] for i in (0, 2, 5)], ids)
    with torch.no_grad():
        torch.testing.assert_close(decoder(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 0), (0, -1), (0, L), (0, L + 1), (-1, 2), (L, 1), (L - 1, 2), (2, L - 1)],
)
def test_nonsense_blocks_are_refused_and_leave_the_decoder_alone(
    qwen2: Path, start: int, size: int
) -> None:
    decoder = decoder_of(qwen2)
    with pytest.raises(UserError, match=r"(block_size|start_layer) -?\d+ is outside"):
        remove_layers(decoder, start, size)
    assert len(decoder.model.layers) == decoder.config.num_hidden_layers == L
    with pytest.raises(UserError, match="is outside"):
        PrunePlan(L, start, size)


@pytest.mark.parametrize(
    ("start", "size", "name"), [(1.0, 2, "start_layer"), (1, True, "block_size"), ("1", 2, "start")]
)
def test_blocks_that_are_no_whole_numbers_are_refused(
    qwen2: Path, start: Any, size: Any, name: str
) -> None:
    decoder = decoder_of(qwen2)
    with pytest.raises(UserError, match=rf"{name}.*no whole number.*block_size 1\.\.5"):
        remove_layers(decoder, start, size)
    assert len(decoder.model.layers) == L


class FakeQuantiser:
    """What transformers leaves on a model that it has loaded in 4 or 8 bits."""


def spoil_quantizer(decoder: Any) -> None:
    decoder.hf_quantizer = FakeQuantiser()


def spoil_config(decoder: Any) -> None:
    decoder.config.quantization_config = {"load_in_4bit": True}


def spoil_weights(decoder: Any) -> None:
    linear = decoder.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


def spoil_sharing(decoder: Any) -> None:
    decoder.model.layers[1].mlp.up_proj.weight = decoder.model.layers[4].mlp.up_proj.weight


def spoil_count(decoder: Any) -> None:
    decoder.config.num_hidden_layers = L - 1


def spoil_pattern(decoder: Any) -> None:
    decoder.config.activation_sparsity_pattern = [0.5] * L


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_quantizer, "is quantised"),
        (spoil_config, "is quantised"),
        (spoil_weights, "is quantised"),
        (spoil_sharing, "shares weights between layers"),
        (spoil_count, "has 6 layers and a config of 5"),
        (spoil_pattern, "activation_sparsity_pattern"),
    ],
)
def test_decoders_that_cannot_be_cut_are_refused_and_left_alone(
    qwen2: Path, spoil: Callable[[Any], None], message: str
) -> None:
    decoder = decoder_of(qwen2)
    spoil(decoder)
    layers, config = list(decoder.model.layers), copy.deepcopy(decoder.config.to_dict())
    with pytest.raises(UserError, match=message):
        remove_layers(decoder, 1, 2)
    assert list(decoder.model.layers) == layers and decoder.config.to_dict() == config


# ---------------------------------------------------------------------------------------------- cut and uncut


def everything(model: SpeechLLM) -> dict[str, Any]:
    """All that a model is: tensors by hash and place in memory, flags, classes, attributes, configs."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": [(name, digest(tensor), tensor.data_ptr()) for name, tensor in named],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "modules": [
            (name, id(module), type(module), sorted(vars(module)), module.training)
            for name, module in model.named_modules(remove_duplicate=False)
        ],
        "hooks": [
            name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks
        ],
        "indices": [
            (name, module.layer_idx)
            for name, module in model.named_modules()
            if hasattr(module, "layer_idx")
        ],
        "config": copy.deepcopy(model.decoder.config.to_dict()),
        "config attributes": copy.deepcopy(vars(model.decoder.config)),
        "generation": model.decoder.generation_config.to_dict(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part, value in before.items():
        assert after[part] == value, part


def work(model: SpeechLLM, names: list[str]) -> None:
    """What happens inside a cut: training of what the healing owns, and decoding with a cache."""
    set_trainable(model, names)
    model.train()
    batch = batch_of(model, [1, 2])
    if names:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            model(batch).loss.backward()
            optimizer.step()
    model.transcribe([batch.audio[0]])  # in eval mode, with a cache


@pytest.mark.parametrize(
    ("mode", "lora_rank"),
    [("none", 0), ("joint", 0), ("none", 4), ("decoder", 4), ("projector", 4), ("joint", 4)],
)
def test_cut_then_uncut_restores_everything(
    wavlm_layer: Path, decoder_folder: Path, mode: str, lora_rank: int
) -> None:
    model = build(
        wavlm_layer, decoder_folder, decoder_lora_rank=lora_rank, max_tokens_per_second=1.0
    )
    set_trainable(model, train_names(model)[:2])  # flags are part of the state too
    heal = None if mode == "none" else HealState(mode, LoraSettings(3, 6, 0.1))
    before = everything(model)
    for plan in (PrunePlan(L, 1, 3), PrunePlan(L, 0, 2), PrunePlan(L, 1, 3, control=True)):
        with cut(model, plan, heal) as names:
            assert len(model.decoder.model.layers) == len(plan.kept_layers)
            assert bool(names) == (mode != "none")
            work(model, names)
        assert_same(before, everything(model))


def test_cut_with_extras_then_uncut_restores_everything(
    wavlm_layer: Path, decoder_folder: Path
) -> None:
    """Compensation and adapters on every layer share a module: the one replaces what the others wrap."""
    model = build(wavlm_layer, decoder_folder, decoder_lora_rank=4, max_tokens_per_second=1.0)
    weight = torch.randn_like(model.decoder.model.layers[0].mlp.down_proj.weight)
    before = everything(model)
    heal = HealState("joint", LoraSettings(3, 6), lora_layers="all", compensation=weight)
    with cut(model, PrunePlan(L, 1, 3), heal) as names:
        assert len([name for name in names if "lora_A" in name]) == 3 * (L - 3)
        assert torch.equal(model.decoder.model.layers[0].mlp.down_proj.base_layer.weight, weight)
        work(model, names)
    assert_same(before, everything(model))


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("mode", ["none", "joint"])
def test_uncut_also_after_an_exception(
    wavlm_layer: Path, qwen2: Path, mode: str, control: bool
) -> None:
    model = build(wavlm_layer, qwen2, decoder_lora_rank=2)
    heal = None if mode == "none" else HealState(mode, LoraSettings(3, 6))
    before = everything(model)
    with (
        pytest.raises(ZeroDivisionError),
        cut(model, PrunePlan(L, 2, 2, control=control), heal) as names,
    ):
        work(model, names)
        raise ZeroDivisionError
    assert_same(before, everything(model))


def test_a_cut_that_fails_half_way_leaves_the_model_whole(wavlm_layer: Path, qwen2: Path) -> None:
    model = build(wavlm_layer, qwen2)
    before = everything(model)
    wrong = HealState("joint", LoraSettings(3, 6), {"projector.layers.9.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="does not fit"), cut(model, PrunePlan(L, 2, 2), wrong):
        pytest.fail("the cut succeeded")
    assert_same(before, everything(model))
    with (
        pytest.raises(UserError, match="no receiving layer"),
        cut(model, PrunePlan(L, 4, 2), wrong),
    ):
        pytest.fail("the cut succeeded")
    with pytest.raises(UserError, match="a decoder of 7 layers, this one has 6"):
        with cut(model, PrunePlan(7, 2, 2)):
            pytest.fail("the cut succeeded")
    assert_same(before, everything(model))


@torch.no_grad()
def test_cut_equals_remove_layers_and_heal_state_is_loaded_by_name(
    wavlm_layer: Path, llama: Path
) -> None:
    model, other = build(wavlm_layer, llama), build(wavlm_layer, llama)
    batch, plan = batch_of(model), PrunePlan(L, 1, 2)
    remove_layers(other.decoder, 1, 2)
    with cut(model, plan):
        assert torch.equal(model(batch).loss, other(batch).loss)
        plain = model(batch).loss
    settings = LoraSettings(3, 6)
    with cut(model, plan, HealState("joint", settings)) as names:
        shapes = {name: p.shape for name, p in model.named_parameters() if name in names}
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    with cut(model, plan, HealState("joint", settings, tensors)) as again:
        assert sorted(again) == sorted(tensors)
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())
        assert not any(p.requires_grad for p in parameters.values())
        # The receiving layer (3 before the cut) is layer 1 now, and only its MLP carries adapters.
        assert {name.split(".")[3] for name in names if name.startswith("decoder")} == {"1"}
        assert not torch.isclose(model(batch).loss, plain)
