"""Encoders against Hugging Face run on one utterance at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from speechllm_prune.data.batching import collate
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.runtime import UserError
from tests.numerics.common import build, utterances

LENGTHS = [9000, 31000, 16001, 23456]


def wavs_of(lengths: list[int]) -> list[torch.Tensor]:
    """Noise with an offset and a loudness of its own in each utterance, so that normalisation matters."""
    return [
        torch.randn(length) * (0.05 + 0.3 * index) + 0.2 * index
        for index, length in enumerate(lengths)
    ]


def padded_with_garbage(wavs: list[torch.Tensor]) -> torch.Tensor:
    batch = torch.full((len(wavs), max(map(len, wavs)) + 777), 3.0)
    batch += torch.randn_like(batch)
    for row, wav in zip(batch, wavs, strict=True):
        row[: len(wav)] = wav
    return batch


def hugging_face(folder: Path, wav: torch.Tensor) -> torch.Tensor:
    """(T, D) of one utterance by transformers alone: its extractor, its model, its frame arithmetic."""
    extractor, model = (
        AutoFeatureExtractor.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    with torch.no_grad():
        if model.config.model_type != "whisper":
            inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
            return model(inputs.input_values).last_hidden_state[0]
        inputs = extractor(
            wav.numpy(),
            sampling_rate=16000,
            return_tensors="pt",
            padding="max_length",
            max_length=48000,
            return_attention_mask=True,
        )
        frames = model.encoder(inputs.input_features).last_hidden_state[0]
        return frames[: model._get_feat_extract_output_lengths(inputs.attention_mask.sum())]


def test_mixed_batch_equals_hugging_face_on_each_utterance(encoder_folder: Path) -> None:
    wavs = wavs_of(LENGTHS)
    encoder = load_encoder(str(encoder_folder))
    features, lengths = encoder(padded_with_garbage(wavs), LENGTHS)
    for row, length, wav in zip(features, lengths, wavs, strict=True):
        expected = hugging_face(encoder_folder, wav)
        assert length == len(expected)
        torch.testing.assert_close(row[:length], expected, atol=2e-5, rtol=1e-4)
        assert expected.std() > 0.1


def test_mixed_batch_equals_one_by_one(encoder_folder: Path) -> None:
    wavs = wavs_of(LENGTHS)
    encoder = load_encoder(str(encoder_folder), output_norm="layer")
    features, lengths = encoder(padded_with_garbage(wavs), LENGTHS)
    for row, length, wav in zip(features, lengths, wavs, strict=True):
        single, single_lengths = encoder(wav[None], [len(wav)])
        assert single_lengths == [length]
        torch.testing.assert_close(row[:length], single[0, :length], atol=2e-5, rtol=1e-4)


def test_output_norm_is_over_the_true_frames_of_an_utterance(encoder_folder: Path) -> None:
    wavs = wavs_of(LENGTHS)
    features, lengths = load_encoder(str(encoder_folder), output_norm="layer")(
        padded_with_garbage(wavs), LENGTHS
    )
    for row, length, wav in zip(features, lengths, wavs, strict=True):
        plain = hugging_face(encoder_folder, wav).double()
        expected = (plain - plain.mean()) / (plain.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(row[:length].double(), expected, atol=1e-4, rtol=1e-3)


def test_lengths_equal_hugging_face_arithmetic(encoder_folder: Path) -> None:
    encoder, model = load_encoder(str(encoder_folder)), AutoModel.from_pretrained(encoder_folder)
    if model.config.model_type == "whisper":
        extractor = AutoFeatureExtractor.from_pretrained(encoder_folder)
        for samples in (1, 159, 160, 161, 319, 320, 321, 480, 481, 16000, 16001, 47999, 48000):
            mask = extractor(
                [torch.ones(samples).numpy()],
                sampling_rate=16000,
                padding="max_length",
                max_length=48000,
                return_attention_mask=True,
            )["attention_mask"]
            frames = model._get_feat_extract_output_lengths(torch.tensor(mask).sum())
            assert encoder.output_length(samples) == frames, samples
        return
    for samples in range(700, 2400):
        frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
        assert encoder.output_length(samples) == frames, samples
    assert encoder.output_length(0) == encoder.output_length(9) == 0


def test_whisper_refuses_what_its_window_cannot_hold(whisper: Path) -> None:
    encoder = load_encoder(str(whisper))
    encoder(torch.zeros(1, 48000), [48000])
    with pytest.raises(UserError, match="3.0 s is longer than the 3 s"):
        encoder(torch.zeros(1, 48001), [48001])


def test_frozen_parts_ignore_train_mode_and_adapters_follow_it(
    encoder_folder: Path, qwen2: Path
) -> None:
    model = build(encoder_folder, qwen2, decoder_lora_rank=4, decoder_lora_dropout=0.5)
    batch = collate(utterances(model, [2, 6]))
    with torch.no_grad():
        quiet = model(batch).loss
        model.train()
        assert not any(module.training for module in model.encoder.modules())
        features = [model.encoder(batch.audio, batch.audio_lengths)[0] for _ in range(2)]
        assert torch.equal(*features)
        # Nothing of the decoder is being trained yet, so its adapters' dropout is off too.
        assert torch.equal(model(batch).loss, quiet)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        model.train()
        noisy = torch.stack([model(batch).loss for _ in range(3)])
        assert len(set(noisy.tolist())) == 3 and not torch.isclose(noisy, quiet).any()
        model.eval()
        assert torch.equal(model(batch).loss, quiet)


def test_encoder_alone_stays_in_eval_mode_and_gives_no_gradients(encoder_folder: Path) -> None:
    encoder = load_encoder(str(encoder_folder)).train()
    assert not any(module.training for module in encoder.modules())
    features, _ = encoder(torch.randn(1, 9000, requires_grad=True), [9000])
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
