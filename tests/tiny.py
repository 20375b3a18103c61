"""Tiny random models and a tiny synthetic corpus, written to disk the way real ones are.

Nothing here is trained and no sound here is speech: these files only exercise the code. Where real checkpoints have a
property that once broke somebody's code (dropout and spec augment in the encoder configs, a `bos_token_id` in a config
whose tokenizer has no bos, more embedding rows than tokens, no pad token), the tiny ones have it as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SAMPLE_RATE = 16000
HIDDEN_SIZE = 32
DECODER_LAYERS = 6
SPARE_ROWS = 5
"""Embedding rows beyond the tokenizer's vocabulary, as in Qwen2.5 (152,064 rows for 151,665 tokens)."""

WORDS = (
    "seven",
    "green",
    "boxes",
    "stand",
    "near",
    "the",
    "old",
    "house",
    "with",
    "four",
    "little",
    "dogs",
)
PROMPTS = (
    "Transcribe speech to text.",
    "Translate English speech to German text.",
    "Translate French speech to English text.",
)


# ---------------------------------------------------------------------------------------------- models
def _spread_out(model: PreTrainedModel) -> None:
    """Move biases and norm weights off their initial 0 and 1, so that code that forgets one of them is noticed."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


def write_wavlm(folder: Path, feat_extract_norm: str, seed: int = 1) -> Path:
    """Write a WavLM: 'layer' is built like WavLM-large (normalised input), 'group' like WavLM-base (raw input)."""
    large = feat_extract_norm == "layer"
    config = WavLMConfig(
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        feat_extract_norm=feat_extract_norm,
        do_stable_layer_norm=large,
        conv_dim=(HIDDEN_SIZE,) * 4,
        conv_kernel=(10, 8, 4, 4),
        conv_stride=(5, 4, 4, 4),  # 320 samples a frame, the rate of the real ones
        num_feat_extract_layers=4,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.1,
        # what the real configs have on in train mode
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0 if large else 0.1,
        feat_proj_dropout=0.1,
        layerdrop=0.1 if large else 0.05,
        apply_spec_augment=True,
        mask_time_prob=0.075 if large else 0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WavLMModel(config)
        torch.manual_seed(seed)  # versions of transformers draw differently while they initialise
        _spread_out(model)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        sampling_rate=SAMPLE_RATE, do_normalize=large, return_attention_mask=large
    ).save_pretrained(folder)
    return folder


def write_whisper(folder: Path, num_mel_bins: int = 16, seed: int = 2) -> Path:
    """Write a whole Whisper (encoder and decoder, as on the hub) whose window is 3 seconds instead of 30."""
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=num_mel_bins,
        d_model=HIDDEN_SIZE,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=150,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.1,
        dropout=0.1,
        attention_dropout=0.1,
        encoder_layerdrop=0.1,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
        _spread_out(model)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=3).save_pretrained(folder)
    return folder


def make_tokenizer(bos: bool) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer, trained on the words and prompts here, that reloads with equal ids.

    Anything but `train_new_from_iterator` of the class that AutoTokenizer picks for the folder may come back as a
    tokenizer that splits differently, without an error.

    Arguments
    ---------
    bos : bool
        True: as in Llama 3, `<|begin_of_text|>` is put in front of every text by default and there is no pad token.
        False: as in Qwen2.5 base, pad is eos and there is no bos.
    """
    sentences = [" ".join(WORDS), " ".join(reversed(WORDS)), *PROMPTS]
    sentences += [f"{a} {b}" for a in WORDS for b in WORDS]
    special = ["<|begin_of_text|>"] if bos else None
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        sentences, vocab_size=360, new_special_tokens=special, show_progress=False
    )
    if bos:
        tokenizer.bos_token = "<|begin_of_text|>"
        tokenizer.pad_token = None
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin_of_text|> $A",
            special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)],
        )
    return tokenizer


def write_decoder(
    folder: Path,
    family: str,
    num_layers: int = DECODER_LAYERS,
    tie_word_embeddings: bool = False,
    seed: int = 3,
) -> Path:
    """Write a causal LM with its tokenizer; `family` is qwen2 or llama. The logits are not flat (std about 1)."""
    tokenizer = make_tokenizer(bos=family == "llama")
    sizes = {
        "vocab_size": len(tokenizer) + SPARE_ROWS,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tie_word_embeddings,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config: PretrainedConfig
    if family == "llama":
        config = LlamaConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=None, **sizes)
    else:
        # As in Qwen2.5 base: the config names a bos (the eos token), the tokenizer has none. The tokenizer is right.
        config = Qwen2Config(bos_token_id=tokenizer.eos_token_id, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _spread_out(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- audio
def write_audio(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> Path:
    """Write 16-bit audio (the suffix decides the format), making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, subtype="PCM_16")
    return path


def tones(words: list[str], rng: np.random.Generator, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Synthetic 'speech': one tone of its own pitch per word, 0.15 to 0.3 s each, in a little noise."""
    pieces = []
    for word in words:
        time = np.arange(int(sample_rate * rng.uniform(0.15, 0.3))) / sample_rate
        pitch = 200 * 1.2 ** WORDS.index(word)
        pieces += [0.3 * np.sin(2 * np.pi * pitch * time), np.zeros(int(0.03 * sample_rate))]
    signal = np.concatenate(pieces)
    return (signal + 0.01 * rng.standard_normal(len(signal))).astype(np.float32)


def write_corpus(folder: Path, seed: int = 4) -> Path:
    """Write a synthetic corpus in LibriSpeech layout (upper-case transcripts) and return the folder that holds it.

    The files are flac and wav, of different lengths; the first one of train-clean-100 has another rate (8 kHz).
    """
    rng = np.random.default_rng(seed)
    sizes = {"train-clean-100": 12, "dev-clean": 4, "test-clean": 4, "test-other": 3}
    for number, (split, size) in enumerate(sizes.items()):
        for index in range(size):
            speaker, chapter = str(100 + number), str(1000 + index // 6)
            name = f"{speaker}-{chapter}-{index:04d}"
            words = list(rng.choice(WORDS, size=1 + index % 5))
            rate = 8000 if split == "train-clean-100" and index == 0 else SAMPLE_RATE
            suffix = "wav" if index % 3 == 1 else "flac"
            chapter_folder = folder / "LibriSpeech" / split / speaker / chapter
            write_audio(chapter_folder / f"{name}.{suffix}", tones(words, rng, rate), rate)
            with open(
                chapter_folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8"
            ) as stream:
                stream.write(f"{name} {' '.join(words).upper()}\n")
    return folder


# ---------------------------------------------------------------------------------------------- processes
def environment(repo_root: Path) -> dict[str, str]:
    """Environment of a child process: one thread, offline, and this checkout first on the path."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(repo_root), os.environ.get("PYTHONPATH")])),
    }
