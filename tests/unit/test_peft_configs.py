"""Adapters of peft on a decoder that loses layers: what peft gets wrong without a word, and what ours does instead."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.lora import (
    HEAL_ADAPTER,
    LoraSettings,
    add_decoder_lora,
    add_healing_lora,
    check_adapter,
    merge_adapters,
    remap_adapter,
)
from speechllm_prune.prune.peft_configs import load_peft_adapter, save_peft_adapter
from speechllm_prune.prune.surgery import Removal, check_cached_decoding, remove_layers
from speechllm_prune.restore import HealState, cut, set_trainable
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics.common import build, stir_adapters

L = tiny.DECODER_LAYERS
START, SIZE, KEPT = 1, 2, [0, 3, 4, 5]
IDS = torch.tensor([[5, 9, 17, 200, 33, 41, 8]])
ALL = list(range(L))


def decoder_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def wrap(folder: Path, **options: Any) -> PeftModel:
    """A PeftModel whose adapter does something."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]} | options
    model = get_peft_model(decoder_of(folder), LoraConfig(**options))
    stir_adapters(model, "default")
    return model.eval()


def pruned(folder: Path) -> Any:
    decoder = decoder_of(folder)
    assert remove_layers(decoder, START, SIZE) == KEPT
    return decoder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def wrapped_layers(model: Any) -> set[int]:
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


