"""Every leaf of the paper: complete, true to its tables, built on the meta device, and short of nothing but weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from speechllm_prune import restore
from speechllm_prune.data.manifest import Row, write_manifest
from speechllm_prune.models.estimate import estimate, setting
from speechllm_prune.models.facts import decoder_facts, meta_decoder, meta_encoder
from speechllm_prune.prune.lora import ATTENTION
from speechllm_prune.reporting.paper import TABLE2, removed_layers
from tests.recipes.leaves import (
    ASR,
    AST,
    HPARAMS,
    PAPER_LEAVES,
    SYSTEMS,
    TRAINED_LEAVES,
    cells,
    head_of,
    loaded,
    path_of,
)
from tests.recipes.verbs import good, load_json, refused

PRESET = {
    "lr": 1e-4,
    "num_steps": 100_000,
    "batch_size": 4,
    "batch_positions": 0,
    "heal_steps": 10_000,
    "warmup_steps": 0,
    "final_lr_share": 0.0,
    "warmdown_share": 1.0,
    "grad_accumulation_factor": 1,
}
"""Preset `paper`. Its steps belong to its batch: `large_batch` has 13,000 steps of 800 seconds."""


# ---------------------------------------------------------------------------------------------- each leaf
def test_all_leaves_are_here() -> None:
    names = {path.stem for path in HPARAMS.glob("*.yaml") if not path.stem.startswith("demo")}
    assert names == {*TRAINED_LEAVES, "text"}


@pytest.mark.parametrize("name", TRAINED_LEAVES)
def test_a_leaf_names_what_decides_its_result(name: str) -> None:
    """Schedule, prompt, what is measured on and what is evaluated stand in the leaf itself, not only in the base."""
    values = yaml.safe_load(path_of(name).read_text(encoding="utf-8"))
    wanted = "task lr num_steps batch_size heal_steps prompt encoder_hub decoder_hub train_manifests valid_manifest"
    assert set(wanted.split()) | {"measure_manifest", "eval_manifests"} <= set(values)
    held_out = {values["valid_manifest"], values["measure_manifest"]}
    assert held_out.isdisjoint(values["train_manifests"] + values["eval_manifests"])
    assert not any("dev-other" in str(value) for value in values.values())
    assert "schedule:" in head_of(name).lower() and "hardware:" in head_of(name).lower()


@pytest.mark.parametrize("name", PAPER_LEAVES)
def test_presets_are_not_mixed(name: str) -> None:
    hparams = loaded(name)
    schedule = {key: hparams[key] for key in PRESET}
    assert hparams["heal_steps"] * 10 == hparams["num_steps"]
    if name == "librispeech_llama8b":
        differing = {key for key in PRESET if schedule[key] != PRESET[key]}
        assert differing == {"lr", "num_steps", "heal_steps"}, "its own schedule, as in the paper"
        assert "preset" not in head_of(name)
    else:
        assert schedule == PRESET and "preset `paper`" in head_of(name)


@pytest.mark.parametrize("name", ASR)
def test_asr_leaves_quote_the_paper(name: str) -> None:
    system, head = SYSTEMS[ASR[name]], head_of(f"librispeech_{name}")
    n = removed_layers(system.drop, system.num_layers)
    assert f"Table 1, row {system.model}:" in head and "Here: not measured." in head
    assert cells(system.unpruned) in head and cells(system.pruned) in head
    assert f"{n} of {system.num_layers} layers ({system.drop} %)" in head
    assert f"sweep.py hparams/librispeech_{name}.yaml --block_sizes {n} --heal_modes joint" in head
    hparams = loaded(f"librispeech_{name}")
    assert bool(hparams["decoder_lora_rank"]) == system.lora and hparams["frame_stack"] == 5
    assert hparams["decoder_hub"].split("/")[1] == system.model.removesuffix(" + LoRA")
    assert hparams["encoder_hub"] == "microsoft/wavlm-large"
    assert hparams["eval_manifests"][-1] == "loquacious/dev" and hparams["tolerance"] == 0.25
    gated = decoder_facts(hparams["decoder_hub"]).gated
    assert gated == (f"hf download {hparams['decoder_hub']}" in head)


@pytest.mark.parametrize("name", AST)
def test_ast_leaves_quote_the_paper(name: str) -> None:
    source, target, column = AST[name]
    head, hparams = head_of(f"covost2_{name}_qwen7b"), loaded(f"covost2_{name}_qwen7b")
    assert cells(row.ast_path[column] for row in TABLE2) in head
    assert cells(row.asr_path[column] for row in TABLE2) in head
    sizes = [removed_layers(row.drop, 28) for row in TABLE2]
    assert f"--block_sizes {','.join(map(str, sizes[1:]))} " in head
    assert " / ".join(f"{row.drop:g}" for row in TABLE2) in head
    assert hparams["train_manifests"] == [f"covost2_{source}_{target}_standard/train"]
    assert (hparams["task"], hparams["target_language"]) == ("ast", target)
    assert (hparams["text_case"], hparams["tolerance"]) == ("keep", 0.10)
    expected = "openai/whisper-large-v3" if name == "fren" else "microsoft/wavlm-large"
    assert hparams["encoder_hub"] == expected
    asr = loaded("librispeech_qwen7b")
    assert hparams["decoder_hub"] == asr["decoder_hub"], "one decoder, so that paths transfer"


@pytest.mark.parametrize("name", TRAINED_LEAVES)
def test_heads_say_what_the_estimate_says(name: str) -> None:
    """`python -m speechllm_prune.models.estimate LEAF` makes these numbers again."""
    found = estimate(loaded(name), *setting(path_of(name)))
    head = head_of(name)
    assert f"{found.memory_gib:.0f} GiB on each by estimate" in head
    assert f"hparams/{name}.yaml): {found.hours:.1f} h of training steps" in head


# ---------------------------------------------------------------------------------------------- meta device
class StubTokenizer:
    """Token roles of the facts; a token per word."""

    def __init__(self, hub: str) -> None:
        facts = decoder_facts(hub)
        self.bos_token_id, self.eos_token_id = facts.bos, facts.eos
        self.pad_token_id, self.num_tokens = facts.pad, facts.num_tokens

    def __len__(self) -> int:
        return self.num_tokens

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(range(len(text.split()))))


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build_model` gets models of full size without weights."""
    monkeypatch.setattr(
        restore, "load_encoder", lambda hub, revision, dtype, norm: meta_encoder(hub, norm)
    )
    monkeypatch.setattr(
        restore,
        "load_decoder",
        lambda hub, revision, dtype, attention: (meta_decoder(hub), StubTokenizer(hub)),
    )


