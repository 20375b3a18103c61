"""The SpeechLLM: frozen encoder, projector and frozen decoder as one module (paper, section 2.1).

Shapes: B utterances, S speech positions, P prompt tokens, N target tokens, X = S + P + N decoder positions, H decoder
width, V vocabulary.

A row is laid out as [speech][prompt][target] without a hole and padded once, on the outside, with explicit position
ids: what an utterance is batched with cannot change it. The end-of-sequence token is a label and never an input, so a
row has S + P + N inputs and N + 1 labels, the first of which is predicted at the last prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm_prune.models.decoder import TokenIds, lm_logits, resolve_token_ids
from speechllm_prune.models.encoder import SpeechEncoder
from speechllm_prune.models.loss import LossSums, loss_sums
from speechllm_prune.models.projector import stack_frames, stacked_length
from speechllm_prune.prune.distill import TeacherRows
from speechllm_prune.runtime import UserError

if TYPE_CHECKING:
    from speechllm_prune.data.batching import Batch


class DecoderInputs(NamedTuple):
    """What the decoder reads.

    Arguments
    ---------
    inputs_embeds : Tensor
        (B, X, H), zeros in the padding.
    attention_mask : Tensor
        (B, X), 1 on real positions.
    position_ids : Tensor
        (B, X), counted from each row's first real position.
    label_rows : Tensor
        (2, M): batch index and position of each of the M positions that predict a label; empty without targets.
    labels : Tensor
        (M,): the target tokens of each row followed by eos.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    label_rows: Tensor
    labels: Tensor


@dataclass
class TaskParts:
    """What one task brings to a decoder that several share; see `SpeechLLM` for the fields.

    Arguments
    ---------
    adapter : str or None
        Name of the healing adapter on the decoder; None for none.
    """

    name: str
    encoder: SpeechEncoder = field(repr=False)
    projector: nn.Module = field(repr=False)
    frame_stack: int
    prompt: str
    text_case: str
    max_tokens_per_second: float
    adapter: str | None = None


