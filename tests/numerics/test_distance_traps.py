"""Each mistake that measuring tools are known to make, run beside ours: theirs must be seen to be wrong, ours right.

Right is what float64 loops over single rows give (`reference_decoder.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers import AutoModelForCausalLM

from speechllm_prune.prune.distance import (
    Distances,
    ResidualStream,
    angular_distance,
    last_positions,
    measure_distances,
    without_adapters,
)
from speechllm_prune.prune.lora import LoraSettings, add_decoder_lora
from speechllm_prune.prune.path import bootstrap_share, pruning_path
from speechllm_prune.runtime import UserError
from tests import tiny
from tests.numerics import reference_decoder as reference
from tests.numerics.common import stir_adapters
from tests.numerics.test_distance_reference import TOLERANCE, naive_distances

LAYERS = tiny.DECODER_LAYERS
LENGTHS = (3, 9, 1, 6, 12)
Batch = dict[str, Tensor]


@pytest.fixture
def decoder(llama: Path):
    return AutoModelForCausalLM.from_pretrained(llama).eval()


def sentences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS]


def padded(rows: list[list[int]], side: str) -> Batch:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), None)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def right_matrix(decoder, rows: list[list[int]]) -> np.ndarray:
    weights = reference.weights_of(decoder)
    inputs = [weights["model.embed_tokens.weight"][row] for row in rows]
    return naive_distances(weights, reference.sizes_of(decoder.config), inputs)["matrix"]


@torch.no_grad()
def by_hidden_states(decoder, batch: Batch, pick: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """How most tools measure: transformers' `hidden_states`, one position of each row, a mean."""
    found = decoder(
        **batch,
        position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    states = [pick(hidden, batch["attention_mask"]) for hidden in found]
    matrix = np.full((LAYERS, LAYERS), np.nan)
    for n in range(1, LAYERS + 1):
        for start in range(LAYERS - n + 1):
            angle = angular_distance(states[start].double(), states[start + n].double())
            matrix[n - 1, start] = float(angle.mean())
    return matrix


def true_last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), last_positions(mask)]


def error(found: np.ndarray | Tensor, right: np.ndarray) -> float:
    return float(np.nanmax(abs(np.asarray(found) - right)))


def ends_at_the_top() -> np.ndarray:
    starts, sizes = np.meshgrid(np.arange(LAYERS), np.arange(1, LAYERS + 1))
    return starts + sizes == LAYERS


# ------------------------------------------------------------------------------------------------- the states
def test_the_last_of_hidden_states_has_passed_the_final_norm(decoder) -> None:
    rows = sentences()
    weight = decoder.model.norm.weight.data  # in trained models it is far from 1
    weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) * 3)
    right, batch = right_matrix(decoder, rows), padded(rows, "right")
    wrong = by_hidden_states(decoder, batch, true_last)
    found = measure_distances(decoder, [batch])
    assert error(found.matrix, right) < TOLERANCE
    top = ends_at_the_top()
    assert error(wrong[~top], right[~top]) < TOLERANCE < 1e-2 < error(wrong[top], right[top])
    paths = [pruning_path(matrix, allow_last=True) for matrix in (found.matrix, wrong)]
    assert paths[0] != paths[1], "it moves the path wherever the last layer may go"
    # Measured on purpose, under a name of its own, and no part of the matrix.
    ends = [wrong[LAYERS - start - 1, start] for start in range(LAYERS)]
    np.testing.assert_allclose(found.post_norm, ends, rtol=0, atol=TOLERANCE)


def test_block_0_starts_at_the_embeddings(decoder) -> None:
    """Dropping `hidden_states[0]`, as the best-known tool does, shifts every start layer by one."""
    rows = sentences()
    right, found = right_matrix(decoder, rows), measure_distances(decoder, [padded(rows, "left")])
    shifted = np.full_like(right, np.nan)
    shifted[:, : LAYERS - 1] = right[:, 1:]
    both = np.isfinite(right) & np.isfinite(shifted)
    assert error(found.matrix, right) < TOLERANCE < 1e-2 < error(shifted[both], right[both])


@pytest.mark.parametrize(
    ("side", "wrong_pick"),
    [
        ("right", lambda hidden, mask: hidden[:, -1]),
        ("left", lambda hidden, mask: hidden[torch.arange(len(hidden)), mask.sum(1) - 1]),
    ],
)
def test_the_last_position_is_the_last_real_one(decoder, side: str, wrong_pick) -> None:
    rows = sentences()
    right, batch = right_matrix(decoder, rows), padded(rows, side)
    top = ends_at_the_top()
    wrong = by_hidden_states(decoder, batch, wrong_pick)
    assert error(wrong[~top], right[~top]) > 1e-2
    assert error(by_hidden_states(decoder, batch, true_last)[~top], right[~top]) < TOLERANCE
    assert error(measure_distances(decoder, [batch]).matrix, right) < TOLERANCE