@pytest.mark.parametrize("name", TRAINED_LEAVES)
def test_every_leaf_is_built_on_meta(name: str, on_meta: None) -> None:
    hparams = loaded(name)
    model = restore.build_model(hparams, "meta")
    first, _, last = model.projector.layers
    config = decoder_facts(hparams["decoder_hub"]).config
    assert first.in_features == hparams["frame_stack"] * model.encoder.output_size
    assert first.out_features == last.in_features == hparams["projector_dim"]
    assert last.out_features == config["hidden_size"]

    names = restore.train_names(model)
    parameters = dict(model.named_parameters())
    found = estimate(hparams)
    trained = sum(parameters[key].numel() for key in names)
    assert trained == found.projector + found.adapters
    total = sum(p.numel() for p in parameters.values())
    assert total == found.encoder + found.decoder + trained, "nothing is counted twice"
    wrapped = {
        key.rsplit(".", 1)[1]
        for key, module in model.decoder.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert wrapped == (set(ATTENTION) if hparams["decoder_lora_rank"] else set())
    assert all(parameters[key].dtype == torch.float32 for key in names)


@pytest.mark.parametrize("name", PAPER_LEAVES)
def test_the_decoders_share(name: str, capsys: pytest.CaptureFixture) -> None:
    """The paper: 'often exceeding 90 %'. True from 3B on, not for the small ones."""
    found = estimate(loaded(name))
    with capsys.disabled():
        print(f"\n{name}: the decoder holds {found.decoder_share:.1f} % of all parameters", end=" ")
    small = name in ("librispeech_qwen1.5b", "librispeech_llama1b")
    assert (found.decoder_share > 90) != small


# ---------------------------------------------------------------------------------------------- offline
@pytest.mark.parametrize("name", TRAINED_LEAVES)
def test_only_the_weights_are_missing(
    name: str, tiny_corpus: Path, wavlm_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline and with prepared data, training stops at the first missing hub and says how to get it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    hparams = loaded(name)
    audio = sorted(tiny_corpus.rglob("*.flac"))[0].relative_to(tiny_corpus).as_posix()
    keys = [*hparams["train_manifests"], hparams["valid_manifest"], hparams["measure_manifest"]]
    for key in dict.fromkeys(keys):
        corpus, split = key.split("/")
        rows = [Row(f"{split}-1", 1.0, audio, "SEVEN GREEN BOXES")]
        write_manifest(tmp_path / "manifests" / corpus, split, rows, [], tiny_corpus)
    options = ["--data_folder", str(tiny_corpus), "--skip_prep", "True", "--results_folder"]
    options += [str(tmp_path / "results"), "--manifest_folder", str(tmp_path / "manifests")]
    message = refused("train", path_of(name), *options)
    assert f"hf download {hparams['encoder_hub']}`" in message and "--encoder_hub FOLDER" in message
    message = refused("train", path_of(name), *options, "--encoder_hub", wavlm_layer)
    assert f"hf download {hparams['decoder_hub']}`" in message and "--decoder_hub FOLDER" in message


def test_text_leaf_needs_only_a_decoder(llama: Path, tmp_path: Path) -> None:
    """No data folder, no train folder, no encoder; and so for every leaf whose decoder is not adapted."""
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("seven green boxes\nfour little dogs near the old house\n")
    options = ("--decoder_hub", llama, "--text_file", sentences, "--results_folder", tmp_path / "r")
    good("measure", path_of("text"), *options, "--encoder_hub", "/no/such/encoder")
    found = load_json(tmp_path / "r/text/3407/measure/text/path.json")
    assert (found["count"], found["num_layers"], found["measure_manifest"]) == (2, 6, None)
    assert not (tmp_path / "r/text/3407/train").exists()
    good("prune", path_of("text"), *options, "--block_size", 2, "--path", "text")
    good("measure", path_of("librispeech_qwen7b"), *options, "--measure_input", "text")
    lora = refused("measure", path_of("librispeech_qwen7b_lora"), *options, "--measure_input=text")
    assert "python train.py" in lora
    assert "train_manifests is empty" in refused(
        "train", path_of("text"), *options, "--data_folder", tmp_path
    )
    assert "--data_folder VALUE" in refused("train", path_of("librispeech_qwen7b"))