class SpeechLLM(nn.Module):
    """Encoder, projector and decoder in one module, so that one wrapper serves distributed training.

    Arguments
    ---------
    encoder : SpeechEncoder
        Frozen speech encoder.
    projector : nn.Module
        (B, S, k * D) -> (B, S, H).
    decoder : PreTrainedModel
        Frozen causal LM, perhaps with LoRA adapters.
    tokenizer : PreTrainedTokenizer
        The decoder's.
    frame_stack : int
        k, encoder frames in one speech position.
    prompt : str
        Text between speech and target.
    text_case : str
        Case of the targets that the model was trained on.
    task : str
        asr | ast.
    max_tokens_per_second : float
        Cap on the length of a hypothesis.
    loss_chunk_rows : int
        Label rows whose logits are in memory at once while training; 0 for all.
    decode_graphs : str
        never | auto | always, see `search.greedy_search`.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        projector: nn.Module,
        decoder: Any,
        tokenizer: Any,
        frame_stack: int,
        prompt: str,
        text_case: str = "lower",
        task: str = "asr",
        max_tokens_per_second: float = 12.0,
        loss_chunk_rows: int = 0,
        decode_graphs: str = "never",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.frame_stack = frame_stack
        self.prompt = prompt
        self.text_case = text_case
        self.task = task
        self.max_tokens_per_second = max_tokens_per_second
        self.loss_chunk_rows, self.decode_graphs = loss_chunk_rows, decode_graphs
        self.tasks: dict[str, TaskParts] = {}
        """All tasks of an export that holds several; empty otherwise. `use_task` switches."""
        self.token_ids: TokenIds = resolve_token_ids(decoder, tokenizer)
        self.prompt_ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> SpeechLLM:
        """Frozen parts stay in eval mode; only the projector and adapters that are being trained follow `mode`."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        if mode:
            from peft.tuners.lora import LoraLayer

            for module in self.decoder.modules():
                if isinstance(module, LoraLayer) and any(
                    p.requires_grad for p in module.parameters()
                ):
                    module.train()
        return self

    def num_positions(self, num_samples: int, num_targets: int) -> int:
        """X: decoder positions of an utterance, known before its audio is read."""
        speech = stacked_length(self.encoder.output_length(num_samples), self.frame_stack)
        return speech + len(self.prompt_ids) + num_targets

    def speech_embeddings(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Encode (unless the batch holds cached features), stack and project: (B, S, H) and the true lengths."""
        if batch.has_features:
            features, lengths = batch.audio, batch.audio_lengths
        else:
            # Not under the training's autocast: cached features are computed without it, and must be the same.
            with torch.autocast(batch.audio.device.type, enabled=False):
                features, lengths = self.encoder(batch.audio, batch.audio_lengths)
        stacks, lengths = stack_frames(features, lengths, self.frame_stack)
        weight = next(self.projector.parameters())
        return self.projector(stacks.to(weight.dtype)), lengths

    def build_inputs(
        self,
        speech: Tensor,
        speech_lengths: Sequence[int],
        target_ids: Sequence[Sequence[int]] | None = None,
        padding_side: str = "right",
    ) -> DecoderInputs:
        """Lay out [speech][prompt][target] for each utterance.

        Arguments
        ---------
        speech : Tensor
            (B, S, H) projected speech.
        speech_lengths : sequence of int
            True number of speech positions of each utterance.
        target_ids : sequence of token id sequences, optional
            Targets without eos. None for generation: the row then ends with the prompt.
        padding_side : str
            `right` for training, `left` for generation.

        Returns
        -------
        DecoderInputs
        """
        device = speech.device

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)  # a blocking copy waits for the encoder

        targets = (
            [list(ids) for ids in target_ids]
            if target_ids is not None
            else [[] for _ in speech_lengths]
        )
        tokens = [torch.tensor(self.prompt_ids + target, dtype=torch.long) for target in targets]
        text = self.decoder.get_input_embeddings()(
            on_device(pad_sequence(tokens, batch_first=True, padding_value=self.token_ids.pad))
        )
        rows = [
            torch.cat([speech[i, :length].to(text.dtype), text[i, : len(tokens[i])]])
            for i, length in enumerate(speech_lengths)
        ]
        ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
        mask = on_device(pad_sequence(ones, batch_first=True, padding_side=padding_side))
        index: list[int] = []
        position: list[int] = []
        labels: list[int] = []
        if target_ids is not None:
            for i, target in enumerate(targets):
                first = (
                    speech_lengths[i] + len(self.prompt_ids) - 1
                )  # the last prompt token predicts the first target
                index += [i] * (len(target) + 1)
                position += range(first, first + len(target) + 1)
                labels += [*target, self.token_ids.eos]
            assert padding_side == "right", "label positions are counted from the left"
        return DecoderInputs(
            inputs_embeds=pad_sequence(rows, batch_first=True, padding_side=padding_side),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            label_rows=on_device(torch.tensor([index, position], dtype=torch.long)),
            labels=on_device(torch.tensor(labels, dtype=torch.long)),
        )

    def inputs_for(
        self, batch: Batch, targets: bool = True, padding_side: str = "right"
    ) -> DecoderInputs:
        """From a batch to what the decoder reads: `speech_embeddings`, then `build_inputs`."""
        speech, lengths = self.speech_embeddings(batch)
        return self.build_inputs(
            speech, lengths, batch.target_ids if targets else None, padding_side
        )

    def label_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(M, H) states after the final norm and (M,) labels of the rows that predict a label."""
        inputs = self.inputs_for(batch)
        hidden = self.decoder.get_decoder()(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden[inputs.label_rows[0], inputs.label_rows[1]], inputs.labels

    def label_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(M, V) logits and (M,) labels of the rows that predict a label; no other row passes the output layer."""
        rows, labels = self.label_states(batch)
        return lm_logits(self.decoder, rows), labels

    def forward(self, batch: Batch, teacher: TeacherRows | None = None) -> LossSums:
        """Teacher-forced loss, summed over the labels.

        Arguments
        ---------
        batch : Batch
        teacher : TeacherRows, optional
            Of the unpruned model, for the batch's labels: its weighted divergence is added to the cross-entropy.
        """
        rows, labels = self.label_states(batch)
        return loss_sums(self.decoder, rows, labels, teacher, self.loss_chunk_rows)

    # ------------------------------------------------------------ for users of a finished model

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> SpeechLLM:
        """Load an export (full, pruned or healed), a folder or a hub id. See `inference.load_export`."""
        from speechllm_prune.inference import load_export

        return load_export(folder, device)

    @classmethod
    def from_hparams(
        cls,
        source: str | Path,
        savedir: str | Path | None = None,
        run_opts: dict[str, Any] | None = None,
    ) -> SpeechLLM:
        """As SpeechBrain users expect.

        Arguments
        ---------
        source : str or Path
            A folder or a hub id.
        savedir : str or Path, optional
            Where an export from a hub is kept (default: the hub's cache). A folder is used where it is.
        run_opts : dict, optional
            Its `device` is used.
        """
        from speechllm_prune.inference import load_export

        return load_export(source, (run_opts or {}).get("device"), savedir)

    def add_task(self, parts: TaskParts) -> None:
        """Make a task available to `use_task`."""
        self.tasks[parts.name] = parts

    def use_task(self, name: str) -> None:
        """Switch to a task: encoder, projector, prompt and the one active adapter. The decoder's weights stay.

        Raises
        ------
        UserError
            If this model does not do it.
        """
        from speechllm_prune.prune.task_adapters import activate_adapter

        if name == self.task and name not in self.tasks:
            return
        if name not in self.tasks:
            known = " and ".join(self.tasks or [self.task])
            raise UserError(f"this model does {known}, not {name}")
        parts = self.tasks[name]
        self.encoder, self.projector = (
            parts.encoder.to(self.device),
            parts.projector.to(self.device),
        )
        self.frame_stack, self.prompt = parts.frame_stack, parts.prompt
        self.prompt_ids = self.tokenizer(parts.prompt, add_special_tokens=False).input_ids
        self.text_case, self.task = parts.text_case, name
        self.max_tokens_per_second = parts.max_tokens_per_second
        activate_adapter(self.decoder, parts.adapter)

    @contextmanager
    def doing(self, task: str | None) -> Iterator[None]:
        """Use a task for one request, and go back to the one before. None changes nothing."""
        before = self.task
        try:
            if task is not None and task != before:
                self.use_task(task)
            yield
        finally:
            if self.task != before:
                self.use_task(before)

    def transcribe(
        self, audio: Sequence[Any], batch_size: int = 8, task: str | None = None
    ) -> list[str]:
        """Transcribe files or 16 kHz waveforms. See `speechllm_prune.inference.transcribe`."""
        from speechllm_prune.inference import transcribe

        return transcribe(self, audio, batch_size, task)

    def transcribe_file(self, path: str | Path, task: str | None = None) -> str:
        """Transcribe one file."""
        return self.transcribe([path], task=task)[0]

    def transcribe_batch(
        self, wavs: Tensor, wav_lens: Tensor, task: str | None = None
    ) -> list[str]:
        """Transcribe a padded batch: (B, N) at 16 kHz with relative lengths in (0, 1], as in SpeechBrain."""
        if wavs.dim() != 2 or wav_lens.shape != wavs.shape[:1]:
            raise UserError(
                f"transcribe_batch takes (B, N) waveforms and (B,) relative lengths, given {tuple(wavs.shape)} and "
                f"{tuple(wav_lens.shape)}"
            )
        if not bool(((wav_lens > 0) & (wav_lens <= 1)).all()):
            raise UserError(
                f"wav_lens are shares of the longest waveform in (0, 1], given {wav_lens.tolist()}"
            )
        lengths = (wav_lens.double() * wavs.shape[1]).round().long().tolist()
        return self.transcribe(
            [wav[:n] for wav, n in zip(wavs, lengths, strict=True)],
            batch_size=max(1, len(wavs)),
            task=task,
        )
