"""The layout [speech][prompt][target], its labels and its loss, against Hugging Face run on one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from speechllm_prune.data.batching import collate
from speechllm_prune.models.decoder import resolve_token_ids
from speechllm_prune.models.projector import stack_frames
from speechllm_prune.models.speechllm import SpeechLLM
from tests.numerics.common import batch_of, build, utterances


@pytest.fixture
def model(wavlm_layer: Path, decoder_folder: Path) -> SpeechLLM:
    return build(wavlm_layer, decoder_folder)


def rows_by_hand(model: SpeechLLM, items: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """Embeddings and Hugging Face labels (-100 elsewhere) of each utterance alone, with eos as one further input.

    transformers shifts labels itself: the label of position t is predicted at t - 1, so eos must stand at the end.
    """
    embed, eos = model.decoder.get_input_embeddings(), model.tokenizer.eos_token_id
    prompt = model.tokenizer.encode(model.prompt, add_special_tokens=False)
    rows = []
    for item in items:
        features, lengths = model.encoder(item["audio"][None], [len(item["audio"])])
        frames = features[0, : lengths[0]]
        k = model.frame_stack
        frames = torch.cat([frames, torch.zeros(-len(frames) % k, frames.shape[1])])
        speech = model.projector(torch.stack([f.flatten() for f in frames.split(k)]))
        tokens = torch.tensor([*prompt, *item["target_ids"], eos])
        labels = torch.tensor([-100] * (len(speech) + len(prompt)) + [*item["target_ids"], eos])
        rows.append((torch.cat([speech, embed(tokens)]), labels))
    return rows


@pytest.mark.parametrize("frame_stack", [1, 2, 5, 7])
def test_stack_frames_equals_a_loop(frame_stack: int) -> None:
    lengths = [1, 4, 5, 9, 10, 11]
    features = torch.randn(len(lengths), 11, 3)
    expected = []
    for row, length in zip(features, lengths, strict=True):
        stacks = []
        for first in range(0, length, frame_stack):
            values: list[float] = []
            for t in range(first, first + frame_stack):
                values += row[t].tolist() if t < length else [0.0] * 3
            stacks.append(values)
        expected.append(torch.tensor(stacks))
    for row, length in zip(features, lengths, strict=True):
        row[length:] = torch.nan  # nothing that stands in the padding may get through
    stacked, stacked_lengths = stack_frames(features, lengths, frame_stack)
    assert stacked_lengths == [len(rows) for rows in expected]
    for got, rows in zip(stacked, expected, strict=True):
        assert torch.equal(got[: len(rows)], rows)
        assert torch.equal(got[len(rows) :], torch.zeros_like(got[len(rows) :]))


def test_layout_is_contiguous_and_eos_is_a_label_in_every_row_and_never_an_input(
    model: SpeechLLM,
) -> None:
    items = utterances(model, [2, 5, 0, 3])
    batch = collate(items)
    inputs = model.inputs_for(batch)
    eos = model.tokenizer.eos_token_id
    prompt = model.tokenizer.encode(model.prompt, add_special_tokens=False)
    eos_vector = model.decoder.get_input_embeddings().weight[eos]
    row_of, position_of = inputs.label_rows.tolist()
    expected_rows: list[tuple[int, int, int]] = []
    for i, (item, (hand, labels)) in enumerate(zip(items, rows_by_hand(model, items), strict=True)):
        length = len(hand) - 1  # eos is no input
        assert inputs.attention_mask[i].tolist() == [1] * length + [0] * (
            inputs.attention_mask.shape[1] - length
        )
        assert inputs.position_ids[i, :length].tolist() == list(range(length))
        torch.testing.assert_close(
            inputs.inputs_embeds[i, :length], hand[:-1], atol=2e-5, rtol=1e-4
        )
        assert not (inputs.inputs_embeds[i, :length] == eos_vector).all(-1).any()
        target = [*item["target_ids"], eos]
        first = length - len(item["target_ids"]) - 1
        # The row of the last prompt token predicts the first target, or eos where there is no target.
        assert torch.equal(
            inputs.inputs_embeds[i, first], model.decoder.get_input_embeddings().weight[prompt[-1]]
        )
        assert labels[-len(target) :].tolist() == target
        expected_rows += [(i, first + j, token) for j, token in enumerate(target)]
    assert list(zip(row_of, position_of, inputs.labels.tolist(), strict=True)) == expected_rows
    assert inputs.labels.tolist().count(eos) == len(items)
    assert model.num_positions(len(items[1]["audio"]), len(items[1]["target_ids"])) == int(
        inputs.attention_mask[1].sum()
    )


def test_token_ids_by_role(model: SpeechLLM, decoder_folder: Path) -> None:
    ids, tokenizer = resolve_token_ids(model.decoder, model.tokenizer), model.tokenizer
    assert ids.eos == tokenizer.eos_token_id and ids.eos in ids.stop
    if decoder_folder.name == "llama":
        assert ids.bos == tokenizer.bos_token_id and tokenizer.pad_token_id is None
    else:  # as in Qwen2.5 base; the bos in its config is not to be believed
        assert ids.bos is None and ids.pad == ids.eos
        assert model.decoder.config.bos_token_id is not None
    model.decoder.generation_config.eos_token_id = [ids.eos, 17]
    assert resolve_token_ids(model.decoder, tokenizer).stop == {ids.eos, 17}
    assert resolve_token_ids(model.decoder, tokenizer).eos == ids.eos


def test_prompt_is_the_same_after_saving_and_reloading_the_tokenizer(
    model: SpeechLLM, tmp_path: Path
) -> None:
    prompts = [model.prompt, "Übersetze, bitte: ", "\n<|speech|>", model.prompt.upper()]
    model.tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in prompts:
        before = model.tokenizer(prompt, add_special_tokens=False).input_ids
        assert before == reloaded(prompt, add_special_tokens=False).input_ids
    assert model.prompt_ids == reloaded(model.prompt, add_special_tokens=False).input_ids
    assert reloaded.decode(model.prompt_ids) == model.prompt
    assert model.tokenizer.bos_token_id not in model.prompt_ids


def test_loss_of_a_batch_equals_hugging_face_row_by_row(model: SpeechLLM) -> None:
    items = utterances(model, [1, 5, 0, 4])
    with torch.no_grad():
        sums = model(collate(items))
        total, correct, count = 0.0, 0, 0
        for embeds, labels in rows_by_hand(model, items):
            output = model.decoder(inputs_embeds=embeds[None], labels=labels[None])
            used = int((labels != -100).sum())
            total += float(output.loss) * used
            correct += int((output.logits[0, :-1].argmax(-1) == labels[1:]).sum())
            count += used
    assert int(sums.num_labels) == count
    assert int(sums.num_correct) == correct
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)
    assert total / count > 1.0


def test_loss_is_the_sum_of_those_one_by_one(encoder_folder: Path, llama: Path) -> None:
    model = build(encoder_folder, llama)
    items = utterances(model, [1, 5, 2, 4])
    with torch.no_grad():
        together = model(collate(items)).loss
        alone = sum(model(collate([item])).loss for item in items)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_decoder_states_of_a_mixed_batch_equal_those_one_by_one(
    model: SpeechLLM, padding_side: str
) -> None:
    items = utterances(model, [1, 5, 2, 4])

    def states(inputs, row: int) -> Tensor:
        hidden = model.decoder.get_decoder()(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
        ).last_hidden_state
        return hidden[row][inputs.attention_mask[row].bool()]

    with torch.no_grad():
        targets = padding_side == "right"
        together = model.inputs_for(collate(items), targets, padding_side)
        assert int(together.attention_mask[1].sum()) > int(together.attention_mask[0].sum())
        for row, item in enumerate(items):
            alone = model.inputs_for(collate([item]), targets, padding_side)
            assert alone.attention_mask.all()
            # A uniform shift is invisible under RoPE in fp32, but not in bf16.
            own = together.position_ids[row][together.attention_mask[row].bool()]
            assert own.tolist() == list(range(len(own))) == alone.position_ids[0].tolist()
            torch.testing.assert_close(
                states(together, row), states(alone, 0), atol=2e-5, rtol=1e-4
            )


def test_only_label_rows_pass_through_the_output_layer(model: SpeechLLM) -> None:
    rows: list[int] = []
    handle = model.decoder.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(args[0].numel() // args[0].shape[-1])
    )
    batch = batch_of(model)
    sums = model(batch)
    handle.remove()
    assert rows == [sum(len(ids) + 1 for ids in batch.target_ids)] == [int(sums.num_labels)]