CHOICES: dict[str, tuple[dict[str, Any], set[int]]] = {
    "every layer": ({}, {0, 1, 2, 3}),
    "some layers": ({"layers_to_transform": [0, 2, 3], "layers_pattern": "layers"}, {0, 1}),
    "one layer": ({"layers_to_transform": 5}, {3}),
    "full names": ({"target_modules": ["model.layers.2.mlp.up_proj", "layers.4.mlp.up_proj"]}, {2}),
    "a pattern": ({"target_modules": r"model\.layers\.[1-4]\.self_attn\.q_proj"}, {1, 2}),
    "ranks by layer": ({"rank_pattern": {"layers.3.mlp.up_proj": 3}}, {0, 1, 2, 3}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_an_attached_adapter_survives_saving_and_loading(
    decoder_folder: Path, tmp_path: Path, choice: str
) -> None:
    options, expected_layers = CHOICES[choice]
    model = wrap(decoder_folder, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    remove_layers(merged, START, SIZE)  # merging first and pruning then is the same thing
    assert remove_layers(model, START, SIZE) == KEPT
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=1e-4)
    assert check_cached_decoding(model) < 1e-4
    assert wrapped_layers(model) == expected_layers
    names = model.base_model.targeted_module_names
    assert {int(name.split(".")[2]) for name in names} == expected_layers
    model.save_pretrained(tmp_path)
    assert not any(
        f"layers.{n}." in name for name in load_peft_weights(str(tmp_path)) for n in (4, 5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reloaded = PeftModel.from_pretrained(pruned(decoder_folder), tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("choice", ["some layers", "one layer"])
def test_a_stale_layers_to_transform_fails_or_hits_other_layers(
    qwen2: Path, tmp_path: Path, choice: str
) -> None:
    """The wrong way: the layers change, the config of the adapter does not."""
    model = wrap(qwen2, **CHOICES[choice][0])
    old = model.peft_config["default"].layers_to_transform
    remove_layers(model, START, SIZE)
    expected = logits(model)
    assert model.peft_config["default"].layers_to_transform == sorted(CHOICES[choice][1])
    model.peft_config["default"].layers_to_transform = old
    model.save_pretrained(tmp_path)
    if choice == "one layer":
        with pytest.raises(Exception, match="layers_to_transform"):
            PeftModel.from_pretrained(pruned(qwen2), tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = PeftModel.from_pretrained(pruned(qwen2), tmp_path).eval()
    assert (logits(reloaded) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("choice", CHOICES)
def test_undo_restores_what_peft_knows(qwen2: Path, choice: str) -> None:
    model = wrap(qwen2, **CHOICES[choice][0])
    expected, config = logits(model), model.peft_config["default"].to_dict()
    names = list(model.base_model.targeted_module_names)
    removal = Removal(model, START, SIZE)
    removal.apply()
    assert model.base_model.targeted_module_names != names
    removal.undo()
    assert model.peft_config["default"].to_dict() == config
    assert model.base_model.targeted_module_names == names
    assert torch.equal(logits(model), expected)


def test_adapters_that_cannot_follow_are_refused(qwen2: Path) -> None:
    only_removed = wrap(qwen2, layers_to_transform=[1, 2])
    with pytest.raises(UserError, match="'default' sits only on layers that would be removed"):
        remove_layers(only_removed, START, SIZE)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="depends on the number of layers"):
        remove_layers(get_peft_model(decoder_of(qwen2), prefix), START, SIZE)
    for model in (only_removed, decoder_of(qwen2)):
        assert len(model.get_decoder().layers) == L


def test_our_own_injected_adapters_move_with_their_layers(qwen2: Path) -> None:
    decoder = decoder_of(qwen2)
    add_decoder_lora(decoder, LoraSettings(2, 4))
    add_healing_lora(decoder, 4, LoraSettings(2, 4))
    stir_adapters(decoder)
    stir_adapters(decoder, HEAL_ADAPTER)
    decoder.eval()
    merged = copy.deepcopy(decoder)
    merge_adapters(merged)
    for model in (decoder, merged):
        remove_layers(model, START, SIZE)
    torch.testing.assert_close(logits(decoder), logits(merged), atol=1e-4, rtol=1e-4)
    heal = [name for name, _ in decoder.named_parameters() if f".{HEAL_ADAPTER}." in name]
    assert {name.split(".")[2] for name in heal} == {"2"}


# ---------------------------------------------------------------- an adapter of the unpruned decoder


def test_peft_loads_an_adapter_of_the_whole_decoder_on_a_pruned_one_without_a_word(
    decoder_folder: Path, tmp_path: Path
) -> None:
    model = wrap(decoder_folder)
    save_peft_adapter(model, tmp_path, ALL)
    remove_layers(model, START, SIZE)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrong = PeftModel.from_pretrained(pruned(decoder_folder), tmp_path).eval()
    assert (logits(wrong) - expected).abs().max() > 0.1
    tensors = load_peft_weights(str(tmp_path))
    with pytest.raises(UserError, match=r"made on layers 0\.\.5, the decoder has 0, 3\.\.5"):
        check_adapter(tensors, ALL, KEPT)
    assert torch.equal(logits(load_peft_adapter(pruned(decoder_folder), tmp_path, KEPT)), expected)


def test_an_adapter_is_remapped_again_when_more_layers_go(qwen2: Path, tmp_path: Path) -> None:
    model = wrap(qwen2)
    remove_layers(model, START, SIZE)
    save_peft_adapter(model, tmp_path, KEPT)
    same = load_peft_adapter(pruned(qwen2), tmp_path, KEPT)
    assert torch.equal(logits(same), logits(model))
    remove_layers(model, 1, 2)  # of [0, 3, 4, 5]: 3 and 4
    smaller = decoder_of(qwen2)
    remove_layers(smaller, 1, 4)
    assert torch.equal(logits(load_peft_adapter(smaller, tmp_path, [0, 5])), logits(model))


def test_an_adapter_without_a_list_or_of_other_layers_is_refused(
    qwen2: Path, tmp_path: Path
) -> None:
    model = wrap(qwen2)
    model.save_pretrained(tmp_path)  # as peft saves it
    with pytest.raises(UserError, match="does not say which layers it was made on"):
        load_peft_adapter(decoder_of(qwen2), tmp_path, ALL)
    remove_layers(model, START, SIZE)
    save_peft_adapter(model, tmp_path / "pruned", KEPT)
    with pytest.raises(UserError, match=r"made on layers 0, 3\.\.5, the decoder has 0\.\.5"):
        load_peft_adapter(decoder_of(qwen2), tmp_path / "pruned", ALL)
    elsewhere = decoder_of(qwen2)
    remove_layers(elsewhere, 3, 2)
    with pytest.raises(UserError, match="would land on other layers"):
        load_peft_adapter(elsewhere, tmp_path / "pruned", [0, 1, 2, 5])


def test_remapped_names() -> None:
    tensor = torch.zeros(1)
    heads = "base_model.model.model.layers", "decoder.model.layers", "model.language_model.layers"
    for head in heads:
        names = {f"{head}.{n}.mlp.up_proj.lora_A.weight": tensor for n in (0, 2, 13)}
        found = remap_adapter(names, [0, 1, 13])
        assert [name.removeprefix(head) for name in found] == [
            ".0.mlp.up_proj.lora_A.weight",
            ".2.mlp.up_proj.lora_A.weight",
        ]
    other = [
        "projector.layers.0.weight",
        "encoder.model.layers.1.x",
        "vision_tower.encoder.layers.1.y",
    ]
    assert list(remap_adapter(dict.fromkeys(other, tensor), [1])) == other
    for wrong in ([3, 1], [1, 1]):
        with pytest.raises(UserError, match="rising layer numbers"):
            remap_adapter({}, wrong)


def test_the_check_of_names_and_lists() -> None:
    name = "model.layers.{}.mlp.up_proj.lora_A.weight".format
    check_adapter([name(3)], KEPT, KEPT)
    with pytest.raises(UserError, match=r"tensors of layer 4, the decoder has 4 layers"):
        check_adapter([name(4)], KEPT, KEPT)


# ---------------------------------------------------------------- where healing's adapters sit


def test_a_loose_pattern_also_takes_layer_13(tmp_path: Path) -> None:
    tiny.write_decoder(tmp_path, "qwen2", num_layers=14)
    loose = LoraConfig(r=2, target_modules=r".*3\.mlp\.(gate|up|down)_proj")
    wrong = inject_adapter_in_model(loose, decoder_of(tmp_path))
    assert wrapped_layers(wrong) == {3, 13}
    right = decoder_of(tmp_path)
    add_healing_lora(right, 3, LoraSettings(2, 4))
    assert wrapped_layers(right) == {3}


def test_modules_that_are_not_there_are_not_passed_over(qwen2: Path) -> None:
    """peft is content if any of the targets exists."""
    targets = {"target_modules": ["gate_proj", "up_proj", "no_such_proj"]}
    wrong = get_peft_model(decoder_of(qwen2), LoraConfig(r=2, **targets, layers_to_transform=[1]))
    assert sum(isinstance(module, LoraLayer) for module in wrong.modules()) == 2
    decoder = decoder_of(qwen2)
    mlp = decoder.model.layers[1].mlp
    mlp.other_proj = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(AssertionError):
        add_healing_lora(decoder, 1, LoraSettings(2, 4))


def test_a_whole_speechllm_as_the_target_would_also_adapt_the_encoder(
    wavlm_layer: Path, qwen2: Path
) -> None:
    model = build(wavlm_layer, qwen2)
    wrong = copy.deepcopy(model)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), wrong
    )
    adapted = [n for n, m in wrong.named_modules() if isinstance(m, LoraLayer)]
    assert any(name.startswith("encoder.") for name in adapted)
    add_decoder_lora(model.decoder, LoraSettings(2, 4))
    adapted = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert adapted and all(name.startswith("decoder.") for name in adapted)


def test_healing_leaves_the_first_adapter_frozen(wavlm_layer: Path, qwen2: Path) -> None:
    """In peft, activating both adapters makes both trainable, and adding one alone leaves it without effect."""
    wrong = wrap(qwen2, target_modules=["q_proj"])
    heal = LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1])
    wrong.add_adapter(HEAL_ADAPTER, heal)
    stirred = logits(wrong)
    stir_adapters(wrong, HEAL_ADAPTER)
    assert torch.equal(logits(wrong), stirred)  # it does nothing
    wrong.base_model.set_adapter(["default", HEAL_ADAPTER])
    assert not torch.equal(logits(wrong), stirred)
    trainable = {name.split(".")[-2] for name, p in wrong.named_parameters() if p.requires_grad}
    assert trainable == {"default", HEAL_ADAPTER}

    from speechllm_prune.prune.surgery import PrunePlan

    model = build(wavlm_layer, qwen2, decoder_lora_rank=2)
    with cut(model, PrunePlan(L, START, SIZE), HealState("decoder", LoraSettings(2, 4))) as names:
        set_trainable(model, names)
        trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {HEAL_ADAPTER} and len(names) == 6
        plain = logits(model.decoder)
        stir_adapters(model, HEAL_ADAPTER)
        assert not torch.equal(logits(model.decoder), plain)


@torch.no_grad()
def test_two_adapters_merged_one_by_one_in_bf16_round_twice(qwen2: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.bfloat16).eval()
    add_decoder_lora(decoder, LoraSettings(2, 4))
    layer = decoder.model.layers[1]
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), layer.self_attn, adapter_name="b"
    )
    for name in ("stage1", "b"):
        stir_adapters(decoder, name)
    layer.self_attn.q_proj.lora_A["b"].float()
    linear = layer.self_attn.q_proj
    exact = linear.get_base_layer().weight.double()
    one_by_one = linear.get_base_layer().weight.clone()
    for name in ("stage1", "b"):
        update = linear.scaling[name] * (
            linear.lora_B[name].weight.double() @ linear.lora_A[name].weight.double()
        )
        exact = exact + update
        one_by_one = one_by_one + update.bfloat16()  # the wrong way
    merge_adapters(decoder)
    merged = decoder.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(merged, exact.float().bfloat16())
    assert not torch.equal(one_by_one, merged)
    assert (one_by_one - exact).abs().mean() > 1.2 * (merged - exact).abs().mean()


def test_an_adapter_state_dict_of_peft_is_what_is_remapped(qwen2: Path) -> None:
    model = wrap(qwen2)
    before = get_peft_model_state_dict(model)
    remove_layers(model, START, SIZE)
    after = get_peft_model_state_dict(model)
    remapped = remap_adapter(before, KEPT)
    assert list(remapped) == list(after)
    assert all(torch.equal(remapped[name], tensor) for name, tensor in after.items())
