"""Train the stand-in for a pretrained speech encoder: a tiny WavLM, from labels instead of self-supervision."""

import math
import random
import time
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from recipes.Demo.corpus import Corpus, read_audio
from recipes.Demo.stand_in_decoder import scheduled_lr
from recipes.Demo.stand_in_labels import CtcObjective, FrameObjective
from speechllm_prune.runtime import UserError, derive_seed, raise_if_stopped

SAMPLE_RATE = 16000
_DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
# Like WavLM Large: layer norm in the front end and before each block. Unlike it, two convolutions instead of seven
# make the 50 Hz frames, the first as wide as the window of a filter bank: much cheaper on a CPU.
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [160, 128],
    "conv_kernel": [400, 4],
    "conv_stride": [160, 2],
    "conv_bias": False,
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 8,
    "num_buckets": 80,
    "max_bucket_distance": 200,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
SETTINGS = {
    "version": 1,  # raise it when the code below, or stand_in_labels.py, changes what is trained
    "batch_size": 16,
    "lr": 6e-3,
    "warmup_steps": 30,
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "noise_share": 0.5,
    "noise_snr_db": [3.0, 43.0],
    "max_hours": 3.0,
    "max_seconds": 20.0,
    "held_out": 100,
}
# Synthetic speech comes in many voices; a small real corpus is soon known by heart unless each copy sounds different.
FRAMES = {
    "steps": 320,
    "dropout": 0.0,
    "speed": 0.1,
    "speed_by_row": False,
    "equaliser_db": 0.0,
    "stop_bands": 0,
    "gaps": 0,
}
CTC = {
    "steps": 2200,
    "dropout": 0.1,
    "speed": 0.2,
    "speed_by_row": True,
    "equaliser_db": 6.0,
    "stop_bands": 2,
    "gaps": 2,
}
_EQUALISER_KNOTS, _EQUALISER_STEPS = 8, 256
_STOP_BAND_WIDTH, _STOP_BAND_GAIN, _GAP_SECONDS = (
    0.15,
    0.03,
    0.1,
)  # a width of the mel scale; at most


def encoder_settings(labels: str, seed: int) -> dict:
    """Everything that decides the weights, apart from the corpus files."""
    settings = SETTINGS | (FRAMES if labels == "frames" else CTC) | {"labels": labels, "seed": seed}
    return settings | {"architecture": ARCHITECTURE | dict.fromkeys(_DROPOUTS, settings["dropout"])}


def build_encoder(settings: dict) -> nn.Module:
    """A ``WavLMModel`` with random weights, but for the first convolution (a mel filter bank)."""
    from transformers import WavLMConfig, WavLMModel

    model = WavLMModel(WavLMConfig(**settings["architecture"]))
    mel_filters(model.feature_extractor.conv_layers[0].conv.weight)
    return model


