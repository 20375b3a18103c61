"""How long a sweep takes: from what this experiment has timed, else from the facts about its models.

One cost model serves both: healing and decoding are passes over the decoder's layers, and a pass over a layer costs the
same whichever block is gone. Not in it: loading the model, filling the feature cache, the teacher's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speechllm_prune.data.manifest import read_summary
from speechllm_prune.experiment import Variant, read_json
from speechllm_prune.models.estimate import (
    LABELS_PER_SECOND,
    LAUNCH_SECONDS,
    SECONDS,
    estimate,
    setting,
)
from speechllm_prune.models.facts import DECODERS, ENCODERS
from speechllm_prune.runtime import spoken
from speechllm_prune.stages.plan import decoder_depth
from speechllm_prune.workbench import Workbench

LONGEST = 2.0
"""The longest hypothesis of a batch, which all others wait for, in mean lengths."""


def layers_left(num_layers: int, variant: Variant) -> int:
    """Depth of a variant's decoder."""
    return num_layers - (0 if variant.control else variant.block_size)


def training_passes(num_layers: int, variant: Variant) -> int:
    """Passes over a layer, forward and backward, in one training step of a variant; `full` is stage 1.

    Example
    -------
    >>> names = ("full", "l07n04-none", "l07n04-decoder", "l07n04-joint", "control-l07n04-decoder")
    >>> [training_passes(12, Variant.parse(name)) for name in names]
    [24, 0, 9, 16, 13]
    """
    if variant.start_layer is not None and variant.heal_mode == "none":
        return 0
    forward = layers_left(num_layers, variant)
    if variant.heal_mode != "decoder" or "all" in variant.tag.split("-"):
        return 2 * forward
    receiver = (variant.start_layer or 0) + (variant.block_size if variant.control else 0)
    return 2 * forward - receiver  # gradients end at the receiving layer


@dataclass(frozen=True)
class Costs:
    """What a pass over a layer costs.

    Arguments
    ---------
    num_layers : int
        L.
    per_pass : float or None
        Seconds of one layer's forward or backward pass in a training step; None where nothing is known.
    per_audio : float or None
        Seconds that one layer takes to decode a second of audio.
    heal_steps : int
        Of every healing.
    num_processes : int
        GPUs (or processes) that work side by side.
    device : str
        CPU | GPU.
    source : str
        Where the numbers come from.
    """

    num_layers: int
    per_pass: float | None
    per_audio: float | None
    heal_steps: int
    num_processes: int
    device: str
    source: str

    @classmethod
    def of(cls, bench: Workbench) -> Costs:
        """Measured if this experiment was timed on this kind of device, else computed if its models are known."""
        hparams, depth = bench.hparams, decoder_depth(bench)
        steps, processes = _timed_steps(bench, depth)
        audio = _timed_decodings(bench, depth)
        corpus = hparams["train_manifests"][0].split("/")[0]
        is_known = hparams["decoder_hub"] in DECODERS and hparams["encoder_hub"] in ENCODERS
        if not (steps and audio) and is_known and corpus in SECONDS:
            gpus, peak = setting(bench.run.leaf)
            step = estimate(hparams, gpus, peak).step_seconds / (2 * depth)
            # Decoding a batch is launching every layer for every token of its longest hypothesis.
            token = LABELS_PER_SECOND * LONGEST * LAUNCH_SECONDS / hparams["eval_batch_size"]
            told = f"computed for {gpus} x {peak / 1e12:.0f} TFLOP/s; nothing was timed here yet"
            return cls(depth, step, token / gpus, hparams["heal_steps"], gpus, "GPU", told)
        told = f"from {len(steps)} trainings and {len(audio)} decodings timed in this experiment"
        device = "CPU" if _kind(bench.device) == "cpu" else "GPU"
        return cls(
            depth, _mean(steps), _mean(audio), hparams["heal_steps"], processes, device, told
        )

    def seconds(self, variant: Variant, to_heal: bool, audio_seconds: float) -> float | None:
        """Time to heal a variant (if that is to be done) and to decode so much audio; None where that is not known."""
        passes = self.heal_steps * training_passes(self.num_layers, variant) if to_heal else 0
        layers = layers_left(self.num_layers, variant) if audio_seconds else 0
        if (passes and self.per_pass is None) or (layers and self.per_audio is None):
            return None
        return passes * (self.per_pass or 0.0) + audio_seconds * layers * (self.per_audio or 0.0)

    def describe(self, seconds: Sequence[float | None]) -> str:
        """How long all of these take together, and how that is known."""
        known = [value for value in seconds if value is not None]
        if len(known) < len(seconds):
            return f"time unknown ({self.source})"
        hours = sum(known) * self.num_processes / 3600
        return f"about {hours:.2g} {self.device} hours ({spoken(sum(known))}), {self.source}"


def audio_seconds(bench: Workbench, keys: list[str]) -> float:
    """Length of some manifests."""
    return 3600.0 * sum(read_summary(bench.manifest(key)).get("hours", 0.0) for key in keys)


def _timed_steps(bench: Workbench, depth: int) -> tuple[list[float], int]:
    """Seconds of a layer's pass in every healing (in stage 1, where there is none), and how many processes worked."""
    for folder in ("heal/*", "train"):
        found, processes = [], 1
        for file in sorted(bench.experiment.root.glob(f"{folder}/DONE.json")):
            timing = read_json(file).get("timing")  # not there where nothing was trained
            if timing and _kind(timing["device"]) == _kind(bench.device):
                name = "full" if folder == "train" else file.parent.name
                passes = training_passes(depth, Variant.parse(name))
                found.append(timing["seconds_per_step"] / passes)
                processes = timing["num_processes"]
        if found:
            return found, processes
    return [], 1


def _timed_decodings(bench: Workbench, depth: int) -> list[float]:
    """Seconds in which one layer decoded a second of audio, for every score of this experiment."""
    found = []
    for file in sorted(bench.experiment.root.glob("eval/*/*/metrics.json")):
        record = read_json(file)
        key = f"{record['corpus']}/{record['split']}"
        audio = audio_seconds(bench, [key]) if bench.is_prepared(key) else 0.0
        if audio and _kind(record["device"]) == _kind(bench.device):
            layers = layers_left(depth, Variant.parse(record["variant"]))
            found.append(record["seconds"] / audio / layers)
    return found


def _kind(device: str) -> str:
    return device.split(":")[0]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
