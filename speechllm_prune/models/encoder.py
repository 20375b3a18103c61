"""Frozen speech encoders: waveforms in, frames with true lengths out.

Every encoder gives an utterance the same frames whatever it is batched with: waveforms are normalised one by one over
their true length, lengths come from the model's own arithmetic, and padding never reaches a statistic.

Shapes: B utterances, N samples at 16 kHz, T frames, D encoder width.
"""

from __future__ import annotations

import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm_prune.runtime import UserError

SAMPLE_RATE = 16000


class SpeechEncoder(nn.Module):
    """Base of the wrappers. Frozen: always in eval mode, never with gradients.

    Arguments
    ---------
    model : nn.Module
        The Hugging Face encoder.
    output_size : int
        Width D of a frame.
    output_norm : str
        `none`, or `layer`: each utterance's frames normalised jointly over its true length.
    """

    max_samples: int | None = None
    """Longest input that the encoder can take, or None."""

    def __init__(self, model: nn.Module, output_size: int, output_norm: str = "none") -> None:
        super().__init__()
        self.model: Any = model
        self.output_size = output_size
        self.output_norm = output_norm
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Stay in eval mode, whatever a training loop asks for: dropout and layer drop would change frozen features."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the frames."""
        return next(self.model.parameters()).dtype

    def output_length(self, num_samples: int) -> int:
        """Number of frames that `num_samples` samples give."""
        raise NotImplementedError

    def encode(self, wavs: Tensor, lengths: list[int]) -> Tensor:
        """(B, N) waveforms with true lengths in samples -> (B, T, D); frames beyond the true length are undefined."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, wavs: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """Encode a padded batch.

        Arguments
        ---------
        wavs : Tensor
            (B, N) float waveforms at 16 kHz, padded on the right with anything.
        lengths : list of int
            True number of samples of each utterance.

        Returns
        -------
        Tensor, list of int
            (B, T, D) and the true number of frames of each utterance.
        """
        frame_lengths = [self.output_length(n) for n in lengths]
        features = self.encode(wavs, lengths)
        if self.output_norm == "layer":
            features = pad_sequence(
                [
                    nn.functional.layer_norm(f[:n], f[:n].shape)
                    for f, n in zip(features, frame_lengths, strict=True)
                ],
                batch_first=True,
            )
        return features, frame_lengths


class WaveEncoder(SpeechEncoder):
    """WavLM, wav2vec 2.0 and HuBERT: a convolutional front end on the waveform, then a transformer.

    Arguments
    ---------
    model : nn.Module
        `WavLMModel` or a relative of it.
    do_normalize : bool
        Whether waveforms are brought to zero mean and unit variance (from the checkpoint's preprocessor_config.json).
    output_norm : str
        See `SpeechEncoder`.
    """

    def __init__(self, model: Any, do_normalize: bool, output_norm: str = "none") -> None:
        super().__init__(model, model.config.hidden_size, output_norm)
        self.do_normalize = do_normalize
        # 'group' normalises the first convolution over time, so that padding would shift every frame of the utterance.
        self.norm_over_time = model.config.feat_extract_norm == "group"
        if model.config.model_type == "wavlm":
            for layer in model.encoder.layers:
                attention = layer.attention
                attention.torch_multi_head_self_attention = partial(wavlm_attention, attention)

    def output_length(self, num_samples: int) -> int:
        for kernel, stride in zip(
            self.model.config.conv_kernel, self.model.config.conv_stride, strict=True
        ):
            num_samples = (num_samples - kernel) // stride + 1
        return max(num_samples, 0)

    def encode(self, wavs: Tensor, lengths: list[int]) -> Tensor:
        rows = [self._normalise(wav[:n].float()) for wav, n in zip(wavs, lengths, strict=True)]
        frame_lengths = [self.output_length(n) for n in lengths]
        if self.norm_over_time:
            convolved = [
                self.model.feature_extractor(row[None].to(self.dtype))[0].T for row in rows
            ]  # (T_i, C)
            features = pad_sequence(convolved, batch_first=True)
        else:
            padded = pad_sequence(rows, batch_first=True).to(self.dtype)
            features = self.model.feature_extractor(padded).transpose(1, 2)  # (B, T, C)
        true = torch.tensor(frame_lengths).to(wavs.device, non_blocking=True)  # waits for nothing
        mask = torch.arange(features.shape[1], device=wavs.device) < true[:, None]  # (B, T)
        hidden, _ = self.model.feature_projection(features)
        return self.model.encoder(hidden, attention_mask=mask).last_hidden_state

    def _normalise(self, wav: Tensor) -> Tensor:
        if not self.do_normalize:
            return wav
        return (wav - wav.mean()) / torch.sqrt(wav.var(unbiased=False) + 1e-7)


def wavlm_attention(
    attention: Any, hidden: Tensor, mask: Tensor | None, gated_bias: Tensor
) -> tuple[Tensor, None]:
    """WavLM's attention through `scaled_dot_product_attention`, in the place of one that also returns its weights.

    transformers always asks torch for the weights, which makes torch write and keep every (T, T) step of them.

    Arguments
    ---------
    attention : WavLMAttention
        For its projections.
    hidden : Tensor
        (B, T, D).
    mask : Tensor or None
        (B, T), true on real frames.
    gated_bias : Tensor
        (B * heads, T, T) gated position bias, which is written to.
    """
    batch, frames, width = hidden.shape
    heads = attention.num_heads
    query, key, value = (
        projection(hidden).view(batch, frames, heads, -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = gated_bias.view(batch, heads, frames, frames)
    if mask is not None:
        bias.masked_fill_(~mask[:, None, None], -math.inf)
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.out_proj(found.transpose(1, 2).reshape(batch, frames, width)), None


class WhisperFeatures(SpeechEncoder):
    """The encoder of a Whisper checkpoint: log-mel of each utterance alone, padded to the window, then cut.

    Arguments
    ---------
    model : nn.Module
        A `WhisperEncoder`.
    extractor : WhisperFeatureExtractor
        The checkpoint's own log-mel front end.
    output_norm : str
        See `SpeechEncoder`.
    """

    def __init__(self, model: Any, extractor: Any, output_norm: str = "none") -> None:
        super().__init__(model, model.config.d_model, output_norm)
        self.extractor = extractor
        self.max_samples = 2 * model.config.max_source_positions * extractor.hop_length

    def output_length(self, num_samples: int) -> int:
        mel_frames = math.ceil(num_samples / self.extractor.hop_length)
        return math.ceil(mel_frames / 2)  # one convolution of stride 2

    def encode(self, wavs: Tensor, lengths: list[int]) -> Tensor:
        assert self.max_samples is not None
        if max(lengths) > self.max_samples:
            raise UserError(
                f"an utterance of {max(lengths) / SAMPLE_RATE:.1f} s is longer than the "
                f"{self.max_samples / SAMPLE_RATE:.0f} s that this Whisper encoder takes; cut it into shorter pieces"
            )
        rows = [wav[:n].float().cpu().numpy() for wav, n in zip(wavs, lengths, strict=True)]
        # max_length by hand: a tiny checkpoint's window need not be a whole number of seconds.
        mels = self.extractor(
            rows,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="max_length",
            max_length=self.max_samples,
        ).input_features
        return self.model(mels.to(device=wavs.device, dtype=self.dtype)).last_hidden_state


def load_encoder(
    hub: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    output_norm: str = "none",
) -> SpeechEncoder:
    """Load a pretrained encoder and wrap it by its model type.

    Arguments
    ---------
    hub : str
        Hub id or local folder.
    revision : str, optional
        Hub revision.
    dtype : torch.dtype
        Type of the frozen weights.
    output_norm : str
        `none` or `layer`.

    Raises
    ------
    UserError
        If the checkpoint cannot be had or is of another kind.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    with explain_hub_errors(hub, "encoder_hub"):
        config = AutoConfig.from_pretrained(hub, revision=revision, trust_remote_code=False)
        kinds = ("wavlm", "wav2vec2", "hubert", "whisper")
        if config.model_type not in kinds:
            raise UserError(
                f"encoder_hub {hub!r} is a {config.model_type!r} model; supported are {', '.join(kinds)}"
            )
        extractor = AutoFeatureExtractor.from_pretrained(
            hub, revision=revision, trust_remote_code=False
        )
        # safetensors where there are any; WavLM's own repository has only a pickle, read as tensors and nothing else.
        model = AutoModel.from_pretrained(
            hub, revision=revision, dtype=dtype, weights_only=True, trust_remote_code=False
        )
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(
            f"encoder_hub {hub!r} expects {extractor.sampling_rate} Hz; only 16000 Hz encoders are supported"
        )
    if config.model_type == "whisper":
        return WhisperFeatures(model.encoder, extractor, output_norm)
    return WaveEncoder(model, bool(extractor.do_normalize), output_norm)


class explain_hub_errors:
    """Context: turn the hub client's exceptions into one message that says what to download.

    Arguments
    ---------
    hub : str
        Hub id or local folder.
    key : str
        YAML key that holds it.
    """

    def __init__(self, hub: str, key: str) -> None:
        self.hub, self.key = hub, key

    def __enter__(self) -> None:
        looks_local = self.hub.startswith((".", "/", "~")) or self.hub.count("/") > 1
        if looks_local and not Path(self.hub).is_dir():
            raise UserError(f"{self.key}: the folder {self.hub} does not exist")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        if isinstance(error, (OSError, HfHubHTTPError, LocalEntryNotFoundError)):
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            where = (
                "the folder lacks files of a Hugging Face checkpoint"
                if Path(self.hub).is_dir()
                else (
                    f"download it on a machine with internet by `hf download {self.hub}` (accept the licence on its "
                    f"page first if it is gated; --revision R if {self.key.replace('hub', 'revision')} is set) and "
                    f"copy the cache, which is looked for in {HF_HUB_CACHE} (HF_HUB_CACHE names another place), or "
                    f"give a local folder: --{self.key} FOLDER"
                )
            )
            raise UserError(f"{self.key}: cannot load {self.hub!r}: {where}. ({reason})") from None
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{self.key}: the weights of {self.hub!r} are a pickle that holds more than tensors, which could run "
                "code: refused. Use a copy in safetensors (model.safetensors)"
            ) from None
        if isinstance(error, ValueError):  # transformers' word for a model of another kind
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"{self.key}: {self.hub!r} is no model of this kind. ({reason})"
            ) from None
