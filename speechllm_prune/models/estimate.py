"""What a leaf needs, computed from facts about its models: parameters, decoder share, memory and training time.

    python -m speechllm_prune.models.estimate hparams/librispeech_*.yaml

Estimates, not measurements. A step costs the larger of two times: its floating-point operations at a share of the GPU's
peak, and the time that Python needs to launch the kernels of every layer, which rules at a few utterances per GPU.
Validation and evaluation come on top. docs/REPRODUCING.md shows the result for every leaf.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.facts import DecoderFacts, EncoderFacts, decoder_facts, encoder_facts
from speechllm_prune.runtime import UserError, verb

if TYPE_CHECKING:
    from speechllm_prune.models.speechllm import SpeechLLM

H100, RTX3090 = 989e12, 71e12
"""Peak dense bf16 operations per second, as published."""
PEAK_SHARE = 0.4
"""Share of the peak that unfused Hugging Face layers reach on large matrices."""
LAUNCH_SECONDS = 0.65e-3
"""Launching one layer's forward pass from Python: 15 to 20 small kernels."""
POSITIONS_PER_SECOND, LABELS_PER_SECOND, PROMPT_POSITIONS = 10.0, 3.4, 10
"""Decoder positions of a second of audio (50 Hz in stacks of 5), its target tokens, and the prompt."""
CONVOLUTIONS = 5.7e9
"""Operations of WavLM's convolutional front end per second of audio."""
SECONDS = {
    "librispeech": 12.3,
    "minilibrispeech": 12.6,
    "covost2_en_de_standard": 5.3,
    "covost2_fr_en_standard": 4.6,
}
"""Mean length of a training utterance. CoVoST2's come from about 430 and 264 h: preparation prints the true ones."""
UTTERANCES = {
    "librispeech": 281_241,
    "minilibrispeech": 1_519,
    "covost2_en_de_standard": 289_430,
    "covost2_fr_en_standard": 207_374,
}
"""Training utterances as published."""


@dataclass(frozen=True)
class Estimate:
    """One leaf.

    Arguments
    ---------
    num_layers : int
        L of the decoder.
    encoder, decoder, projector, adapters : int
        Parameters.
    epochs : float
        Passes over the training set.
    step_seconds : float
        Of one optimiser step on the given GPUs.
    hours : float
        Of all training steps.
    memory_gib : float
        Peak of a training step on one GPU.
    """

    num_layers: int
    encoder: int
    decoder: int
    projector: int
    adapters: int
    epochs: float
    step_seconds: float
    hours: float
    memory_gib: float

    @property
    def decoder_share(self) -> float:
        """The decoder's share of all parameters, in percent."""
        total = self.encoder + self.decoder + self.projector + self.adapters
        return 100.0 * self.decoder / total


def projector_size(input_size: int, hidden_size: int, output_size: int) -> int:
    """Parameters of Linear - activation - Linear with biases.

    Example
    -------
    >>> projector_size(5 * 1024, 2048, 3584)
    17831424
    """
    return (input_size + 1) * hidden_size + (hidden_size + 1) * output_size


