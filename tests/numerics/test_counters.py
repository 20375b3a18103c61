"""What the speed claims rest on, counted without a clock: rows of lm_head, positions of the body, bytes saved.

Counted elsewhere: rows of lm_head in decoding, which leave when they end (`test_decoding`), and while training in
chunks (`test_speed_features`); no call of it for distances, and one pass for all pairs (`test_distance`); nothing kept
below a cut by decoder-only healing (`test_healing`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm_prune.checkpoint import load_checkpoint_tensors
from speechllm_prune.data.batching import collate
from speechllm_prune.inference import greedy_search
from speechllm_prune.restore import build_model, set_trainable, train_names
from tests.numerics.common import batch_of, build, hparams_of, train_on, utterances

NEVER = frozenset({-1})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cached", [False, True], ids=["waveforms", "features"])
def test_a_training_step_puts_only_label_rows_through_the_output_layer(
    wavlm_layer: Path, decoder_folder: Path, precision: str, cached: bool
) -> None:
    model = build(wavlm_layer, decoder_folder, precision=precision)
    set_trainable(model, train_names(model))
    batch = batch_of(model)
    if cached:
        batch.audio, batch.audio_lengths = model.encoder(batch.audio, batch.audio_lengths)
    rows: list[int] = []
    encoded: list[int] = []
    body: list[tuple[int, ...]] = []
    model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(args[0].numel() // args[0].shape[-1])
    )
    model.decoder.get_decoder().register_forward_hook(
        lambda module, args, output: body.append(tuple(output.last_hidden_state.shape[:2]))
    )
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    sums = model(batch)
    sums.loss.backward()
    assert rows == [sum(len(ids) + 1 for ids in batch.target_ids)] == [int(sums.num_labels)]
    # One pass of the body, padded to the longest row and no further.
    positions = model.inputs_for(batch).attention_mask.sum(1)
    assert body == [(len(batch), int(positions.max()))]
    assert len(encoded) == (0 if cached else 2)  # the step, and this line's own layout


@pytest.mark.parametrize("caps", [[1, 5, 9, 14], [7, 7, 7, 7], [1, 1, 1, 1]])
@torch.no_grad()
def test_decoding_runs_the_prefix_once_and_each_token_once(
    wavlm_layer: Path, decoder_folder: Path, caps: list[int]
) -> None:
    """Prefix + tokens - 1 positions for every row: the last token is never an input, an ended row never runs again."""
    model = build(wavlm_layer, decoder_folder)
    inputs = model.inputs_for(collate(utterances(model, [2])), targets=False)
    embeds = inputs.inputs_embeds.expand(len(caps), -1, -1)
    prefix = embeds.shape[1]
    positions: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        positions.append(output.shape[0] * output.shape[1])

    model.decoder.get_decoder().norm.register_forward_hook(count)
    found = greedy_search(model.decoder, embeds, torch.ones(embeds.shape[:2]).long(), caps, NEVER)
    assert [len(tokens) for tokens, _ in found] == caps
    assert sum(positions) == sum(prefix + cap - 1 for cap in caps)
    assert len(positions) == max(caps)


def test_a_checkpoint_holds_what_is_trained_and_its_optimiser_and_nothing_frozen(
    wavlm_layer: Path, qwen2: Path, tmp_path: Path
) -> None:
    hparams = hparams_of(
        wavlm_layer, qwen2, projector_dim=4096, decoder_lora_rank=2, max_tokens_per_second=1.0
    )
    model = build_model(hparams)
    set_trainable(model, train_names(model))
    items = utterances(model, [1, 2])
    brain = train_on(model, hparams, items, [[0, 1]], 1, tmp_path)
    (folder,) = (tmp_path / "save").glob("CKPT*")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(load_checkpoint_tensors(folder)) == set(trained) == set(train_names(model))
    needed = sum(p.numel() * p.element_size() for p in trained.values())
    for state in brain.optimizer.state.values():
        needed += sum(v.numel() * v.element_size() for v in state.values())
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert needed > 5_000_000  # or the names would outweigh the tensors
    assert needed <= written <= 1.05 * needed