def test_positions_are_given_because_bf16_sees_a_shift(llama: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    rows = sentences()
    right, left = padded(rows, "right"), padded(rows, "left")
    found = [measure_distances(decoder, [batch]).matrix for batch in (right, left)]
    body = decoder.get_decoder()

    def forget(module, args, kwargs):
        return args, kwargs | {"position_ids": None}

    handle = body.register_forward_pre_hook(forget, with_kwargs=True)
    wrong = measure_distances(decoder, [left]).matrix
    handle.remove()
    assert error(wrong, found[0].numpy()) > 3 * error(found[1], found[0].numpy())


def test_nan_is_refused_and_not_averaged(decoder) -> None:
    """float64 with eager attention turns a row with padding on the left into NaN."""
    rows = sentences()
    decoder.set_attn_implementation("eager")
    assert (
        error(
            measure_distances(decoder, [padded(rows, "left")]).matrix, right_matrix(decoder, rows)
        )
        < TOLERANCE
    )
    decoder.double()
    with torch.no_grad():
        states = decoder(**padded(rows, "left"), output_hidden_states=True).hidden_states
    if not states[-1][:, -1].isnan().any():
        pytest.skip("this transformers computes finite states here")
    with pytest.raises(UserError, match="not finite"):
        measure_distances(decoder, [padded(rows, "left")])


# ------------------------------------------------------------------------------------------------- the angle
def unclamped(a: Tensor, b: Tensor) -> Tensor:
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.arccos(cosine) / math.pi


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_unclamped_arccos_is_nan_for_equal_vectors(dtype: torch.dtype) -> None:
    vectors = torch.randn(500, 64).to(dtype)
    assert unclamped(vectors, vectors).isnan().any()
    clamped = torch.arccos(
        torch.nn.functional.cosine_similarity(vectors, vectors, dim=-1).clamp(-1, 1)
    )
    assert (clamped > 0).any(), "clamped it is no NaN, but not 0 either"
    assert (angular_distance(vectors, vectors) == 0).all()


def test_a_cosine_in_bf16_cannot_tell_small_angles() -> None:
    a = torch.randn(200, 256)
    a, b = a.bfloat16(), (a + 0.01 * torch.randn(200, 256)).bfloat16()
    exact = unclamped(a.double(), b.double()).mean()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert cosine.dtype == torch.bfloat16
    wrong = (torch.arccos(cosine.clamp(-1, 1).float()) / math.pi).mean()
    assert 0.002 < exact < 0.005 and abs(wrong - exact) > 0.2 * exact
    assert angular_distance(a, b).mean() == pytest.approx(float(exact), rel=1e-5)


def test_a_gram_matrix_loses_what_the_library_keeps() -> None:
    """All pairs by one matrix product would be the obvious short cut."""
    a = torch.randn(1, 64, dtype=torch.float64)
    angle = 1e-9
    other = torch.randn(1, 64, dtype=torch.float64)
    other -= (other @ a.T) / (a @ a.T) * a
    b = a / a.norm() * math.cos(angle) + other / other.norm() * math.sin(angle)
    unit = torch.nn.functional.normalize(torch.cat([a, b]), dim=-1)
    wrong = torch.arccos((unit @ unit.T).clamp(-1, 1))[0, 1] / math.pi
    right = angle / math.pi
    assert abs(wrong - right) > 0.5 * right
    assert angular_distance(a, b).item() == pytest.approx(right, rel=1e-5)


# -------------------------------------------------------------------------------------------------- the mode
def test_dropout_of_adapters_is_off(decoder) -> None:
    add_decoder_lora(decoder, LoraSettings(4, 8, 0.5))
    stir_adapters(decoder)
    rows = sentences()
    batch = padded(rows, "right")
    right = right_matrix(decoder, rows)
    decoder.train()
    top = ends_at_the_top()
    assert error(by_hidden_states(decoder, batch, true_last)[~top], right[~top]) > 1e-2
    assert error(measure_distances(decoder, [batch]).matrix, right) < TOLERANCE


def test_adapters_are_on_or_off_as_asked_and_stay_as_they_were(decoder, llama: Path) -> None:
    add_decoder_lora(decoder, LoraSettings(4, 8, 0.5))
    stir_adapters(decoder)
    decoder.requires_grad_(False)
    batch = padded(sentences(), "right")
    plain = measure_distances(AutoModelForCausalLM.from_pretrained(llama).eval(), [batch]).matrix
    on = measure_distances(decoder, [batch]).matrix
    off = measure_distances(decoder, [batch], adapters=False).matrix
    assert torch.equal(off.nan_to_num(), plain.nan_to_num())
    assert error(on, plain.numpy()) > 1e-2
    assert not any(p.requires_grad for p in decoder.parameters()), "peft would make them trainable"
    assert torch.equal(measure_distances(decoder, [batch]).matrix.nan_to_num(), on.nan_to_num())
    with without_adapters(decoder), without_adapters(decoder):
        pass
    assert torch.equal(measure_distances(decoder, [batch]).matrix.nan_to_num(), on.nan_to_num())


# -------------------------------------------------------------------------------------------------- the mean
def of_values(values: list[float], index: list[int] | None = None) -> Distances:
    """Made-up distances of a one-layer decoder."""
    samples = torch.tensor(values).float().reshape(-1, 1, 1)
    total = samples.double().sum(0)
    return Distances(
        total, len(values), total, total[0], samples, None if index is None else torch.tensor(index)
    )


def test_the_mean_is_over_utterances_and_not_over_batches(decoder) -> None:
    assert of_values([1.0, 2, 3, 10, 20]).matrix.item() == pytest.approx(7.2)
    assert np.mean([np.mean([1, 2, 3]), np.mean([10, 20])]) == 8.5
    rows = sentences()
    parts = [padded(rows[:3], "right"), padded(rows[3:], "right")]
    right = right_matrix(decoder, rows)
    wrong = sum(measure_distances(decoder, [part]).matrix for part in parts) / 2
    dropped = measure_distances(decoder, parts[:1]).matrix  # drop_last with a batch size of 3
    assert error(measure_distances(decoder, parts).matrix, right) < TOLERANCE
    assert min(error(wrong, right), error(dropped, right)) > 1e-3


def test_an_utterance_that_fills_up_a_shard_is_refused(decoder) -> None:
    """`DistributedSampler` gives both of two ranks three of five utterances: one counts twice."""
    rows = sentences()
    shards = [list(DistributedSampler(rows, 2, rank, shuffle=False)) for rank in (0, 1)]
    assert sorted(shards[0] + shards[1]) == [0, 0, 1, 2, 3, 4]

    def batches(numbered: bool) -> list[Batch]:
        plain = [padded([rows[i] for i in shard], "right") for shard in shards]
        numbers = [{"index": torch.tensor(shard)} if numbered else {} for shard in shards]
        return [batch | number for batch, number in zip(plain, numbers, strict=True)]

    assert (
        error(measure_distances(decoder, batches(False)).matrix, right_matrix(decoder, rows)) > 1e-3
    )
    with pytest.raises(ValueError, match="utterance 0 was measured twice"):
        measure_distances(decoder, batches(True))


def test_samples_come_in_the_order_of_the_set_and_so_does_their_bootstrap(decoder) -> None:
    rows = sentences() * 4
    orders = [list(range(20)), list(reversed(range(20))), [7 * i % 20 for i in range(20)]]
    found = []
    for order, size in zip(orders, (3, 1, 20), strict=True):
        parts = [order[first : first + size] for first in range(0, 20, size)]
        batches = [padded([rows[i] for i in p], "left") | {"index": torch.tensor(p)} for p in parts]
        found.append(measure_distances(decoder, batches))
    shares = []
    for other in found:
        assert other.samples.dtype == torch.float32
        torch.testing.assert_close(other.samples, found[0].samples, atol=1e-6, rtol=0)
        mean = other.samples.double().mean(0)
        assert error(mean[0], other.matrix[0].numpy()) < 1e-7
        shares.append(bootstrap_share(other.samples, pruning_path(other.matrix)))
    assert shares[0] == shares[1] == shares[2]


# ------------------------------------------------------------------------------------------------ the memory
def test_nothing_but_one_position_of_each_layer_is_kept(decoder) -> None:
    """`output_hidden_states` keeps all positions; so does a view `hidden[:, -1]`, whose storage is the whole."""
    rows = sentences()
    batch = padded(rows, "right")
    calls: list[int] = []
    handle = decoder.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), ResidualStream(decoder) as stream:
        stream.positions = last_positions(batch["attention_mask"])
        decoder.get_decoder()(**batch, use_cache=False)
        kept = sum(state.untyped_storage().nbytes() for state in stream.states)
        hidden = decoder.get_decoder()(**batch, output_hidden_states=True).hidden_states
    one_position = (LAYERS + 1) * len(rows) * tiny.HIDDEN_SIZE * 4
    assert kept == one_position
    wrong = sum(state[:, -1].untyped_storage().nbytes() for state in hidden)
    assert wrong == one_position * max(LENGTHS)
    measure_distances(decoder, [batch])
    assert calls == [], "the output layer is never called"
    handle.remove()
