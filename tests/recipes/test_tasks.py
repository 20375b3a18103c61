"""One pruned decoder on disk, many tasks: encoder, projector, adapter and prompt switched per request."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from speechllm_prune import SpeechLLM
from speechllm_prune.experiment import Experiment
from speechllm_prune.prune.export import probe_logits
from speechllm_prune.prune.task_adapters import activate_adapter, lora_modules
from speechllm_prune.restore import restore
from tests.recipes.conftest import MakeLeaf, Study
from tests.recipes.verbs import (
    audio_of,
    good,
    hypotheses,
    leaf_values,
    load_json,
    refused,
    snapshot,
    write_leaf,
)


@dataclass
class Shared:
    """Two studies on one decoder and the folder that holds both as tasks."""

    asr: Study
    ast: Study
    variant: str
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def shared(
    study: Study,
    tiny_corpus: Path,
    wavlm_group: Path,
    qwen2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shared:
    """ASR of the study, and a 'translation' with another encoder, prompt and frame_stack, cut by the same block."""
    place = tmp_path_factory.mktemp("tasks")
    values = leaf_values(tiny_corpus, wavlm_group, qwen2, place / "results") | {
        "experiment_name": "tiny_ast",
        "task": "ast",
        "prompt": "Translate English speech to German text.",
        "frame_stack": 3,
        "heal_lora_rank": 4,
        "seed": 5,
        "lr": 1.0e-2,
    }
    ast = Study(write_leaf(place / "ast.yaml", values), values, tiny_corpus, place / "results")
    variant = study.variant(2)
    good("train", ast.leaf)
    block = ("--block_size", 2, "--start_layer", int(variant[1:3]))
    good("heal", ast.leaf, *block, "--export")
    good("evaluate", ast.leaf, "--variant", variant)
    folder = place / "shared"
    good("heal", study.leaf, "--block_size", 2, "--into", folder)
    outcome = good("heal", ast.leaf, *block, "--export", "--into", folder)
    return Shared(study, ast, variant, folder, outcome.out)


def separate_export(study: Study, variant: str) -> Path:
    """The export of one task."""
    (folder,) = study.results.glob(f"*/*/heal/{variant}/export")
    return folder


def test_transcripts_are_those_of_separate_models(shared: Shared) -> None:
    root = next(shared.ast.results.glob("tiny_ast/*"))
    expected = {
        "asr": hypotheses(shared.asr.root, shared.variant),
        "ast": hypotheses(root, shared.variant),
    }
    files = [audio_of(shared.asr.corpus, name) for name in expected["asr"]]
    together = SpeechLLM.from_pretrained(shared.folder)
    apart = {
        "asr": SpeechLLM.from_pretrained(separate_export(shared.asr, shared.variant)),
        "ast": SpeechLLM.from_pretrained(separate_export(shared.ast, shared.variant)),
    }
    for task in ("asr", "ast", "asr", "ast"):
        found = together.transcribe(files, task=task)
        assert found == list(expected[task].values())
        assert found == apart[task].transcribe(files)
    assert expected["asr"] != expected["ast"]
    assert together.transcribe(files) == list(expected["asr"].values())  # the first is the default
    assert together.transcribe_file(files[0], task="ast") == next(iter(expected["ast"].values()))
    printed = good("transcribe", shared.folder, files[0], "--task", "ast").out
    assert printed == f"{files[0]}\t{next(iter(expected['ast'].values()))}\n"


def test_a_request_switches_everything_and_switches_back(shared: Shared) -> None:
    model = SpeechLLM.from_pretrained(shared.folder)
    ids = model.prompt_ids
    logits = {}
    for task in ("asr", "ast"):
        model.use_task(task)
        logits[task] = probe_logits_of(model)
        active = {name for m in lora_modules(model.decoder).values() for name in m.active_adapters}
        assert active == {f"task_{task}"}
    assert (logits["asr"] - logits["ast"]).abs().max() > 1e-4
    model.use_task("asr")
    with model.doing("ast"):
        assert model.prompt.startswith("Translate") and model.prompt_ids != ids
        assert model.frame_stack == 3 and model.encoder.norm_over_time  # type: ignore[union-attr]
        activate_adapter(model.decoder, "task_asr")  # the wrong adapter is not the right one
        assert torch.equal(probe_logits_of(model), logits["asr"])
    assert model.task == "asr" and model.frame_stack == 5 and model.prompt_ids == ids
    with pytest.raises(ZeroDivisionError), model.doing("ast"):
        _ = 1 / 0
    assert model.task == "asr" and torch.equal(probe_logits_of(model), logits["asr"])


@torch.no_grad()
def probe_logits_of(model: SpeechLLM) -> torch.Tensor:
    return probe_logits(model.decoder)


@torch.no_grad()
def test_the_root_is_the_pruned_decoder_and_plain_peft_loads_a_task(shared: Shared) -> None:
    base, report = AutoModelForCausalLM.from_pretrained(shared.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    experiment = Experiment(shared.asr.results, "tiny", 3407)
    unhealed = restore(experiment, shared.asr.variant(2, "none"), device="cpu")
    assert torch.equal(probe_logits(base.eval()), probe_logits(unhealed.decoder))
    healed = restore(experiment, shared.variant, device="cpu")
    model = PeftModel.from_pretrained(base, str(shared.folder / "adapters" / "asr")).eval()
    torch.testing.assert_close(probe_logits(model), probe_logits(healed.decoder), rtol=0, atol=1e-5)
    assert len(lora_modules(model)) == 3


def test_memory_of_two_tasks_against_two_models(shared: Shared) -> None:
    together = SpeechLLM.from_pretrained(shared.folder)
    parts = {
        id(part): part
        for task in together.tasks.values()
        for part in (task.encoder, task.projector)
    }
    modules = [together.decoder, *parts.values()]
    count = sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())
    apart = sum(
        sum(
            p.numel()
            for p in SpeechLLM.from_pretrained(separate_export(s, shared.variant)).parameters()
        )
        for s in (shared.asr, shared.ast)
    )
    assert f"2 tasks on one decoder: {count:,} parameters" in shared.printed
    assert f"2 separate models: {apart:,} parameters" in shared.printed
    card = (shared.folder / "README.md").read_text()
    assert f"{count:,} parameters" in card and "## asr: " in card and "## ast: " in card
    assert "BLEU" in card and "WER" in card


def test_who_may_not_join(
    shared: Shared, make_leaf: MakeLeaf, qwen2_tied: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(shared.folder, folder)
    before = snapshot(folder)
    start = int(shared.variant[1:3])
    other = (start + 1) % 4
    heal = ("heal", shared.ast.leaf, "--block_size", 2)
    assert "kept layers" in refused(*heal, "--start_layer", other, "--into", folder)
    tied = make_leaf(decoder_hub=str(qwen2_tied))
    good("train", tied.leaf)
    cut = ("--block_size", 2, "--start_layer", start)
    assert "source of the decoder" in refused("heal", tied.leaf, *cut, "--into", folder)
    assert "names a folder" in refused(
        *heal, "--start_layer", start, "--into", folder, "--task_name", "a/b"
    )
    single = separate_export(shared.asr, shared.variant)
    assert "an export of one task" in refused(*heal, "--start_layer", start, "--into", single)
    message = refused(*heal, "--start_layer", start, "--into", shared.ast.leaf.parent)
    assert "is no export" in message
    assert snapshot(folder) == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_task_can_be_replaced_and_named(shared: Shared, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(shared.folder, folder)
    untouched = snapshot(shared.folder)
    heal = ("heal", shared.ast.leaf, "--block_size", 2, "--start_layer", int(shared.variant[1:3]))
    again = good(*heal, "--into", folder).out
    assert "exported to" in again and again.count("asr") == 1
    assert [task["name"] for task in load_json(folder / "speechllm.json")["tasks"]] == [
        "asr",
        "ast",
    ]
    good(*heal, "--into", folder, "--task_name", "ast-de")
    names = [task["name"] for task in load_json(folder / "speechllm.json")["tasks"]]
    assert names == ["asr", "ast", "ast-de"]
    encoders = sorted(path.name for path in folder.glob("encoder*"))
    assert len(encoders) == 2 and encoders[0] == "encoder"  # the two translations share theirs
    file = audio_of(shared.asr.corpus, "102-1000-0000")
    model = SpeechLLM.from_pretrained(folder)
    assert model.transcribe([file], task="ast-de") == model.transcribe([file], task="ast")
    assert "ast-de" in refused("transcribe", folder, file, "--task", "ast-fr")
    assert snapshot(shared.folder) == untouched


def test_a_task_without_an_adapter_and_the_control(shared: Shared, tmp_path: Path) -> None:
    """The pruned model joins as a task that is not healed; the control has all layers and a folder of its own."""
    folder = tmp_path / "shared"
    shutil.copytree(shared.folder, folder)
    leaf = shared.asr.leaf
    good("prune", leaf, "--block_size", 2, "--into", folder, "--task_name", "bare")
    unhealed, control = shared.asr.variant(2, "none"), "control-" + shared.variant
    expected = hypotheses(shared.asr.root, unhealed)
    files = [audio_of(shared.asr.corpus, name) for name in expected]
    model = SpeechLLM.from_pretrained(folder)
    assert model.transcribe(files, task="bare") == list(expected.values())
    heal = ("heal", leaf, "--block_size", 2, "--control")
    assert "kept layers" in refused(*heal, "--into", folder)
    good(*heal, "--into", tmp_path / "control")
    whole = SpeechLLM.from_pretrained(tmp_path / "control")
    assert whole.transcribe(files) == list(hypotheses(shared.asr.root, control).values())


def test_the_line_on_memory_reads_well(shared: Shared) -> None:
    (line,) = (line for line in shared.printed.splitlines() if "on one decoder" in line)
    pattern = (
        r"2 tasks on one decoder: [\d,]+ parameters, [\d.]+ \w+ \([\d.]+ %\); 2 separate models: "
    )
    assert re.match(pattern, line)
