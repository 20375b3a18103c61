"""The same verbs on other systems: a LoRA baseline, Whisper, Llama, tied embeddings, translation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from speechllm_prune import SpeechLLM
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import (
    SPLITS,
    audio_of,
    good,
    hypotheses,
    load_json,
    load_rows,
    refused,
    tensors,
)


def whole_study(study: Study, mode: str = "joint") -> str:
    """Train, measure, heal with export, evaluate; the export transcribes as evaluate does. Returns the variant."""
    good("train", study.leaf)
    good("measure", study.leaf)
    good("heal", study.leaf, "--block_size", 2, "--heal_mode", mode, "--export")
    variant = study.variant(2, mode)
    good("evaluate", study.leaf, "--variant", variant)
    expected = hypotheses(study.root, variant)
    model = SpeechLLM.from_pretrained(study.root / "heal" / variant / "export")
    files = [audio_of(study.corpus, name) for name in expected]
    assert model.transcribe(files) == list(expected.values())
    return variant


def test_lora_baseline(make_leaf: MakeLeaf) -> None:
    study = make_leaf(decoder_lora_rank=4, decoder_lora_alpha=8)
    variant = whole_study(study)
    trained, healed = tensors(study.root / "train"), tensors(study.root / "heal" / variant)
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 6 * 4 * 2 and all("self_attn" in name for name in adapters)
    moved = [name for name in adapters if "lora_B" in name and trained[name].abs().sum() > 0]
    assert len(moved) == 24, "adapters start at zero and are trained"
    assert not adapters & set(healed), "stage-1 adapters are frozen in healing"
    assert {name.split(".")[4] for name in healed if name.startswith("decoder")} == {"mlp"}
    good("measure", study.leaf, "--measure_input", "text")
    text = load_json(study.root / "measure/text/DONE.json")
    assert "train/DONE.json" in text["inputs"], "text mode measures the decoder with its adapters"


def test_lora_baseline_text_mode_needs_its_training(make_leaf: MakeLeaf) -> None:
    study = make_leaf(decoder_lora_rank=4)
    message = refused("measure", study.leaf, "--measure_input", "text")
    assert f"python train.py {study.leaf}" in message


def test_healing_lora_leaves_the_stage_1_adapters_on(make_leaf: MakeLeaf) -> None:
    """With adapters off, the cut model would compute something else: their removal must be visible in the logits."""
    from speechllm_prune.experiment import Experiment
    from speechllm_prune.restore import restore

    study = make_leaf(decoder_lora_rank=4, lr=0.02)
    good("train", study.leaf)
    good("measure", study.leaf)
    good("prune", study.leaf, "--block_size", 2, "--export")
    variant = study.variant(2, "none")
    model = restore(Experiment(study.results, "tiny", 3407), variant, device="cpu")
    exported = SpeechLLM.from_pretrained(study.root / "prune" / variant[:6] / "export")
    ids = torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        on, merged = model.decoder(ids).logits, exported.decoder(ids).logits
        for module in model.decoder.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
        off = model.decoder(ids).logits
    assert (on - off).abs().max() > 0.01
    torch.testing.assert_close(on, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"cache_features": False}], ids=["cached", "not cached"])
def test_whisper(make_leaf: MakeLeaf, whisper: Path, changes: dict) -> None:
    whole_study(make_leaf(encoder_hub=str(whisper), frame_stack=10, **changes), "projector")


@pytest.mark.parametrize("decoder", ["llama", "qwen2_tied"])
def test_other_decoders(make_leaf: MakeLeaf, decoder: str, request: pytest.FixtureRequest) -> None:
    whole_study(make_leaf(decoder_hub=str(request.getfixturevalue(decoder))), "decoder")


def test_cached_features_change_nothing(make_leaf: MakeLeaf) -> None:
    """Up to rounding: features are computed in other batches than training's."""
    found = {}
    for cached in (True, False):
        study = make_leaf(experiment_name=f"cached_{cached}".lower(), cache_features=cached)
        good("train", study.leaf)
        found[cached] = tensors(study.root / "train"), hypotheses(study.root, "full")
    assert found[True][1] == found[False][1]
    for name, tensor in found[True][0].items():
        torch.testing.assert_close(tensor, found[False][0][name], rtol=1e-3, atol=1e-4)


def test_translation(make_leaf: MakeLeaf, tiny_manifests: Path, tmp_path: Path) -> None:
    """A task ast leaf on manifests that exist: BLEU with its signature, source text in text mode."""
    study = make_leaf(
        task="ast", target_language="de", prompt="Translate English speech to German text."
    )
    good("train", study.leaf)
    good("measure", study.leaf)
    good("sweep", study.leaf, "--block_sizes", "1", "--heal_modes", "joint")
    variant = study.variant(1)
    for name in ("full", variant):
        folder = study.root / "eval" / name / SPLITS[0]
        metrics = load_json(folder / "metrics.json")
        assert (metrics["task"], metrics["metric"]) == ("ast", "bleu") and 0 <= metrics[
            "value"
        ] <= 100
        assert metrics["signature"].startswith("nrefs:1|") and "tok:13a" in metrics["signature"]
        assert not {"substitutions", "reference_words"} & set(metrics)
        rows = load_rows(folder / "hyps.jsonl")
        assert set(rows[0]) == {"id", "ref", "hyp", "duration", "num_tokens", "capped", "looped"}
        assert (folder / "bleu.txt").is_file() and not (folder / "wer.txt").exists()
    assert "valid bleu" in (study.root / "train/train_log.txt").read_text()
    assert "valid_bleu" in load_json(study.root / "train/DONE.json")
    assert "BLEU" in good("report", study.root).out
    with open(study.root / "report/points.csv", newline="") as stream:
        assert {row["metric"] for row in csv.DictReader(stream)} == {"bleu"}


def test_extension_points(make_leaf: MakeLeaf) -> None:
    """A leaf may take another optimiser, schedule, activation and projector, whole."""
    study = make_leaf()
    text = study.leaf.read_text() + (
        "activation: !name:torch.nn.SiLU\n"
        "opt_class: !name:torch.optim.AdamW\n    weight_decay: 0.1\n"
        "lr_scheduler: !name:speechllm_prune.brain.LinearWarmdown\n    warmup_steps: 2\n"
    )
    study.leaf.write_text(text)
    good("train", study.leaf)
    archived = (study.root / "train/hyperparams.yaml").read_text()
    assert "!name:torch.optim.AdamW" in archived and "final_lr_share: !ref" not in archived
    line = (study.root / "train/train_log.txt").read_text().splitlines()[0]
    assert "lr: " in line
    good("measure", study.leaf)
    study.leaf.write_text(text.replace("SiLU", "ReLU"))
    assert "SiLU" in refused("train", study.leaf)
    assert yaml.safe_load(text.split("activation")[0])["lr"] == 1e-3


def test_objects_from_elsewhere_need_a_word(make_leaf: MakeLeaf) -> None:
    study = make_leaf()
    study.leaf.write_text(study.leaf.read_text() + "lr_scheduler: !name:collections.OrderedDict\n")
    assert "--allow_module collections" in refused("train", study.leaf, "--check")
    good("train", study.leaf, "--check", "--allow_module", "collections")
    study.leaf.write_text(study.leaf.read_text() + "seed: !apply:os.getpid []\n")
    assert "seed" in refused("train", study.leaf, "--check", "--allow_module", "collections")
