"""Healing through the real training stage on a tiny experiment: where it starts, what it changes, what it leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speechllm_prune import training
from speechllm_prune.brain import SpeechLLMBrain
from speechllm_prune.cli import open_run
from speechllm_prune.prune.lora import LoraSettings
from speechllm_prune.prune.surgery import PrunePlan
from speechllm_prune.restore import HealState, cut, set_trainable
from speechllm_prune.stages.heal import heal
from speechllm_prune.training import train
from speechllm_prune.workbench import Workbench
from tests import tiny
from tests.numerics.common import BASE, batch_of, build, tensors_of

L = tiny.DECODER_LAYERS
PLAN = PrunePlan(L, 1, 2)
CONTROL = PrunePlan(L, 1, 2, control=True)


@dataclass
class Record:
    """What one run of `training.fit` did."""

    names: list[str] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    ids: list[list[str]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    noise: Tensor | None = None  # state of the random numbers at the first batch

    @property
    def changed(self) -> set[str]:
        return {name for name, old in self.before.items() if not torch.equal(old, self.after[name])}


@pytest.fixture(scope="module")
def records(
    wavlm_layer: Path,
    qwen2: Path,
    tiny_manifests: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Record]]:
    """Stage 1 with adapters, then every heal mode and the control, on one workbench, each run watched."""
    folder = tmp_path_factory.mktemp("healing")
    values: dict[str, Any] = {
        "experiment_name": "healing",
        "data_folder": "nowhere",
        "results_folder": folder,
        "manifest_folder": tiny_manifests,
        "skip_prep": True,
        "train_manifests": "[librispeech/train-clean-100]",
        "encoder_hub": wavlm_layer,
        "decoder_hub": qwen2,
        "projector_dim": 16,
        "decoder_lora_rank": 2,
        "device": "cpu",
        "batch_size": 3,
        "lr": 0.01,
        "num_steps": 3,
        "heal_steps": 3,
        "heal_lora_rank": 2,
        "valid_utterances": 1,
        "max_tokens_per_second": 1.0,
    }
    leaf = folder / "leaf.yaml"
    lines = [f"base: {BASE}", *(f"{key}: {value}" for key, value in values.items())]
    leaf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = open_run("train", "", [str(leaf)])
    assert run is not None
    bench = Workbench(run)
    found: dict[str, Record] = {}
    with pytest.MonkeyPatch.context() as patch:
        real_fit, real_batch = training.fit, SpeechLLMBrain.fit_batch

        def fit(bench: Workbench, stage: str, *args: Any, **facts: Any) -> None:
            record = found[stage] = Record(args[1], tensors_of(bench.model))

            def fit_batch(brain: SpeechLLMBrain, batch: Any) -> Tensor:
                if not record.ids:
                    record.noise = torch.random.get_rng_state()
                record.ids.append(batch.ids)
                record.rates.append(brain.optimizer.param_groups[0]["lr"])
                return real_batch(brain, batch)

            patch.setattr(SpeechLLMBrain, "fit_batch", fit_batch)
            real_fit(bench, stage, *args, **facts)
            record.after = tensors_of(bench.model)

        patch.setattr(training, "fit", fit)
        patch.setattr("speechllm_prune.stages.heal.fit", fit)
        train(bench)
        bench.model.train()  # a careless caller
        full = tensors_of(bench.model)
        for mode in ("decoder", "projector", "joint"):
            heal(bench, PLAN, mode)
        heal(bench, CONTROL, "joint")
        found["full"] = Record(before=full, after=tensors_of(bench.model))
    yield found


def test_training_changes_the_projector_and_all_adapters_and_nothing_else(
    records: dict[str, Record],
) -> None:
    record = records["train"]
    assert record.changed == set(record.names)
    assert {name.split(".")[0] for name in record.names} == {"projector", "decoder"}
    adapters = [name for name in record.names if name.startswith("decoder")]
    assert len(adapters) == L * 4 * 2 and all(".self_attn." in name for name in adapters)


@pytest.mark.parametrize("mode", ["decoder", "projector", "joint", "control"])
def test_only_the_named_tensors_change_in_each_heal_mode(
    records: dict[str, Record], mode: str
) -> None:
    stage = "heal/control-l01n02-joint" if mode == "control" else f"heal/l01n02-{mode}"
    record = records[stage]
    assert record.changed == set(record.names)
    layer = PLAN.receiving_layer if mode == "control" else PLAN.start_layer
    expected = {
        f"decoder.model.layers.{layer}.mlp.{linear}.lora_{side}.heal.weight"
        for linear in ("gate_proj", "up_proj", "down_proj")
        for side in "AB"
        if mode != "projector"
    }
    if mode != "decoder":
        expected |= {name for name in record.before if name.startswith("projector.")}
    assert set(record.names) == expected


def test_healing_leaves_the_full_model_as_it_was(records: dict[str, Record]) -> None:
    assert records["full"].changed == set()
    assert records["full"].before.keys() == records["full"].after.keys()


def test_every_mode_starts_from_the_same_state_data_and_rate(records: dict[str, Record]) -> None:
    joint = records["heal/l01n02-joint"]
    receiver = f"layers.{PLAN.receiving_layer}."

    def adapters(record: Record, layer: str) -> list[Tensor]:
        return [
            t
            for name, t in sorted(record.before.items())
            if f"{layer}mlp" in name and ".heal." in name
        ]

    for name, record in records.items():
        if not name.startswith("heal/"):
            continue
        assert record.ids == joint.ids and len(record.ids) == 3
        assert record.rates == joint.rates
        # Only some modes draw adapters; none may have another dropout for it.
        assert torch.equal(record.noise, joint.noise)
        for projector in [key for key in record.before if key.startswith("projector.")]:
            assert torch.equal(record.before[projector], records["full"].before[projector])
        if "projector" not in name:
            layer = receiver if "control" in name else f"layers.{PLAN.start_layer}."
            starts = adapters(record, layer)
            assert len(starts) == 6
            reference = adapters(records["heal/l01n02-joint"], f"layers.{PLAN.start_layer}.")
            assert all(torch.equal(a, b) for a, b in zip(starts, reference, strict=True))
    # The full peak again, whatever stage 1 ended with, and other batches than those of a fixed order.
    assert joint.rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_the_kept_layers_enter_healing_with_their_stage_1_weights(
    records: dict[str, Record],
) -> None:
    full, cut_state = records["full"].before, records["heal/l01n02-joint"].before
    for new, old in enumerate(PLAN.kept_layers):
        for name, tensor in cut_state.items():
            if f"decoder.model.layers.{new}." in name and ".heal." not in name:
                original = name.replace(f"layers.{new}.", f"layers.{old}.").replace(
                    ".base_layer", ""
                )
                expected = full.get(original)
                if expected is None:  # attention is wrapped in stage 1 already
                    expected = full[name.replace(f"layers.{new}.", f"layers.{old}.")]
                assert torch.equal(tensor, expected), name


# ---------------------------------------------------------------------------------------------- on the model alone


@pytest.mark.parametrize("plan", [PLAN, CONTROL], ids=["cut", "control"])
@torch.no_grad()
def test_zero_initialised_adapters_leave_logits_bit_equal(
    wavlm_layer: Path, decoder_folder: Path, plan: PrunePlan
) -> None:
    model = build(wavlm_layer, decoder_folder, decoder_lora_rank=2)

    def logits() -> Tensor:
        inputs = model.inputs_for(batch_of(model))
        return model.decoder(
            inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask
        ).logits

    with cut(model, plan):
        plain = logits()
    with cut(model, plan, HealState("decoder", LoraSettings(4, 8, 0.5))) as names:
        assert torch.equal(logits(), plain)
        set_trainable(model, names)
        model.train()
        assert torch.equal(logits(), plain)  # dropout of what is multiplied by zero
        dict(model.named_parameters())[names[1]].data.fill_(0.1)
        assert not torch.isclose(logits(), plain).all()


@pytest.mark.parametrize("mode", ["decoder", "joint"])
def test_decoder_healing_does_not_go_back_below_the_cut(
    wavlm_layer: Path, qwen2: Path, mode: str
) -> None:
    model = build(wavlm_layer, qwen2, decoder_lora_rank=2)
    with cut(model, PrunePlan(L, 2, 2), HealState(mode, LoraSettings(2, 4))) as names:
        set_trainable(model, names)
        model.train()
        tracked: list[bool] = []
        kept = [0] * (L - 2)  # tensors that each layer leaves for the backward pass
        inside: list[int] = []

        def leave(layer: Any, inputs: Any, output: Any) -> None:
            tracked.append(output.requires_grad)
            inside.pop()

        def pack(tensor: Tensor) -> Tensor:
            if inside and not isinstance(tensor, torch.nn.Parameter):
                kept[inside[-1]] += 1
            return tensor

        handles = []
        for number, layer in enumerate(model.decoder.model.layers):
            enter = functools.partial(lambda number, *_: inside.append(number), number)
            handles += [
                layer.register_forward_pre_hook(enter),
                layer.register_forward_hook(leave),
            ]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch_of(model)).loss.backward()
        for handle in handles:
            handle.remove()
        below = mode == "joint"  # to reach the projector, gradients pass through all layers
        assert tracked == [below, below, True, True]
        assert [count > 0 for count in kept] == tracked
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == set(names)
