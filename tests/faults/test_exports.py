"""Rows 19 to 23 and 26 to 28: tokens, blocks, paths and exports."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from speechllm_prune.restore import build_model, restore
from tests.faults.processes import Processes
from tests.numerics.common import batch_of, hparams_of
from tests.recipes.conftest import MakeLeaf, Study, copy_study
from tests.recipes.verbs import load_json, tensors

pytestmark = pytest.mark.slow

FEW = ("--num_steps", 2, "--eval_manifests", "[]")


@pytest.fixture(scope="module")
def exported(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A block of 2 layers pruned and exported; the export was killed once on its way."""
    folder = tmp_path_factory.mktemp("exported")
    study, verbs = copy_study(trained, folder), Processes(folder)
    prune = ("prune", study.leaf, "--block_size", 2, "--start_layer", 1, "--export")
    verbs.run(*prune, code=-9, inject=[("signal_in", "export", 1, signal.SIGKILL)])
    assert not (study.root / "prune/l01n02/export").exists(), "row 27: half an export has no name"
    verbs.run(*prune)
    return study


def test_row_19_tokenizer_without_pad(make_leaf: MakeLeaf, llama: Path, verbs: Processes) -> None:
    """Padding takes the eos id, which is said, and never enters the loss: eos alone counts as a label."""
    study = make_leaf(decoder_hub=str(llama))
    out = verbs.run("train", study.leaf, *FEW).out
    model = build_model(hparams_of(Path(study.values["encoder_hub"]), llama))
    assert model.tokenizer.pad_token_id is None and model.token_ids.pad == model.token_ids.eos
    assert f"pad={model.token_ids.eos}" in out
    batch = batch_of(model, (1, 5))
    labels = model.inputs_for(batch).labels
    assert len(labels) == sum(len(ids) + 1 for ids in batch.target_ids)


def test_row_20_eos_is_the_last_label(wavlm_layer: Path, qwen2: Path) -> None:
    model = build_model(hparams_of(wavlm_layer, qwen2))
    batch = batch_of(model, (1, 5, 2))
    ends = torch.tensor([len(ids) + 1 for ids in batch.target_ids]).cumsum(0) - 1
    labels = model.inputs_for(batch).labels
    assert (labels[ends] == model.token_ids.eos).all()
    assert int((labels == model.token_ids.eos).sum()) == 3


def test_row_21_tokenizer_of_another_model(
    make_leaf: MakeLeaf, qwen2: Path, verbs: Processes, tmp_path: Path
) -> None:
    """Fewer embeddings than tokens: said before the first step, not by an index out of range."""
    decoder = AutoModelForCausalLM.from_pretrained(qwen2)
    rows = decoder.get_input_embeddings().weight.shape[0]
    decoder.resize_token_embeddings(rows // 2)
    shutil.copytree(qwen2, tmp_path / "mixed")
    decoder.save_pretrained(tmp_path / "mixed")
    study = make_leaf(decoder_hub=str(tmp_path / "mixed"))
    message = verbs.run("train", study.leaf, *FEW, code=2).message
    assert f"the decoder {rows // 2} embeddings" in message


@pytest.mark.parametrize("size", [6, 0, -1, 7])
def test_row_22_block_size_out_of_range(exported: Study, verbs: Processes, size: int) -> None:
    message = verbs.run("prune", exported.leaf, f"--block_size={size}", code=2).message
    assert "block_size" in message and ("1..5" in message or "0 or more" in message), message


def test_row_23_path_of_another_model(exported: Study, verbs: Processes, tmp_path: Path) -> None:
    path = load_json(exported.root / "measure/speech/path.json")
    run = ("prune", exported.leaf, "--block_size", 2, "--path", tmp_path / "path.json")
    for change, said in (
        ({"decoder_fingerprint": "sha256:other"}, "measured on another decoder"),
        ({"num_layers": 8}, "for a decoder of 8 layers, this one has 6"),
    ):
        (tmp_path / "path.json").write_text(json.dumps(path | change))
        assert said in verbs.run(*run, code=2).message
    (tmp_path / "path.json").write_text(json.dumps(path))
    verbs.run(*run)


def test_row_26_cache_after_the_cut(exported: Study) -> None:
    """Layers are numbered anew, and generation with a cache gives what the model gives without one."""
    model = AutoModelForCausalLM.from_pretrained(exported.root / "prune/l01n02/export").eval()
    layers = model.get_decoder().layers
    assert model.config.num_hidden_layers == len(layers) == 4
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    prompt = torch.tensor([[5, 17, 40, 8]])
    with torch.no_grad():
        cached = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
        ids = prompt
        while ids.shape[1] < cached.shape[1]:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert cached.equal(ids)


def test_row_27_interrupted_export(exported: Study) -> None:
    """The fixture has killed the first export and made it again."""
    folder = exported.root / "prune/l01n02/export"
    assert (folder / "speechllm.json").is_file() and (folder / "model.safetensors").is_file()


def test_row_28_exported_logits(exported: Study) -> None:
    from speechllm_prune.experiment import Experiment

    experiment = Experiment(exported.results, "tiny", 3407)
    decoder = restore(experiment, "l01n02-none", device="cpu").decoder
    plain = AutoModelForCausalLM.from_pretrained(exported.root / "prune/l01n02/export").eval()
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert decoder(ids).logits.equal(plain(ids).logits)


def test_row_28_a_changed_export_is_noticed(exported: Study) -> None:
    """The comparison above is no formality: one weight moved by little shows."""
    plain = AutoModelForCausalLM.from_pretrained(exported.root / "prune/l01n02/export").eval()
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        before = plain(ids).logits
        next(plain.parameters())[5, 0] += 1e-3
        assert not before.equal(plain(ids).logits)
    assert tensors(exported.root / "train")
