"""Angular distances against arccos in a double loop over states taken one utterance at a time, without padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from speechllm_prune.data.batching import collate
from speechllm_prune.prune.distance import (
    Distances,
    angular_distance,
    last_positions,
    measure_distances,
)
from speechllm_prune.prune.path import pruning_path
from speechllm_prune.prune.surgery import remove_layers
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics.common import build, utterances

LENGTHS = [3, 9, 1, 6, 12]


@pytest.fixture
def decoder(decoder_folder: Path):
    return AutoModelForCausalLM.from_pretrained(decoder_folder).eval()


def sentences(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str, pad: int = 7) -> dict[str, Tensor]:
    length = max(map(len, rows)) + 2  # a column or two that no row needs
    ids, mask = [], []
    for row in rows:
        fill = length - len(row)
        ids.append(row + [pad] * fill if side == "right" else [pad] * fill + row)
        mask.append([1] * len(row) + [0] * fill if side == "right" else [0] * fill + [1] * len(row))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def states_by_hand(decoder, **inputs: Tensor) -> list[list[float]]:
    """h[0..L] at the last position of one unpadded row: L states of transformers' own, the end state by a hook."""
    ends: list[Tensor] = []
    layers = decoder.get_decoder().layers
    handle = layers[-1].register_forward_hook(lambda m, a, output: ends.append(output))
    hidden = decoder(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    end = ends[0][0] if isinstance(ends[0], tuple) else ends[0]
    # The last of transformers' states has passed the final norm: not a point of the residual stream.
    assert not torch.allclose(hidden[-1], end, atol=1e-2)
    return [h[0, -1].double().tolist() for h in (*hidden[:-1], end)]


def naive(all_states: list[list[list[float]]]) -> list[list[float]]:
    """Mean over utterances of arccos(cosine) / pi, in plain Python."""
    num_layers = len(all_states[0]) - 1
    matrix = [[math.nan] * num_layers for _ in range(num_layers)]
    for n in range(1, num_layers + 1):
        for start in range(num_layers - n + 1):
            angles = []
            for states in all_states:
                a, b = states[start], states[start + n]
                cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
                    sum(x * x for x in a) * sum(y * y for y in b)
                )
                angles.append(math.acos(min(1.0, max(-1.0, cosine))) / math.pi)
            matrix[n - 1][start] = sum(angles) / len(angles)
    return matrix


def assert_equal(found: Distances, expected: list[list[float]], count: int) -> None:
    torch.testing.assert_close(
        found.matrix, torch.tensor(expected).double(), atol=2e-6, rtol=0, equal_nan=True
    )
    assert found.count == count and found.matrix.dtype == torch.float64


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_a_double_loop(decoder, side: str) -> None:
    rows = sentences()
    expected = naive([states_by_hand(decoder, input_ids=torch.tensor([row])) for row in rows])
    batches = [padded(rows[:3], side), padded(rows[3:], side)]
    found = measure_distances(decoder, batches)
    assert_equal(found, expected, len(rows))
    defined = torch.isfinite(found.matrix)
    num_layers = tiny.DECODER_LAYERS
    assert defined.tolist() == [
        [start + n <= num_layers for start in range(num_layers)] for n in range(1, num_layers + 1)
    ]
    assert found.matrix[defined].min() > 0.01  # these layers do something
    path = pruning_path(found.matrix)
    for n, start in path.items():
        assert expected[n - 1][start] == min(expected[n - 1][: num_layers - n])


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_counted_from_the_first_real_token(decoder, side: str) -> None:
    """In fp32 a shift of a whole row is invisible under RoPE, in bf16 it is not."""
    given: list[Tensor] = []
    handle = decoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    batch = padded(sentences(), side)
    measure_distances(decoder, [batch])
    handle.remove()
    for positions, mask in zip(given[0], batch["attention_mask"].bool(), strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_batch_composition_does_not_matter(decoder) -> None:
    rows = sentences()
    splits: list[list[list[int]]] = [
        [[0, 1, 2, 3, 4]],
        [[4], [0, 2], [3, 1]],
        [[i] for i in range(5)],
    ]
    found = [
        measure_distances(decoder, (padded([rows[i] for i in part], "right") for part in split))
        for split in splits
    ]
    for other in found[1:]:  # a mean over batches would weigh the single row of [4] as much as two
        torch.testing.assert_close(found[0].matrix, other.matrix, atol=1e-6, rtol=0, equal_nan=True)
        assert other.count == 5
    # No mean at all of what the second batch holds alone.
    assert (
        found[0].matrix - measure_distances(decoder, [padded(rows[4:], "right")]).matrix
    ).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_speech_rows_end_with_the_last_target_token_or_the_prompt(
    wavlm_layer: Path, llama: Path, lora_rank: int
) -> None:
    model = build(wavlm_layer, llama, decoder_lora_rank=lora_rank, decoder_lora_dropout=0.9)
    items = utterances(model, [1, 5, 2, 4])
    embed, body_calls, head_calls = model.decoder.get_input_embeddings(), [], []
    matrices = []
    for with_targets in (True, False):
        alone = []
        for item in items:
            inputs = model.inputs_for(collate([item]), targets=with_targets)
            last = item["target_ids"][-1] if with_targets else model.prompt_ids[-1]
            assert torch.equal(inputs.inputs_embeds[0, -1], embed.weight[last])
            alone.append(states_by_hand(model.decoder, inputs_embeds=inputs.inputs_embeds))
        handles = [
            model.decoder.get_decoder().register_forward_hook(lambda *_: body_calls.append(1)),
            model.decoder.get_output_embeddings().register_forward_hook(
                lambda *_: head_calls.append(1)
            ),
        ]
        model.decoder.train()  # adapters' dropout must not be measured, whoever forgot it
        found = measure_distances(
            model.decoder,
            [
                model.inputs_for(collate(part), with_targets)._asdict()
                for part in (items[:3], items[3:])
            ],
        )
        assert model.decoder.training
        model.decoder.eval()
        for handle in handles:
            handle.remove()
        assert_equal(found, naive(alone), len(items))
        matrices.append(found.matrix)
    assert len(body_calls) == 4 and head_calls == []
    assert (matrices[0] - matrices[1]).abs().nan_to_num().max() > 1e-3


def test_measures_a_pruned_decoder(decoder) -> None:
    remove_layers(decoder, 1, 2)
    rows = sentences()
    expected = naive([states_by_hand(decoder, input_ids=torch.tensor([row])) for row in rows])
    assert_equal(measure_distances(decoder, [padded(rows, "left")]), expected, len(rows))


def test_measures_gemma_whose_embeddings_are_scaled() -> None:
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.1,
    )
    decoder = Gemma3ForCausalLM(config).eval()
    rows = sentences()
    expected = naive([states_by_hand(decoder, input_ids=torch.tensor([row])) for row in rows])
    assert_equal(measure_distances(decoder, [padded(rows, "right")]), expected, len(rows))


