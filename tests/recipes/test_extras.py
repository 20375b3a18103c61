"""Healing beyond the paper, by the verbs: distillation, compensation, adapters on all layers."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from speechllm_prune.experiment import Experiment
from speechllm_prune.prune import distill
from speechllm_prune.restore import restore
from tests.recipes.conftest import Study
from tests.recipes.verbs import SPLITS, good, load_json, refused, run, tensors

MODES = "none,none+comp,joint,joint+kl,joint+comp,joint+all,joint+comp+kl"


def test_a_sweep_with_extras(own_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = distill.ask_teacher
    monkeypatch.setattr(
        "speechllm_prune.stages.heal.ask_teacher",
        lambda *arguments: asked.append(1) or original(*arguments),
    )
    good("sweep", own_study.leaf, "--block_sizes", "1,2", "--start_layer", 2, "--heal_modes", MODES)
    assert asked == [1], "one teacher for all blocks and modes"
    heal, none = own_study.root / "heal", "l02n02-none"
    for tag in ("kl", "comp", "all", "comp-kl"):
        metrics = load_json(
            own_study.root / f"eval/l02n02-joint+{tag}" / SPLITS[0] / "metrics.json"
        )
        assert (metrics["heal_mode"], metrics["tag"]) == ("joint", tag)
        assert f"heal/l02n02-joint+{tag}/DONE.json" in "".join(metrics["inputs"])
    assert (own_study.root / f"eval/{none}+comp" / SPLITS[0] / "metrics.json").is_file()
    assert not (heal / none).exists() and (heal / f"{none}+comp" / "DONE.json").is_file()

    plain, kl, every = (tensors(heal / f"l02n02-joint{tag}") for tag in ("", "+kl", "+all"))
    assert plain.keys() == kl.keys()
    assert not all(torch.equal(plain[name], kl[name]) for name in plain), "the teacher teaches"
    layers = {name.split(".layers.")[1].split(".")[0] for name in every if ".lora_" in name}
    assert len(layers) == load_json(own_study.root / "prune/l02n02/plan.json")["num_layers"] - 2
    archived = (heal / "l02n02-joint+kl/hyperparams.yaml").read_text()
    assert "heal_kl_beta: 1.0" in archived

    again = run(
        "sweep", own_study.leaf, "--block_sizes", "1,2", "--start_layer", 2, "--heal_modes", MODES
    )
    assert again.code == 0 and asked == [1], "finished points are left alone"


def test_compensation_is_in_the_restored_model_and_only_there(own_study: Study) -> None:
    good(
        "heal",
        own_study.leaf,
        *("--block_size", 2, "--start_layer", 2, "--heal_mode", "none", "--compensate", True),
    )
    stage = own_study.root / "heal/l02n02-none+comp"
    weight = load_file(stage / "compensation.safetensors")["weight"]
    experiment = Experiment(own_study.results, "tiny", 3407)
    plain = restore(experiment, "full").decoder.get_decoder().layers
    healed = restore(experiment, "l02n02-none+comp").decoder.get_decoder().layers
    assert len(healed) == len(plain) - 2
    assert torch.equal(healed[1].mlp.down_proj.weight, weight)
    assert not torch.equal(plain[1].mlp.down_proj.weight, weight)
    assert torch.equal(healed[0].mlp.down_proj.weight, plain[0].mlp.down_proj.weight)
    assert torch.equal(healed[2].mlp.down_proj.weight, plain[4].mlp.down_proj.weight)
    assert load_json(stage / "DONE.json")["compensated"] is True


def test_teacher_is_kept_for_the_next_command(own_study: Study) -> None:
    options = ("--block_size", 2, "--start_layer", 2, "--heal_mode", "joint")
    good("heal", own_study.leaf, *options, "--heal_kl_beta", 0.5)
    (file,) = own_study.results.glob("features/teacher_*/rank0of1.safetensors")
    before = os.stat(file).st_mtime_ns
    good("heal", own_study.leaf, *options, "--heal_kl_beta", 0.5, "--tag", "again")
    assert os.stat(file).st_mtime_ns == before
    heal = own_study.root / "heal"
    one, two = tensors(heal / "l02n02-joint+kl"), tensors(heal / "l02n02-joint+kl-again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_requests(own_study: Study) -> None:
    heal = ("heal", own_study.leaf, "--block_size", 2)
    assert "evaluate.py --variant" in refused(*heal, "--start_layer", 2, "--heal_mode", "none")
    assert "layer 0" in refused(*heal, "--start_layer", 0, "--compensate", True)
    assert "a control has none" in refused(
        *heal, "--start_layer", 2, "--compensate", True, "--control"
    )
    assert "--heal_kl_beta 1.0" in refused(*heal, "--start_layer", 2, "--tag", "kl")
    sweep = ("sweep", own_study.leaf, "--block_sizes", 2)
    assert "none takes +comp" in refused(*sweep, "--heal_modes", "none+kl")
    assert "'joint+what'" in refused(*sweep, "--heal_modes", "joint+what")
