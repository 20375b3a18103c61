"""Adapters that travel: off one decoder, on to another copy by name, switched, and merged for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.export import merge_and_compare, probe_logits
from speechllm_prune.prune.export_folder import ExportFault
from speechllm_prune.prune.lora import (
    LoraSettings,
    add_decoder_lora,
    add_healing_lora,
    merge_adapters,
)
from speechllm_prune.prune.task_adapters import (
    activate_adapter,
    attach_adapter,
    differing_tensors,
    lora_modules,
    merged_adapters,
    save_adapter,
    take_adapters,
)
from speechllm_prune.runtime import UserError

KEPT = [0, 1, 2, 3, 4, 5]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def adapted(folder: Path, seed: int, stage_1: bool = False, dtype: torch.dtype = torch.float32):
    """A decoder with healing adapters on layer 3, perhaps with stage-1 adapters of another rank."""
    decoder = load(folder, dtype)
    if stage_1:
        add_decoder_lora(decoder, LoraSettings(4, 6))
    add_healing_lora(decoder, 3, LoraSettings(2, 8))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return decoder.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("stage_1", [False, True])
def test_an_adapter_travels_to_another_copy_and_to_plain_peft(
    decoder_folder: Path, tmp_path: Path, stage_1: bool
) -> None:
    decoder = adapted(decoder_folder, 1, stage_1)
    expected = probe_logits(decoder)
    adapter = take_adapters(decoder)
    assert adapter is not None and take_adapters(decoder) is None
    assert differing_tensors(decoder, load(decoder_folder)) == []
    plain = probe_logits(decoder)
    assert (plain - expected).abs().max() > 0.01  # the adapter does something
    save_adapter(adapter, tmp_path / "a", KEPT, 6)
    attach_adapter(decoder, tmp_path / "a", "task_x", KEPT)
    torch.testing.assert_close(probe_logits(decoder), expected, rtol=0, atol=1e-5)
    activate_adapter(decoder, None)
    assert torch.equal(probe_logits(decoder), plain)
    theirs = PeftModel.from_pretrained(load(decoder_folder), str(tmp_path / "a")).eval()
    torch.testing.assert_close(probe_logits(theirs), expected, rtol=0, atol=1e-5)
    assert len(lora_modules(theirs)) == len(lora_modules(decoder))


@torch.no_grad()
def test_one_adapter_is_active_at_a_time(qwen2: Path, tmp_path: Path) -> None:
    logits = {}
    for seed, name in ((1, "a"), (2, "b")):
        decoder = adapted(qwen2, seed, stage_1=name == "b")
        logits[name] = probe_logits(decoder)
        adapter = take_adapters(decoder)
        assert adapter is not None
        save_adapter(adapter, tmp_path / name, KEPT, 6)
    shared = load(qwen2)
    for name in logits:
        attach_adapter(shared, tmp_path / name, f"task_{name}", KEPT)
    for name in ("a", "b", "a"):
        activate_adapter(shared, f"task_{name}")
        torch.testing.assert_close(probe_logits(shared), logits[name], rtol=0, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in shared.parameters())
    for module in lora_modules(shared).values():  # the wrong way: every adapter active
        module.set_adapter(list(module.lora_A), inference_mode=True)
    assert (probe_logits(shared) - logits["a"]).abs().max() > 0.01


def test_an_adapter_for_other_layers_is_refused(qwen2: Path, tmp_path: Path) -> None:
    decoder = adapted(qwen2, 1)
    adapter = take_adapters(decoder)
    assert adapter is not None
    save_adapter(adapter, tmp_path / "a", [0, 1, 2, 3, 6, 7], 8)
    with pytest.raises(UserError, match="layers"):
        attach_adapter(decoder, tmp_path / "a", "task_a", KEPT)
    # peft itself takes it without a word
    assert PeftModel.from_pretrained(decoder, str(tmp_path / "a")) is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_for_a_while_is_merging_and_is_undone(qwen2: Path, dtype: torch.dtype) -> None:
    decoder = adapted(qwen2, 1, stage_1=True, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    unmerged = probe_logits(decoder)
    with merged_adapters(decoder):
        assert not lora_modules(decoder)
        inside = probe_logits(decoder)
    after = decoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(probe_logits(decoder), unmerged)
    merge_adapters(decoder)
    assert torch.equal(probe_logits(decoder), inside)  # exactly the weights that are shipped
    difference = float((inside - unmerged).abs().max())
    assert difference < 1e-4 if dtype == torch.float32 else difference > 1e-4


def test_merging_for_a_while_is_undone_after_an_error(qwen2: Path) -> None:
    decoder = adapted(qwen2, 1)
    before = probe_logits_of(decoder)
    with pytest.raises(KeyError), merged_adapters(decoder):
        raise KeyError
    assert len(lora_modules(decoder)) == 3 and torch.equal(probe_logits_of(decoder), before)


@torch.no_grad()
def probe_logits_of(decoder: Any) -> torch.Tensor:
    return probe_logits(decoder)


@torch.no_grad()
def test_a_wrong_merge_is_noticed(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scaling(decoder: Any) -> None:
        for module in lora_modules(decoder).values():
            for adapter in module.lora_A:
                module.scaling[adapter] = 1.0
        merge_adapters(decoder)

    found = merge_and_compare(adapted(qwen2, 1))
    assert found is not None and found["max_logit_difference"] < 1e-4
    assert found["same_best_token"] == 1.0 and found["positions"] == 64
    assert merge_and_compare(load(qwen2)) is None
    monkeypatch.setattr("speechllm_prune.prune.export.merge_adapters", without_scaling)
    with pytest.raises(ExportFault, match="changed a logit"):
        merge_and_compare(adapted(qwen2, 1))