@torch.no_grad()
def mel_filters(weight: Tensor) -> None:
    """Fill the first convolution with windowed cosines at mel-spaced frequencies, in four phases each.

    Learning starts from a spectrogram instead of noise; the filters are trained on like all weights.

    Arguments
    ---------
    weight : Tensor
        (channels, 1, kernel) of the convolution; channels a multiple of 4.
    """
    channels, _, kernel = weight.shape
    bands = channels // 4
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (60.0, 7600.0))
    mels = torch.linspace(low, high, bands + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    times = (torch.arange(kernel) - (kernel - 1) / 2) / SAMPLE_RATE
    for band in range(bands):
        width = (edges[band + 2] - edges[band]) / 2
        spread = torch.clamp(0.44 / width, max=kernel / SAMPLE_RATE / 4)
        window = torch.exp(-0.5 * (times / spread) ** 2)
        for phase in range(4):
            wave = window * torch.cos(2 * math.pi * edges[band + 1] * times + phase * math.pi / 2)
            weight[4 * band + phase, 0] = wave / wave.norm()


class Audio:
    """The train audio in memory, and batches of it.

    Arguments
    ---------
    corpus : Corpus
        Gives the files.
    settings : dict
        Of :func:`encoder_settings`.
    """

    def __init__(self, corpus: Corpus, settings: dict) -> None:
        self.settings = settings
        self.rng = random.Random(derive_seed(settings["seed"], "encoder batches"))
        uttids = sorted(corpus.train)
        self.rng.shuffle(uttids)
        self.wavs: dict[str, Tensor] = {}
        room = settings["max_hours"] * 3600 * SAMPLE_RATE
        for uttid in uttids:
            wav = torch.from_numpy(read_audio(corpus.train[uttid][0], SAMPLE_RATE))
            if room > 0 and 0.1 <= len(wav) / SAMPLE_RATE <= settings["max_seconds"]:
                self.wavs[uttid] = wav
                room -= len(wav)
        held_out = min(settings["held_out"], len(self.wavs) // 10)
        self.held_out = list(self.wavs)[:held_out]
        self.train = list(self.wavs)[held_out:]
        if not self.held_out:
            raise UserError(
                f"the train splits of {corpus.root} hold {len(self.wavs)} usable utterances; "
                "an encoder needs at least 10 (and hundreds to learn anything)"
            )
        self.pool: list[list[str]] = []

    def next_batch(self) -> list[str]:
        """Utterance ids of similar length."""
        if not self.pool:
            size = self.settings["batch_size"]
            uttids = self.rng.sample(self.train, min(12 * size, len(self.train)))
            uttids.sort(key=lambda uttid: len(self.wavs[uttid]))
            self.pool = [uttids[i : i + size] for i in range(0, len(uttids), size)]
            self.rng.shuffle(self.pool)
        return self.pool.pop()

    def waveforms(
        self, uttids: list[str], augment: bool
    ) -> tuple[Tensor, list[int], float | list[float]]:
        """Padded, normalised waveforms (B, N), true lengths, and the speed factor of the batch or of each row.

        Arguments
        ---------
        uttids : list of str
            Utterances.
        augment : bool
            Whether to change speed (hence pitch) and timbre, and to add noise.
        """
        rows = [self.wavs[uttid][None] for uttid in uttids]  # (1, N) each
        speed: float | list[float] = 1.0
        if augment and self.settings["speed_by_row"]:
            speed = [self._draw_speed() for _ in rows]
            rows = [change_speed(row, factor) for row, factor in zip(rows, speed, strict=True)]
        lengths = [row.shape[1] for row in rows]
        wavs = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        if augment and not self.settings["speed_by_row"]:
            speed = self._draw_speed()
            wavs = change_speed(wavs, speed)
            lengths = [min(int(n / speed), wavs.shape[1]) for n in lengths]
        true = torch.arange(wavs.shape[1]) < torch.tensor(lengths)[:, None]
        if augment:
            wavs = self._filtered(wavs) * true
            wavs = self._with_gaps(wavs, lengths)
            wavs = wavs + self._noise(wavs)
        count = true.sum(1, keepdim=True)
        wavs = (wavs - (wavs * true).sum(1, keepdim=True) / count) * true
        return wavs / (wavs.square().sum(1, keepdim=True) / count + 1e-7).sqrt(), lengths, speed

    def _draw_speed(self) -> float:
        return 1.0 + self.settings["speed"] * self.rng.uniform(-1, 1)

    def _filtered(self, wavs: Tensor) -> Tensor:
        """Each row with a timbre of its own: a random smooth equaliser, and perhaps bands that are missing."""
        decibels, bands = self.settings["equaliser_db"], self.settings["stop_bands"]
        if not (decibels or bands):
            return wavs
        spectrum = torch.fft.rfft(wavs)
        rows, bins = spectrum.shape
        hertz = torch.linspace(0, SAMPLE_RATE / 2, bins)
        mels = torch.log10(1 + hertz / 700)
        place = mels / mels[-1]  # 0 to 1
        knots = decibels * torch.randn(rows, 1, _EQUALISER_KNOTS)
        gains = nn.functional.interpolate(knots, size=_EQUALISER_STEPS, mode="linear")[:, 0]
        gains = 10 ** (gains[:, (place * (_EQUALISER_STEPS - 1)).long()] / 20)  # (rows, bins)
        for _ in range(bands):
            width = _STOP_BAND_WIDTH * torch.rand(rows, 1)
            start = (1 - width) * torch.rand(rows, 1)
            missing = (place >= start) & (place < start + width) & (torch.rand(rows, 1) < 0.5)
            gains = gains.masked_fill(missing, _STOP_BAND_GAIN)
        return torch.fft.irfft(spectrum * gains, wavs.shape[1])

    def _with_gaps(self, wavs: Tensor, lengths: list[int]) -> Tensor:
        """Each row with up to that many short silences."""
        for row, length in enumerate(lengths if self.settings["gaps"] else []):
            for _ in range(self.rng.randint(0, self.settings["gaps"])):
                gap = int(self.rng.uniform(0, _GAP_SECONDS) * SAMPLE_RATE)
                start = self.rng.randrange(max(1, length - gap))
                wavs[row, start : start + gap] = 0
        return wavs

    def _noise(self, wavs: Tensor) -> Tensor:
        """White or pink noise for a share of the rows, at random signal-to-noise ratios."""
        noise = torch.randn_like(wavs)
        if self.rng.random() < 0.5:
            spectrum = torch.fft.rfft(noise)
            falling = torch.arange(1, spectrum.shape[1] + 1).sqrt()
            noise = torch.fft.irfft(spectrum / falling, wavs.shape[1])
        low, high = self.settings["noise_snr_db"]
        snr = low + (high - low) * torch.rand(len(wavs), 1)
        chosen = torch.rand(len(wavs), 1) < self.settings["noise_share"]
        power = wavs.square().mean(1, keepdim=True) / noise.square().mean(1, keepdim=True)
        return chosen * noise * power.sqrt() * 10 ** (-snr / 20)


def change_speed(wavs: Tensor, factor: float) -> Tensor:
    """Faster or slower, hence also higher or lower: (B, N) -> (B, int(N / factor))."""
    size = int(wavs.shape[1] / factor)
    return nn.functional.interpolate(wavs[:, None], size=size, mode="linear")[:, 0]


def encode(model, wavs: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
    """Frames (B, T, D) and their true numbers."""
    mask = torch.arange(wavs.shape[1]) < torch.tensor(lengths)[:, None]
    features = model(wavs, attention_mask=mask.long()).last_hidden_state
    frames = [int(model._get_feat_extract_output_lengths(n)) for n in lengths]
    return features, frames


@torch.no_grad()
def held_out_figures(model, objective, audio: Audio) -> dict[str, float]:
    """Mean figures of the objective over the held-out train utterances, without augmentation."""
    model.eval()
    uttids = sorted(audio.held_out, key=lambda uttid: len(audio.wavs[uttid]))
    rows: list[tuple[int, dict[str, float]]] = []
    for start in range(0, len(uttids), 20):
        part = uttids[start : start + 20]
        wavs, lengths, speed = audio.waveforms(part, augment=False)
        rows.append((len(part), objective(*encode(model, wavs, lengths), part, speed)[1]))
    model.train()
    return {
        f"held_out_{key}": round(
            float(numpy.average([f[key] for _, f in rows], weights=[n for n, _ in rows])), 4
        )
        for key in rows[0][1]
    }


def train_encoder(corpus: Corpus, settings: dict, folder: Path) -> dict:
    """Train an encoder and save it as a checkpoint of the hub would be.

    Arguments
    ---------
    corpus : Corpus
        Its train splits are used.
    settings : dict
        Of :func:`encoder_settings`.
    folder : Path
        Where to save: ``trained`` below it.

    Returns
    -------
    dict
        Figures for bootstrap.json.
    """
    from transformers import Wav2Vec2FeatureExtractor

    torch.manual_seed(derive_seed(settings["seed"], "stand-in encoder"))
    audio = Audio(corpus, settings)
    model = build_encoder(settings)
    objectives = {"frames": FrameObjective, "ctc": CtcObjective}
    objective = objectives[settings["labels"]](corpus, model.config.hidden_size)
    started = time.monotonic()
    optimise(model, objective, audio, settings)
    figures = held_out_figures(model, objective, audio) | {
        "held_out_utterances": len(audio.held_out),
        "train_utterances": len(audio.train),
        "train_hours": round(sum(len(audio.wavs[u]) for u in audio.train) / SAMPLE_RATE / 3600, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
    }
    model.save_pretrained(folder / "trained")
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=True,
    ).save_pretrained(folder / "trained")
    return figures


def optimise(model, objective, audio: Audio, settings: dict) -> None:
    """The training loop."""
    parameters = [*model.parameters(), *objective.parameters()]
    optimiser = torch.optim.AdamW(
        parameters, betas=tuple(settings["betas"]), weight_decay=settings["weight_decay"]
    )
    model.train()
    for step in range(settings["steps"]):
        raise_if_stopped()
        for group in optimiser.param_groups:
            group["lr"] = scheduled_lr(step, settings)
        uttids = audio.next_batch()
        wavs, lengths, speed = audio.waveforms(uttids, augment=True)
        loss, figures = objective(*encode(model, wavs, lengths), uttids, speed)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimiser.step()
        if (step + 1) % 50 == 0:
            rounded = {name: round(value, 3) for name, value in figures.items()}
            print(
                f"encoder: step {step + 1} of {settings['steps']}, loss {loss.item():.3f}, {rounded}",
                flush=True,
            )