def test_leaves_no_hooks_and_modes_as_they_were(decoder) -> None:
    decoder.train()
    decoder.model.layers[2].eval()
    modes = [module.training for module in decoder.modules()]

    def failing() -> Iterator[dict[str, Tensor]]:
        yield padded(sentences(), "right")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_distances(decoder, failing())
    assert modes == [module.training for module in decoder.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())


def test_refuses_rows_of_padding_and_nothing_at_all(decoder) -> None:
    batch = padded(sentences(), "right")
    batch["attention_mask"][2] = 0
    with pytest.raises(UserError, match="without any real position"):
        measure_distances(decoder, [batch])
    with pytest.raises(UserError, match="nothing to measure"):
        measure_distances(decoder, [])


def test_last_positions_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0]])
    assert last_positions(mask).tolist() == [2, 0, 2, 2, 1]


# ---------------------------------------------------------------------------------------------- the angle itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_special_angles(dtype: torch.dtype) -> None:
    vectors = torch.randn(200, 64).to(dtype)
    same = angular_distance(vectors, vectors)
    assert (same == 0).all()  # arccos of a rounded cosine is NaN or 1e-4 here
    assert (angular_distance(vectors, -vectors) == 1).all()
    assert (angular_distance(vectors, vectors * 4) < 1e-7).all()  # only the direction counts
    a, b = torch.zeros(2, 8, dtype=dtype)
    a[0], b[3] = 3.0, 0.5
    assert angular_distance(a, b) == 0.5


@pytest.mark.parametrize(
    "angle", [1e-12, 1e-9, 1e-7, 1e-4, 0.01, 0.3, 1.0, 2.0, 3.0, math.pi - 1e-7]
)
def test_small_and_large_angles_keep_their_digits(angle: float) -> None:
    a = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    b = 5.0 * torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    expected = angle / math.pi
    assert angular_distance(a, b).item() == pytest.approx(expected, rel=1e-6)
    assert angular_distance(b, a).item() == angular_distance(a, b).item()


def test_low_precision_states_are_measured_in_high_precision() -> None:
    a = torch.randn(50, 128)
    b = (a + 0.01 * torch.randn(50, 128)).bfloat16()
    a = a.bfloat16()
    found = angular_distance(a, b)
    exact = angular_distance(a.double(), b.double())
    assert found.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, atol=1e-7, rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)  # in bf16
    assert ((torch.arccos(cosine.double()) / math.pi - exact).abs() > 10 * 1e-5).any()
    assert 0.001 < exact.mean() < 0.01


def test_broadcasts_like_its_inputs() -> None:
    a, b = torch.randn(3, 1, 5), torch.randn(4, 5)
    found = angular_distance(a, b)
    assert found.shape == (3, 4)
    cosine = (a[2, 0] @ b[1]) / (a[2, 0].norm() * b[1].norm())
    assert found[2, 1].item() == pytest.approx(math.acos(cosine) / math.pi, rel=1e-4)