def attention_lora_size(config: dict[str, Any], rank: int) -> int:
    """Parameters of rank-r adapters on q, k, v and o of every layer.

    Example
    -------
    >>> from speechllm_prune.models.facts import DECODERS
    >>> attention_lora_size(DECODERS["Qwen/Qwen2.5-7B"].config, 16)
    10092544
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    query, key = heads * head_dim, config["num_key_value_heads"] * head_dim
    return config["num_hidden_layers"] * rank * 2 * (2 * width + query + key)


def estimate(hparams: dict[str, Any], num_gpus: int = 2, peak: float = H100) -> Estimate:
    """Estimate what training a leaf needs.

    Arguments
    ---------
    hparams : dict
        From `load_hparams`; its hubs must be in the table of facts.
    num_gpus : int
        GPUs of the run.
    peak : float
        Peak bf16 operations per second of one of them.

    Returns
    -------
    Estimate
    """
    decoder, encoder = (
        decoder_facts(hparams["decoder_hub"]),
        encoder_facts(hparams["encoder_hub"]),
    )
    config = decoder.config
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    frame = encoder.config.get("hidden_size") or encoder.config["d_model"]
    projector = projector_size(hparams["frame_stack"] * frame, hparams["projector_dim"], width)
    rank = hparams["decoder_lora_rank"]
    adapters = attention_lora_size(config, rank) if rank else 0

    corpus = hparams["train_manifests"][0].split("/")[0]
    seconds, batch = SECONDS[corpus], hparams["batch_size"]
    positions = batch * (POSITIONS_PER_SECOND * seconds + PROMPT_POSITIONS)
    labels = batch * LABELS_PER_SECOND * seconds
    operations = step_operations(decoder, encoder, projector, batch, seconds)
    encoder_layers = encoder.config.get("num_hidden_layers") or encoder.config["encoder_layers"]
    launches = LAUNCH_SECONDS * (encoder_layers + 2.5 * layers)
    micro_batches = hparams["grad_accumulation_factor"]
    step = micro_batches * max(operations / (PEAK_SHARE * peak), launches)
    utterances = hparams["num_steps"] * batch * num_gpus * micro_batches
    weights = 2 * (decoder.num_parameters + encoder.num_parameters) + 4 * (projector + adapters)
    memory = step_memory(config, weights, projector + adapters, positions + labels, labels)
    return Estimate(
        num_layers=layers,
        encoder=encoder.num_parameters,
        decoder=decoder.num_parameters,
        projector=projector,
        adapters=adapters,
        epochs=utterances / UTTERANCES[corpus],
        step_seconds=step,
        hours=hparams["num_steps"] * step / 3600,
        memory_gib=memory / 2**30,
    )


def step_operations(
    decoder: DecoderFacts, encoder: EncoderFacts, projector: int, batch: int, seconds: float
) -> float:
    """Floating-point operations of a training step on `batch` utterances of `seconds`.

    Frozen weights: forward and the gradient to the inputs, 2 + 2 operations per weight, and none for the weights.
    """
    config = decoder.config
    embedding = config["vocab_size"] * config["hidden_size"]
    body = decoder.num_parameters - embedding * (1 if config["tie_word_embeddings"] else 2)
    labels = LABELS_PER_SECOND * seconds
    positions = POSITIONS_PER_SECOND * seconds + PROMPT_POSITIONS
    operations = 4 * body * (positions + labels) + 4 * embedding * labels
    operations += 6 * projector * POSITIONS_PER_SECOND * seconds
    return batch * (operations + _encoder_operations(encoder, seconds))


def step_memory(
    config: Mapping[str, Any],
    weight_bytes: int,
    num_trained: int,
    positions: float,
    labels: float,
    element_size: int = 2,
    checkpointing: bool = False,
) -> float:
    """Bytes at the peak of a training step with Adam.

    Arguments
    ---------
    config : mapping
        Of the decoder.
    weight_bytes : int
        Of the whole model as it lies in memory.
    num_trained : int
        Parameters that are trained (fp32).
    positions : float
        Decoder positions of the micro-batch.
    labels : float
        Label rows whose logits are in memory at once.
    element_size : int
        Bytes of a frozen weight.
    checkpointing : bool
        Whether layers keep only their input.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    attention = heads * (config.get("head_dim") or width // heads)
    # what a position leaves in a layer for the backward pass: frozen matrices keep nothing
    kept = (4 * width + 4 * attention + 3 * config["intermediate_size"]) * element_size
    layers = config["num_hidden_layers"]
    body = layers * width * element_size + kept if checkpointing else layers * kept
    return weight_bytes + 12 * num_trained + positions * body + 12 * labels * config["vocab_size"]


def training_memory(model: SpeechLLM, names: Collection[str], positions: int, **how: Any) -> float:
    """`step_memory` of a model at hand, for its largest micro-batch.

    Arguments
    ---------
    model : SpeechLLM
    names : collection of str
        Parameters that are trained.
    positions : int
        Padded decoder positions of the micro-batch.
    **how
        `checkpointing` of `step_memory`.
    """
    parameters = dict(model.named_parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters.values())
    labels = positions * LABELS_PER_SECOND / (LABELS_PER_SECOND + POSITIONS_PER_SECOND)
    return step_memory(
        model.decoder.config.get_text_config().to_dict(),
        weights,
        sum(parameters[name].numel() for name in names),
        positions,
        min(labels, model.loss_chunk_rows or labels),
        model.decoder.get_input_embeddings().weight.element_size(),
        **how,
    )


def _encoder_operations(encoder: Any, seconds: float) -> float:
    """Forward pass over one utterance: weights at 50 frames a second, plus a tenth for attention."""
    if encoder.model_type == "whisper":
        seconds = 30.0  # its window, whatever the utterance's length
        return 1.2 * 2 * encoder.num_parameters * 50 * seconds
    layers = encoder.config["num_hidden_layers"] * 12 * encoder.config["hidden_size"] ** 2
    return (1.1 * 2 * layers * 50 + CONVOLUTIONS) * seconds


def setting(leaf: str | Path) -> tuple[int, float]:
    """GPUs and their peak that a leaf is meant for: two H100 as in the paper, or one 24 GB card."""
    return (1, RTX3090) if Path(leaf).stem.startswith("minilibrispeech") else (2, H100)


def table(leaves: list[str]) -> str:
    """A Markdown table of the estimates of several leaves."""
    head = (
        "leaf | L | encoder | decoder | decoder's share | trained | epochs | GPUs | step | training"
    )
    rows = [f"| {head} | memory per GPU |", "|---" * 11 + "|"]
    for leaf in leaves:
        hparams = load_hparams(leaf, {"data_folder": "unused"})
        num_gpus, peak = setting(leaf)
        found = estimate(hparams, num_gpus, peak)
        gpus = f"{num_gpus} x {'H100' if peak == H100 else '24 GB'}"
        rows.append(
            f"| {Path(leaf).stem} | {found.num_layers} | {found.encoder:,} | {found.decoder:,} "
            f"| {found.decoder_share:.1f} % | {found.projector + found.adapters:,} | {found.epochs:.2f} | {gpus} "
            f"| {1000 * found.step_seconds:.0f} ms | {found.hours:.1f} h | {found.memory_gib:.0f} GiB |"
        )
    return "\n".join(rows)


@verb
def main(argv: list[str]) -> int | None:
    """Print the table for the leaves named."""
    if not argv or argv[0].startswith("-"):
        raise UserError("usage: python -m speechllm_prune.models.estimate LEAF...")
    print(table(argv))
    return None


if __name__ == "__main__":
    sys.exit(main())
