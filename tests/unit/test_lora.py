"""Adapters: where they sit, what they add, and that taking them off or folding them in is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.lora import (
    HEAL_ADAPTER,
    TRAIN_ADAPTER,
    LoraSettings,
    adapter_names,
    add_decoder_lora,
    add_healing_lora,
    merge_adapters,
    remove_healing_lora,
)
from tests import tiny

IDS = torch.tensor([[5, 9, 17, 200, 33]])


@pytest.fixture
def decoder(decoder_folder: Path):
    return AutoModelForCausalLM.from_pretrained(decoder_folder).eval().requires_grad_(False)


def stir(decoder) -> None:
    decoder.eval()  # new adapters come in train mode, with their dropout
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)


def wrapped(decoder) -> list[str]:
    return [name for name, module in decoder.named_modules() if isinstance(module, LoraLayer)]


def test_stage_1_adapters_sit_on_the_attention_of_every_layer(decoder) -> None:
    names = add_decoder_lora(decoder, LoraSettings(4, 8))
    assert wrapped(decoder) == [
        f"model.layers.{layer}.self_attn.{linear}"
        for layer in range(tiny.DECODER_LAYERS)
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    assert (
        names == adapter_names(decoder, TRAIN_ADAPTER)
        and adapter_names(decoder, HEAL_ADAPTER) == []
    )
    assert len(names) == 2 * len(wrapped(decoder))


@pytest.mark.parametrize("layer", [0, 3, tiny.DECODER_LAYERS - 1])
def test_healing_adapters_sit_on_one_mlp(decoder, layer: int) -> None:
    add_decoder_lora(decoder, LoraSettings(4, 8))
    names = add_healing_lora(decoder, layer, LoraSettings(2, 4))
    expected = [
        f"model.layers.{layer}.mlp.{linear}" for linear in ("gate_proj", "up_proj", "down_proj")
    ]
    assert [name for name in wrapped(decoder) if "mlp" in name] == expected
    assert sorted({name.split(".lora_")[0] for name in names}) == sorted(expected)
    assert not set(names) & set(adapter_names(decoder, TRAIN_ADAPTER))


def test_layer_1_is_not_layer_11(qwen2: Path, tmp_path: Path) -> None:
    tiny.write_decoder(tmp_path / "deep", "qwen2", num_layers=12)
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    assert {name.split(".")[2] for name in add_healing_lora(decoder, 1, LoraSettings(2, 4))} == {
        "1"
    }


@torch.no_grad()
def test_the_update_is_alpha_over_rank_times_b_a(decoder) -> None:
    settings = LoraSettings(rank=3, alpha=12)
    add_healing_lora(decoder, 2, settings)
    stir(decoder)
    linear = decoder.model.layers[2].mlp.up_proj
    x = torch.randn(4, linear.in_features)
    a, b = linear.lora_A[HEAL_ADAPTER].weight, linear.lora_B[HEAL_ADAPTER].weight
    assert a.shape == (3, linear.in_features) and b.shape == (linear.out_features, 3)
    expected = x @ linear.get_base_layer().weight.T + 4.0 * (x @ a.T) @ b.T
    torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_taking_healing_off_leaves_stage_1_alone(decoder) -> None:
    add_decoder_lora(decoder, LoraSettings(4, 8))
    stir(decoder)
    logits, names = decoder(IDS).logits, [name for name, _ in decoder.named_parameters()]
    modules = [(name, type(m), sorted(vars(m))) for name, m in decoder.named_modules()]
    add_healing_lora(decoder, 2, LoraSettings(2, 4))
    stir(decoder)
    assert not torch.allclose(decoder(IDS).logits, logits)
    remove_healing_lora(decoder)
    assert [name for name, _ in decoder.named_parameters()] == names
    assert [(name, type(m), sorted(vars(m))) for name, m in decoder.named_modules()] == modules
    remove_healing_lora(decoder)  # nothing to do is fine


@torch.no_grad()
def test_merged_adapters_are_gone_and_the_logits_stay(decoder, tmp_path: Path) -> None:
    plain = [name for name, _ in decoder.named_parameters()]
    base = decoder(IDS).logits
    add_decoder_lora(decoder, LoraSettings(4, 8, 0.5))
    add_healing_lora(decoder, 2, LoraSettings(2, 4, 0.5))
    stir(decoder)
    expected = decoder(IDS).logits
    assert not torch.allclose(expected, base, atol=1e-2)
    merge_adapters(decoder)
    assert [name for name, _ in decoder.named_parameters()] == plain and wrapped(decoder) == []
    torch.testing.assert_close(decoder(IDS).logits, expected, atol=1e-3, rtol=1e-3)
    decoder.save_pretrained(tmp_path / "merged")
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(reloaded.eval()(IDS).logits, decoder(IDS).logits)


def test_adapters_are_fp32_on_a_bf16_decoder(qwen2: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.bfloat16)
    names = add_decoder_lora(decoder, LoraSettings(4, 8)) + add_healing_lora(
        decoder, 1, LoraSettings(2, 4)
    )
    types = {name: p.dtype for name, p in decoder.named_parameters()}
    assert {types.pop(name) for name in names} == {torch.float32}
    assert set(types.values()) == {torch.bfloat16}


@torch.no_grad()
def test_merging_into_bf16_weights_rounds_only_once(qwen2: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.bfloat16)
    add_healing_lora(decoder, 1, LoraSettings(2, 4))
    stir(decoder)
    linear = decoder.model.layers[1].mlp.down_proj
    a, b = (getattr(linear, f"lora_{side}")[HEAL_ADAPTER].weight.double() for side in "AB")
    exact = linear.get_base_layer().weight.double() + 2.0 * b @ a
    merge_adapters(decoder)
    assert torch.equal(decoder.model.layers[1].mlp.down_proj.weight, exact.float().bfloat16())
