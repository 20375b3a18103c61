"""The tiny models and the corpus must have the properties the other tests rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests import tiny

TEXTS = [
    *tiny.PROMPTS,
    " ".join(tiny.WORDS),
    "SEVEN Green",
    "unseen Übelkeit, 42 %",
    " two  spaces ",
    "a\nb",
]


def test_tokenizer_reloads_with_equal_ids(decoder_folder: Path) -> None:
    before = tiny.make_tokenizer(bos=decoder_folder.name == "llama")
    after = AutoTokenizer.from_pretrained(decoder_folder)
    for text in TEXTS:
        assert before(text).input_ids == after(text).input_ids
        assert after.decode(after(text, add_special_tokens=False).input_ids) == text
    assert len(before) == len(after)


def test_special_tokens_by_family(qwen2: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2)
    config = AutoModelForCausalLM.from_pretrained(qwen2).config
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.bos_token_id is None
    assert (
        config.bos_token_id == tokenizer.eos_token_id
        and config.vocab_size == len(tokenizer) + tiny.SPARE_ROWS
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert (
        tokenizer.pad_token_id is None and tokenizer("house").input_ids[0] == tokenizer.bos_token_id
    )


def test_decoder_is_not_flat_and_its_layers_matter(decoder_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    assert model.config.num_hidden_layers == tiny.DECODER_LAYERS
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (decoder_folder.name == "qwen2_tied")
    ids = torch.randint(0, 200, (2, 9))
    with torch.no_grad():
        full = model(ids).logits
        model.model.layers = model.model.layers[:3] + model.model.layers[4:]
        model.config.num_hidden_layers = tiny.DECODER_LAYERS - 1
        short = model(ids, use_cache=False).logits
    assert full.std() > 0.3
    assert (full - short).abs().mean() > 0.05


def test_encoders_have_train_mode_noise(encoder_folder: Path) -> None:
    encoder = AutoModel.from_pretrained(encoder_folder)
    if encoder_folder.name == "whisper":
        encoder, inputs = encoder.get_encoder(), torch.randn(1, 16, 300)
    else:
        inputs = torch.randn(1, 16000)
    with torch.no_grad():
        quiet = [encoder.eval()(inputs).last_hidden_state for _ in range(2)]
        noisy = encoder.train()(inputs).last_hidden_state
    assert torch.equal(*quiet) and not torch.allclose(quiet[0], noisy, atol=1e-3)


def test_corpus(tiny_corpus: Path) -> None:
    audio = sorted(path for path in tiny_corpus.rglob("*") if path.suffix in {".flac", ".wav"})
    assert len(audio) == 23 and {path.suffix for path in audio} == {".flac", ".wav"}
    infos = [soundfile.info(path) for path in audio]
    assert sorted(info.samplerate for info in infos)[:2] == [8000, 16000]
    assert len({info.frames for info in infos}) > 15


def test_importing_the_data_and_scoring_code_needs_no_torch(repo_root: Path) -> None:
    code = (
        "import sys, json, speechllm_prune, speechllm_prune.data.manifest, speechllm_prune.evaluation.scoring,"
        " recipes.LibriSpeech.librispeech_prepare;"
        "print(json.dumps([m for m in ('torch', 'transformers', 'speechbrain') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tiny.environment(repo_root),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_run_verb_reports_the_wrong_exit_code(run_verb) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"(?s)exit code 2, expected 0.*error: no such folder"
    ):
        run_verb("recipes/LibriSpeech/librispeech_prepare.py", "nowhere", "manifests")
